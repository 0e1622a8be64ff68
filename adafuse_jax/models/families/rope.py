"""RoPE's keys of config.json ↔ `RopeConfig`, in the forms of transformers 4 and 5.

    transformers 4    rope_theta, partial_rotary_factor, rope_scaling {type or rope_type, factor, …}
    transformers 5    rope_parameters {rope_type, rope_theta, factor, …}, or {layer type: such an object}

Where both name parameters, the older form wins, key by key where layers differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ROPE_FIELDS, RopeConfig

NOT_NULL = (
    "rope_theta", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
"""Keys that may be absent, but not null."""
GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Types of layers that may have a RoPE of their own."""
YARN_KEYS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeKeys:
    """RoPE as the classes of one family read it.

    Attributes:
      defaults: of keys that are absent, and of what no key says (`interleaved`).
      partial: whether the class reads `partial_rotary_factor`; one that does not rotates whole heads.
      scales_queries: whether it reads `llama_4_scaling_beta`, which it needs then.
      kinds: values of `rope_type` → the kind.
      original: the original length of a class that has a default for it beside the parameters, where it wins over theirs.
      theta_key: the key of the base beside the parameters; None: there is none.
      absent: the parameters where config.json has none at all.
    """

    defaults: RopeConfig = RopeConfig()
    partial: bool = False
    scales_queries: bool = False
    kinds: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ROPE_FIELDS})
    original: int | None = None
    theta_key: str | None = "rope_theta"
    absent: Mapping[str, Any] = field(default_factory=dict)

    def read(
        self, table: Table, max_positions: int, head_dim: int, *, layer_type: str | None = None
    ) -> tuple[RopeConfig, list[str]]:
        """The parameters of all layers, or of those of a `layer_type` if `rope_parameters` has an object for each; and the
        keys that are not used. Raises `UserError` for a kind, key or value that is not supported."""
        name, values = _parameters(table, layer_type, self.absent)
        rope = Table(values, f"{table.where}: {name}")
        for place in (table, rope):
            for key in NOT_NULL:
                if key in place.values and place.values[key] is None:
                    raise place.error(key, "it must have a value, or be left out")
        kind = rope.choice("type", (*self.kinds,), self.defaults.kind)
        kind = self.kinds[rope.choice("rope_type", (*self.kinds,), kind)]
        theta = self.defaults.theta
        if self.theta_key is not None:
            theta = table.number(self.theta_key, theta, low=0, high=1e30, above=True)
        settings: dict[str, Any] = {"theta": rope.number("rope_theta", theta, low=0, high=1e30, above=True)}
        settings["partial_rotary_factor"] = self._partial(table, rope, head_dim)
        if "factor" in ROPE_FIELDS[kind]:
            settings["factor"] = rope.number("factor", low=0, high=1e30, above=True)
        if kind in ("llama3", "yarn", "longrope"):
            original = rope.integer("original_max_position_embeddings", max_positions, low=1)
            if layer_type is None:  # transformers takes the outer one before the inner one, unless there are several
                original = table.integer("original_max_position_embeddings", self.original or original, low=1)
            settings["original_max_position_embeddings"] = original
        elif kind == "dynamic":
            settings["original_max_position_embeddings"] = max_positions
        dim = int(head_dim * settings["partial_rotary_factor"])
        settings |= _of_kind(kind, rope, settings, max_positions, dim, is_nested=layer_type is not None)
        if self.scales_queries:
            settings["query_scaling_beta"] = rope.number("llama_4_scaling_beta", low=0, high=1e6)
            if "original_max_position_embeddings" not in settings:
                settings["original_max_position_embeddings"] = rope.integer("original_max_position_embeddings", low=1)
        rope.get("max_position_embeddings")  # which some files repeat
        read = RopeConfig(kind=kind, interleaved=self.defaults.interleaved, **settings)  # type: ignore[arg-type]
        unused = [f"{name}.{key}" for key in rope.unread()]
        has_both = layer_type is None and all(table.get(form) for form in ("rope_scaling", "rope_parameters"))
        return read, unused + ["rope_parameters"] * has_both

    def _partial(self, table: Table, rope: Table, head_dim: int) -> float:
        outer = table.number("partial_rotary_factor", self.defaults.partial_rotary_factor, low=0, high=1, above=True)
        share = rope.number("partial_rotary_factor", outer, low=0, high=1, above=True)
        place = rope if "partial_rotary_factor" in rope else table
        if share != 1 and not self.partial:
            raise place.error("partial_rotary_factor", "supported: 1")
        if int(head_dim * share) < 2 or int(head_dim * share) % 2:
            raise place.error("partial_rotary_factor", f"an even part of {head_dim} dimensions must be rotated")
        return share

    def write(self, rope: RopeConfig) -> dict[str, Any]:
        """The inverse of `read` for one set of parameters, in the form of transformers 4."""
        table: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
        if self.partial:
            table["partial_rotary_factor"] = rope.partial_rotary_factor
        names = [name for name in ROPE_FIELDS[rope.kind] if rope.kind != "dynamic" or name == "factor"]
        scaling = {name: getattr(rope, name) for name in names}
        scaling = {name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()}
        if rope.kind in ("yarn", "longrope"):
            scaling["attention_factor"] = rope.attention_factor
        if self.original is not None and "original_max_position_embeddings" in scaling:
            table["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        if self.scales_queries:
            scaling["llama_4_scaling_beta"] = rope.query_scaling_beta
            scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
        if scaling:
            written = next((name for name, kind in self.kinds.items() if kind == rope.kind), rope.kind)
            table["rope_scaling"] = {"rope_type": written} | scaling
        return table


def _parameters(table: Table, layer_type: str | None, absent: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the object of RoPE's parameters, and the object, `absent` where there is none. Where layers differ, the
    older form changes those without a window."""
    scaling, parameters = table.get("rope_scaling"), table.get("rope_parameters")
    name, values = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    if layer_type is not None:
        if not isinstance(parameters, dict | None) or not (parameters or {}).keys() <= {GLOBAL, LOCAL}:
            raise table.error("rope_parameters", f"give it a table {GLOBAL} and a table {LOCAL}")
        of_type = {"rope_type": "default"} if parameters is None else parameters.get(layer_type)
        if not scaling or layer_type == LOCAL:
            name, values = f"rope_parameters.{layer_type}", of_type
        elif isinstance(scaling, dict) and isinstance(of_type, dict):
            values = of_type | scaling
    values = dict(absent) if values is None else values or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UserError(
            f"{table.where}: rope parameters {quoted(values)} are not supported; give one table for all layers"
        )
    return name, values


def _of_kind(
    kind: str, rope: Table, settings: dict[str, Any], max_positions: int, dim: int, *, is_nested: bool
) -> dict[str, Any]:
    """The fields of one kind alone, given the others and the number of rotated dimensions."""
    if kind == "llama3":
        low = rope.number("low_freq_factor", low=0, high=1e30, above=True)
        high = rope.number("high_freq_factor", low=0, high=1e30)
        if high <= low:
            raise rope.error("high_freq_factor", f"it must be greater than low_freq_factor, which is {low:g}")
        return {"low_freq_factor": low, "high_freq_factor": high}
    if kind == "yarn":
        return _yarn(rope, settings, is_nested=is_nested)
    if kind == "longrope":
        return _longrope(rope, settings["original_max_position_embeddings"], max_positions, dim)
    if kind == "dynamic" and dim == 2:
        raise rope.error("rope_type", "it needs more than 2 rotated dimensions; restore the file")
    return {}


def _yarn(rope: Table, settings: dict[str, Any], *, is_nested: bool) -> dict[str, Any]:
    """The fields of yarn alone. `mscale` and `mscale_all_dim` only decide the attention factor."""
    factor = settings["factor"]
    if settings["theta"] <= 1:
        raise rope.error("rope_theta", "yarn needs more than 1; restore the file")
    inferred = _log_scale(factor)
    mscale, all_dim = (rope.number(name, 0.0, low=0, high=1e6) for name in ("mscale", "mscale_all_dim"))
    if mscale and all_dim:
        inferred = _log_scale(factor, mscale) / _log_scale(factor, all_dim)
    found: dict[str, Any] = {"attention_factor": rope.number("attention_factor", inferred, low=0, high=1e6)}
    for name, default in YARN_KEYS.items():
        found[name] = rope.number(name, default, low=0, high=1e6) or default
        if found[name] < 1e-6:  # turns whose length no float holds
            raise rope.error(name, "it must be at least 1e-06, or 0 for the default")
    if not is_nested:  # where transformers looks for it, a level too high
        found["truncate"] = rope.boolean("truncate", True)
    return found


def _log_scale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _longrope(rope: Table, original: int, max_positions: int, dim: int) -> dict[str, Any]:
    factor = rope.number("factor", max_positions / original, low=0, high=1e30, above=True)
    if factor > 1 and original == 1:
        raise rope.error("original_max_position_embeddings", "longrope needs more than 1; restore the file")
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    found: dict[str, Any] = {"attention_factor": rope.number("attention_factor", inferred, low=0, high=1e6)}
    for name in ("short_factor", "long_factor"):
        values = rope.items(name)
        is_number = [isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1e30 for x in values]
        if len(values) != dim // 2 or not all(is_number):
            raise rope.error(name, f"it must be a list of {dim // 2} numbers greater than 0")
        found[name] = tuple(map(float, values))
    return found
