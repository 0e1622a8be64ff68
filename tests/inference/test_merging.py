"""Decoding by merging against decoding unmerged: tokens, logits, experts, memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generation import generate, prompt_of
from merging_cases import MERGING, adapted, cases, copied, strategies
from random_models import random_adapter

from adafuse_jax import Backbone, load_backbone
from adafuse_jax.data.chat import encode_prompt, load_tokenizer
from adafuse_jax.data.examples import Message
from adafuse_jax.inference import programs
from adafuse_jax.inference.backends.merged import Merged, unmerge, update_merged
from adafuse_jax.inference.backends.registry import choose_backend
from adafuse_jax.inference.config import TOKEN_STRATEGIES
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.state import DecodeState
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.kv_cache import KVCache


def stepwise_logits(model: Backbone, adapter: Any, strategy: str, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of a text read token by token, every token merged."""
    backend = choose_backend(strategy, copied(model), adapter)
    step, cache, found = jax.jit(backend.step), KVCache.empty(model.config, 1, 64, model.dtype), []
    carry = backend.take_carry()
    for position, token in enumerate(tokens):
        given = jnp.array([token]), jnp.array([position]), cache, jnp.array([False])
        logits, _, cache, carry = step(backend.reads, carry, *given)
        found.append(np.asarray(logits[0]))
    return np.array(found)


