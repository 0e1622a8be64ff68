"""Bytes and FLOPs of decoding one token, by method: the columns of arXiv 2603.11873's Tables 1, 5 and 6.

    bytes = weights + norms + embedding rows + KV cache (read to the mean position, one row written)
          + factors of the experts that the token uses + routers + what a merge writes and reads again

Counted per step: with a batch, one step decodes a token of every row, and rows that share an expert read it once.
FLOPs are of one row. Nothing here needs JAX or torch.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER_WISE = ("moral", "mola", "lora-moe", "lora-moe-compiled")
STATIC = ("lora", "peft-lora", "peft-lora-compiled")
"""One expert that every token uses."""
MOLA_EXPERTS = (2, 4, 6, 8)
"""Experts of the four quarters of the layers."""
TARGETS: dict[str, tuple[str, ...]] = {"qv": ("q_proj", "v_proj"), "all7": LINEARS, "-": ()}


QUANTISED = {"int8": 1.0, "int4": 0.5 + 2 / 128, "int4-g64": 0.5 + 2 / 64}
"""`--quantize` → bytes of a weight with its part of a bfloat16 scale; that of a row of int8 is left out. The strategy of
such a row is fused-int8, unmerged-int8 and so on."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A Llama and its mixture of experts. `num_kv_heads` of 0: as many as heads."""

    name: str
    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int = 0
    vocab_size: int
    max_position_embeddings: int = 4096
    num_experts: int = 8
    rank: int = 64
    top_k: int = 2
    alpha: float = 128.0
    itemsize: int = 2

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        d, f = self.embed_dim, self.hidden_dim
        kv = d * (self.num_kv_heads or self.num_heads) // self.num_heads
        return {"k_proj": (kv, d), "v_proj": (kv, d), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.get(
            name, (d, d)
        )

    def elements(self, targets: tuple[str, ...]) -> int:
        """Weights of these linears in all layers."""
        return self.num_layers * sum(out * into for out, into in map(self.linear_shape, targets))

    def factor_elements(self, method: str, targets: tuple[str, ...]) -> int:
        """A and B of one expert, for these linears or, with PESC, for the FFN's output, in all layers."""
        dims = [(self.embed_dim, self.embed_dim)] if method == "pesc" else map(self.linear_shape, targets)
        return self.num_layers * self.rank * sum(out + into for out, into in dims)

    def experts_per_layer(self, method: str) -> float:
        """Experts of a layer; of MoLA's, which has more in later layers, the mean."""
        if method in STATIC:
            return 1
        return statistics.mean(MOLA_EXPERTS) if method == "mola" else self.num_experts

    def router_elements(self, method: str, targets: tuple[str, ...]) -> float:
        """AdaFuse has one router; PESC one in every layer; the layer-wise mixtures one for every adapted linear."""
        if method == "adafuse":
            return self.num_experts * self.linear_shape(targets[0])[1]
        inputs = {"pesc": self.embed_dim} | dict.fromkeys(LAYER_WISE, sum(self.linear_shape(n)[1] for n in targets))
        return self.num_layers * self.experts_per_layer(method) * inputs.get(method, 0)


SIZES = {
    "llama2-7b": Shapes(
        name="llama2-7b", num_layers=32, embed_dim=4096, hidden_dim=11008, num_heads=32, vocab_size=32000
    ),
    "llama2-13b": Shapes(
        name="llama2-13b", num_layers=40, embed_dim=5120, hidden_dim=13824, num_heads=40, vocab_size=32000
    ),
    "llama2-70b": Shapes(
        name="llama2-70b",
        num_layers=80,
        embed_dim=8192,
        hidden_dim=28672,
        num_heads=64,
        num_kv_heads=8,
        vocab_size=32000,
    ),
    "small": Shapes(
        name="small", num_layers=12, embed_dim=1024, hidden_dim=2816, num_heads=16, vocab_size=32000, rank=16
    ),
    "tiny": Shapes(name="tiny", num_layers=2, embed_dim=32, hidden_dim=48, num_heads=4, vocab_size=256, rank=8),
}


@dataclass(frozen=True, kw_only=True)
class Costs:
    params_b: float
    """Billions of parameters."""
    bytes_gb: float
    flops_g: float


def costs(
    shapes: Shapes, method: str, targets: str, strategy: str, batch: int, context: float, distinct: float | None = None
) -> Costs:
    """Costs of a step with `context` tokens in the cache. `distinct`: experts that the rows use together (default: no two
    rows share one)."""
    adapted, has_adapter = TARGETS[targets], method in ("adafuse", "pesc", *LAYER_WISE, *STATIC)
    d, layers, k = shapes.embed_dim, shapes.num_layers, 1 if method in STATIC else shapes.top_k
    norms, head = (2 * layers + 1) * d, shapes.vocab_size * d
    backbone = shapes.elements(LINEARS) + norms + head
    one_expert = shapes.factor_elements(method, adapted) if has_adapter else 0
    num_experts, routers = shapes.experts_per_layer(method), shapes.router_elements(method, adapted)
    used = 1 if method in STATIC else distinct or min(batch * k, num_experts)
    products = {"golden": k, "simple": k, "switch": 2 * k}.get(strategy, 0)

    moved = backbone + batch * d + batch * 2 * layers * shapes.linear_shape("k_proj")[0] * (context + 1)
    flops = 2 * (backbone - norms) + 4 * layers * d * context + 2 * routers
    if products:  # switch reads and writes in place, then reads; the others write a copy that is then read
        moved += products * one_expert + 2 * shapes.elements(adapted)
        flops += 2 * shapes.rank * shapes.elements(adapted) * products
    elif strategy != "merged":  # merged once, before decoding, a LoRA costs nothing
        moved += one_expert * used
        flops += 2 * one_expert * k
    saved = 0.0
    if bytes_of_weight := QUANTISED.get(strategy.removeprefix("unmerged-").removeprefix("fused-")):
        saved = shapes.elements(LINEARS) * (shapes.itemsize - bytes_of_weight)
    return Costs(
        params_b=(backbone + head + one_expert * num_experts + routers) / 1e9,
        bytes_gb=(moved * shapes.itemsize - saved + 4 * routers) / 1e9,
        flops_g=flops / 1e9,
    )
