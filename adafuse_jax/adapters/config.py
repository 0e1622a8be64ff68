"""Settings of an adapter as a frozen dataclass; the flags of `train.py` are made from its fields."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.core.fields import check, flag, require
from adafuse_jax.models.config import LINEARS

Method = Literal["adafuse", "moral", "mola", "pesc", "lora", "full", "none"]
MAX_EXPERTS = 4096


def _preset(help: str, name: str, **bounds: Any) -> Any:
    """The flag of a setting whose default is the method's."""
    values: dict[str, list[str]] = {}
    for method, preset in PRESETS.items():
        if name in preset.settings:
            value = preset.settings[name]
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            values.setdefault(text, []).append(method)
    defaults = "; ".join(f"{' '.join(methods)}: {text}" for text, methods in values.items())
    return flag(f"{help} (default, by method: {defaults})", None, **bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The method, which linears get experts, how many, how large, and how the router chooses among them.

    A setting that is not given is the method's preset; one that the method does not have is None, and refused when given.
    """

    adapter: Method = flag("method: mixtures of experts, one LoRA, all weights, or no training at all", "adafuse")
    targets: tuple[str, ...] = _preset(f"linears that get experts: any of {' '.join(LINEARS)}, or 'all'", "targets")
    num_experts: int = _preset("experts per linear, E", "num_experts", low=1, high=MAX_EXPERTS)
    experts_per_layer: tuple[int, ...] = _preset(
        "experts per linear by depth, for equal parts of the layers from the first to the last; one number is for all",
        "experts_per_layer",
        low=1,
        high=MAX_EXPERTS,
    )
    rank: int = _preset("LoRA rank of each expert, R; width of a PESC adapter", "rank", low=1, high=2**16)
    top_k: int = _preset("experts active per token, k", "top_k", low=1, high=MAX_EXPERTS)
    alpha: float = _preset("LoRA scale: each expert's output is multiplied by alpha / rank", "alpha", above=0, high=1e6)
    dropout: float = _preset("share of each expert's inputs dropped while training", "dropout", low=0, below=1)
    renormalize: bool = _preset(
        "gates are a softmax over the k selected logits; off: over all E logits, then top-k", "renormalize"
    )
    balance_coefficient: float = _preset(
        "weight of the load-balance loss E·Σ f_e·P_e", "balance_coefficient", low=0, high=1e6
    )

    def __post_init__(self) -> None:
        settings = PRESETS[self.adapter].settings
        for f in fields(self):
            given, default = getattr(self, f.name), settings.get(f.name)
            name = "--" + f.name.replace("_", "-")
            if f.name != "adapter":
                require(
                    given is None or default is not None,
                    f"{name} is no setting of --adapter {self.adapter}, which has "
                    f"{', '.join('--' + s.replace('_', '-') for s in settings) or 'none'}; leave it out",
                )
                object.__setattr__(self, f.name, default if given is None else given)
        check(self)
        if self.targets is not None:
            targets = LINEARS if tuple(self.targets) == ("all",) else tuple(self.targets)
            unknown = [name for name in targets if name not in LINEARS]
            require(not unknown, f"--targets: unknown linear {unknown!r}; choose from {' '.join(LINEARS)}, or 'all'")
            require(bool(targets), f"--targets is empty; name at least one of {' '.join(LINEARS)}")
            object.__setattr__(self, "targets", tuple(name for name in LINEARS if name in targets))
        if self.experts_per_layer is not None:
            numbers = " ".join(map(str, self.experts_per_layer))
            require(bool(numbers), "--experts-per-layer is empty; give one number or several")
            require(
                min(self.experts_per_layer) >= self.top_k,
                f"--experts-per-layer {numbers}: no layer can have fewer than --top-k {self.top_k}; raise the smallest",
            )
        require(
            self.num_experts is None or self.top_k <= self.num_experts,
            f"--top-k {self.top_k} is larger than --num-experts {self.num_experts}; choose at most as many as there are",
        )

    @property
    def scale(self) -> float:
        """s = α / R."""
        return self.alpha / self.rank

    @property
    def max_experts(self) -> int:
        """The most experts that a router of the method chooses from; 0 without a router."""
        return self.num_experts or max(self.experts_per_layer or (0,))

    def table(self) -> dict[str, Any]:
        """The method and those settings that it has."""
        return {"adapter": self.adapter} | {name: getattr(self, name) for name in PRESETS[self.adapter].settings}
