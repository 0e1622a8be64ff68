"""The methods that `--adapter` names: the settings each one has, with the values it is known for, and its capabilities.

A setting that a method does not list does not exist for it, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ALL_LINEARS = ("all",)
FFN = ("gate_proj", "up_proj", "down_proj")


Capability = Literal["pre_gated", "routed_lora", "static"]
"""Properties that a decoding backend can require.

pre_gated     one router decides for all layers, before any adapted linear runs
routed_lora   the experts of a linear are low-rank terms that a router chooses, so a token's can be merged into its weight
static        every token has the same terms, so they can be merged once
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """`settings`: fields of `AdapterConfig` → values; `capabilities`: the properties that backends can require."""

    settings: Mapping[str, Any]
    capabilities: tuple[Capability, ...] = ()


def _mixture(**settings: Any) -> dict[str, Any]:
    return {"top_k": 2, "dropout": 0.0, "renormalize": True, "balance_coefficient": 0.01} | settings


PRESETS: dict[str, Preset] = {
    "adafuse": Preset(
        settings=_mixture(targets=ALL_LINEARS, num_experts=8, rank=64, alpha=128.0),
        capabilities=("pre_gated", "routed_lora"),
    ),
    # AdaFuse's experts on the linears of its paper; the routers make the difference.
    "moral": Preset(
        settings=_mixture(targets=FFN, num_experts=8, rank=64, alpha=128.0),
        capabilities=("routed_lora",),
    ),
    "mola": Preset(
        settings=_mixture(
            targets=ALL_LINEARS, experts_per_layer=(2, 4, 6, 8), rank=8, alpha=16.0, dropout=0.05,
            balance_coefficient=0.001,
        ),
        capabilities=("routed_lora",),
    ),
    # The width of the released script, and s = α / R = 1.
    "pesc": Preset(settings=_mixture(num_experts=8, rank=64, alpha=64.0, dropout=0.1)),
    "lora": Preset(
        settings={"targets": ALL_LINEARS, "rank": 80, "alpha": 160.0, "dropout": 0.05}, capabilities=("static",)
    ),
    "full": Preset(settings={}),
    "none": Preset(settings={}),
}  # fmt: skip
