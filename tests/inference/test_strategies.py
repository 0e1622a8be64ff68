"""Strategies of decoding: their choice, the weights they leave, generations that end early, and refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation import generate, prompt_of
from merging_cases import CASES, adapted, cases, copied, strategies
from random_models import random_adapter

from adafuse_jax import Backbone, UserError
from adafuse_jax.inference import programs, slots
from adafuse_jax.inference.backends import megakernel, portable
from adafuse_jax.inference.backends.registry import BACKENDS
from adafuse_jax.inference.backends.unfused import LayerKernels
from adafuse_jax.inference.config import TOKEN_STRATEGIES, Strategy
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.quantised import quantised
from pallas_kernels.quantised import QuantLayout

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
"""Largest relative error of one rounding."""


def weights_of(model: Backbone) -> list[np.ndarray]:
    return [np.array(leaf, copy=True) for leaf in jax.tree.leaves(model)]


class TestWithTheMegakernel:
    """The megakernel gets the merged weights where it can run. Here the modules stand in for it."""

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        self.traced = []

        def step(model, adapter, fused, token, positions, cache):
            self.traced.append((adapter is None, sorted(fused.a)))
            out = model.run(token[:, None], adapter=adapter, positions=positions[:, None], cache=cache, unroll=True)
            experts = None if adapter is None else out.routing.of_first_token()
            return model.logits(out.hidden[:, 0]), experts, out.cache

        def unsupported_reason(model, batch=1, adapter=None):
            return "it takes 2 rows" if batch > 2 else None

        monkeypatch.setattr(megakernel, "fused_step", step)
        monkeypatch.setattr(megakernel, "fused_unsupported_reason", unsupported_reason)

    @pytest.mark.parametrize("strategy", ["golden", "switch"])
    @cases
    def test_it_gets_merged_weights(self, models, case, strategy):
        model, adapter = adapted(case, models)
        prompt = prompt_of(model, 9)
        wanted = generate(Engine(model, adapter, strategy="unmerged", eos_ids=()), prompt, n=24)
        engine = Engine(copied(model), adapter, strategy=strategy, eos_ids=())
        assert generate(engine, prompt, n=24) == wanted
        assert self.traced == [(True, [])]  # once, without an adapter

    def test_default_is_fused_and_large_batches_are_not(self, models, caplog):
        model, adapter = adapted(CASES[0], models)
        engine = Engine(model, adapter, eos_ids=())
        assert (engine.strategy, Engine(model).strategy) == ("fused", "fused")
        prompts = [prompt_of(model, n) for n in (4, 9, 6)]
        assert [t.ids.tolist() for t in engine.generate(prompts[:2], max_new_tokens=5)]
        assert self.traced == [(False, ["q_proj", "v_proj"])]
        for _ in range(2):
            with caplog.at_level("DEBUG", logger="adafuse_jax.inference"):
                assert len([t.ids.tolist() for t in engine.generate(prompts, max_new_tokens=5)]) == 5
        assert len(self.traced) == 1
        assert (engine.strategy_of(2), engine.strategy_of(3)) == ("fused", "unmerged")
        assert caplog.text.count("decoding 3 prompts unfused: the megakernel cannot, as it takes 2 rows") == 1
        with pytest.raises(UserError, match="fused cannot run: it takes 2 rows; decode fewer"):
            next(Engine(model, adapter, strategy="fused", eos_ids=()).generate(prompts, max_new_tokens=5))

    def test_larger_batches_get_the_layer_kernels_where_those_run(self, models, monkeypatch):
        monkeypatch.setattr(portable, "unsupported_reason", lambda model, adapter, batch: None)
        backend = Engine(*adapted(CASES[0], models), eos_ids=()).backend
        assert backend.for_batch(2) is backend
        assert isinstance(backend.for_batch(3), LayerKernels)


@pytest.mark.parametrize("are_kernels", [True, False])
def test_default_is_the_faster_where_both_kernels_can(models, monkeypatch, caplog, are_kernels):
    """The layer kernels for many rows in plain weights, but only where they run; and what is asked for by name."""
    monkeypatch.setattr(megakernel, "fused_unsupported_reason", lambda *_, **__: None)
    monkeypatch.setattr(portable, "unsupported_reason", lambda *_: None if are_kernels else "there are none")
    caplog.set_level("DEBUG", logger="adafuse_jax.inference")
    fused, faster = megakernel.Megakernel, LayerKernels if are_kernels else megakernel.Megakernel
    model, adapter = adapted(CASES[0], models)
    int8, int4 = (quantised(model, layout) for layout in (QuantLayout(8), QuantLayout(4, 16)))

    def kinds(model, rows, **options):
        engine = Engine(model, adapter, eos_ids=(), **options)
        return [type(engine.backend.for_batch(n)) for n in rows]

    assert kinds(model, (1, 16, 17, 32)) == [fused, fused, faster, faster]
    assert kinds(int8, (1, 32)) == kinds(int4, (1, 32)) == [fused, fused]
    assert kinds(model, (1, 32), strategy="fused") == [fused, fused]
    assert (
        "decoding 17 prompts unfused: the layer kernels decode more than 16 rows faster" in caplog.text
    ) == are_kernels


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_default_over_devices_is_what_has_run_there(models, monkeypatch, devices):
    """Llama's block over two GPUs; codes, and norms behind blocks, over one."""
    monkeypatch.setattr(megakernel, "fused_unsupported_reason", lambda *_, **__: None)
    monkeypatch.setattr(megakernel, "mesh_of", lambda model: SimpleNamespace(size=devices))
    model = models("llama_mha")
    gemma = SimpleNamespace(layers=model.layers, config=replace(model.config, norm_placement="both"))
    found = [megakernel.default_unsupported_reason(m) for m in (model, quantised(model, QuantLayout(8)), gemma)]
    asked = "over several devices it must be asked for, if weights are quantised or norms stand behind blocks"
    if devices == 1:
        assert found == [None] * 3
    else:
        assert found == [None if devices == 2 else "over more than 2 devices it must be asked for", asked, asked]


