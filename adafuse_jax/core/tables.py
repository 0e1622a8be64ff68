"""JSON, YAML and TOML files read once, with bounds and types: size, depth, encoding, and the type and range of each value.

    table = Table.read(path)
    table.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    table.number("rms_norm_eps", 1e-6, low=0)
    table.unread()                                          keys that nobody asked for

A value of a wrong type or out of its range is a `UserError` that names the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from adafuse_jax.core.errors import UserError, quoted, shortened

MAX_BYTES = 256 * 2**20
"""Largest file; the index of a model with 100,000 tensors has 10 MB, the largest tokenizer.json 35 MB."""
MAX_DEPTH = 32
"""Deepest nesting of lists and objects."""
REQUIRED: Any = object()
"""Default that marks a key as required."""


def read_text(
    path: Path, *, what: str = "", max_bytes: int = MAX_BYTES, advice: str = "restore the file", pipe: bool = False
) -> str:
    """A regular UTF-8 file as text, without a byte order mark. `what` goes before the path in messages: "--config ".

    With `pipe` also a pipe, until its writers close it; one without a writer is empty, not waited for.

    Raises:
      UserError: a file that is missing, no regular file (a FIFO would wait for ever), unreadable, too large or not UTF-8.
    """
    where = f"{what}{path}"
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not (pipe and stat.S_ISFIFO(mode)):
            raise UserError(f"{where}: is not a regular file; {advice}")
        # A blocking open of a FIFO would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            os.set_blocking(file.fileno(), True)
            data = file.read(max_bytes + 1)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be read ({reason}); {advice}") from error
    if len(data) > max_bytes:
        raise UserError(f"{where}: has more than {max_bytes} bytes, which no such file needs; {advice}")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where}: is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def read_json(path: Path, *, what: str = "", advice: str = "restore the file") -> dict[str, Any]:
    """The JSON object in `path`, plain. Raises `UserError` as `read_text`, and for what is no JSON object or nested deeper
    than `MAX_DEPTH`."""
    return parse_table(read_text(path, what=what, advice=advice), ".json", f"{what}{path}", advice=advice)


def parse_table(
    text: str, suffix: str, where: str, *, advice: str = "correct the file", unique: bool = False
) -> dict[str, Any]:
    """The object that `text` holds as `.json`, `.yaml`, `.yml` or `.toml`; a key that is there twice has its last value in
    JSON, unless they must be `unique`. Raises `UserError` with `where` in it."""
    parsers: dict[str, Any] = {
        ".json": partial(json.loads, object_pairs_hook=_unique if unique else None),
        ".toml": tomllib.loads,
        ".yaml": _parse_yaml,
        ".yml": _parse_yaml,
    }
    kind = {".yml": "YAML"}.get(suffix, suffix[1:].upper())
    try:
        table = parsers[suffix](text)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be read; {advice}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise UserError(f"{where}: not valid {kind} ({shortened(str(error), 120)}); {advice}") from error
    if not isinstance(table, dict):
        raise UserError(f"{where}: holds a {kind} {type(table).__name__}, not an object; {advice}")
    if _depth(table) > MAX_DEPTH:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH}; {advice}")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{quoted(twice[0])} is given twice")
    return dict(pairs)


class _PlainYaml(yaml.SafeLoader):
    """YAML loader that refuses references, a few lines of which can expand to gigabytes, and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _PlainYaml)
    except (AttributeError, LookupError, TypeError) as error:  # SafeLoader's own, for a tag that does not fit its value
        raise ValueError(f"a value does not fit its tag: {error}") from error


def _depth(value: Any) -> int:
    """Nesting depth of lists and objects, without recursion; counting stops above `MAX_DEPTH`."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth


@dataclass(slots=True)
class Table:
    """The object in a file, read key by key. `where` names the file, and the key of an inner object, for messages.

    A key whose value is null counts as absent: its default is taken, and without a default it is required.
    """

    values: dict[str, Any]
    where: str
    _read: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, *, what: str = "", advice: str = "restore the file") -> Table:
        return cls(read_json(path, what=what, advice=advice), f"{what}{path}")

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is, unchecked, or `default` for an absent one."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None and default is REQUIRED:
            raise UserError(f"{self.where}: {name} is missing; restore the file")
        return default if value is None else value

    def integer(self, name: str, default: Any = REQUIRED, *, low: int = 0, high: int = 2**31 - 1) -> Any:
        """An integer in [low, high]; `default` (None too) if absent."""
        value = self.get(name, default)
        if value is default and name not in self:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"it must be an integer from {low} to {high}")
        return value

    def number(
        self, name: str, default: Any = REQUIRED, *, low: float = -math.inf, high: float = math.inf, above: bool = False
    ) -> Any:
        """A finite number in [low, high] (with `above`, greater than `low`), as a float; `default` (None too) if absent."""
        value = self.get(name, default)
        if value is default and name not in self:
            return value
        ok = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300
        if not ok or not low <= value <= high or (above and value == low):
            bounds = [f"{'greater than' if above else 'at least'} {low:g}"] if low > -math.inf else []
            bounds += [f"at most {high:g}"] if high < math.inf else []
            raise self.error(name, f"it must be a finite number{', ' if bounds else ''}{' and '.join(bounds)}")
        return float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default)
        if value is not default and not isinstance(value, str):
            raise self.error(name, "it must be text")
        return value

    def choice(self, name: str, choices: Sequence[Any], default: Any = REQUIRED) -> Any:
        """One of `choices`, of the same type: true is not 1."""
        value = self.get(name, default)
        if value is not default and not any(type(value) is type(c) and value == c for c in choices):
            raise self.error(name, f"supported: {', '.join(map(str, choices))}")
        return value

    def items(self, name: str, default: Any = REQUIRED) -> Any:
        """A list, its entries unchecked."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, list):
            raise self.error(name, "it must be a list")
        return value

    def table(self, name: str) -> Table | None:
        """The inner object `name`, or None."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "it must be an object")
        return None if value is None else Table(value, f"{self.where}: {name}")

    def unread(self) -> list[str]:
        """Keys with a value that no call has asked for, in the file's order."""
        return [name for name, value in self.values.items() if value is not None and name not in self._read]

    def error(self, name: str, rule: str) -> UserError:
        """An error that names the file, the key and its value; `rule` describes valid values."""
        return UserError(f"{self.where}: {shortened(name, 60)} is {quoted(self.values.get(name))}; {rule}")
