"""Adapters of every method on every family, AdaFuse with its router at each position: a prompt and tokens decoded from the
cache, merged weights among them, against the float64 loops, and gradients against differences of these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters.test_adapters import reference_hidden
from adapters.test_methods import reference
from goldens import family_models, tiny_models
from random_models import METHODS, POSITIONS, random_adapter, random_method, tokens_of
from reference import f64, hidden_states

from adafuse_jax import Backbone, load_backbone
from adafuse_jax.adapters.router import is_router
from adafuse_jax.adapters.stacked import of_rows
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.backends.merged import Golden
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.registry import FAMILIES

TOKENS, PROMPT = 10, 8
ONE_WINDOW = {"sliding_window": 4}
TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama_bias", {}),
    "mistral": ("mistral_layer_types", TWO_KINDS),
    "qwen2": ("qwen2_layer_types", TWO_KINDS),
    "qwen3": ("qwen3_window", {"num_hidden_layers": 2, "hidden_size": 64} | ONE_WINDOW),
    "gemma2": ("gemma2_0", ONE_WINDOW),
    "gemma3_text": ("gemma3_text_0", TWO_KINDS),
    "granite": ("granite_0", {"embedding_multiplier": 2.0, "residual_multiplier": 0.6}),
    "olmo2": ("olmo2_0", {}),
    "olmo3": ("olmo3_0", TWO_KINDS),
    "smollm3": ("smollm3_0", TWO_KINDS | {"use_sliding_window": True, "no_rope_layers": [1, 0]}),
    "phi3": ("phi3_1", ONE_WINDOW),
    "glm4": ("glm4_0", {}),
    "exaone4": ("exaone4_0", TWO_KINDS),
    "cohere2": ("cohere2_0", TWO_KINDS),
    "seed_oss": ("seed_oss_0", {}),
    "ministral3": (
        "ministral3_0",
        ONE_WINDOW | {"rope_parameters": family_models.YARN | {"original_max_position_embeddings": PROMPT}},
    ),
}
"""`model_type` → tiny model and its changes: two layers, of both kinds where a family has two; a window and an original
length shorter than the text."""
PLACES = tuple(place for place in POSITIONS if place != "all")
"""Positions of AdaFuse's router. The other methods adapt, and route, all linears."""
QUICK = ("gemma3_text", "olmo3", "cohere2", "ministral3")
"""Families of which all cases are quick: norms on both sides, behind only, a parallel block, and Llama's block."""
CASES = [
    pytest.param(family, adapter, id=f"{family}-{adapter}", marks=() if family in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for adapter in (*PLACES, *METHODS)
]
SCANNED = {(family, "after_attention") for family in ("gemma3_text", "cohere2")}
"""Cases whose layers are scanned over, as prompts and training are; in the others each operation is a program, and most
families share these."""
TOLERANCE = 3e-5  # of the largest hidden state or logit
DIFFERENCE = 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    @functools.cache
    def load(family: str) -> Backbone:
        name, changes = MODELS[family]
        of = tiny_models if name in tiny_models.CASES else family_models
        case = replace(of.CASES[name], config=of.CASES[name].config | changes)
        return load_backbone(of.write_model_dir(case, tmp_path_factory.mktemp(name)), "float32")

    return load


def make(name: str, model: Backbone) -> Any:
    if name in PLACES:
        adapter = random_adapter(model.config, targets=POSITIONS[name])
        adapter.router.weight[...] = adapter.router.weight[...] / 3  # without a norm before it, one gate would be 1
        return adapter
    settings = {} if name == "pesc" else {"targets": ("all",)}
    return random_method(name, model.config, **settings | ({"experts_per_layer": (2, 4)} if name == "mola" else {}))


def in_float64(model: Backbone, adapter: Any, tokens: np.ndarray) -> np.ndarray:
    """Final hidden states [T, D]."""
    if adapter.config.adapter == "adafuse":
        return reference_hidden(model, adapter, tokens)[0]
    return reference(model, adapter, tokens)


def assert_close(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_decoding(models, family: str, name: str):
    """A prompt at once and a token after it; the last token by merged weights, where the method has them."""
    model = models(family)
    adapter, tokens = make(name, model), np.asarray(tokens_of(model, (1, TOKENS))[0])
    exact = jax.tree.map(f64, model)
    wanted = in_float64(exact, jax.tree.map(f64, adapter), tokens)
    bare = hidden_states(exact, tokens, lambda layer, name, x, y: y)
    assert np.abs(wanted - bare).max() > 1e-2 * np.abs(wanted).max()
    cache, found, gates = KVCache.empty(model.config, 1, TOKENS + 2, jnp.float32), [], []
    for first, last in ((0, PROMPT), (PROMPT, TOKENS - 1)):
        positions = jnp.arange(first, last)[None]
        options = {"positions": positions, "cache": cache, "unroll": (family, name) not in SCANNED}
        out = model.run(tokens[None, first:last], adapter=adapter, **options)
        cache = out.cache
        found.append(out.hidden[0])
        gates += [] if name not in PLACES else [out.routing.dense_gates()[0]]
    assert_close(np.concatenate(found), wanted[:-1])
    if name in PLACES:
        np.testing.assert_allclose(
            np.concatenate(gates), reference_hidden(exact, adapter, tokens)[1][:-1], rtol=0, atol=1e-5
        )
        backend = Golden(model, adapter)
        at = (jnp.array([n]) for n in (tokens[-1], TOKENS - 1))
        logits, *_ = backend.step(backend.reads, backend.take_carry(), *at, cache, jnp.array([False]))
        assert_close(logits[0], np.asarray(model.logits(wanted[-1].astype(np.float32))))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_gradient(models, family: str, name: str):
    """The slope of a weighted sum of the hidden states, along one direction of all experts and one of all routers."""
    model = models(family)
    adapter, tokens = make(name, model), np.asarray(tokens_of(model, (1, TOKENS))[0])
    exact, exact_adapter = jax.tree.map(f64, model), jax.tree.map(f64, adapter)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((TOKENS, model.config.embed_dim))

    def loss(adapter: Any) -> jax.Array:
        out = model.run(tokens[None], adapter=adapter, unroll=(family, name) not in SCANNED)
        return (out.hidden[0] * weights.astype(np.float32)).sum()

    def moved(direction: Any, step: float) -> np.ndarray:
        return in_float64(exact, jax.tree.map(lambda x, along: x + step * along, exact_adapter, direction), tokens)

    gradient = jax.grad(loss)(adapter)
    for of_routers in (False, True)[: 1 if name == "lora" else 2]:
        direction = jax.tree_util.tree_map_with_path(
            lambda path, x, own=of_routers: rng.standard_normal(x.shape) * x.std() * (is_router(path) == own),
            exact_adapter,
        )
        difference = moved(direction, DIFFERENCE) - moved(direction, -DIFFERENCE)
        terms = jax.tree.leaves(jax.tree.map(lambda g, along: np.ravel(f64(g) * along), gradient, direction))
        terms, wanted = np.concatenate(terms), (difference * weights).sum() / (2 * DIFFERENCE)
        np.testing.assert_allclose(terms.sum(), wanted, rtol=0, atol=1e-4 * np.linalg.norm(terms))


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_rows_of_different_adapters(models, family: str):
    """Routers at every position, and a LoRA, in one batch."""
    model = models(family)
    bank, names, tokens = (
        AdapterBank(model, max_experts=17),
        (*PLACES, "lora"),
        np.asarray(tokens_of(model, (1, TOKENS))),
    )
    for name in names:
        bank.load(name, make(name, model))
    ids = jnp.array([bank.adapters[name].id for name in names])
    found = model.run(np.repeat(tokens, len(names), 0), adapter=of_rows(bank.stacked, ids), unroll=True).hidden
    exact = jax.tree.map(f64, model)
    for name, hidden in zip(names, found, strict=True):
        assert_close(hidden, in_float64(exact, jax.tree.map(f64, make(name, model)), tokens[0]))
