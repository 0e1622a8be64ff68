"""A bank of adapters: mixtures of them in one step against each row alone, loaded and unloaded while rows run."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import Case, by_modules, in_fp32, make
from generation import by_full_forward, prompt_of, step_by_modules
from random_models import POSITIONS, random_adapter, random_method

from adafuse_jax import UserError
from adafuse_jax.adapters.stacked import of_rows
from adafuse_jax.inference import programs
from adafuse_jax.inference.adapter_bank import AdapterBank, Bucket
from adafuse_jax.inference.backends import megakernel
from adafuse_jax.inference.backends.megakernel import Fused, fused_step
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.slots import Slots
from pallas_kernels.megakernel import executor_np, kernel_sm90

CONTEXT = 100
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def adapters_of(model) -> dict[str | None, Any]:
    """AdaFuse with routers at three positions, ranks and top-k of their own; a LoRA; none."""
    config = model.config
    return {
        "all": random_adapter(config, 0),
        "after attention": random_adapter(
            config, 1, targets=POSITIONS["after_attention"], num_experts=3, rank=4, top_k=1
        ),
        "ffn": random_adapter(config, 2, targets=POSITIONS["ffn"], num_experts=2, rank=2, renormalize=False),
        "lora": random_method("lora", config, 3, targets=("q_proj", "down_proj")),
        None: None,
    }


def bank_of(model, adapters: dict[str | None, Any], max_experts: int) -> AdapterBank:
    bank = AdapterBank(model, max_experts=max_experts)
    load_all(bank, adapters)
    return bank


def load_all(bank: AdapterBank, adapters: dict[str | None, Any]) -> None:
    for name, adapter in adapters.items():
        if name is not None:
            bank.load(name, adapter)


def check(model, adapter, row: Row) -> None:
    """The row's tokens, experts and gates are those of one full forward pass with its adapter."""
    assert by_full_forward(model, adapter, row.prompt, row.token_ids) == row.token_ids
    if row.adapter is None or row.adapter.method == "lora" or len(row.token_ids) < 2:
        return
    tokens = (
        jnp.zeros((1, 128), jnp.int32)
        .at[0, : len(row.prompt) + len(row.token_ids)]
        .set(jnp.array([*row.prompt, *row.token_ids]))
    )
    routing = model(tokens, adapter=adapter, unroll=True).routing
    read = slice(len(row.prompt), len(row.prompt) + len(row.experts))
    np.testing.assert_array_equal(row.experts, routing.experts[0, read])
    np.testing.assert_allclose(row.gates, routing.gates[0, read], atol=1e-5)


class Traffic:
    """Rows of random adapters and lengths, some with a common beginning, that join and leave at random steps; those that
    have left, with the name of their adapter."""

    def __init__(self, model, slots: Slots, names: list[str | None], seed: int = 0):
        self.model, self.slots, self.names = model, slots, names
        self.rng, self.left, self.joined = np.random.default_rng(seed), list[tuple[str | None, Row]](), 0

    def join(self, name: str | None) -> int:
        prompt = prompt_of(self.model, int(self.rng.integers(1, 8)), seed=self.joined)
        if self.rng.random() < 0.6:
            prompt = [*prompt_of(self.model, 9, seed=10_000), *prompt]
        self.joined += 1
        return self.slots.insert(prompt, max_new_tokens=int(self.rng.integers(3, 9)), adapter=name, reuse_cache=True)

    def run(self, rows: int) -> None:
        """Until so many rows more have joined, and all have left."""
        until = self.joined + rows
        while self.slots.rows or self.joined < until:
            while self.joined < until and self.slots.free and self.rng.random() < 0.5:
                self.join(self.names[self.joined % len(self.names)])
            self.step()

    def step(self) -> None:
        self.slots.step()
        for slot, row in self.slots.rows.items():
            if row.finish_reason is not None or self.rng.random() < 0.02:
                self.left.append((row.adapter and row.adapter.name, self.slots.evict(slot)))


@pytest.fixture
def model(models):
    return models("llama_gqa")


