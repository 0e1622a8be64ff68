"""Variants of AdaFuse whose routing of every layer is known before layer 0 runs.

    r_t = plan(x_0 … x_t),   x_t = the first norm of token t's embedding
    y^l = f^l(x^l) + E_shared^l(x^l) + Σ_i G(r_t)_i E_i^l(x^l)

The router sees tokens alone, so a decode step knows all its experts from the start, as with AdaFuse on q, k or v; the
kernels that decode AdaFuse need no other form for it (a shared expert is one more chosen expert with gate 1).

    normalised input    z = W x / rms(x): Llama's first norm has small weights, and without this all logits are close
    selection bias      TopK(z + b), gates from z alone; b_e falls while e has more than its share of the tokens
    context             z += W_c m / rms(m),  m: a decayed mean, a convolution or the request's prompt (see `context`)
    by task             the expert of a token is that of its set: no router learns it, a bound on what routing can gain
    expert dropout      while training, each expert is not to be chosen in a row with this probability
    shared A            one A for all experts of a linear, a B for each (as HydraLoRA)
    orthogonal          the A of all experts of a linear are segments of one orthogonal matrix
    principal           they are segments of the right singular vectors of its weight, the largest first (as GOAT)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adafuse_jax.adapters.adafuse import AdaFuse, AdaFuseLayer
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.low_rank import LoRAExperts, LoRAParam
from adafuse_jax.adapters.router import balance_loss, expert_load
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone, Output
from adafuse_jax.models.hooks import Routing
from adafuse_jax.training.replicas import replica_attention, replica_forward
from studies.accuracy.context import decayed, normalized, request, windows

DROPPED = -1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Settings of a variant beside AdaFuse's. `router_rate` and `bias_rate` multiply the learning rate."""

    shared_rank: int = 0
    shared_a: bool = False
    normalize_input: bool = True
    selection_bias: bool = True
    router_rate: float = 0.1
    bias_rate: float = 10.0
    context_decay: float | None = None
    convolution: int = 0
    by_request: bool = False
    by_task: bool = False
    expert_dropout: float = 0.0
    orthogonal: bool = False
    principal: bool = False

    @property
    def has_context(self) -> bool:
        return self.context_decay is not None or self.convolution > 0 or self.by_request


class SharedA(LoRAExperts):
    """E experts of one A [L, 1, R, in]; B [L, E, out, R]."""

    def __init__(self, *shape: int, **options: Any):
        super().__init__(*shape, **options)
        self.A = LoRAParam(self.A[:, :1])

    def __call__(self, x: Float[Array, "B T in"], routing: Routing) -> Float[Array, "B T out"]:
        a, b = self.A[0].astype(x.dtype), self.B[...].astype(x.dtype)
        h = jnp.einsum("bti,ri->btr", x, a, preferred_element_type=jnp.float32)
        gated = (self.scale * routing.dense_gates()[..., None] * h[..., None, :]).astype(x.dtype)
        return jnp.einsum("bter,eor->bto", gated, b)


class WithShared(nnx.Module):
    """Routed experts of a linear, and one that every token uses whole."""

    def __init__(self, routed: LoRAExperts, shared: LoRAExperts):
        self.routed, self.shared = routed, shared

    def __call__(self, x: Float[Array, "B T in"], routing: Routing) -> Float[Array, "B T out"]:
        return self.routed(x, routing) + self.shared(x, Routing.of_one_expert(*x.shape[:2]))


