"""Variants of AdaFuse in the accuracy study, against independent ways to the same numbers; and their decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.router import expert_load
from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.models.hooks import Routing
from studies.accuracy import context, generation, pregated
from studies.accuracy.pregated import PreGated, Variant
from studies.questions import prompts_of
from studies.training import Texts

pytestmark = pytest.mark.slow

MIXTURE: dict[str, Any] = {
    "rank": 2, "alpha": 4.0, "targets": ("q_proj", "down_proj"), "adapter": "adafuse", "num_experts": 4, "top_k": 2
}  # fmt: skip


@pytest.fixture(scope="module")
def model(stories260k_dir: Path) -> Any:
    return load_backbone(str(stories260k_dir), "float32")


def adapter_of(model: Any, variant: Variant, seed: int = 0) -> PreGated:
    adapter = PreGated(AdapterConfig(**MIXTURE), model.config, variant, rngs=nnx.Rngs(seed))
    draw = np.random.default_rng(1).normal
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + draw(size=leaf.shape, scale=0.1), jnp.float32), adapter)


def test_a_plain_variant_is_adafuse(model: Any):
    """Routing before layer 0 equals routing in it, if nothing else is changed."""
    plain = Variant(normalize_input=False, selection_bias=False)
    planned = adapter_of(model, plain)
    adafuse = AdaFuse(AdapterConfig(**MIXTURE), model.config, rngs=nnx.Rngs(0))
    adafuse.router, adafuse.experts = planned.router, planned.experts
    tokens = jnp.arange(24).reshape(2, 12)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)

    @jax.jit
    def hidden(adapter: Any) -> jax.Array:
        view, context = pregated.seen(adapter, model, tokens, positions, tokens)
        assert context is None
        return model.run(tokens, adapter=view).hidden

    by_variant, by_adafuse, bare = (hidden(adapter) for adapter in (planned, adafuse, None))
    np.testing.assert_allclose(by_variant, by_adafuse, rtol=1e-4, atol=1e-5)
    assert not np.allclose(by_variant, bare, atol=1e-2)


def test_shared_expert_is_a_lora_beside_the_routed(model: Any):
    adapter = adapter_of(model, Variant(shared_rank=3))
    x = jax.random.normal(jax.random.key(2), (1, 5, model.config.embed_dim))
    layer = jax.tree.map(lambda leaf: leaf[1], adapter.experts["q_proj"])
    routing = adapter.plan(model, jnp.arange(5)[None], jnp.arange(5)[None], jnp.zeros((1, 5), int))[0]
    a, b = layer.shared.A[0], layer.shared.B[0]
    expected = layer.routed(x, routing) + adapter.config.scale * (x @ a.T) @ b.T
    np.testing.assert_allclose(layer(x, routing), expected, rtol=1e-3, atol=1e-4)


def test_experts_of_one_a(model: Any):
    """Equality with experts whose A are equal, with the parameters of one A."""
    adapter = adapter_of(model, Variant(shared_a=True))
    x = jax.random.normal(jax.random.key(2), (1, 5, model.config.embed_dim))
    layer = jax.tree.map(lambda leaf: leaf[1], adapter.experts["q_proj"])
    assert layer.A.shape == (1, 2, model.config.embed_dim)
    routing = adapter.plan(model, jnp.arange(5)[None], jnp.arange(5)[None], jnp.zeros((1, 5), int))[0]
    gates = np.asarray(routing.dense_gates(), np.float64)
    expected = sum(gates[..., e, None] * 2.0 * (x @ layer.A[0].T @ layer.B[e].T) for e in range(4))
    assert adapter.config.scale == 2.0
    np.testing.assert_allclose(layer(x, routing), expected, rtol=1e-3, atol=1e-4)


def test_context_goes_on_from_token_to_token(model: Any):
    """The plan of texts in one row is that of each alone, token by token; and the context is the decayed mean."""
    adapter = adapter_of(model, Variant(context_decay=0.9))
    tokens, positions = jnp.array([[5, 9, 30, 7, 8]]), jnp.array([[0, 1, 2, 0, 1]])
    routing, context = adapter.plan(model, tokens, positions, tokens)
    past = None
    for at in range(5):
        one = (slice(None), slice(at, at + 1))
        single, past = adapter.plan(model, tokens[one], positions[one], tokens[one], past=past)
        past = past[:, 0]
        np.testing.assert_allclose(past, context[:, at], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(single.probabilities[:, 0], routing.probabilities[:, at], rtol=1e-4, atol=1e-6)
    norm = jax.tree.map(lambda leaf: leaf[0], model.layers.input_layernorm)
    x = np.asarray(norm(model.embed_tokens[...][tokens]), np.float64)[0]
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(context[0, 2], 0.1 * (x[2] + 0.9 * x[1] + 0.81 * x[0]), rtol=1e-3, atol=1e-5)


def test_convolution_goes_on_from_token_to_token(model: Any):
    """The plan of texts in one row is that of each alone, token by token; and the context is the sum over the taps."""
    adapter = adapter_of(model, Variant(convolution=3))
    tokens, positions = jnp.array([[5, 9, 30, 7, 2, 8, 4]]), jnp.array([[0, 1, 2, 3, 0, 1, 2]])
    routing, states = adapter.plan(model, tokens, positions, tokens)
    past = None
    for at in range(7):
        one = (slice(None), slice(at, at + 1))
        single, past = adapter.plan(model, tokens[one], positions[one], tokens[one], past=past)
        past = past[:, 0]
        np.testing.assert_allclose(past, states[:, at], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(single.probabilities[:, 0], routing.probabilities[:, at], rtol=1e-4, atol=1e-6)
    norm = jax.tree.map(lambda leaf: leaf[0], model.layers.input_layernorm)
    x = np.asarray(norm(model.embed_tokens[...][tokens]), np.float64)[0]
    x /= np.sqrt((x**2).mean(-1, keepdims=True))
    kernel, router, weight = (
        np.asarray(p[...], np.float64) for p in (adapter.kernel, adapter.router.weight, adapter.context)
    )
    for at, seen in ((3, (3, 2, 1)), (5, (5, 4)), (4, (4,))):
        m = sum(kernel[k] * x[t] for k, t in enumerate(seen))
        expected = router @ x[at] + weight @ (m / np.sqrt((m**2).mean()))
        found = np.log(np.asarray(routing.probabilities[0, at], np.float64))
        np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-3, atol=1e-3)


def test_request_is_the_mean_of_its_prompt(model: Any):
    """Two texts in a row, each with its own prompt's mean, from the backbone's run over each prompt alone."""
    tokens, positions = jnp.array([[305, 419, 330, 407, 272, 488, 394, 0]]), jnp.array([[0, 1, 2, 3, 0, 1, 2, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    prompts = prompts_of(np.asarray(segments), np.array([0, 0, 0]), np.array([2, 1, 5]))
    assert prompts.tolist() == [[True, True, False, False, True, True, False, False]]
    found = context.request(model, tokens, positions, segments, jnp.asarray(prompts))
    for first, last, end in ((0, 2, 4), (4, 6, 7)):
        alone = model.run(tokens[:, first:last]).hidden.mean(1)
        np.testing.assert_allclose(found[0, first:end], np.repeat(alone, end - first, 0), rtol=1e-3, atol=1e-4)
    adapter = adapter_of(model, Variant(by_request=True))
    texts = Texts(tokens=tokens, positions=positions, segment_ids=segments, tasks=tokens, prompts=prompts)  # type: ignore[arg-type]
    routing, _ = adapter.plan(model, tokens, positions, tokens, request=found)
    _, out = pregated.forward(adapter, model, texts)
    np.testing.assert_allclose(out.routing.probabilities, routing.probabilities, rtol=1e-5)
    one = tokens[:, :1]
    first, second = (adapter.plan(model, one, one, one, request=found[:, [at]])[0] for at in (0, 4))
    assert not np.allclose(first.probabilities, second.probabilities, atol=1e-2), "the request moves a token's routing"


def test_principal_experts_are_singular_vectors(model: Any):
    fresh = PreGated(AdapterConfig(**MIXTURE), model.config, Variant(principal=True), rngs=nnx.Rngs(0))
    fresh.start_from(model)
    for name in MIXTURE["targets"]:
        weight = np.asarray(getattr(model.layers, name).weight[...], np.float64)[1]
        a = np.asarray(fresh.experts[name].A[...], np.float64)[1].reshape(8, -1) * 3**0.5
        values = np.linalg.svd(weight, compute_uv=False)
        np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(a @ weight.T, axis=1), values[:8], rtol=3e-2)


def test_selection_bias_moves_against_the_load(model: Any):
    adapter = adapter_of(model, Variant())
    tokens = jnp.arange(40).reshape(2, 20)
    mask = jnp.ones(tokens.shape, bool)
    before, _ = adapter.plan(model, tokens, tokens, tokens)

    def loss(adapter: PreGated) -> Any:
        return adapter.balance_loss(adapter.plan(model, tokens, tokens, tokens)[0], mask)

    grads = jax.grad(loss)(adapter)
    load = expert_load(before, mask)[0]
    np.testing.assert_allclose(grads.bias[...], load - 0.25, atol=1e-6)
    assert all(not leaf.any() for leaf in jax.tree.leaves((grads.router, grads.experts)))
    adapter.bias[...] = jnp.array([50.0, 0, 0, 40.0])
    after, _ = adapter.plan(model, tokens, tokens, tokens)
    assert (np.sort(after.experts, -1) == [0, 3]).all()
    logits = jnp.log(after.probabilities)[..., [0, 3]]
    np.testing.assert_allclose(after.dense_gates()[..., [0, 3]], jax.nn.softmax(logits), rtol=1e-4)


def test_rates_of_routers_and_biases(model: Any):
    adapter = adapter_of(model, Variant(shared_rank=1, context_decay=0.9, router_rate=0.3, bias_rate=7.0))
    rates = adapter.rates()
    assert [jax.tree.leaves(tree) for tree in (rates.router, rates.context, rates.bias)] == [[0.3], [0.3], [7.0]]
    assert set(jax.tree.leaves(rates.experts)) == {1.0}


def test_expert_dropout_and_orthogonal_experts(model: Any):
    adapter = adapter_of(model, Variant(expert_dropout=0.5))
    tokens = jnp.tile(jnp.arange(30), (64, 1))
    routing, _ = adapter.plan(model, tokens, tokens, tokens, key=jax.random.key(0))
    used = jax.nn.one_hot(routing.experts, 4).sum((1, 2)) > 0  # [B, E]
    assert 0.3 < used.mean() < 0.8
    again, _ = adapter.plan(model, tokens, tokens, tokens)
    assert (again.experts == again.experts[:1]).all(), "none is dropped without a key"
    fresh = PreGated(AdapterConfig(**MIXTURE), model.config, Variant(orthogonal=True), rngs=nnx.Rngs(0))
    a = fresh.experts["q_proj"].A[...].reshape(model.config.num_layers, -1, model.config.embed_dim)
    np.testing.assert_allclose(a @ a.swapaxes(1, 2), np.broadcast_to(np.eye(8) / 3, (len(a), 8, 8)), atol=1e-5)


def test_by_task_routes_by_the_set(model: Any):
    adapter = PreGated(
        AdapterConfig(**MIXTURE | {"num_experts": 8, "top_k": 1}), model.config, Variant(by_task=True), rngs=nnx.Rngs(0)
    )
    given = jnp.array([[3, 3, 7]])
    routing, _ = adapter.plan(model, given, given, given)
    assert isinstance(routing, Routing)
    assert (routing.dense_gates()[0].argmax(-1) == given).all()
    assert adapter.balance_loss(routing, given > 0) == 0


@pytest.mark.parametrize("change", [{"context_decay": 0.9}, {"convolution": 3}, {"by_request": True}], ids=str)
def test_greedy_decoding_is_the_full_forward_pass(model: Any, change: dict[str, Any]):
    """Replies of two replicas to prompts of different lengths; a reply that has ended stays unchanged."""
    variant = Variant(shared_rank=2, **change)
    each = [adapter_of(model, variant), jax.tree.map(lambda leaf: leaf * 1.5, adapter_of(model, variant, seed=3))]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    prompts, lengths = jnp.array([[1, 40, 41, 42, 50], [1, 60, 61, 0, 0]]), jnp.array([5, 3])
    plan: dict[str, Any] = {"new_tokens": 4}

    @jax.jit
    def following(adapter: Any, tokens: jax.Array, prompt: int) -> jax.Array:
        places = jnp.arange(10)[None]
        asked = pregated.request_of(adapter, model, tokens, places, jnp.ones_like(tokens), places < prompt)
        view, _ = pregated.seen(adapter, model, tokens, places, jnp.zeros_like(tokens), **asked)
        return model.logits(model.run(tokens, adapter=view).hidden[0]).argmax(-1)

    found = generation.greedy(model, params, prompts, lengths, jnp.zeros(2, jnp.int32), jnp.array([-1]), **plan)
    assert found.shape == (2, 2, 4)
    for s, adapter in enumerate(each):
        for n in range(2):
            text = prompts[n, : lengths[n]].tolist()
            for _ in range(4):
                padded = jnp.array([text + [0] * (10 - len(text))])
                text.append(int(following(adapter, padded, lengths[n])[len(text) - 1]))
            assert found[s, n].tolist() == text[lengths[n] :]
    stop = int(found[0, 0, 1])
    again = generation.greedy(model, params, prompts, lengths, jnp.zeros(2, jnp.int32), jnp.array([stop]), **plan)
    assert set(again[0, 0, 1:].tolist()) == {stop}
