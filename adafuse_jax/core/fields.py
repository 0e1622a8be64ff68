"""Fields of config dataclasses: what each declares (help, bounds, kind of text), and the one check of a value against it.

    steps: int | None = flag("optimiser steps", None, low=1, high=10**9)
    dropout: float = flag("share of the inputs dropped", 0.0, low=0, below=1)
    output: str = flag("directory to write", metavar="DIR", text="path")

`check(config)`, called in `__post_init__`, raises `UserError` for a value of a wrong type or out of its bounds, and expands
`~` in paths. Flags, keys of `--config FILE` and Python callers all pass it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from adafuse_jax.core.errors import UserError, quoted, shortened

log = logging.getLogger(__name__)

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095
"""Longest name of a file and longest path, in bytes, on Linux."""
MAX_SEED = 2**32 - 1
"""The largest that a JAX key takes."""
MAX_COUNT, MAX_ROWS, MAX_TOKENS = 10**9, 2**16, 2**24
"""The largest values of flags: steps and other counts, rows of a batch, tokens of a sequence."""

Text = Literal["any", "path", "spec"]
"""A text as it is; a path; a data set's `SOURCE[…]`, which may begin with a path."""


def flag(
    help: str,
    default: Any = ...,
    metavar: str | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    text: Text = "any",
    moved: typing.Mapping[str, str] = types.MappingProxyType({}),
    formerly: typing.Mapping[bool, str] = types.MappingProxyType({}),
) -> Any:
    """A dataclass field with the help text its command-line flag shows; without a default the flag is required.

    A number is in [low, high], greater than `above` and less than `below`; of a tuple, each of its elements. `moved`: a
    choice of the past → where it is now. `formerly`: the choices in the place of true and false, which files of earlier
    versions have.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    metadata = {"help": help, "metavar": metavar, "text": text, "moved": moved, "formerly": formerly, **bounds}
    return (
        dataclasses.field(metadata=metadata)
        if default is ...
        else dataclasses.field(default=default, metadata=metadata)
    )


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def check(config: Any) -> None:
    """Check and, for paths, rewrite the fields of a frozen config. None is a value of every field that has it as default."""
    for kind in kinds(config.__class__):
        value = getattr(config, kind.name)
        if value is not None or not kind.optional:
            object.__setattr__(config, kind.name, kind.checked(value, flag_name(kind.name)))


@functools.cache
def kinds(config_type: type) -> tuple[Kind, ...]:
    """The declarations of a config's fields, in their order."""
    hints = typing.get_type_hints(config_type)
    return tuple(Kind.of(f, hints[f.name]) for f in dataclasses.fields(config_type))


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of a field, `int | float | str | bool`, or of the elements of a tuple; and its metadata."""

    name: str
    type: type
    is_tuple: bool
    choices: tuple[Any, ...] | None
    optional: bool
    metadata: typing.Mapping[str, Any]

    @classmethod
    def of(cls, f: dataclasses.Field, hint: Any) -> Kind:
        optional = f.default is None
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            optional = True
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        is_tuple, choices = origin is tuple, arguments if origin is Literal else None
        kind = arguments[0] if is_tuple else str if choices else hint
        return cls(f.name, kind, is_tuple, choices, optional, f.metadata)

    def checked(self, value: Any, where: str) -> Any:
        """`value` as the field holds it. Raises `UserError` with `where` in it, the flag's name."""
        if not self.is_tuple:
            return self._element(value, where)
        require(isinstance(value, list | tuple), f"{where} is {quoted(value)}: it must be a list")
        return tuple(self._element(element, where) for element in value)

    def _element(self, value: Any, where: str) -> Any:
        if self.type is bool:
            require(isinstance(value, bool), f"{where} is {quoted(value)}: it must be true or false")
            return value
        if self.type in (int, float):
            if not self._fits(value):
                raise UserError(f"{where} is {quoted(value)}: it must be {self.rule}")
            return self.type(value)
        if isinstance(value, bool) and value in self.metadata["formerly"]:
            choice = self.metadata["formerly"][value]
            # A warning, which is shown before a program sets up its logging
            log.warning("%s %s of earlier versions is %s now", where, str(value).lower(), choice)
            return choice
        require(isinstance(value, str), f"{where} is {quoted(value)}: it must be text; write it in quotes")
        if self.choices is not None:
            known, moved = ", ".join(map(str, self.choices)), self.metadata["moved"]
            require(value not in moved, f"{where} is {quoted(value)}: {moved.get(value)}")
            require(value in self.choices, f"{where} is {quoted(value)}: it must be one of {known}")
        require_text(where, value)
        if self.metadata["text"] == "path":
            return checked_path(value, where)
        return os.path.expanduser(value) if self.metadata["text"] == "spec" else value

    def _fits(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.type is int else int | float):
            return False
        bounds = self.metadata
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (
            (bounds["low"] is None or value >= bounds["low"])
            and (bounds["high"] is None or value <= bounds["high"])
            and (bounds["above"] is None or value > bounds["above"])
            and (bounds["below"] is None or value < bounds["below"])
        )

    @property
    def rule(self) -> str:
        """The numbers that are allowed: "an integer from 1 to 8", "a finite number in [0, 1)"."""
        low, high, above, below = (self.metadata[name] for name in ("low", "high", "above", "below"))
        if self.type is int:
            return f"an integer from {low} to {high}"
        left = f"({above:g}" if above is not None else f"[{low:g}"
        return f"a finite number in {left}, {f'{below:g})' if below is not None else f'{high:g}]'}"


def require_text(where: str, text: str | None) -> None:
    """Refuse NUL characters, which no file's name has and no terminal shows, and lone surrogates: what Python makes of bytes
    that are not UTF-8, and no tokenizer takes."""
    broken = next((i for i, c in enumerate(text or "") if "\ud800" <= c <= "\udfff"), None)
    require(broken is None, f"{where}: not UTF-8 text (character {broken}); give UTF-8 text")
    require("\0" not in (text or ""), f"{where}: holds a NUL character; leave it out")


def checked_path(text: str, where: str) -> str:
    """A path that a file can have, `~` expanded."""
    require_text(where, text)
    require(text != "", f"{where} is empty; give a path, or leave it out")
    path = os.path.expanduser(text)
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    fault = f"a name in it has {longest} bytes, too long for a file's" if longest > MAX_NAME_BYTES else ""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        fault = "it is too long for a path"
    require(not fault, f"{where} {shortened(path, 60)}: {fault}; give another one")
    return path