class PreGated(AdaFuse):
    """AdaFuse with a plan: `plan` gives the routing of tokens, `bound` the adapter that uses it in every layer."""

    def __init__(self, config: AdapterConfig, model: ModelConfig, variant: Variant, *, rngs: nnx.Rngs):
        super().__init__(config, model, rngs=rngs)
        self.variant = variant
        self.bias = LoRAParam(jnp.zeros(config.num_experts)) if variant.selection_bias and not variant.by_task else None
        shape, bound = (config.num_experts, model.embed_dim), model.embed_dim**-0.5
        context = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.context = LoRAParam(context) if variant.has_context else None
        self.kernel = _kernel(variant.convolution, model.embed_dim, rngs) if variant.convolution else None
        if variant.by_task:
            del self.router
        for name in config.targets:
            out_dim, in_dim = model.linear_shape(name)
            if variant.shared_a:
                self.experts[name] = SharedA(
                    model.num_layers, out_dim, in_dim,
                    num_experts=config.num_experts, rank=config.rank, scale=config.scale, rngs=rngs,
                )  # fmt: skip
            if variant.orthogonal:
                self.experts[name].A[...] = _orthogonal(self.experts[name].A[...], rngs.params())
            if variant.shared_rank:
                shared = LoRAExperts(
                    model.num_layers, out_dim, in_dim,
                    num_experts=1, rank=variant.shared_rank, scale=config.scale, rngs=rngs,
                )  # fmt: skip
                self.experts[name] = WithShared(self.experts[name], shared)

    def start_from(self, model: Backbone) -> None:
        """Set the A of a variant with `principal`."""
        if self.variant.principal:
            for name, experts in self.experts.items():
                experts.A[...] = _principal(getattr(model.layers, name).weight[...], experts.A[...])

    def plan(
        self,
        model: Backbone,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        tasks: Int[Array, "B T"],
        *,
        key: Key[Array, ""] | None = None,
        past: Float[Array, "B ..."] | None = None,
        request: Float[Array, "B T D"] | None = None,
    ) -> tuple[Routing, Float[Array, "B T ..."] | None]:
        """(routing, state of the context after every token). `past` is the state before the first token where that continues
        a text, `request` that of a variant by request; `key` the randomness of expert dropout, None for none."""
        if self.variant.by_task:
            chosen = jax.nn.one_hot(tasks, self.config.num_experts)
            return Routing(tasks[..., None], jnp.ones((*tasks.shape, 1)), chosen), None
        norm = jax.tree.map(lambda leaf: leaf[0], model.layers.input_layernorm)
        x = norm(model.embed_tokens[...][tokens]).astype(jnp.float32)  # [B, T, D]
        x = normalized(x) if self.variant.normalize_input else x
        logits = _scores(x, self.router.weight[...])  # [B, T, E]
        if self.context is None:
            return self._chosen(logits, key), None
        if self.variant.by_request:
            state = request if past is None else past[:, None]
            assert state is not None
            context = state
        elif self.kernel is not None:
            state = windows(x, positions, self.variant.convolution, past)
            context = jnp.einsum("btkd,kd->btd", state, self.kernel[...])
        else:
            assert self.variant.context_decay is not None
            context = state = decayed(x, positions, self.variant.context_decay, past)
        return self._chosen(logits + _scores(normalized(context), self.context[...]), key), state

    def _chosen(self, logits: Float[Array, "B T E"], key: Key[Array, ""] | None) -> Routing:
        selection = logits if self.bias is None else logits + jax.lax.stop_gradient(self.bias[...])
        if key is not None and self.variant.expert_dropout:
            out = jax.random.bernoulli(key, self.variant.expert_dropout, (logits.shape[0], 1, logits.shape[-1]))
            selection = jnp.where(out, DROPPED, selection)
        _, experts = jax.lax.top_k(selection, self.config.top_k)
        gates = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
        return Routing(experts, gates, jax.nn.softmax(logits, axis=-1))

    def bound(self, routing: Routing) -> Bound:
        return Bound(self, routing)

    def balance_loss(
        self, routing: Routing, mask: Bool[Array, "B T"], load: Float[Array, " E"] | None = None
    ) -> Float[Array, ""]:
        """Loss Σ_e b_e · (f_e − 1/E) for a selection bias, whose gradient moves the bias alone; 0 without a router."""
        if self.variant.by_task:
            return jnp.float32(0)
        if self.bias is None:
            return balance_loss(routing, mask, load=load)
        found = jax.lax.stop_gradient(expert_load(routing, mask)[0] if load is None else load)
        return jnp.sum(self.bias[...] * (found - 1 / self.config.num_experts))

    def rates(self) -> Any:
        """A multiplier of the learning rate for every parameter."""

        def rate(path: tuple, _: Array) -> float:
            name = jax.tree_util.keystr(path[:1])
            if "bias" in name:
                return self.variant.bias_rate
            return self.variant.router_rate if re.search("router|context|kernel", name) else 1.0

        return jax.tree_util.tree_map_with_path(rate, self)


