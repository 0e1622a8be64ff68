"""The peers of `benchmarks.decode` in torch, and how each of them decodes: eager, and compiled into one graph a token.

Each has its best form. Eager: a growing cache, no wait for the device between tokens; the mixture loops over its experts,
as the published code does, and has to wait. Compiled: the whole step, Hugging Face's static cache and the choice of
the token included, is one graph for torch.compile and then one CUDA graph, started once a token; the mixture
reads its two experts by index inside the reduction, without a copy and without the host.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from benchmarks.decode.costs import TARGETS, Shapes


class MoELinear(nn.Module):
    """y = W x + Σ_j g_j s B[e_j] (A[e_j] x), (e, g) = top-k softmax of its own fp32 router; `gather` chooses the form."""

    def __init__(self, base: nn.Linear, shapes: Shapes):
        super().__init__()
        like, e, r = {"dtype": base.weight.dtype, "device": base.weight.device}, shapes.num_experts, shapes.rank
        self.base, self.scale, self.top_k, self.gather = base, shapes.alpha / r, shapes.top_k, False
        self.router = nn.Parameter(torch.empty(e, base.in_features, device=base.weight.device))
        self.A = nn.Parameter(torch.empty(e, r, base.in_features, **like))
        self.B = nn.Parameter(torch.empty(e, base.out_features, r, **like))
        for parameter in (self.router, self.A, self.B):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # [1, T, in]
        if not self.gather:
            return self.base(x) + self._loop(x)
        return self.base(x) + (self._one(x[0, 0]) if x.shape[1] == 1 else self._dense(x))

    def _loop(self, x: Tensor) -> Tensor:
        """Expert by expert over the tokens that chose it, as the published code does."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, experts = torch.topk(tokens.to(self.router.dtype) @ self.router.T, self.top_k)
        gates, out = chosen.softmax(-1), tokens.new_zeros(len(tokens), self.B.shape[1])
        for e in range(len(self.A)):
            rows, slot = torch.where(experts == e)
            if len(rows):
                y = (tokens[rows] @ self.A[e].T) @ self.B[e].T
                out.index_add_(0, rows, (self.scale * gates[rows, slot, None] * y).to(out.dtype))
        return out.view(*x.shape[:-1], -1)

    def _dense(self, x: Tensor) -> Tensor:
        """All experts, gates of 0 for those not chosen: for prompts."""
        chosen, experts = torch.topk(x.to(self.router.dtype) @ self.router.T, self.top_k)
        gates = chosen.new_zeros(*x.shape[:-1], len(self.A)).scatter(-1, experts, chosen.softmax(-1))
        h = torch.einsum("bti,eri->bter", x, self.A) * (self.scale * gates[..., None]).to(x.dtype)
        return torch.einsum("bter,eor->bto", h, self.B)

    def _one(self, x: Tensor) -> Tensor:
        """One token, for the compiler: no sort, no copy of the experts, sums in fp32."""
        wide = x.to(self.router.dtype)
        z, index = (self.router * wide).sum(-1), torch.arange(len(self.A), device=x.device)
        values, experts = [], []
        for _ in range(self.top_k):
            best = z.argmax(-1)
            values.append(z.amax(-1))
            experts.append(best)
            z = z.masked_fill(index == best, float("-inf"))
        gates, e = torch.stack(values).softmax(-1), torch.stack(experts)
        h = (self.A[e] * wide).sum(-1) * (self.scale * gates)[:, None]  # [k, R]
        return (self.B[e] * h[:, None, :]).sum((0, 2)).to(x.dtype)


def moe_layers(model: nn.Module) -> Iterator[MoELinear]:
    return (module for module in model.modules() if isinstance(module, MoELinear))


def bare_model(shapes: Shapes, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shapes.vocab_size, hidden_size=shapes.embed_dim, intermediate_size=shapes.hidden_dim,
        num_hidden_layers=shapes.num_layers, num_attention_heads=shapes.num_heads, num_key_value_heads=shapes.num_heads,
        max_position_embeddings=shapes.max_position_embeddings, tie_word_embeddings=False,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def build(method: str, targets: str, shapes: Shapes, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model with random adapters: none of them is 0."""
    model = bare_model(shapes, device, dtype)
    if method.startswith("peft-lora"):
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=shapes.rank, lora_alpha=int(shapes.alpha), target_modules=list(TARGETS[targets]), lora_dropout=0.0,
            init_lora_weights=False,
        )  # fmt: skip
        get_peft_model(model, lora, autocast_adapter_dtype=False)  # puts its layers into `model`
    elif method.startswith("lora-moe"):
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in TARGETS[targets]:
                    if hasattr(block, name):
                        setattr(block, name, MoELinear(getattr(block, name), shapes))
    return model.eval().requires_grad_(False)


class Eager:
    """Greedy decoding with a growing cache."""

    def __init__(self, model: LlamaForCausalLM):
        self.model = model

    def prefill(self, prompt: Tensor) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.logits = self.model(input_ids=prompt, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def step(self, token: Tensor | None = None) -> None:
        """Read `token`, or the likeliest."""
        token = self.logits.argmax(-1, keepdim=True) if token is None else token
        self.logits = self.model(input_ids=token, past_key_values=self.cache, use_cache=True).logits[:, -1]


class Compiled:
    """Greedy decoding with a static cache; on a GPU a step is one CUDA graph."""

    def __init__(self, model: LlamaForCausalLM, slots: int, options: dict[str, Any], backend: str = "inductor"):
        self.model, device = model, model.lm_head.weight.device
        self.cache = StaticCache(config=model.config, max_cache_len=slots)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.graph: Any = None
        with gathering(model):
            self.prefill(self.token)  # allocates the cache
            chosen = {"options": options} if backend == "inductor" else {}
            self.compiled = torch.compile(self._step, fullgraph=True, dynamic=False, backend=backend, **chosen)
            if device.type != "cuda":
                self.logits = self.compiled()
                return
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.compiled()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.compiled()

    def _step(self) -> Tensor:
        out = self.model(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        self.token.copy_(out.argmax(-1, keepdim=True))
        self.position.add_(1)
        return out

    def prefill(self, prompt: Tensor) -> None:
        self.cache.reset()
        with gathering(self.model):
            logits = self.model(input_ids=prompt, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.fill_(prompt.shape[1])

    def step(self, token: Tensor | None = None) -> None:
        if token is not None:
            self.token.copy_(token)
        if self.graph is not None:
            self.graph.replay()
            return
        with gathering(self.model):
            self.logits = self.compiled()


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Context in which mixtures run in the form for the compiler."""
    before = [layer.gather for layer in moe_layers(model)]
    for layer in moe_layers(model):
        layer.gather = True
    try:
        yield
    finally:
        for layer, gather in zip(moe_layers(model), before, strict=True):
            layer.gather = gather


def stepwise(decoder: Eager | Compiled, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits [steps, V] after each of these tokens."""
    decoder.prefill(prompt)
    rows = []
    for token in tokens:
        decoder.step(token.view(1, 1))
        rows.append(decoder.logits[0].float().clone())
    return torch.stack(rows)


def exact_logits(model: LlamaForCausalLM, prompt: Tensor, tokens: Tensor) -> Tensor:
    """`stepwise` of the same weights in float32; needs room for such a copy of them."""
    return stepwise(Eager(copy.deepcopy(model).float()), prompt, tokens)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; NaN counts as infinite."""
    error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return error if error == error else float("inf")
