"""Data of a run, by the names of its data sets: batches by step, held-out data, and a fingerprint of both.

It is built once (`building`) and then read from the data cache. Chat templates that write the date get that of the run's
first start, also when it is resumed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.data.batches import Batches, mixture_weights
from adafuse_jax.data.cache import code_version, default_directory, prepared
from adafuse_jax.data.sources import Dataset, DatasetSpec
from adafuse_jax.data.templates import dates_written, template_date
from adafuse_jax.data.tokenizer import tokenizer_digest
from adafuse_jax.evaluation.heldout import HeldOut
from adafuse_jax.parallel.processes import on_first
from adafuse_jax.training import building
from adafuse_jax.training.building import Sources
from adafuse_jax.training.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    batches: Batches
    held_out: HeldOut
    fingerprint: str
    """SHA-256 of the packed rows and their weights: a resumed run must see the same."""
    largest_token: int

    @property
    def padded_from(self) -> int | None:
        """The rows of the run if the last batch is filled up with padding, for its identity; None without padding, and in
        runs of earlier versions, in which rows of the next epoch filled it."""
        total = self.batches.total_rows
        return None if total is None or total % self.batches.rows_per_step == 0 else total


def prepare_data(config: TrainConfig, tokenizer: Any) -> Data:
    """The data sets of `config`: loaded, tokenised, divided and packed, or read from the data cache.

    Held out are, in this order: `eval_dataset`; the validation or test split of each data set; `eval_fraction` of it.
    Raises `UserError` for whatever is wrong with the data.
    """
    sources = _open(config)
    directory = Path(config.data_cache).expanduser() if config.data_cache else default_directory()
    with template_date():
        key = _key(config, sources, tokenizer)
        with prepared(directory, key, partial(building.build, config, sources, tokenizer)) as (files, facts):
            batches = building.batches(config, sources, files, facts)
            held_out = building.read_held_out(files, facts)
    return Data(
        batches=batches, held_out=held_out, fingerprint=facts["fingerprint"], largest_token=facts["largest_token"]
    )


def _open(config: TrainConfig) -> Sources:
    """Raises UserError for a source that cannot be opened, and for weights that fit no mixture."""
    evaluation = []
    for text in config.eval_dataset if config.eval_examples > 0 else ():
        spec = DatasetSpec.parse(text)
        if spec.weight is not None:
            raise UserError(f"--eval-dataset {text}: a weight means nothing there; leave ={spec.weight:g} out")
        evaluation.append(Dataset(spec, skip_bad_rows=config.skip_bad_rows))
    mixture_weights([DatasetSpec.parse(text).weight for text in config.dataset])
    training = [Dataset(DatasetSpec.parse(text), skip_bad_rows=config.skip_bad_rows) for text in config.dataset]
    return Sources(training=training, evaluation=evaluation)


def _key(config: TrainConfig, sources: Sources, tokenizer: Any) -> dict[str, Any]:
    """All that the prepared data depends on, as JSON."""
    used = ["max_length", "packing", "skip_bad_rows", "eval_examples"]
    if config.eval_examples > 0 and not config.eval_dataset:
        used += ["eval_fraction", "seed"]

    def listed(opened: list[Dataset]) -> list[Any]:
        return [[dataclasses.asdict(data.spec), data.digest()] for data in opened]

    return {
        "training": listed(sources.training),
        "evaluation": listed(sources.evaluation),
        "settings": {name: getattr(config, name) for name in used},
        "tokenizer": tokenizer_digest(tokenizer),
        "dates": dates_written(tokenizer),
        **code_version(Path(building.__file__)),
    }


@contextmanager
def run_date(config: TrainConfig, tokenizer: Any, recorded: Table | None) -> Iterator[str | None]:
    """Fix the date that templates get as the present time; yields it in ISO format, or None if the template asks for none.

    It is `--template-date`, that of the config `recorded` by a run that is resumed, or now, in this order.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        if config.template_date is not None:
            log.warning("--template-date %s: the chat template writes no date; it has no effect", config.template_date)
        yield None
        return
    text = config.template_date or (recorded.text("template_date", None) if recorded is not None else None)
    if text is None and recorded is not None:
        log.warning(
            "the chat template writes the date, and the run is of an earlier version, which did not record it: it is "
            "rendered with today's; if the data then counts as changed, give the day of its start as --template-date"
        )
        yield None
        return
    date = None
    try:
        date = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        assert recorded is not None  # the flag is checked where it is parsed
        raise UserError(f"{recorded.where}: template_date is no ISO date; restore the file") from None
    with template_date(date) as own:
        date = datetime.fromisoformat(on_first(own.isoformat))
    with template_date(date) as fixed:
        log.info("the chat template writes the date: rendered with %s, also when the run is resumed", fixed)
        yield fixed.isoformat()