class Bound:
    """A `PreGated` with the routing of the tokens that it will see: an adapter for one run of the backbone."""

    def __init__(self, adapter: PreGated, routing: Routing):
        self.adapter, self.routing = adapter, routing
        self.experts = adapter.experts

    def initial_routing(self, batch: int, length: int) -> Routing:
        return self.routing

    def hook(
        self, experts: nnx.Dict, layer: int | Int[Array, ""], routing: Routing, key: Key[Array, ""] | None
    ) -> PlannedLayer:
        return PlannedLayer(self.adapter, experts, layer, routing, key)


def seen(
    trained: Any, model: Backbone, tokens: Array, positions: Array, tasks: Array, **options: Any
) -> tuple[Any, Array | None]:
    """(adapter for one run over these tokens, context after every token or None)."""
    if not isinstance(trained, PreGated):
        return trained, None
    routing, context = trained.plan(model, tokens, positions, tasks, **options)
    return trained.bound(routing), context


def request_of(
    trained: Any, model: Backbone, tokens: Array, positions: Array, segment_ids: Array, prompts: Array
) -> dict[str, Array]:
    """`request` as an option of `seen`; nothing for an arm that does not route by request."""
    if not isinstance(trained, PreGated) or not trained.variant.by_request:
        return {}
    return {"request": request(model, tokens, positions, segment_ids, prompts)}


def forward(trained: Any, model: Backbone, texts: Any, *, key: Any = None, **options: Any) -> tuple[Backbone, Output]:
    """`forward` of `train_step` for every arm; `key` is the randomness of expert dropout."""
    if not isinstance(trained, PreGated):
        return replica_forward(trained, model, texts, key=key, **options)
    asked = request_of(trained, model, texts.tokens, texts.positions, texts.segment_ids, texts.prompts)
    adapter, _ = seen(trained, model, texts.tokens, texts.positions, texts.tasks, key=key, **asked)
    out = model.run(
        texts.tokens, adapter=adapter, positions=texts.positions, segment_ids=texts.segment_ids,
        attention=replica_attention, **options,
    )  # fmt: skip
    return model, out


def _own_rates(updates: Any, params: Any) -> Any:
    return jax.tree.map(jnp.multiply, params.rates(), updates) if isinstance(params, PreGated) else updates


OWN_RATES = optax.stateless(_own_rates)
"""Updates times the multipliers of `PreGated.rates`."""


class PlannedLayer(AdaFuseLayer):
    """Layer of the adapter that does not route: the routing is known before layer 0."""

    def _route(self, x: Array) -> None:
        pass


def _scores(x: Float[Array, "B T D"], weight: Float[Array, "E D"]) -> Float[Array, "B T E"]:
    return jnp.einsum("btd,ed->bte", x, weight, precision=jax.lax.Precision.HIGHEST)


def _kernel(taps: int, embed_dim: int, rngs: nnx.Rngs) -> LoRAParam:
    return LoRAParam(jax.random.normal(rngs.params(), (taps, embed_dim)) * taps**-0.5)


def _orthogonal(a: Float[Array, "L E R in"], key: Key[Array, ""]) -> Float[Array, "L E R in"]:
    """Orthogonal rows of all experts of a layer, as long as those of U(±1/√in) are on average: 1/√3."""
    layers, experts, rank, in_dim = a.shape
    if experts * rank > in_dim:
        raise ValueError(f"{experts} experts of rank {rank} have more than {in_dim=} directions")
    q, _ = jnp.linalg.qr(jax.random.normal(key, (layers, in_dim, experts * rank)))
    return q.swapaxes(1, 2).reshape(a.shape) * 3**-0.5


def _principal(weight: Float[Array, "L out in"], a: Float[Array, "L E R in"]) -> Float[Array, "L E R in"]:
    """The E·R leading right singular vectors of each layer's weight, as long as `_orthogonal`'s rows, by subspace
    iteration."""
    layers, experts, rank, in_dim = a.shape
    weight = weight.astype(jnp.float32)
    if experts * rank > min(weight.shape[1:]):
        raise ValueError(f"{experts} experts of rank {rank} have more than {min(weight.shape[1:])} singular vectors")
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (layers, in_dim, experts * rank)))[0]
    for _ in range(12):
        basis = jnp.linalg.qr(jnp.einsum("loi,loj->lij", weight, weight @ basis))[0]
    image = weight @ basis
    _, turn = jnp.linalg.eigh(jnp.einsum("loj,lok->ljk", image, image))  # ascending
    return (basis @ turn[..., ::-1]).swapaxes(1, 2).reshape(a.shape) * 3**-0.5
