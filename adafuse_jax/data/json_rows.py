"""Rows of a JSON file, one at a time: objects by the line, a list of objects, or one object that holds the rows.

Numbers keep their spelling (`Number`). Of a list only the present element is in memory, of lines the present line.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError, shortened
from adafuse_jax.data.rows import BadRow, Number, Repeated

log = logging.getLogger(__name__)

CHUNK = 2**18
"""Characters read at a time from a list."""
NEAR_END = 16
"""Characters from the end of what was read within which a mistake may be a value that goes on."""
SPACE = re.compile(r"[ \t\n\r]*")
BYTE_ORDER_MARK = "\ufeff"
"""Mark that may also come in the middle of a file, where another one was appended."""
Item = tuple[int, dict[str, Any] | BadRow]
"""A line number, from 1 (0: unknown), and the row that begins there."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = Repeated(found)
    names = [name for name, _ in pairs]
    repeated.key = next(name for i, name in enumerate(names) if name in names[:i])
    return repeated


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number)


def json_rows(stream: io.TextIOBase, path: Path, *, starts_with: str, lines_only: bool) -> Iterator[Item]:
    """Rows of a text stream (UTF-8 with surrogateescape, universal newlines), whose first character but for white space is
    `starts_with`. With `lines_only` (by its name) a file that is no list holds an object a line.

    A line that holds no object is a BadRow; other mistakes are a UserError, which names the line."""
    if starts_with == "[" and not lines_only:
        yield from _list_elements(_Buffer(stream, path))
        return
    lines = enumerate(stream, 1)
    number, first = next(((n, line) for n, line in lines if not line.isspace()), (0, ""))
    if not first:
        raise empty_file(path)
    begins = first.lstrip()[:1]
    if begins == "[":
        _require_utf8(first, path, number)
    if begins == "[" and _goes_on(first):
        yield from _list_elements(_Buffer(stream, path, first, number))
        return
    if first.strip() == "{" or (not lines_only and (begins != "{" or _goes_on(first))):
        yield from _document(first + stream.read(), path, number)
        return
    second = next(((n, line) for n, line in lines if not line.isspace()), None)
    if second is None and begins == "[":
        yield from _list_elements(_Buffer(stream, path, first, number))
    elif second is None and not lines_only:
        yield from _document(first, path, number)
    else:
        yield number, _line(first)
        if second is not None:
            yield second[0], _line(second[1])
        for number, line in lines:
            if not line.isspace():
                yield number, _line(line)


def empty_file(path: Path) -> UserError:
    return UserError(f"empty file: {path}: it has no rows: give a file with at least one")


def _goes_on(line: str) -> bool:
    """True if a JSON value begins on this line and ends on a later one."""
    try:
        DECODER.raw_decode(line, SPACE.match(line).end())  # type: ignore[union-attr]
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (RecursionError, ValueError):
        return False
    return False


