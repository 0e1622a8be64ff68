"""The methods that `--adapter` names: the settings each one has, with the values it is known for, and how it can decode.

A setting that a method does not list does not exist for it, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALL_LINEARS = ("all",)
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`settings`: fields of `AdapterConfig` → values; `strategies`: of `DecodeConfig.strategy`, that the method can have."""

    settings: Mapping[str, Any]
    strategies: tuple[str, ...]


def _mixture(**settings: Any) -> dict[str, Any]:
    return {"top_k": 2, "dropout": 0.0, "renormalize": True, "balance_coefficient": 0.01} | settings


PRESETS: dict[str, Preset] = {
    "adafuse": Preset(
        settings=_mixture(targets=ALL_LINEARS, num_experts=8, rank=64, alpha=128.0),
        strategies=("fused", "unmerged", "golden", "switch", "simple"),
    ),
    # AdaFuse's experts on the linears of its paper; the routers make the difference.
    "moral": Preset(
        settings=_mixture(targets=FFN, num_experts=8, rank=64, alpha=128.0),
        strategies=("unmerged", "simple"),
    ),
    "mola": Preset(
        settings=_mixture(
            targets=ALL_LINEARS, experts_per_layer=(2, 4, 6, 8), rank=8, alpha=16.0, dropout=0.05,
            balance_coefficient=0.001,
        ),
        strategies=("unmerged", "simple"),
    ),
    # The width of the released script, and s = α / R = 1.
    "pesc": Preset(settings=_mixture(num_experts=8, rank=64, alpha=64.0, dropout=0.1), strategies=("unmerged",)),
    "lora": Preset(
        settings={"targets": ALL_LINEARS, "rank": 80, "alpha": 160.0, "dropout": 0.05}, strategies=("unmerged", "merged")
    ),
    "full": Preset(settings={}, strategies=("unmerged",)),
    "none": Preset(settings={}, strategies=("unmerged",)),
}  # fmt: skip
