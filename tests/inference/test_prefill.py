"""The lengths of a prompt's chunks, and prefill by kernels, interpreted, against prefill in XLA ops."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from goldens.family_models import CASES as FAMILY_CASES
from goldens.family_models import write_model_dir
from random_models import POSITIONS, random_adapter, random_method

from adafuse_jax import load_backbone
from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.prompts import PromptAdapter, all_experts_reason
from adafuse_jax.adapters.stacked import NO_ADAPTER, of_rows
from adafuse_jax.inference import prefill as prefill_module
from adafuse_jax.inference import slots as slots_module
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prefill import CHUNKS, MAX_TOKENS, Prefill, adapter_of_prompts, chunk_lengths, largest_chunk
from adafuse_jax.inference.programs import prefill_chunk, prefill_chunk_by_kernels
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.state import DecodeState
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache


def test_little_is_padding_and_no_chunk_is_needless():
    for length in range(1, 4500):
        sizes = chunk_lengths(length)
        padding = sum(sizes) - length
        assert 0 <= padding <= max(128, length / 2), length
        assert padding < sizes[-1], "a chunk without a token"
        assert len(sizes) <= -(-length // CHUNKS[-1]) + 2
    assert [chunk_lengths(n) for n in (128, 512, 1100, 2048)] == [[128], [512], [1024, 128], [2048]]
    assert chunk_lengths(1100, 256) == [256] * 4 + [128]


def test_other_chunks_are_no_faster():
    """Any three chunks, by the cost that `chunk_lengths` has in mind: a twentieth faster at most."""

    def cost(sizes):
        return sum(max(size, 128) + 128 for size in sizes)

    plans = [plan for count in (1, 2, 3) for plan in itertools.combinations_with_replacement(CHUNKS, count)]
    for length in (1, 65, 129, 300, 500, 700, 1025, 1100, 1300, 1600, 1700, 1920, 2000):
        best = min(cost(plan) for plan in plans if sum(plan) >= length)
        assert best <= cost(chunk_lengths(length)) <= 1.05 * best, length


@pytest.mark.parametrize("rows", [1, 9, 32, 1000])
def test_tokens_of_a_program_are_bounded(rows):
    prompt = [1] * 5000
    made = [
        Row(
            slot=i, prompt=prompt, budget=1, sampling=Sampling.of(), seed=0, sample=i, stop_ids=(), reuse_cache=False,
            cached=0 if i else 100,
        )
        for i in range(rows)
    ]  # fmt: skip
    prefill = Prefill.of(made, 4, whole=True, most=largest_chunk(rows, beside_rows=False, by_kernels=True))
    assert sum(prefill.sizes) >= len(prompt) - (100 if rows == 1 else 0)
    assert rows * max(prefill.sizes) <= max(MAX_TOKENS, CHUNKS[0] * rows)


def test_largest_chunks():
    of_one = [largest_chunk(1, beside_rows=beside, by_kernels=by) for beside in (False, True) for by in (True, False)]
    assert of_one == [2048, 1024, 256, 256]


def prefilled(model, adapter, chunks, slots, *, by_kernels):
    """Logits and cache after chunks of two prompts in slots 2 and 0 of three, whose cache was not empty."""
    rng = np.random.default_rng(0)
    state = DecodeState.empty(model.config, 3, slots, model.dtype)
    old = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), state.cache)
    state, logits = replace(state, cache=old), jnp.zeros((2, model.config.vocab_size))
    rows, starts = jnp.array([2, 0]), np.zeros(2, np.int32)
    program = prefill_chunk_by_kernels if by_kernels else prefill_chunk
    for size, lengths in chunks:
        tokens = rng.integers(0, model.config.vocab_size, (2, size), np.int32)
        state, logits, _ = program(model, adapter, state, logits, tokens, starts, lengths, rows, pad_id=0)
        starts = starts + lengths
    return logits, state.cache


@pytest.mark.parametrize(("family", "targets"), [("mistral_window", "attention"), ("qwen3", "after_attention")])
def test_by_kernels(models, family, targets):
    """The second chunk is behind the first; one row has nothing in it. What a slot without a prompt has stays."""
    model = models(family)
    adapter = random_adapter(model.config, targets=POSITIONS[targets])
    chunks = (32, np.array([32, 9], np.int32)), (16, np.array([13, 0], np.int32))
    (wanted, cache), (found, by_kernels) = (
        prefilled(model, adapter, chunks, 64, by_kernels=by_kernels) for by_kernels in (False, True)
    )
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)
    for new, old in zip(jax.tree.leaves(by_kernels), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", quick.first(("gemma2", "olmo2", "cohere2")))
def test_by_kernels_of_other_blocks(tmp_path, family):
    """Soft caps and a scale; no norm in front; a parallel block. The router is asked before the layers."""
    model = load_backbone(write_model_dir(FAMILY_CASES[f"{family}_0"], tmp_path), "float32")
    adapter = random_adapter(model.config, targets=POSITIONS["attention"])
    chunks = [(32, np.array([32, 9], np.int32)), (16, np.array([13, 0], np.int32))]
    wanted, found = (prefilled(model, adapter, chunks, 64, by_kernels=by)[0] for by in (False, True))
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)


def test_by_kernels_with_the_chosen_experts(models, monkeypatch):
    """128 tokens; linears that share an input, and one that is not adapted."""
    model = models("llama_gqa")
    targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    adapter = random_adapter(model.config, rank=16, targets=targets)
    chunks = [(64, np.array([64, 50], np.int32))]
    wanted, _ = prefilled(model, adapter, chunks, 64, by_kernels=False)
    assert "float32" in str(all_experts_reason(adapter, model.config, 512, model.dtype))
    monkeypatch.setattr(prefill_module, "all_experts_reason", lambda *_: None)
    found, _ = prefilled(model, adapter, chunks, 64, by_kernels=True)
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["llama_gqa", *quick.first(("granite", "gemma2", "cohere2"))])
def test_all_linears_by_kernels_with_the_chosen_experts(models, monkeypatch, tmp_path, family):
    """Experts of the last linears of a block are added to x; not where a block's output is scaled, or has a norm. GELU; a
    parallel block."""
    if family == "llama_gqa":
        model = models(family)
    else:
        model = load_backbone(write_model_dir(FAMILY_CASES[f"{family}_0"], tmp_path), "float32")
    adapter = random_adapter(model.config, rank=16, targets=LINEARS)
    chunks = [(64, np.array([64, 50], np.int32))]
    wanted, _ = prefilled(model, adapter, chunks, 64, by_kernels=False)
    monkeypatch.setattr(prefill_module, "all_experts_reason", lambda *_: None)
    found, _ = prefilled(model, adapter, chunks, 64, by_kernels=True)
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("only_chosen", [True, False])
def test_a_bank_by_kernels(models, monkeypatch, only_chosen):
    """Adapters of other sizes, a LoRA and a row without an adapter; each reads with its own experts' places in the bank, in
    which others have been loaded before. No program asks in its layers which is the first."""
    model = models("llama_gqa")
    adapters = {
        "others": random_adapter(model.config, 3, rank=16, targets=("o_proj",)),
        "many": random_adapter(model.config, 1, num_experts=6, rank=16, top_k=3, targets=LINEARS),
        "few": random_adapter(model.config, 2, num_experts=2, rank=3, top_k=1, targets=("v_proj", "up_proj")),
        "lora": random_method("lora", model.config, 4, rank=5, targets=("down_proj",)),
    }
    bank = AdapterBank(model, max_experts=16)
    before = bank.load("before", random_adapter(model.config, 5, num_experts=3, rank=16, targets=LINEARS))
    loaded = {name: bank.load(name, adapter) for name, adapter in [*adapters.items()][1:]}
    assert set(bank.stacked.routers) == {"q_proj"}
    if only_chosen:
        monkeypatch.setattr(prefill_module, "all_experts_reason", lambda *_: None)

    def run(adapters, slot, *, by_kernels):
        rng = np.random.default_rng(0)
        state = DecodeState.empty(model.config, 2, 128, model.dtype, with_bank=True)
        logits, start = jnp.zeros((1, model.config.vocab_size)), 0
        program = prefill_chunk_by_kernels if by_kernels else prefill_chunk
        for size, length in ((64, 64), (64, 21)):
            tokens = rng.integers(0, model.config.vocab_size, (1, size), np.int32)
            given = tokens, np.array([start], np.int32), np.array([length], np.int32), jnp.array([slot])
            state, logits, _ = program(
                model, bank.stacked, state, logits, *given, pad_id=0, adapters=np.array([adapters], np.int32)
            )
            start += length
        return logits, state.cache.k[:, slot], state.cache.v[:, slot]

    for number in (before.id, *(one.id for one in loaded.values()), NO_ADAPTER):
        wanted, found = (run(number, 1, by_kernels=by) for by in (False, True))
        for new, old in zip(found, wanted, strict=True):
            np.testing.assert_allclose(new, old, atol=3e-4, rtol=3e-4, err_msg=str(number))
    tokens = jnp.zeros((1, 64), jnp.int32)
    of_row = of_rows(bank.stacked, jnp.array([before.id]))
    prompts = adapter_of_prompts(model, of_row, tokens)
    assert isinstance(prompts, PromptAdapter)
    assert (prompts.pairs is not None) == only_chosen
    if not only_chosen:  # the kernels have conditions of their own
        asks = ["cond[" in str(jax.make_jaxpr(partial(model.run, tokens))(adapter=one)) for one in (of_row, prompts)]
        assert asks == [True, False]
    bank.load("others", adapters["others"])  # whose router must wait for attention
    assert "later linear" in str(all_experts_reason(bank.stacked, model.config, 64, jnp.dtype("bfloat16")))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_a_bank_by_compiled_kernels():
    """Logits of rows of a bank in bfloat16 are those of separate XLA ops, as two orders of summation agree."""
    config = ModelConfig(
        model_type="llama", vocab_size=512, embed_dim=1024, hidden_dim=2816, num_layers=3, num_heads=8, num_kv_heads=4,
        head_dim=128, max_position_embeddings=1024, norm_eps=1e-5,
    )  # fmt: skip
    model = Backbone(config, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    bank = AdapterBank(model, max_experts=20)
    adapters = [
        random_adapter(config, 0, num_experts=8, rank=64, targets=LINEARS),
        random_adapter(config, 1, num_experts=4, rank=16, targets=("v_proj", "down_proj")),
        random_method("lora", config, 2, rank=32, targets=("q_proj", "up_proj")),
    ]
    ids = [NO_ADAPTER, *(bank.load(str(number), adapter).id for number, adapter in enumerate(adapters))]
    assert all_experts_reason(bank.stacked, config, 256, model.dtype) is None

    def logits(number, *, by_kernels):
        state = DecodeState.empty(config, 2, 256, model.dtype, with_bank=True)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 256), np.int32)
        given = tokens, np.zeros(1, np.int32), np.array([201], np.int32), jnp.array([1])
        program = prefill_chunk_by_kernels if by_kernels else prefill_chunk
        empty = jnp.zeros((1, config.vocab_size))
        ids = np.array([number], np.int32)
        return np.asarray(program(model, bank.stacked, state, empty, *given, pad_id=0, adapters=ids)[1], np.float64)

    found, wanted = (np.stack([logits(number, by_kernels=by) for number in ids]) for by in (True, False))
    sizes = np.linalg.norm(wanted, axis=(1, 2))
    assert (np.linalg.norm(found - wanted, axis=(1, 2)) < 0.02 * sizes).all()
    assert (
        np.linalg.norm(wanted[1:] - wanted[0], axis=(1, 2)) > 0.1 * sizes[1:]
    ).all()  # the adapters change something


def test_all_experts_are_multiplied_where_that_is_as_fast(models):
    model = models("llama_gqa")
    sixteen = jnp.dtype("bfloat16")

    def reason(tokens=1024, **settings):
        adapter = random_adapter(
            model.config, **({"num_experts": 8, "rank": 32, "targets": POSITIONS["attention"]} | settings)
        )
        adapter.experts = jax.tree.map(lambda leaf: leaf.astype(sixteen), adapter.experts)
        config = replace(model.config, embed_dim=64, num_heads=2, num_kv_heads=2, head_dim=32)
        return all_experts_reason(adapter, config, tokens, sixteen)

    assert reason() is None
    assert "64 tokens are few" in reason(64)
    assert "16 tokens are no multiple of 64" in reason(16)
    assert "rank 3" in reason(rank=3)
    assert "later linear" in reason(targets=("o_proj",))
    assert "E·R = 128 columns are few" in reason(rank=16)
    assert "a token uses 3 of 8 experts" in reason(top_k=3)


def test_other_adapters_keep_their_products_and_the_log_says_so(models, caplog):
    model = models("llama_gqa")
    lora = LoRA(AdapterConfig(adapter="lora", rank=2, targets=("q_proj",)), model.config, rngs=nnx.Rngs(0))
    caplog.set_level(logging.DEBUG, "adafuse_jax.inference.prefill")
    assert adapter_of_prompts(model, lora, jnp.zeros((1, 16), int)) is lora
    assert "16 prompt tokens: products of all experts (LoRA has products of its own)" in caplog.text


def compiled(slots: int, targets: tuple[str, ...], sharding: Any = None) -> tuple[str, int]:
    """(HLO, bytes of temporaries) of a chunk of 512 tokens by kernels, with a cache of so many slots."""
    config = ModelConfig(
        model_type="llama", vocab_size=1000, embed_dim=2048, hidden_dim=4096, num_layers=4, num_heads=16, num_kv_heads=16,
        head_dim=128, max_position_embeddings=2**15, norm_eps=1e-5,
    )  # fmt: skip
    sixteen, settings = jnp.dtype("bfloat16"), AdapterConfig(targets=targets, num_experts=8, rank=64, top_k=2)

    def make():
        adapter = AdaFuse(settings, config, rngs=nnx.Rngs(0))
        adapter.experts = jax.tree.map(lambda leaf: leaf.astype(sixteen), adapter.experts)
        state = DecodeState.empty(config, 1, slots, sixteen)
        ints = jnp.zeros((1, 512), jnp.int32), *(jnp.zeros(1, jnp.int32),) * 2
        return Backbone(config, dtype=sixteen, rngs=nnx.Rngs(0)), adapter, state, jnp.zeros((1, 1000)), *ints

    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make))
    program = prefill_chunk_by_kernels.lower(*given, None, pad_id=0).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_neither_weights_nor_cache_are_copied():
    """Temporaries do not grow with the cache; XLA makes no array of a weight's shape, and one of the cache's by updates."""
    text, temporaries = compiled(1024, LINEARS)
    made = re.findall(r"= bf16\[([\d,]+)\]\S* (fusion|copy|concatenate|dynamic-slice)\(.*?(?:calls=(\S+),|$)", text)
    weights = {"2048,2048", "4096,2048", "2048,4096", "8,64,2048", "8,64,4096", "8,2048,64", "8,4096,64"}
    weights |= {f"1,{shape}" for shape in weights}
    in_place = text.count("calls=%dynamic-slice-fusion")
    assert in_place == 7, "every linear reads its layer's weights from the stack"
    outside = [
        made_by for made_by in made if "dynamic-slice-fusion" not in made_by[2] and made_by[1] != "dynamic-slice"
    ]
    assert not [shape for shape, _, _ in outside if shape in weights]
    assert text.count('"beta":1') == 5, "cuBLAS adds to q, k and v, and to x"
    activations = {"512,2048", "512,4096", "1,512,2048", "1,512,4096"}
    assert not [shape for shape, how, _ in made if how == "copy" and shape in activations]
    of_cache = [(how, calls) for shape, how, calls in outside if shape.startswith("4,1,1024,")]
    assert len(of_cache) == 2
    assert all(how == "fusion" and "scatter" in calls for how, calls in of_cache)
    assert compiled(4096, LINEARS)[1] == pytest.approx(temporaries, rel=0.01)


def test_rows_by_kernels_get_the_same_tokens(models, monkeypatch):
    """A row, then one in another slot whose prompt begins alike, and a third that takes the first one's place."""
    model = models("llama_gqa")
    engine = Engine(model, random_adapter(model.config), strategy="unmerged", eos_ids=())
    prompts = [[*range(5, 19)], [*range(5, 15), 4, 4, 4], [7, 8, 9]]

    def answers() -> list[list[int]]:
        slots = engine.slots(2, context_length=64)
        for prompt in prompts[:2]:
            slots.insert(prompt, max_new_tokens=5, reuse_cache=True)
            slots.step()
        slots.evict(0)
        slots.insert(prompts[2], max_new_tokens=5)
        while slots.step() is not None:
            pass
        assert slots.rows[1].cached == 10
        return [slots.evict(slot).token_ids for slot in (0, 1)]

    wanted = answers()
    monkeypatch.setattr(slots_module, "prefills_by_kernels", lambda *_: True)
    engine._warm.clear()
    programs = prefill_chunk_by_kernels._cache_size()
    assert answers() == wanted
    assert len({*map(tuple, wanted)}) == 2
    assert prefill_chunk_by_kernels._cache_size() > programs, "prefilled without kernels"