class TestMixtures:
    @pytest.mark.parametrize("strategy", ["unmerged", pytest.param("fused", marks=pytest.mark.slow)])
    def test_rows_decode_what_they_would_alone_and_loading_compiles_nothing(self, model, strategy, caplog, monkeypatch):
        if strategy == "fused":
            monkeypatch.setattr(megakernel, "fused_step", step_by_modules)
            monkeypatch.setattr(megakernel, "fused_unsupported_reason", lambda *_, **__: None)
        adapters = adapters_of(model)
        bank = AdapterBank(model, max_experts=12)
        slots = Engine(model, bank, strategy=strategy, eos_ids=()).slots(3, context_length=CONTEXT)
        load_all(bank, adapters)
        assert bank.bucket.rank == {"unmerged": 4, "fused": 64}[strategy]
        traffic = Traffic(model, slots, [*adapters])
        traffic.run(len(adapters))  # compile
        traffic.join("ffn")
        traffic.step()
        adapters["new"] = random_adapter(model.config, 7, targets=("k_proj",), num_experts=2, rank=1, top_k=1)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            bank.unload("ffn")
            with pytest.raises(
                UserError, match="no adapter 'ffn' is loaded; there are 'after attention', 'all', 'lora'"
            ):
                traffic.join("ffn")
            assert bank.free_experts == 2
            bank.load("new", adapters["new"])
            traffic.names = [name for name in adapters if name != "ffn"]
            traffic.run(12)
            assert bank.free_experts == 2
            assert not [r.message for r in caplog.records if "Compiling" in r.message]
        assert {name for name, _ in traffic.left} == {*adapters}
        for name, row in traffic.left:
            check(model, adapters[name], row)
        assert any(len(row.token_ids) < row.budget for _, row in traffic.left)
        assert any(row.cached for _, row in traffic.left)

    def test_an_adapter_of_all_experts_reads_a_prompt(self, model):
        """Its experts, padded to a power of two, are more than the bank has."""
        adapter = random_adapter(model.config, num_experts=3, targets=("q_proj", "down_proj"))
        bank = bank_of(model, {"a": adapter}, max_experts=3)
        slots = Engine(model, bank, eos_ids=()).slots(2)
        slots.insert(prompt_of(model, 20), max_new_tokens=3, adapter="a")
        while slots.step() is not None:
            pass
        check(model, adapter, slots.evict(0))

    def test_a_row_that_is_not_finite_leaves_nothing_in_its_slot(self, model):
        """Hidden keys and values of the row before have a weight of 0, which times NaN is NaN."""
        overflowing = random_adapter(model.config, num_experts=2, alpha=1e4, targets=("q_proj", "v_proj"))
        for experts in overflowing.experts.values():
            experts.A[...], experts.B[...] = 1e20 * experts.A[...], 1e20 * experts.B[...]
        bank = bank_of(model, {"overflowing": overflowing}, max_experts=2)
        slots = Engine(model, bank, eos_ids=()).slots(1)
        for name, reason in (("overflowing", "not_finite"), (None, "length")):
            slots.insert(prompt_of(model, 30 if name else 18), max_new_tokens=3, adapter=name)
            while slots.step() is not None:
                pass
            row = slots.evict(0)
            assert row.finish_reason == reason
        check(model, None, row)

    @pytest.mark.slow
    def test_a_larger_adapter_joins_while_rows_run(self, model):
        """An adapter with more ranks, linears, experts and a larger top-k: one more decoding program, and rows go on."""
        adapters = adapters_of(model)
        first = {"lora": adapters["lora"]}
        bank = bank_of(model, first, max_experts=12)
        slots = Engine(model, bank, eos_ids=()).slots(2, context_length=CONTEXT)
        slots.insert(prompt_of(model, 5), max_new_tokens=12, adapter="lora")
        for _ in range(4):
            slots.step()
        before = programs.decode_step._cache_size()
        bank.load("all", adapters["all"])
        slots.insert(prompt_of(model, 7), max_new_tokens=6, adapter="all")
        while slots.step() is not None:
            pass
        assert programs.decode_step._cache_size() == before + 1
        for name, slot in (("lora", 0), ("all", 1)):
            row = slots.evict(slot)
            assert row.finish_reason == "length"
            check(model, adapters[name], row)

    @pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.gpu, on_gpu])])
    def test_the_megakernel_equals_the_modules(self, compiled, monkeypatch):
        """Compiled, or its schedule in NumPy: in bfloat16, with routers at two positions, ranks below 64, a row without an
        adapter, and more experts than have room for their h in shared memory."""
        if not compiled:
            monkeypatch.setattr(kernel_sm90, "run_megakernel", executor_np.run)
        model, first, cache, tokens, positions = make(
            Case(batch=24, targets=("q_proj", "down_proj"), rank=40, num_experts=40)
        )
        second = make(Case(targets=("o_proj", "down_proj"), top_k=1, num_experts=24), seed=5)[1]
        bank = AdapterBank(model, max_experts=64)
        bank.reserve(Bucket(rank=64))
        ids = [bank.load(name, adapter).id for name, adapter in (("first", first), ("second", second))]
        rows = jnp.array([0, *ids, ids[0]] * 6)
        step: Any = jax.jit(fused_step) if compiled else partial(fused_step, num_ctas=132)
        stacked = of_rows(bank.stacked, rows)
        logits, chosen, _ = step(model, stacked, Fused.of(model, bank), tokens, positions, cache)
        for row, adapter in enumerate((None, first, second, first)):
            of_row = tokens[row : row + 1], positions[row : row + 1]
            own = jax.tree.map(lambda x, row=row: x[:, row : row + 1], cache)
            exact, routing, _ = by_modules(in_fp32(model), in_fp32(adapter), in_fp32(own), *of_row)
            usual = by_modules(model, adapter, own, *of_row)[0]
            error, tolerated = (np.linalg.norm(np.float64(x) - np.float64(exact[0])) for x in (logits[row], usual[0]))
            assert error <= 2 * tolerated
            if adapter is not None:
                loaded = bank.adapters["first" if adapter is first else "second"]
                np.testing.assert_array_equal(loaded.numbers_of(np.asarray(chosen.experts)[row]), routing.experts[0, 0])
        assert not np.asarray(chosen.gates)[0].any()