class TestEqualsUnmerged:
    @cases
    def test_greedy_tokens(self, models, case):
        model, adapter = adapted(case, models)
        prompt = prompt_of(model, 9)
        wanted = generate(Engine(model, adapter, eos_ids=()), prompt, n=24)
        for strategy in MERGING:
            assert generate(Engine(copied(model), adapter, strategy=strategy, eos_ids=()), prompt, n=24) == wanted

    @strategies
    @cases
    def test_logits(self, models, case, strategy):
        model, adapter = adapted(case, models)
        tokens = np.array(prompt_of(model, 24))
        wanted = np.asarray(model(tokens[None], adapter=adapter).logits[0])
        assert np.abs(wanted - model(tokens[None]).logits[0]).max() > 0.1 * wanted.std()
        difference = np.abs(stepwise_logits(model, adapter, strategy, tokens) - wanted) / wanted.std()
        assert np.median(difference) < 1e-5
        assert difference.max() < 1e-4

    @pytest.mark.parametrize("strategy", ["golden", "simple"])
    @pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LINEARS], ids=["q_v", "all"])
    def test_bfloat16_logits_err_as_much_as_those_of_another_summation_order(self, models, targets, strategy):
        """Errors are against the same weights in fp32: unmerged step by step and unmerged all at once differ only in
        the order of sums. Merged weights are rounded once more, and like every weight, to 2^-9."""
        bf16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models("llama_gqa"))
        experts = random_adapter(bf16.config, targets=targets)
        experts.experts = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), experts.experts)
        exact, exact_experts = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), m) for m in (bf16, experts))
        tokens = np.array(prompt_of(bf16, 48))
        wanted = np.asarray(exact(tokens[None], adapter=exact_experts).logits[0])

        @jax.jit
        def unmerged_step(token, position, cache):
            out = bf16(token, adapter=experts, positions=position, cache=cache, unroll=True)
            return out.logits[0, 0], out.cache

        cache, unmerged = KVCache.empty(bf16.config, 1, 64, bf16.dtype), []
        for position, token in enumerate(tokens):
            logits, cache = unmerged_step(jnp.array([[token]]), jnp.array([[position]]), cache)
            unmerged.append(np.asarray(logits))
        at_once = np.asarray(bf16(tokens[None], adapter=experts).logits[0])
        merged = stepwise_logits(bf16, experts, strategy, tokens)
        error, *orders = (np.sqrt(np.mean((x - wanted) ** 2)) for x in (merged, np.array(unmerged), at_once))
        assert 0 < error < np.sqrt(2) * max(orders)

    @strategies
    def test_sampled_tokens_of_a_seed(self, models, strategy):
        model = models("llama_gqa")
        adapter, prompt, sampling = random_adapter(model.config), prompt_of(model, 5), Sampling.of(temperature=1.0)
        one, other = Engine(model, adapter, eos_ids=()), Engine(copied(model), adapter, strategy=strategy, eos_ids=())
        tokens = [generate(e, prompt, n=30, sampling=sampling, seed=s) for e in (one, other) for s in (1, 2)]
        assert tokens[0] == tokens[2] != tokens[1] == tokens[3]

    @strategies
    def test_reported_experts(self, models, strategy):
        model = models("llama_gqa")
        adapter, prompt = random_adapter(model.config, targets=("gate_proj",)), prompt_of(model, 5)
        one, other = Engine(model, adapter, eos_ids=()), Engine(copied(model), adapter, strategy=strategy, eos_ids=())
        wanted, found = ([t.experts for t in e.generate([prompt], max_new_tokens=9)] for e in (one, other))
        assert wanted[0] is found[0] is None
        np.testing.assert_array_equal(found[1:], wanted[1:])

    @pytest.mark.parametrize(
        "targets", [("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")], ids=["q_v", "ffn"]
    )
    @pytest.mark.slow
    def test_500_tokens_of_a_real_model(self, stories260k_dir, targets):
        model, tokenizer = load_backbone(stories260k_dir, "float32"), load_tokenizer(stories260k_dir)
        adapter, bos = random_adapter(model.config, targets=targets), [tokenizer.bos_token_id]
        wanted = generate(Engine(model, adapter, eos_ids=()), bos, n=510)
        assert len(wanted[0]) == 510
        assert len(set(wanted[0])) > 30
        assert generate(Engine(model, adapter, strategy="golden", eos_ids=()), bos, n=510) == wanted

    @pytest.mark.slow
    def test_64_tokens_of_a_chat_model(self, smollm2_dir):
        model = load_backbone(smollm2_dir, "float32")
        adapter = random_adapter(model.config, targets=("q_proj", "v_proj"))
        question = (Message("user", "Explain how rainbows form, in three sentences."),)
        prompt = encode_prompt(question, load_tokenizer(smollm2_dir)).tolist()
        wanted = generate(Engine(model, adapter, eos_ids=()), prompt, n=64)
        assert len(set(wanted[0])) > 30
        assert generate(Engine(model, adapter, strategy="golden", eos_ids=()), prompt, n=64) == wanted

    def test_experts_of_another_type_are_cast(self, models):
        """Experts of an adapter that was never saved: fp32, with a bfloat16 backbone."""
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models("llama_gqa"))
        adapter = random_adapter(model.config)
        engine = Engine(model, adapter, strategy="golden", eos_ids=())
        assert len(generate(engine, prompt_of(model, 5), n=4)[0]) == 4
        assert adapter.experts["q_proj"].A[...].dtype == jnp.float32
        assert engine.adapter.router.weight[...].dtype == jnp.float32


def random_backbone(num_layers: int, dtype: Any = jnp.float32, width: int = 64) -> tuple[Backbone, Any]:
    config = ModelConfig(
        model_type="llama", vocab_size=64, embed_dim=width, hidden_dim=2 * width, num_layers=num_layers, num_heads=4,
        num_kv_heads=2, head_dim=width // 4, max_position_embeddings=2048, norm_eps=1e-5,
    )  # fmt: skip
    model = Backbone(config, dtype=dtype, rngs=nnx.Rngs(0))
    adapter = random_adapter(config, rank=16)
    adapter.experts = jax.tree.map(lambda leaf: leaf.astype(dtype), adapter.experts)
    return model, adapter


