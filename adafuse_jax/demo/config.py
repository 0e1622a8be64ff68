"""Settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from adafuse_jax.configs import flag, require, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """How much the demo learns and asks. The defaults take two CPU cores about two minutes."""

    output: str = flag("directory of everything the demo writes; an earlier demo there is replaced", "demo", "DIR")
    seed: int = flag("seed of the data, the initial weights and the order of training", 0)
    pretrain_steps: int = flag("optimiser steps of the backbone", 480)
    train_steps: int = flag("optimiser steps of the adapters", 500)
    train_prompts: int = flag("prompts the adapters learn from", 9000)
    held_out_prompts: int = flag("prompts asked of every skill afterwards", 40)

    def __post_init__(self) -> None:
        require_positive(self, "pretrain_steps", "train_steps", "train_prompts", "held_out_prompts")
        require(self.seed >= 0, f"--seed is {self.seed}: it must be ≥ 0")
        require(self.held_out_prompts <= 200, f"--held-out-prompts is {self.held_out_prompts}: it must be at most 200")