def test_default_without_the_megakernel_is_unmerged_and_the_log_says_why(models, caplog):
    with caplog.at_level("DEBUG", logger="adafuse_jax.inference"):
        engine = Engine(models("llama_mha"))
    if jax.default_backend() == "cpu":
        assert engine.strategy == "unmerged"
        assert "decoding unmerged: fused is not used, as it needs a Hopper GPU" in caplog.text
        assert {record.levelname for record in caplog.records} == {"DEBUG"}  # on a CPU nobody expects it


class TestTheBackbone:
    @pytest.mark.parametrize("strategy", ["golden", "simple"])
    def test_stays_bit_identical(self, models, strategy):
        model = models("qwen2_tied")
        before = weights_of(model)
        engine = Engine(model, random_adapter(model.config), strategy=strategy, eos_ids=())
        generate(engine, prompt_of(model, 5), n=20)
        for leaf, was in zip(weights_of(engine.model), before, strict=True):
            np.testing.assert_array_equal(leaf, was)

    @pytest.mark.parametrize("dtype", ROUNDING)
    def test_switch_gives_back_the_weights_but_for_rounding(self, models, dtype):
        model = jax.tree.map(lambda leaf: leaf.astype(dtype), models("llama_bias"))
        before, adapter = weights_of(model), random_adapter(model.config, targets=("q_proj", "o_proj", "up_proj"))
        engine = Engine(copied(model), adapter, strategy="switch", eos_ids=())
        stream = engine.generate([prompt_of(model, 5)], max_new_tokens=30)
        next(stream), next(stream)
        merged = np.asarray(engine.backend.merged.weights["q_proj"], np.float32)
        assert np.abs(merged - np.asarray(model.layers.q_proj.weight, np.float32)).max() > 0.05
        assert len(list(stream)) == 28
        changed, steps = 0, 30 + slots.LOOKAHEAD
        for leaf, was in zip(weights_of(engine.model), before, strict=True):
            leaf, was = leaf.astype(np.float64), was.astype(np.float64)
            changed += not np.array_equal(leaf, was)
            assert np.linalg.norm(leaf - was) < np.sqrt(steps) * ROUNDING[dtype] * np.linalg.norm(was)
        assert changed == 3

    def test_warm_up_changes_no_bit(self, models):
        """Tokens: one, from prefill. The only decode step was that of the warm-up."""
        model = models("llama_gqa")
        before = weights_of(model)
        engine = Engine(copied(model), random_adapter(model.config), strategy="switch", eos_ids=())
        generate(engine, prompt_of(model, 5), n=1)
        for leaf, was in zip(weights_of(engine.model), before, strict=True):
            np.testing.assert_array_equal(leaf, was)

    def test_the_log_states_the_drift_of_switch(self, models, caplog):
        model = models("llama_gqa")
        adapter = random_adapter(model.config)
        with caplog.at_level("INFO", logger="adafuse_jax.inference"):
            Engine(model, adapter, strategy="golden")
            assert not caplog.text
            Engine(copied(model), adapter, strategy="switch")
        assert "every token rounds the weights once more" in caplog.text

    def test_switch_takes_the_weights_over(self, models):
        given = copied(models("llama_gqa"))
        engine = Engine(given, random_adapter(given.config, targets=("q_proj",)), strategy="switch", eos_ids=())
        generate(engine, prompt_of(given, 5), n=4)
        assert given.layers.q_proj.weight[...].is_deleted()
        assert not given.layers.k_proj.weight[...].is_deleted()
        assert engine.backend.reads[0].layers.q_proj.weight.get_value() is None
        assert engine.model(jnp.array([[1, 2]])).logits.shape == (1, 2, given.config.vocab_size)


