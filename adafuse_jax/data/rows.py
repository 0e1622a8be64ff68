"""A row of a data file: its values as text, numbers as they stand in the file, and the faults that a row can have."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adafuse_jax.core.errors import quoted

Row = Mapping[str, Any]


class Number(str):
    """A JSON number, spelled as in its file: "1.50" stays "1.50"."""

    __slots__ = ()


class Repeated(dict[str, Any]):
    """A JSON object in which the key `key` stands more than once."""

    key: str = ""


class RowError(Exception):
    """A row that cannot become an example; `convert` adds the place and raises it as a UserError."""


class SkipRow(Exception):
    """A row that is well formed but holds nothing to learn from; it is counted by its reason."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that its file does not hold in a form to be read: `fault: PLACE: detail`."""

    fault: str
    detail: str


@dataclass(slots=True)
class Notes:
    """Counts of altered rows, by alteration, and the keys of turns that nothing reads."""

    altered: Counter[str] = field(default_factory=Counter)
    unused: dict[str, None] = field(default_factory=dict)


def text_of(value: Any, name: str) -> str:
    """A value as text: numbers, truth values and times as they are written in files. `name` is for messages.

    Raises RowError for null, lists, objects, numbers that are not finite, and text that is not Unicode."""
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value, name)
        return value if type(value) is str else str(value)
    if value is None:
        raise RowError(f"{name} is missing or null: every row needs it")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise RowError(f"{name} holds bytes that are not UTF-8 text") from None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{name} holds {value}, which is no text and no number")
    if isinstance(value, int | float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    raise RowError(f"{name} holds a {type(value).__name__}, not text")


def _check_unicode(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowError(f"{name} has half of a surrogate pair ({half}), which is no character: correct it") from None


def first_given(row: Row, names: Sequence[str], notes: Notes) -> str | None:
    """The first of several columns of one meaning that has a value, or None. Others with values are noted."""
    given = [name for name in names if not is_blank(row.get(name))]
    for name in given[1:]:
        notes.altered[f"rows whose {name} is not used beside {given[0]}"] += 1
    return given[0] if given else None


def is_blank(value: Any) -> bool:
    """True for an optional value without content: null, empty, white space."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)


def json_value(value: Any, name: str) -> Any:
    """A list or object; a CSV cell or column of text that holds one as JSON is parsed. Raises RowError for other text."""
    if not isinstance(value, str) or isinstance(value, Number):
        return value
    try:
        return json.loads(value, parse_int=Number, parse_float=Number)
    except (ValueError, RecursionError):
        raise RowError(f"{name} holds {quoted(value)}, which is no JSON") from None


def json_text(value: Any, name: str) -> str:
    """A list or object as JSON text, with numbers as numbers. Raises RowError as `text_of`."""
    text = json.dumps(_with_numbers(value), ensure_ascii=False, default=str)
    if not text.isascii():
        _check_unicode(text, name)
    return text


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Number):
        return json.loads(value) if len(value) < 4000 else str(value)
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(inner) for inner in value]
    return value
