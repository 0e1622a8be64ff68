"""Command-line flags made from config dataclasses. Precedence: defaults < `--config FILE` < flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from adafuse_jax.core.errors import UserError


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_flags(description: str, config_types: Sequence[type], argv: Sequence[str]) -> list[Any]:
    """Parse `argv` into one instance of each dataclass in `config_types` (their field names must not clash).

    Raises `UserError` for unknown flags or keys, values of a wrong type, and whatever the dataclasses refuse.
    """
    parser = _OneLineParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="JSON, TOML or YAML file of flag names and values")
    fields: dict[str, dataclasses.Field] = {}
    for config_type in config_types:
        hints = typing.get_type_hints(config_type)
        for f in dataclasses.fields(config_type):
            fields[f.name] = f
            _add_flag(parser, f, hints[f.name])
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    values = (_read_config_file(Path(path), parser, fields) if path else {}) | given
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING:
            raise UserError(f"{_flag_name(name)} is required: {f.metadata['help']}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return [t(**{f.name: values[f.name] for f in dataclasses.fields(t) if f.name in values}) for t in config_types]


def _flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _plain_type(hint: Any) -> tuple[Any, bool, tuple | None]:
    """(element type, is a tuple, choices) of a field's type hint; `X | None` counts as X."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return typing.get_args(hint)[0], True, None
    if origin is typing.Literal:
        return str, False, typing.get_args(hint)
    return hint, False, None


def _add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field, hint: Any) -> None:
    kind, is_tuple, choices = _plain_type(hint)
    text = f.metadata["help"].replace("%", "%%")
    if f.default is dataclasses.MISSING:
        text += " (required)"
    elif f.default not in (None, ()):
        text += f" (default: {' '.join(map(str, f.default)) if is_tuple else f.default})"
    if kind is bool:
        parser.add_argument(_flag_name(f.name), action=argparse.BooleanOptionalAction, help=text)
        return
    metavar = f.metadata["metavar"] or (None if choices else {int: "N", float: "X"}.get(kind, "NAME"))
    extra: dict[str, Any] = {"nargs": "+"} if is_tuple else {}
    parser.add_argument(_flag_name(f.name), type=kind, choices=choices, metavar=metavar, help=text, **extra)


def _read_config_file(
    path: Path, parser: argparse.ArgumentParser, fields: dict[str, dataclasses.Field]
) -> dict[str, Any]:
    readers: dict[str, Any] = {
        ".json": json.loads,
        ".toml": tomllib.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
    if path.suffix not in readers:
        raise UserError(f"--config {path}: unknown kind of file; use one of {' '.join(readers)}")
    try:
        table = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give an existing file") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: not valid {path.suffix[1:].upper()} ({error}); correct the file") from error
    if not isinstance(table, dict):
        raise UserError(f"--config {path}: holds a {type(table).__name__}; write a table of flag names and values")
    arguments: list[str] = []
    empty: dict[str, Any] = {}
    for key, value in table.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise UserError(f"--config {path}: unknown key '{key}'; the keys are the names of the flags, see --help")
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(_flag_name(name) if value else "--no-" + _flag_name(name)[2:])
        elif value == [] and isinstance(fields[name].default, tuple):
            empty[name] = []
        elif isinstance(value, list):
            arguments += [_flag_name(name), *map(str, value)]
        else:
            arguments.append(f"{_flag_name(name)}={value}")
    try:
        return vars(parser.parse_args(arguments)) | empty
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
