"""Settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from adafuse_jax.core.fields import MAX_SEED, check, flag


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo's training and evaluation. The defaults take about two minutes on two CPU cores."""

    output: str = flag(
        "directory of everything the demo writes; an earlier demo there is replaced", "demo", "DIR", text="path"
    )
    seed: int = flag("seed of the data, the initial weights and the order of training", 0, low=0, high=MAX_SEED)
    pretrain_steps: int = flag("optimiser steps of the backbone", 480, low=1, high=10**6)
    train_steps: int = flag("optimiser steps of the adapters", 500, low=1, high=10**6)
    train_prompts: int = flag("prompts the adapters learn from", 9000, low=1, high=10**6)
    held_out_prompts: int = flag("prompts asked of every skill afterwards", 40, low=1, high=200)

    def __post_init__(self) -> None:
        check(self)
