"""Widths of steps: rows decode in the first slots, and a step of few rows is far shorter than one of all slots."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.rows import Row

STEP_WIDTHS = 1, 8
"""Rows of a step, beside all slots; each is a program of its own."""


class Widths(tuple[int, ...]):
    """The rows that a step may have, in order; the last are all slots."""

    @classmethod
    def of(cls, num_slots: int, backend: Backend | None) -> Widths:
        """`backend`: that of all slots, which decodes fewer rows if it can; None: a step is of all slots."""
        narrow = [
            width
            for width in STEP_WIDTHS
            if width < num_slots and backend and backend.takes_wider_cache and backend.for_batch(width) is backend
        ]
        return cls([*narrow, num_slots])

    def narrowest(self, rows: Sequence[Row]) -> int:
        """Rows of the narrowest step that reads these."""
        return next(width for width in self if width > max(row.slot for row in rows))

    def first(self, free: Sequence[int]) -> list[int]:
        """The free slots that need the narrowest step."""
        return next(near for width in self if (near := [slot for slot in free if slot < width]))