def invalid_byte(text: str) -> BadRow | None:
    """The fault of text that holds a byte which is not UTF-8 (a surrogate, by surrogateescape)."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow("not UTF-8", f"byte 0x{ord(text[error.start]) & 0xFF:02x}: convert the file to UTF-8")
    return None


def _require_utf8(text: str, path: Path, line: int) -> None:
    """Raise UserError, with its line, for a byte that is not UTF-8 in text that begins on `line`."""
    bad = invalid_byte(text)
    if bad is not None:
        line += text.count("\n", 0, next(i for i, c in enumerate(text) if "\udc80" <= c <= "\udcff"))
        raise UserError(f"{bad.fault}: {path}: line {line}: {bad.detail}")


def _line(line: str) -> dict[str, Any] | BadRow:
    line = line.removeprefix(BYTE_ORDER_MARK)
    bad = invalid_byte(line)
    if bad is not None:
        return bad
    try:
        row, end = DECODER.raw_decode(line, 0 if line[0] == "{" else SPACE.match(line).end())  # type: ignore[union-attr]
    except json.JSONDecodeError as error:
        column = min(error.pos, len(line.rstrip())) + 1
        return BadRow("malformed JSON", f"column {column}: {error.msg}: fix that line")
    except RecursionError:
        return BadRow("malformed JSON", "nested too deeply: fix that line")
    after = SPACE.match(line, end).end()  # type: ignore[union-attr]
    if after < len(line):
        return BadRow("malformed JSON", f"column {after + 1}: Extra data: fix that line")
    return _row(row)


def _row(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("malformed row", f"not a JSON object but {_kind(value)}: write one object a row")


def _kind(value: Any) -> str:
    if isinstance(value, Number | float):
        return "a number"
    kinds = {dict: "an object", Repeated: "an object", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), "null")


def _malformed(path: Path, line: int, column: int, message: str) -> UserError:
    return UserError(f"malformed JSON: {path}: line {line}, column {column}: {message}: fix it there")


class _Buffer:
    """The part of a stream that is being read: `text`, of which `at` characters are done."""

    def __init__(self, stream: Iterable[str], path: Path, text: str = "", line: int = 1):
        self.stream, self.path, self.text, self.at, self.ended = stream, path, text, 0, False
        self._line, self._counted, self._column = line, 0, 0  # the line at _counted; the column where text begins

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def fill(self) -> None:
        """Forget what is done; read as much again as is left, or a chunk. `ended` if there is no more."""
        line = self.line
        newline = self.text.rfind("\n", 0, self.at)
        self._column = self.at - newline - 1 if newline >= 0 else self._column + self.at
        left = self.text[self.at :]
        self.text, self.at, self._counted = "", 0, 0
        more = self.stream.read(max(CHUNK, len(left)))  # type: ignore[attr-defined]
        _require_utf8(more, self.path, line + left.count("\n"))
        self.text, self.ended = left + more, not more

    def skip_space(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.fill()

    def error(self, at: int, message: str) -> UserError:
        newline = self.text.rfind("\n", 0, at)
        column = at - newline if newline >= 0 else self._column + at + 1
        return _malformed(self.path, self.line + self.text.count("\n", self.at, at), column, message)

    def value(self) -> Any:
        """The value at `at`, which then stands behind it."""
        while True:
            try:
                value, self.at = DECODER.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                goes_on = error.pos >= len(self.text) - NEAR_END or error.msg.startswith("Unterminated string")
                if self.ended or not goes_on:
                    raise self.error(error.pos, error.msg) from None
                self.fill()
            except RecursionError:
                raise self.error(self.at, "nested too deeply") from None


def _list_elements(buffer: _Buffer) -> Iterator[Item]:
    buffer.skip_space()
    buffer.at += 1
    following = buffer.skip_space()
    while following != "]":
        line = buffer.line
        yield line, _row(buffer.value())
        following = buffer.skip_space()
        if following not in (",", "]"):
            raise buffer.error(buffer.at, "Expecting ',' delimiter" if following else "the list does not end")
        if following == ",":
            buffer.at += 1
            buffer.skip_space()
    buffer.at += 1
    if buffer.skip_space():
        raise buffer.error(buffer.at, "Extra data after the list")


def _document(text: str, path: Path, first_line: int) -> Iterator[Item]:
    """Rows of a file that holds objects over several lines, or one object with the rows in it."""
    _require_utf8(text, path, first_line)
    at, values = SPACE.match(text).end(), []  # type: ignore[union-attr]
    while at < len(text):
        line = first_line + text.count("\n", 0, at)
        try:
            value, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _malformed(path, first_line + error.lineno - 1, error.colno, error.msg) from None
        except RecursionError:
            raise _malformed(path, line, 1, "nested too deeply") from None
        values.append((line, value))
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
    if len(values) == 1:
        yield from ((values[0][0], row) for row in _rows_within(values[0][1], path))
    else:
        yield from ((line, _row(value)) for line, value in values)


def _rows_within(value: Any, path: Path) -> list[dict[str, Any] | BadRow]:
    """The rows of a lone value: {"version": ..., "data": [rows]}, {"column": [values], ...}, or one row."""
    from adafuse_jax.data.formats import FORMATS

    if not isinstance(value, dict):
        raise UserError(f"malformed rows: {path}: it holds {_kind(value)}: write a JSON list of objects, or one a line")
    inner = list(value.values())
    if any(fmt.fits(list(value)) for fmt in FORMATS.values()):
        columns = _columns(value)
        return [value] if columns is None else columns
    holders = [key for key, v in value.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
    if len(holders) == 1:
        rest = [key for key in value if key != holders[0]]
        if rest:
            log.info("%s: the rows are its list %s; not used: %s", path, holders[0], shortened(", ".join(rest), 200))
        return value[holders[0]]
    if inner and all(isinstance(v, dict) for v in inner):
        rows = [row for row in inner if any(fmt.fits(list(row)) for fmt in FORMATS.values())]
        if len(rows) == len(inner):
            return rows
    if holders and len(holders) == len(value):
        return [{"split": key, **row} for key in holders for row in value[key]]
    keys = shortened(", ".join(value), 100)
    raise UserError(
        f"no rows: {path}: a JSON object with the keys {keys or '(none)'}: write a list of objects, or one object a line"
    )


def _columns(value: dict[str, Any]) -> list[dict[str, Any] | BadRow] | None:
    """Rows of {"column": [value, ...]} or {"column": {"0": value, ...}}; None if `value` is a row itself."""
    indices = [list(v) for v in value.values() if isinstance(v, dict)]
    if any(index != indices[0] for index in indices):
        return None
    tables = {key: list(v.values()) if isinstance(v, dict) else v for key, v in value.items()}
    if not all(isinstance(v, list) for v in tables.values()) or len({len(v) for v in tables.values()}) != 1:
        return None
    if any(
        isinstance(turn, dict) for key in ("messages", "conversations", "conversation") for turn in tables.get(key, ())
    ):
        return None
    return [dict(zip(tables, row, strict=True)) for row in zip(*tables.values(), strict=True)]
