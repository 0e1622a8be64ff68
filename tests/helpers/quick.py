"""Parametrised tests of which `make test` runs a part and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """The values as parameters: the first `count` are quick, the others slow."""
    return [pytest.param(value, marks=() if i < count else pytest.mark.slow) for i, value in enumerate(values)]