def compiled_step(engine: Engine) -> Any:
    backend, state = engine.backend, DecodeState.empty(engine.config, 1, 128, engine.model.dtype)
    carry = backend.merged if engine.strategy in TOKEN_STRATEGIES else None
    given = backend.step, backend.reads, carry, state, Sampling.of(), jnp.array([[-1]])
    return programs.decode_step.lower(*given, pad_id=0).compile().memory_analysis()


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class TestMemory:
    @pytest.mark.parametrize("strategy", ["golden", "switch"])
    def test_step_updates_weights_and_cache_in_place(self, strategy):
        model, adapter = random_backbone(num_layers=4)
        cache, bare = nbytes(KVCache.empty(model.config, 1, 128, model.dtype)), compiled_step(Engine(model, eos_ids=()))
        engine = Engine(model, adapter, strategy=strategy, eos_ids=())
        weights, found = nbytes(engine.backend.merged.weights), compiled_step(engine)
        assert found.alias_size_in_bytes >= weights + cache
        copies = {"golden": 2, "switch": 1}[strategy]
        others = nbytes(model) - weights + nbytes(adapter) + cache
        assert found.argument_size_in_bytes == pytest.approx(copies * weights + others, abs=1000)
        # On the CPU the bare step, too, copies the slice of every layer.
        assert found.temp_size_in_bytes < bare.temp_size_in_bytes + weights / 16

    def test_merge_needs_no_more_than_a_layer(self):
        """A layer of 24, for the products of both tokens' experts."""
        model, adapter = random_backbone(num_layers=24)
        switch, golden = (Merged.nothing(strategy, model, adapter) for strategy in ("switch", "golden"))

        def merge(model, adapter, merged, x):
            routing = adapter.router(x)
            chosen = routing.experts[0, 0], routing.gates[0, 0]
            return update_merged(adapter, model, merged, *chosen, hold=jnp.array(False))

        x, weights = jnp.ones((1, 1, model.config.embed_dim)), nbytes(switch.weights)
        in_step = jax.jit(merge, donate_argnums=2)
        for program in (
            unmerge.lower(adapter, switch),
            in_step.lower(model, adapter, golden, x),
            in_step.lower(choose_backend("switch", copied(model), adapter).reads[0], adapter, switch, x),
        ):
            found = program.compile().memory_analysis()
            assert found.alias_size_in_bytes >= weights
            assert found.temp_size_in_bytes < weights / 4

    @pytest.mark.parametrize("strategy", ["golden", "switch"])
    def test_weights_never_move(self, strategy):
        model, adapter = random_backbone(num_layers=2)
        check_pointers(Engine(model, adapter, strategy=strategy, eos_ids=()), steps=1000)


def check_pointers(engine: Engine, steps: int) -> None:
    def pointers() -> dict[str, int]:
        return {name: w.unsafe_buffer_pointer() for name, w in engine.backend.merged.weights.items()}

    before, count = pointers(), 0
    for _ in engine.generate([[1]], max_new_tokens=steps + 1):
        assert pointers() == before
        count += 1
    assert (count, pointers()) == (steps + 1, before)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
class TestOnTheGPU:
    """Tests at a size that the kernels take, in bfloat16."""

    @pytest.mark.parametrize("strategy", ["golden", "switch"])
    def test_memory_and_pointers(self, strategy):
        model, adapter = random_backbone(num_layers=8, dtype=jnp.bfloat16, width=1024)
        engine = Engine(model, adapter, strategy=strategy, eos_ids=())
        weights, found = nbytes(engine.backend.merged.weights), compiled_step(engine)
        assert found.alias_size_in_bytes >= weights
        bare = compiled_step(Engine(model if strategy == "golden" else engine.model, eos_ids=()))
        assert found.temp_size_in_bytes < bare.temp_size_in_bytes + weights / 8 / 4  # a quarter of a layer
        check_pointers(engine, steps=1000)

    @strategies
    def test_logits_err_as_unmerged_ones_do(self, strategy):
        model, adapter = random_backbone(num_layers=4, dtype=jnp.bfloat16, width=512)
        exact, exact_adapter = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), m) for m in (model, adapter))
        tokens = np.array(prompt_of(model, 24))
        with jax.default_matmul_precision("highest"):
            wanted = np.asarray(exact(tokens[None], adapter=exact_adapter).logits[0])
        unmerged = np.asarray(model(tokens[None], adapter=adapter).logits[0])
        error, unmerged_error = (
            np.sqrt(np.mean((x - wanted) ** 2)) for x in (stepwise_logits(model, adapter, strategy, tokens), unmerged)
        )
        assert 0 < error < 2 * unmerged_error