class TestLoading:
    def test_writes_in_place_where_experts_are_free(self, model):
        """Also in gaps: an adapter's experts need not be neighbours."""
        adapters = adapters_of(model)
        bank = bank_of(model, adapters, max_experts=10)
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(bank.stacked.experts)]
        assert bank.free_experts == 0
        bank.unload("lora")
        bank.unload("after attention")
        loaded = bank.load("again", adapters["all"])
        assert set(loaded.places) == {4, 5, 6, 9}
        assert loaded.version > max(bank.adapters[name].version for name in ("all", "ffn"))
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(bank.stacked.experts)] == buffers
        tokens = jnp.array([prompt_of(model, 9)])
        found = model(tokens, adapter=of_rows(bank.stacked, jnp.array([loaded.id])), unroll=True)
        wanted = model(tokens, adapter=adapters["all"], unroll=True)
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(
            loaded.numbers_of(np.asarray(found.routing.experts)[0, 3]), wanted.routing.experts[0, 3]
        )

    def test_prepared_before_another_enlarged_the_arrays(self, model):
        adapters = adapters_of(model)
        bank = AdapterBank(model, max_experts=6)
        prepared = bank.prepare("ffn", adapters["ffn"])
        assert (bank.bucket, bank.free_experts) == (Bucket(), 6)
        bank.load("all", adapters["all"])
        loaded = bank.load("ffn", prepared)
        tokens = jnp.array([prompt_of(model, 9)])
        found = model(tokens, adapter=of_rows(bank.stacked, jnp.array([loaded.id])), unroll=True)
        wanted = model(tokens, adapter=adapters["ffn"], unroll=True)
        np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)

    def test_experts_are_free_when_the_last_row_is_evicted(self, model):
        bank = bank_of(model, {"lora": adapters_of(model)["lora"]}, max_experts=2)
        slots = Engine(model, bank, eos_ids=()).slots(2)
        for _ in range(2):
            slots.insert(prompt_of(model, 4), max_new_tokens=5, adapter="lora")
        bank.unload("lora")
        free = [bank.free_experts]
        for slot in (1, 0):
            slots.evict(slot)
            free.append(bank.free_experts)
        assert free == [1, 1, 2]

    def test_experts_are_free_although_the_device_fails(self, model, monkeypatch):
        bank = bank_of(model, {"lora": adapters_of(model)["lora"]}, max_experts=2)
        slots = Engine(model, bank, eos_ids=()).slots(1)
        slots.insert(prompt_of(model, 4), max_new_tokens=5, adapter="lora")
        slots.step()
        bank.unload("lora")
        monkeypatch.setattr(slots, "_release", lambda row: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            slots.evict(0)
        assert bank.free_experts == 2
        assert slots.free == 1

    def test_refusals(self, models, model):
        adapters = adapters_of(model)
        bank = bank_of(model, {"all": adapters["all"]}, max_experts=6)
        bucket = bank.bucket
        broken = random_adapter(model.config, num_experts=2, rank=20)
        broken.experts["q_proj"].B[...] = broken.experts["q_proj"].B[...].at[0, 0, 0, 0].set(jnp.nan)
        large = random_adapter(model.config, num_experts=1, top_k=1)
        large.experts["q_proj"].A[...] = 1e30 * large.experts["q_proj"].A[...]
        other = random_adapter(models("qwen3").config, num_experts=2)
        for name, adapter, message in (
            ("all", adapters["ffn"], "'all' is loaded already; unload it first"),
            ("more", adapters["after attention"], "'more' has 3 experts, and 2 of 6 are free; unload an adapter"),
            (
                "mola",
                random_method("mola", model.config, experts_per_layer=(2, 4)),
                "'mola' is of mola, which has routers in every layer",
            ),
            ("pesc", random_method("pesc", model.config), "'pesc' is of pesc, which has routers in every layer"),
            ("nan", broken, "'nan' has weights that are not finite"),
            ("large", large, "'large' has weights that are not finite or above 1e\\+20"),
            ("other", other, "'other' is of another backbone"),
        ):
            with pytest.raises(UserError, match=message):
                bank.load(name, adapter)
        bank.limit(lambda bucket: "ranks are too many" if bucket.rank > 4 else None)
        with pytest.raises(UserError, match="cannot be loaded, as ranks are too many; give one of a lower rank"):
            bank.load("large", random_adapter(model.config, num_experts=1, top_k=1, rank=5))
        with pytest.raises(UserError, match="no adapter 'x' is loaded; there are 'all'"):
            bank.unload("x")
        with pytest.raises(UserError, match="give 1 to 4096"):
            AdapterBank(model, max_experts=0)
        assert (list(bank.adapters), bank.free_experts, bank.bucket) == (["all"], 2, bucket)
        bank.load("ffn", adapters["ffn"])

    def test_the_megakernel_is_asked_about_the_bank(self, model, monkeypatch):
        asked: list[Any] = []
        monkeypatch.setattr(
            megakernel,
            "fused_unsupported_reason",
            lambda model, batch=1, adapter=None, bucket=None: asked.append(adapter),
        )
        bank = AdapterBank(model, max_experts=2)
        Engine(model, bank, strategy="fused").slots(2)
        assert asked == [bank, bank]

    def test_engine_refuses_names_without_a_bank_and_strategies_that_merge(self, model):
        with pytest.raises(UserError, match="wants adapter 'x', and no bank of adapters is loaded"):
            Engine(model).slots(1).insert([3], max_new_tokens=1, adapter="x")
        with pytest.raises(UserError, match="strategy golden merges one adapter, and rows have their own"):
            Engine(model, AdapterBank(model, max_experts=2), strategy="golden")
