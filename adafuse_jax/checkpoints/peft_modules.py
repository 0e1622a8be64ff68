"""The modules that a PEFT config adapts, with the rank and scale of each, as `peft.tuners` decides them.

    target_modules, exclude_modules          names, or the ends of names; or a regular expression for the whole name
    layers_to_transform, layers_pattern      numbers of layers, and the names of the lists that they are in
    rank_pattern, alpha_pattern              regular expression for the end of a name → r, lora_alpha

Patterns are the file's: each match has a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex

from adafuse_jax.checkpoints.adapter_files import MAX_SIZE
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table

SECONDS = 1.0
"""Time of a match, which may take for ever."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModules:
    """The selection in an adapter_config.json, `table`."""

    table: Table
    rank: int
    alpha: float
    stabilised: bool
    targets: list[str] | str | None
    excluded: list[str] | str | None
    layers: frozenset[int] | None
    lists: tuple[str, ...]
    ranks: tuple[tuple[Any, int], ...]
    alphas: tuple[tuple[Any, float], ...]
    """(compiled pattern, value)."""

    @classmethod
    def read(cls, table: Table) -> AdaptedModules:
        """Raises `UserError` for a value of a wrong type or range."""
        for name in ("target_modules", "exclude_modules"):
            value = table.get(name)
            if not isinstance(value, list | str | None) or not all(isinstance(entry, str) for entry in value or ()):
                raise table.error(name, "it must be a list of names, or a pattern")
        layers, lists = table.get("layers_to_transform"), table.get("layers_pattern") or ()
        numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(type(layer) is int for layer in numbers):
            raise table.error("layers_to_transform", "it must be a number of a layer, or a list of them")
        lists = (lists,) if isinstance(lists, str) else lists
        if not isinstance(lists, list | tuple) or not all(isinstance(name, str) for name in lists):
            raise table.error("layers_pattern", "it must be a name, or a list of names")
        of_ranks, of_alphas = (table.table(f"{name}_pattern") or Table({}, "") for name in ("rank", "alpha"))
        return cls(
            table=table,
            rank=table.integer("r", low=1, high=MAX_SIZE),
            alpha=table.number("lora_alpha", low=0, high=1e6, above=True),
            stabilised=table.boolean("use_rslora", False),
            targets=table.get("target_modules"),
            excluded=table.get("exclude_modules"),
            layers=frozenset(numbers) if numbers else None,
            lists=tuple(lists),
            ranks=tuple(
                (_compiled(table, "rank_pattern", rf"(.*\.)?({name})$"), of_ranks.integer(name, low=1, high=MAX_SIZE))
                for name in of_ranks.values
            ),
            alphas=tuple(
                (_compiled(table, "alpha_pattern", rf"(.*\.)?({name})$"), of_alphas.number(name, low=0, high=1e6))
                for name in of_alphas.values
            ),
        )

    @property
    def default_scale(self) -> float:
        return self._scale(self.alpha, self.rank)

    def alpha_at(self, rank: int) -> float:
        """The alpha with which a plain LoRA of this rank has the default scale."""
        return self.alpha * (math.sqrt(self.rank) if self.stabilised else 1) * (rank / self.rank)

    def left_out_by(self, module: str) -> str | None:
        """The key that leaves `module`, for instance model.layers.0.mlp.up_proj, out; None if it is adapted."""
        if self.excluded and self._is_named(module, self.excluded, "exclude_modules"):
            return "exclude_modules"
        if self.targets is None or (isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR):
            return None
        if not self._is_named(module, self.targets, "target_modules"):
            return "target_modules"
        if self.layers is not None and self._layer(module) not in self.layers:
            return "layers_to_transform"
        return None

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """R and s of a module: those of the first patterns that fit, or the default."""
        rank, alpha = (
            next((value for pattern, value in values if self._match(key, pattern, module)), default)
            for key, values, default in (
                ("rank_pattern", self.ranks, self.rank), ("alpha_pattern", self.alphas, self.alpha)
            )
        )  # fmt: skip
        return int(rank), self._scale(alpha, int(rank))

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def _is_named(self, module: str, names: Sequence[str], key: str) -> bool:
        if isinstance(names, str):
            return self._match(key, _compiled(self.table, key, names), module, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self.lists] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        for pattern in patterns:
            if found := self._match("layers_pattern", _compiled(self.table, "layers_pattern", pattern), module):
                return int(found["idx"])
        return None

    def _match(self, key: str, pattern: Any, module: str, *, whole: bool = False) -> Any:
        try:
            return (pattern.fullmatch if whole else pattern.match)(module, timeout=SECONDS)
        except TimeoutError as error:
            raise _unmatched(self.table, key, pattern.pattern, f"it takes more than {SECONDS:g} s") from error


def _compiled(table: Table, key: str, pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise _unmatched(table, key, pattern, str(error)) from error


def _unmatched(table: Table, key: str, pattern: str, reason: str) -> UserError:
    return UserError(f"{table.where}: {key}: {quoted(pattern)} cannot be matched ({reason}); name the modules instead")
