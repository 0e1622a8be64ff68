"""The date that chat templates write into the training data: that of the run's first start, also when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.data.templates import template_date
from adafuse_jax.training.config import TrainConfig

log = logging.getLogger(__name__)


@contextmanager
def run_date(config: TrainConfig, tokenizer: Any, recorded: Table | None) -> Iterator[str | None]:
    """Within, templates that ask for the present time get one date; it is yielded in ISO format, None if none asks.

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