@pytest.mark.parametrize("slots", [1, 256, 257, 2**17, 2**20])
def test_a_copy_is_at_most_four_times_as_long_as_the_prefix(slots):
    sizes = KVCache(*[jax.ShapeDtypeStruct((2, 3, slots, 1, 4), jnp.bfloat16)] * 2).copied_positions()
    assert sizes[0] <= 256
    assert sizes[-1] == slots
    assert all(size < following <= 4 * size for size, following in itertools.pairwise(sizes))


@pytest.mark.parametrize(("slots", "length", "copied"), [(300, 150, 256), (300, 299, 300), (64, 1, 64)])
def test_nothing_behind_a_copied_prefix_is_copied(slots, length, copied):
    """The row that it is copied from may have NaN there."""
    values = np.random.default_rng(0).standard_normal((2, 3, slots, 1, 4)).astype(np.float32)
    values[:, 0, length:] = np.nan
    cache = KVCache(jnp.asarray(values), jnp.asarray(values))
    assert next(size for size in cache.copied_positions() if size >= length) == copied
    cache = cache.with_prefix(*map(jnp.int32, (0, 1, length)), copied=copied)
    for found in (np.asarray(cache.k), np.asarray(cache.v)):
        np.testing.assert_array_equal(found[:, 1, :length], values[:, 0, :length])
        np.testing.assert_array_equal(found[:, 1, length:copied], 0)
        np.testing.assert_array_equal(found[:, 1, copied:], values[:, 1, copied:])
        np.testing.assert_array_equal(found[:, [0, 2]], values[:, [0, 2]])
