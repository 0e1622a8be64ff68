"""EXAONE 4: norms behind every block and none in front, norms of q and k. Where some layers have a window, the others have
no rotary embedding."""

from __future__ import annotations

from typing import Any

from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.families.family import POST_NORM_NAMES, Family, patterned_windows, write_pattern


def _read(table: Table, num_layers: int, max_positions: int) -> dict[str, Any]:
    has_window = "sliding_window" in table or "sliding_window" not in table.values
    pattern = table.get("sliding_window_pattern", 4)
    if "layer_types" not in table:
        pattern = table.integer("sliding_window_pattern", 4, low=1) if has_window else 0
    windows = patterned_windows(table, num_layers, pattern)
    nope = tuple(layer for layer, window in enumerate(windows) if window is None) if has_window else ()
    return {"norm_placement": "post", "qk_norm": True, "sliding_windows": windows, "nope_layers": nope}


def _write(config: ModelConfig) -> dict[str, Any]:
    return ({} if config.nope_layers else {"sliding_window": None}) | write_pattern(config)


EXAONE4 = Family(
    architecture="Exaone4ForCausalLM", num_kv_heads=32, max_positions=2048, bos_token_id=0, eos_token_id=2, norm_eps=1e-5,
    tensor_names=POST_NORM_NAMES, read=_read, write=_write,
)  # fmt: skip
