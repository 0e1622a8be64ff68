"""Command-line flags made from config dataclasses. Precedence: defaults < `--config FILE` < flags."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.fields import Kind, checked_path, flag_name, kinds
from adafuse_jax.core.tables import parse_table, read_text

CONFIG_SUFFIXES = (".json", ".toml", ".yaml", ".yml")
MAX_CONFIG_BYTES = 2**20
INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class _Former(argparse.Action):
    """A flag of earlier versions; `const` is what to give now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise UserError(f"{self.option_strings[0]}: give {self.const} instead; see --help")


def parse_flags(
    description: str | None, config_types: Sequence[type], argv: Sequence[str], program: str | None = None
) -> list[Any]:
    """Parse `argv` into one instance of each dataclass in `config_types` (their field names must not clash). `program` is
    its name in the usage; default: that of the script.

    Raises `UserError` for unknown flags or keys, values of a wrong type, and whatever the dataclasses refuse.
    """
    parser = _OneLineParser(
        prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", metavar="FILE", help="JSON, TOML or YAML file of flag names and values")
    fields: dict[str, tuple[dataclasses.Field, Kind]] = {}
    for config_type in config_types:
        for f, kind in zip(dataclasses.fields(config_type), kinds(config_type), strict=True):
            fields[f.name] = f, kind
            _add_flag(parser, f, kind)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    values = (
        {} if path is None else _read_config_file(path, {name: kind for name, (_, kind) in fields.items()})
    ) | given
    for name, (f, _) in fields.items():
        if name not in values and f.default is dataclasses.MISSING:
            raise UserError(f"{flag_name(name)} is required: {f.metadata['help']}")
    return [t(**{f.name: values[f.name] for f in dataclasses.fields(t) if f.name in values}) for t in config_types]


def _add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field, kind: Kind) -> None:
    text = f.metadata["help"].replace("%", "%%")
    if f.default is dataclasses.MISSING:
        text += " (required)"
    elif f.default not in (None, ()):
        text += f" (default: {' '.join(map(str, f.default)) if kind.is_tuple else f.default})"
    if kind.type is bool:
        parser.add_argument(flag_name(f.name), action=argparse.BooleanOptionalAction, help=text)
        return
    metavar = f.metadata["metavar"] or (None if kind.choices else {int: "N", float: "X"}.get(kind.type, "NAME"))
    extra: dict[str, Any] = {"nargs": "+"} if kind.is_tuple else {}

    def parse(text: str) -> Any:
        if text in f.metadata["moved"]:
            raise argparse.ArgumentTypeError(f"{quoted(text)}: {f.metadata['moved'][text]}")
        return _parser_of(kind.type)(text)

    if False in f.metadata["formerly"]:
        negation = flag_name(f"no_{f.name}")
        now = f"{flag_name(f.name)} {f.metadata['formerly'][False]}"
        parser.add_argument(
            negation, action=_Former, nargs=0, const=now, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    parser.add_argument(flag_name(f.name), type=parse, choices=kind.choices, metavar=metavar, help=text, **extra)


def _parser_of(kind: type) -> Callable[[str], Any]:
    """Function from a flag's text to its value. `int` and `float` alone would take 1_0, and digits of every script."""
    if kind not in (int, float):
        return kind
    pattern, name = (INTEGER, "an integer") if kind is int else (NUMBER, "a number")

    def parse(text: str) -> Any:
        try:
            if pattern.fullmatch(text.strip()):
                return kind(text)
        except ValueError:  # more digits than Python converts
            pass
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not {name}")

    return parse


def _read_config_file(given: str, fields: dict[str, Kind]) -> dict[str, Any]:
    """Field names → checked values. A key without a value (null) counts as absent."""
    path = Path(checked_path(given, "--config"))
    where = f"--config {path}"
    if path.suffix not in CONFIG_SUFFIXES:
        raise UserError(f"{where}: unknown kind of file; use one of {' '.join(CONFIG_SUFFIXES)}")
    text = read_text(path, what="--config ", max_bytes=MAX_CONFIG_BYTES, advice="give an existing file")
    values: dict[str, Any] = {}
    for key, value in parse_table(text, path.suffix, where, unique=True).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise UserError(f"{where}: unknown key {quoted(str(key))}; the keys are the names of the flags, see --help")
        if name in values:
            raise UserError(f"{where}: {flag_name(name)} is given twice; leave one out")
        if value is not None:
            try:
                values[name] = fields[name].checked(_as_declared(value, fields[name]), flag_name(name))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{where}: {flag_name(name)}: {error}; correct the file") from error
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
    return values


def _as_declared(value: Any, kind: Kind) -> Any:
    """One value for a flag that takes several is a list of it. Numbers may be text: YAML reads 1e-4 as text."""
    if kind.is_tuple:
        elements = value if isinstance(value, list) else [value]
        return [_as_number(element, kind) for element in elements]
    return _as_number(value, kind)


def _as_number(value: Any, kind: Kind) -> Any:
    is_number = kind.type in (int, float) and isinstance(value, str)
    return _parser_of(kind.type)(value) if is_number else value