class TestEndings:
    @pytest.fixture
    def engines(self, models):
        model = models("llama_gqa")
        adapter = random_adapter(model.config)

        def pair(strategy: str) -> tuple[Engine, Engine]:
            return (
                Engine(model, adapter, eos_ids=()),
                Engine(copied(model), adapter, strategy=strategy, eos_ids=()),
            )

        return pair

    @pytest.mark.parametrize("end", ["close", "throw", "drop"])
    def test_ending_early_restores(self, engines, end):
        plain, engine = engines("switch")
        prompt = prompt_of(plain.model, 9)
        stream = engine.generate([prompt], max_new_tokens=40)
        for _ in range(5):
            next(stream)
        assert np.asarray(engine.backend.merged.gates).any()
        if end == "close":
            stream.close()
        elif end == "throw":
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        else:
            del stream
        assert not np.asarray(engine.backend.merged.gates).any()
        assert generate(engine, prompt, n=20) == generate(plain, prompt, n=20)

    @strategies
    def test_generations_may_interleave(self, engines, strategy):
        plain, engine = engines(strategy)
        prompts = [prompt_of(plain.model, n, seed=n) for n in (7, 12)]
        streams = [engine.generate([p], max_new_tokens=15) for p in prompts]
        rows: list[list[int]] = [[], []]
        for turn in range(3):
            for row, stream in zip(rows, streams, strict=True):
                row += [int(next(stream).ids[0]) for _ in range(5 - (turn == 2))]
        for row, prompt in zip(rows, prompts, strict=True):
            assert row == generate(plain, prompt, n=14)[0]

    @strategies
    def test_conversation_with_a_kept_cache(self, engines, strategy):
        plain, engine = engines(strategy)
        tokens = prompt_of(plain.model, 10)
        for turn in range(4):
            answer = generate(engine, tokens, n=8, keep_cache=True)
            assert answer == generate(plain, tokens, n=8)
            tokens = [*tokens, *answer[0], *prompt_of(plain.model, 5, seed=turn)]

    @strategies
    def test_after_the_end_token(self, engines, strategy):
        """The steps that were under way when the row ended do no harm."""
        plain, engine = engines(strategy)
        prompt = prompt_of(plain.model, 5)
        free = generate(plain, prompt, n=12)[0]
        plain.eos_ids = engine.eos_ids = (free[3],)
        for _ in range(3):
            assert generate(engine, prompt, n=12) == generate(plain, prompt, n=12)

    def test_a_failed_step_is_told_and_then_what_it_cost(self, engines, monkeypatch):
        _, engine = engines("switch")
        prompt = [3, 4, 5]
        stream = engine.generate([prompt], max_new_tokens=40)
        next(stream)

        def out_of_memory(step, reads, carry, *args, **options):
            for w in carry.weights.values():
                w.delete()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of the test")

        monkeypatch.setattr(programs, "decode_step", out_of_memory)
        with pytest.raises(jax.errors.JaxRuntimeError, match="of the test"):
            next(stream)
        with pytest.raises(UserError, match="load the model again"):
            generate(engine, prompt)


class TestRefused:
    @strategies
    def test_several_rows(self, models, strategy):
        model = models("llama_gqa")
        engine = Engine(copied(model), random_adapter(model.config), strategy=strategy)
        with pytest.raises(UserError, match=f"{strategy} .* 2 prompts; give one at a time"):
            generate(engine, [3], [4])

    @strategies
    def test_no_adapter(self, models, strategy):
        with pytest.raises(UserError, match="give one, or decode unmerged"):
            Engine(models("llama_gqa"), strategy=strategy)

    def test_unknown_strategy(self, models):
        with pytest.raises(UserError, match="'fast' is none of fused, unmerged, golden"):
            Engine(models("llama_gqa"), strategy="fast")

    def test_what_the_config_knows_of_strategies_is_what_the_backends_are(self):
        assert {*get_args(Strategy), "simple"} == {*BACKENDS}
        assert {name for name, backend in BACKENDS.items() if backend.one_row} == {*TOKEN_STRATEGIES, "simple"}
