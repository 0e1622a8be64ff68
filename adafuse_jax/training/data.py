"""Data of a run, by the names of its data sets: batches by step, held-out data, and a fingerprint of both.

Chat templates that write the date get that of the run's first start, also when it is resumed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import Encoded, encode_all, encode_choices
from adafuse_jax.data.examples import Example, MultipleChoice, Text
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.data.sources import Dataset, DatasetSpec, held_out_split
from adafuse_jax.data.templates import template_date
from adafuse_jax.evaluation.heldout import HeldOut
from adafuse_jax.training.config import TrainConfig

log = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")


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
    """Load, tokenise, split and pack the data sets of `config`.

    Held out are, in this order: `eval_dataset`; the validation or test split of each data set; `eval_fraction` of it.
    Raises `UserError` for whatever is wrong with the data.
    """
    specs = [DatasetSpec.parse(text) for text in config.dataset]
    held_out: list[Example] = []
    if config.eval_examples > 0:
        for text in config.eval_dataset:
            spec = DatasetSpec.parse(text)
            if spec.weight is not None:
                raise UserError(f"--eval-dataset {text}: a weight means nothing there; leave ={spec.weight:g} out")
            data = Dataset(spec, skip_bad_rows=config.skip_bad_rows)
            held_out += data.load(data.evaluation_split(HELD_OUT_SPLITS)).examples
    rows = []
    for spec in specs:
        examples, held = _training_and_held_out(spec, config)
        held_out += held
        rows.append(_pack(examples, spec, tokenizer, config))
    batches = Batches(
        rows=tuple(rows),
        seed=config.seed,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        weights=tuple(spec.weight for spec in specs),
        epochs=None if config.steps else config.epochs,
    )
    evaluation = _held_out(held_out, tokenizer, config)
    parts: list[Rows | Encoded] = [*rows, *evaluation.rows, *(row for rows in evaluation.choices for row in rows)]
    return Data(
        batches=batches,
        held_out=evaluation,
        fingerprint=_fingerprint(batches),
        largest_token=int(max(part.tokens.max() for part in parts)),
    )


def _training_and_held_out(spec: DatasetSpec, config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those held out if there is no `eval_dataset`. A file is read once."""
    data = Dataset(spec, skip_bad_rows=config.skip_bad_rows)
    training = data.training_split()
    examples = data.load(training).examples
    if config.eval_examples == 0 or config.eval_dataset:
        return examples, []
    split = data.held_out_split(HELD_OUT_SPLITS, besides=data.find(training))
    if split is not None:
        return examples, data.load(split).examples
    if config.eval_fraction == 0:
        return examples, []
    try:
        return held_out_split(examples, config.eval_fraction, config.seed)
    except UserError as error:
        raise UserError(f"{spec.source}: {error}, or --eval-examples 0") from error


def _pack(examples: list[Example], spec: DatasetSpec, tokenizer: Any, config: TrainConfig) -> Rows:
    encoded, dropped = encode_all(
        examples, tokenizer, config.max_length, name=spec.source, skip_bad_rows=config.skip_bad_rows
    )
    if not encoded:
        raise UserError(
            f"{spec.source}: no response of its {len(examples)} examples fits --max-length {config.max_length}; raise it"
        )
    if dropped:
        log.warning(
            "%s: %d of %d examples left out: their prompt alone fills --max-length %d, or no turn has weight",
            spec.source, dropped, len(examples), config.max_length,
        )  # fmt: skip
    chats = sum(not isinstance(example, Text) for example in examples)
    num_full = sum(len(row.tokens) == config.max_length for row in encoded) if chats else 0
    if num_full:
        log.warning(
            "%s: %d of %d examples fill --max-length %d, where they are cut",
            spec.source,
            num_full,
            len(examples),
            config.max_length,
        )
    return pack(encoded, config.max_length, packing=config.packing)


def _held_out(examples: list[Example], tokenizer: Any, config: TrainConfig) -> HeldOut:
    """Up to `eval_examples` of the examples, evenly spaced so that every data set is represented."""
    count = min(len(examples), config.eval_examples)
    examples = [examples[i * len(examples) // count] for i in range(count)]
    rows, dropped = encode_all(
        examples, tokenizer, config.max_length, name="held out", skip_bad_rows=config.skip_bad_rows
    )
    choices, answers = [], []
    for example in examples:
        if isinstance(example, MultipleChoice):
            try:
                candidates = encode_choices(example, tokenizer, config.max_length)
            except UserError:  # counted and logged above
                continue
            if candidates is None:
                dropped += 1
            else:
                choices.append(candidates)
                answers.append(example.answer)
    if dropped:
        log.warning(
            "held out: %d answers or questions do not fit --max-length %d and are not scored",
            dropped,
            config.max_length,
        )
    return HeldOut(rows=rows, choices=choices, answers=answers)


def _fingerprint(batches: Batches) -> str:
    digest = hashlib.sha256(repr((batches.weights, [rows.tokens.shape for rows in batches.rows])).encode())
    for packed in batches.rows:
        digest.update(packed.tokens.tobytes())
        digest.update(packed.loss_mask.tobytes())
        digest.update(packed.segment_ids.tobytes())
    return digest.hexdigest()


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
    with template_date(date) as fixed:
        log.info("the chat template writes the date: rendered with %s, also when the run is resumed", fixed)
        yield fixed.isoformat()
