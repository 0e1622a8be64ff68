"""The peers' mathematics, checked on small models: each form against plain per-token loops in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decode.costs import TARGETS, Shapes
from benchmarks.peers.models import Compiled, Eager, MoELinear, build, relative_error, stepwise

SMALL = Shapes(
    name="small",
    num_layers=2,
    embed_dim=64,
    hidden_dim=96,
    num_heads=4,
    vocab_size=128,
    rank=4,
    num_experts=8,
    alpha=8.0,
)


class PlainLinear(nn.Module):
    """Reference of a peer's linear: token by token in plain loops."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.stack([self._token(token) for token in row]) for row in x])

    def _token(self, x: Tensor) -> Tensor:
        m: Any = self.module
        if not isinstance(m, MoELinear):
            a, b = m.lora_A["default"].weight, m.lora_B["default"].weight
            return m.base_layer.weight @ x + m.scaling["default"] * (b @ (a @ x))
        z = [float(w @ x) for w in m.router]
        best = sorted(range(len(z)), key=lambda e: -z[e])[: m.top_k]
        total = sum(torch.tensor(z[e], dtype=torch.float64).exp() for e in best)
        y = m.base.weight @ x
        for e in best:
            y = y + torch.tensor(z[e], dtype=torch.float64).exp() / total * m.scale * (m.B[e] @ (m.A[e] @ x))
        return y


@torch.no_grad()
def check(method: str, backend: str = "eager") -> str:
    """A small model on the CPU: what the timed forms find, eager and step by step with either cache, against plain loops
    in float64. Returns by how much they differ; raises RuntimeError if that is more than float32 rounding."""
    torch.manual_seed(1)
    found = []
    for targets in ("qv", "all7") if method == "lora-moe" else ("all7",) if method == "peft-lora" else ("-",):
        model = build(method, targets, SMALL, "cpu", torch.float32)
        for name, parameter in model.named_parameters():  # of a size at which a mistake shows
            if any(part in name for part in ("lora_", ".A", ".B", "router")):
                parameter.normal_(std=0.2)
        tokens = torch.randint(0, SMALL.vocab_size, (1, 12))
        steps = tokens[0, 6:]
        eager, compiled = Eager(model), Compiled(model, 16, {}, backend=backend)
        results = [stepwise(decoder, tokens[:, :6], steps) for decoder in (eager, compiled)]
        model.double()
        backbone = model(input_ids=tokens).logits
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in TARGETS[targets]:
                    if hasattr(block, name):
                        setattr(block, name, PlainLinear(getattr(block, name)))
        wanted = model(input_ids=tokens).logits
        errors = [relative_error(result, wanted[0, 6:]) for result in results]
        errors.append(relative_error(backbone, wanted))
        if not max(errors) < 1e-5:
            raise RuntimeError(
                f"{method} {targets} is wrong: relative errors {errors} of eager, static and whole logits"
            )
        found.append(f"{targets} within {max(errors):.1e}")
    return ", ".join(found)
