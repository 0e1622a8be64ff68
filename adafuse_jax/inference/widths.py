"""Widths of steps: rows decode in the first slots, and a step of few rows is far shorter than one of all slots."""

from __future__ import annotations

from collections.abc import Sequence

from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.rows import Row

STEP_WIDTHS = 1, 8
"""Rows of a step, beside all slots; each is a program of its own."""


class Widths(dict[int, Backend]):
    """The rows that a step may have, in order, and the backend that decodes so many; the last are all slots."""

    @classmethod
    def of(cls, num_slots: int, backend: Backend, *, cache_is_fixed: bool) -> Widths:
        """Widths of slots over `backend`. Raises `UserError` if it cannot decode so many rows."""
        whole, narrow = backend.for_batch(num_slots), {}
        for width in STEP_WIDTHS if cache_is_fixed else ():
            if width < num_slots and (fewer := backend.for_batch(width)).takes_wider_cache:
                narrow[width] = fewer
        return cls({**narrow, num_slots: whole})

    def narrowest(self, rows: Sequence[Row]) -> int:
        """Rows of the narrowest step that reads these."""
        return next(width for width in self if width > max(row.slot for row in rows))

    def first(self, free: Sequence[int]) -> list[int]:
        """The free slots that need the narrowest step."""
        return next(near for width in self if (near := [slot for slot in free if slot < width]))
