"""Slots: rows inserted while others run, evicted, and each with its own settings, against the same rows alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation import generate, prompt_of, step_by_modules
from random_models import FEW, random_adapter, random_method

from adafuse_jax import UserError
from adafuse_jax.inference import prefill as prefill_module
from adafuse_jax.inference import programs
from adafuse_jax.inference import state as state_module
from adafuse_jax.inference.backends import megakernel
from adafuse_jax.inference.backends.megakernel import Megakernel
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.slots import Slots

GREEDY = Sampling.of()
SETTINGS = (
    GREEDY,
    Sampling.of(temperature=1.3, top_k=30),
    Sampling.of(temperature=0.8, top_p=0.9, repetition_penalty=1.4),
    Sampling.of(repetition_penalty=1e6),
)


@pytest.fixture
def engine(models) -> Engine:
    model = models("llama_gqa")
    return Engine(model, random_adapter(model.config), eos_ids=())


def alone(engine: Engine, prompt: list[int], n: int, **options: Any) -> list[int]:
    return generate(engine, prompt, n=n, **options)[0]


def run(slots: Slots, steps: int | None = None) -> list[dict[int, int]]:
    """Step by step, the tokens that the slots got; to the end, or so many steps."""
    found: list[dict[int, int]] = []
    while (steps is None or len(found) < steps) and (step := slots.step()) is not None:
        read = {slot: row for slot, row in step.rows.items() if row.finish_reason != "not_finite"}
        assert all(step.ids[slot] == row.token_ids[-1] for slot, row in read.items() if not step.done[slot])
        found.append({slot: int(step.ids[slot]) for slot in step.rows})
    return found


class TestRowsThatComeLater:
    @pytest.mark.parametrize("strategy", ["unmerged", "fused", "merged"])
    def test_equal_the_same_rows_alone(self, models, strategy, monkeypatch):
        """A greedy row runs; a long prompt, chunk by chunk, and a sampled row join it, and then one that reuses a slot."""
        monkeypatch.setattr(prefill_module, "CHUNKS", (4, 16))
        if strategy == "fused":
            monkeypatch.setattr(megakernel, "fused_step", step_by_modules)
            monkeypatch.setattr(megakernel, "fused_unsupported_reason", lambda *_, **__: None)
        model = models("llama_gqa")
        adapter: Any = random_adapter(model.config)
        if strategy == "merged":
            adapter = random_method("lora", model.config, **FEW["lora"])
        engine = Engine(model, adapter, strategy=strategy, eos_ids=())
        assert isinstance(engine.backend, Megakernel) == (strategy == "fused")
        prompts = [prompt_of(model, n, seed=n) for n in (5, 37, 9, 6)]
        lengths = 16, 8, 8, 8
        given = [*zip(prompts, lengths, SETTINGS, strict=True)]
        wanted = [alone(engine, prompt, n, sampling=s, seed=i) for i, (prompt, n, s) in enumerate(given)]
        slots = engine.slots(3)

        def insert(i: int) -> int:
            return slots.insert(prompts[i], max_new_tokens=lengths[i], sampling=SETTINGS[i], seed=i)

        assert insert(0) == 0
        before = run(slots, 3)
        assert [*map(list, before)] == [[0]] * 3
        assert (insert(1), insert(2)) == (1, 2)
        found = run(slots, 12)
        first = next(at for at, tokens in enumerate(found) if 1 in tokens)
        assert first >= 3, "the first row goes on while the prompt of 37 tokens is prefilled in three chunks"
        assert sum(0 in tokens for tokens in found) == 10, "the first tokens of the two others are steps of their own"
        while slots.rows[2].finish_reason is None:
            slots.step()
        third = slots.evict(2)
        assert insert(3) == 2
        run(slots)
        rows = [slots.evict(0), slots.evict(1), third, slots.evict(2)]
        assert [row.token_ids for row in rows] == wanted
        assert {row.finish_reason for row in rows} == {"length"}

    def test_a_larger_cache_does_not_disturb_running_rows(self, engine, monkeypatch):
        monkeypatch.setattr(state_module, "MIN_CACHE_LENGTH", 16)
        short, long = prompt_of(engine, 4), prompt_of(engine, 30, seed=1)
        wanted = alone(engine, short, 10), alone(engine, long, 8)
        slots = engine.slots(2)
        slots.insert(short, max_new_tokens=10)
        run(slots, 4)
        slots.insert(long, max_new_tokens=8)
        run(slots)
        assert tuple(slots.evict(slot).token_ids for slot in (0, 1)) == wanted

    def test_after_rows_that_were_evicted_in_the_queue(self, engine):
        """Tokens that nobody reads any more do not end the steps of a row that waits."""
        slots = engine.slots(2)
        slots.insert([3], max_new_tokens=20)
        slots.step()
        slots.insert([4], max_new_tokens=20)
        slots.step()
        for slot in (0, 1):
            slots.evict(slot)
        slots.insert([5], max_new_tokens=4)
        assert [*map(list, run(slots))] == [[0]] * 4
        assert slots.evict(0).token_ids == alone(engine, [5], 4)

    def test_full(self, engine):
        slots = engine.slots(1)
        with pytest.raises(ValueError, match="max_new_tokens is 0; give at least 1"):
            slots.insert([3], max_new_tokens=0)
        for changes in ({"seed": 2**32}, {"seed": -1}, {"sample": 2**32}):
            with pytest.raises(ValueError, match="is not between 0 and 4294967295"):
                slots.insert([3], max_new_tokens=2, **changes)
        slots.insert([3], max_new_tokens=2)
        with pytest.raises(ValueError, match="no free slot"):
            slots.insert([4], max_new_tokens=2)
        with pytest.raises(ValueError, match="slot 0 is not free"):
            slots.insert([4], max_new_tokens=2, slot=0)


class TestEviction:
    def test_leaves_no_trace(self, engine, monkeypatch):
        """Rows end while they decode, while their prompt is prefilled and while it waits; then others take their slots."""
        monkeypatch.setattr(prefill_module, "CHUNKS", (4, 16))
        prompts = [prompt_of(engine, n, seed=n) for n in (30, 28, 7)]
        slots = engine.slots(2)
        slots.insert(prompts[0], max_new_tokens=20)
        run(slots, 3)
        slots.insert(prompts[1], max_new_tokens=20)
        slots.step()
        partly = slots.evict(1)
        assert (partly.finish_reason, partly.token_ids) == ("evicted", [])
        slots.insert(prompts[1], max_new_tokens=20)
        assert slots.evict(1).finish_reason == "evicted"
        assert slots.evict(0).token_ids == alone(engine, prompts[0], 4)
        assert slots.step() is None
        for slot, prompt in ((0, prompts[2]), (1, prompts[0])):
            assert slots.insert(prompt, max_new_tokens=6) == slot
        run(slots)
        assert [slots.evict(slot).token_ids for slot in (0, 1)] == [
            alone(engine, p, 6) for p in (prompts[2], prompts[0])
        ]

    def test_an_ended_row_stays_as_it_is_in_the_cache(self, engine):
        slots = engine.slots(2)
        for n in (6, 3):
            slots.insert(prompt_of(engine, 5, seed=n), max_new_tokens=n)
        run(slots)
        row = slots.evict(1)
        keys = np.asarray(slots._state.cache.k)[:, 1, : len(row.tokens_in_cache())]
        assert np.abs(keys).min(axis=(0, 2, 3)).all()
        slots.evict(0)
        slots.insert(prompt_of(engine, 5), max_new_tokens=9, slot=0)
        run(slots)
        np.testing.assert_array_equal(np.asarray(slots._state.cache.k)[:, 1, : keys.shape[1]], keys)

    def test_a_row_of_full_length_stands_still_while_others_run(self, engine):
        slots = engine.slots(2)
        for n in (3, 30):
            slots.insert(prompt_of(engine, 5), max_new_tokens=n)
        run(slots, 20)
        assert slots.rows[0].finish_reason == "length"
        assert np.asarray(slots._state.done).tolist() == [True, False]
        assert int(slots._state.position[0]) <= 5 + 3

    def test_the_prompt_is_a_copy(self, engine):
        prompt = prompt_of(engine, 5)
        slots = engine.slots(1)
        slots.insert(prompt, max_new_tokens=4)
        prompt.append(7)
        run(slots)
        assert len(slots.evict(0).tokens_in_cache()) == 5 + 3

    def test_reuses_the_slot_whose_cache_has_most_of_the_prompt(self, engine, monkeypatch):
        slots = engine.slots(2)
        prompts = [prompt_of(engine, 12, seed=n) for n in (1, 2)]
        for prompt in prompts:
            slots.insert(prompt, max_new_tokens=5)
        run(slots)
        rows = [slots.evict(slot) for slot in (0, 1)]
        longer = [*prompts[1], *rows[1].token_ids, 5, 6]
        assert slots.insert(longer, max_new_tokens=6, reuse_cache=True) == 1
        run(slots)
        row = slots.evict(1)
        assert row.cached == 12 + 4  # the answer's last token was never read
        assert row.token_ids == alone(engine, longer, 6)


class TestSettings:
    def test_new_values_and_lengths_compile_nothing(self, engine):
        def compiled() -> list[int]:
            return [p._cache_size() for p in (programs.prefill_chunk, programs.start, programs.decode_step)]

        slots = engine.slots(2)
        for n, sampling in enumerate(SETTINGS[1:3]):
            slots.insert(prompt_of(engine, 9 + n), max_new_tokens=6, sampling=sampling)
        run(slots, 3)
        slots.evict(0)
        slots.insert(prompt_of(engine, 5), max_new_tokens=9, sampling=SETTINGS[2], seed=8)
        run(slots)
        slots.close()
        before = compiled()
        for n in (3, 16):
            penalized = Sampling.of(temperature=n, repetition_penalty=2.0)
            slots.insert(prompt_of(engine, n), max_new_tokens=6, sampling=penalized)
            slots.insert(prompt_of(engine, 7), max_new_tokens=6, sampling=Sampling.of(temperature=0.1 * n), seed=n)
            run(slots)
            slots.close()
        assert compiled() == before

    def test_a_row_that_ends_compiles_nothing(self, engine):
        """Nor does the last that samples, has a penalty or has many stop ids; and tokens stay the same."""
        prompt, penalized = prompt_of(engine, 5), Sampling.of(temperature=0.7, repetition_penalty=1.3)
        slots = engine.slots(2)
        slots.insert(prompt, max_new_tokens=4, sampling=penalized, stop_ids=(1, 2, 3))
        slots.insert(prompt, max_new_tokens=16)
        run(slots, 3)
        before = programs.decode_step._cache_size()
        run(slots)
        assert programs.decode_step._cache_size() == before
        assert slots.evict(1).token_ids == alone(engine, prompt, 16)

    def test_each_row_has_its_own_stop_ids(self, engine):
        prompt = prompt_of(engine, 5)
        free = alone(engine, prompt, 12)
        at = next(i for i in range(3, 12) if free[i] not in free[:i])
        slots = engine.slots(2)
        for stop_ids in ((free[at], 0, 1), ()):
            slots.insert(prompt, max_new_tokens=12, stop_ids=stop_ids)
        run(slots)
        stopped, whole = (slots.evict(slot) for slot in (0, 1))
        assert (stopped.token_ids, stopped.finish_reason) == (free[:at], "stop")
        assert (whole.token_ids, whole.finish_reason) == (free, "length")
        assert len(stopped.seconds) == at + 1

    def test_whoever_reads_a_row_may_end_it(self, engine):
        slots = engine.slots(2)
        for _ in range(2):
            slots.insert(prompt_of(engine, 5), max_new_tokens=8)
        run(slots, 2)
        rows: list[Row] = [*slots.step().rows.values()]
        rows[0].finish_reason = "stop"
        assert [*map(list, run(slots))] == [[1]] * 5
        assert [len(row.token_ids) for row in rows] == [3, 8]


class TestFailures:
    def test_a_failed_step_takes_the_rows_and_the_slots_go_on(self, engine, monkeypatch):
        slots, prompt = engine.slots(1), prompt_of(engine, 5)
        slots.insert(prompt, max_new_tokens=9)
        slots.step()

        def out_of_memory(*args, **options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of the test")

        with monkeypatch.context() as patch:
            patch.setattr(programs, "decode_step", out_of_memory)
            with pytest.raises(jax.errors.JaxRuntimeError, match="of the test"):
                run(slots)
        with pytest.raises(UserError, match="evict them, and insert their prompts again"):
            run(slots)
        slots.close()
        slots.insert(prompt, max_new_tokens=9)
        run(slots)
        assert slots.evict(0).token_ids == alone(engine, prompt, 9)

    def test_a_row_that_comes_after_a_failed_step_does_not_revive_the_others(self, engine):
        slots = engine.slots(2)
        slots.insert(prompt_of(engine, 5), max_new_tokens=9)
        run(slots, 2)
        slots._state = None
        slots.insert(prompt_of(engine, 5), max_new_tokens=9)
        with pytest.raises(UserError, match="evict them, and insert their prompts again"):
            run(slots)

    def test_a_row_whose_prefill_cannot_begin_waits_on(self, engine, monkeypatch):
        """Nothing runs; the next step prefills it."""
        slots, prompt = engine.slots(2), prompt_of(engine, 5)
        slots.insert(prompt, max_new_tokens=4)

        def out_of_memory(*args, **options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of the test")

        with monkeypatch.context() as patch:
            patch.setattr(state_module.DecodeState, "empty", out_of_memory)
            with pytest.raises(jax.errors.JaxRuntimeError, match="of the test"):
                slots.step()
        run(slots)
        assert slots.evict(0).token_ids == alone(engine, prompt, 4)

    def test_a_row_whose_logits_are_not_finite_ends_alone(self, models):
        """Token 7 has an embedding that is NaN; its neighbour goes on as alone."""
        model = models("llama_mha")
        embeddings = model.embed_tokens[...].at[7].set(jnp.nan)
        broken = jax.tree.map(lambda leaf: leaf, model)
        broken.embed_tokens = broken.embed_tokens.replace(embeddings)
        engine = Engine(broken, eos_ids=())
        slots = engine.slots(2)
        for prompt in ([3, 5], [3, 7]):
            slots.insert(prompt, max_new_tokens=6)
        run(slots)
        good, bad = slots.evict(0), slots.evict(1)
        assert (bad.finish_reason, bad.token_ids) == ("not_finite", [])
        assert good.token_ids == alone(engine, [3, 5], 6)
        assert slots.insert([3, 5], max_new_tokens=6, slot=1) == 1  # behind its tokens the cache holds the others' NaN
        run(slots)
        assert slots.evict(1).token_ids == good.token_ids
        with pytest.raises(UserError, match="the logits are not finite"):
            alone(engine, [3, 7], 6)

    def test_switch_restores_the_weights_when_its_row_is_evicted(self, models):
        model = models("llama_gqa")
        engine = Engine(jax.tree.map(jnp.copy, model), random_adapter(model.config), strategy="switch", eos_ids=())
        slots = engine.slots(1)
        slots.insert(prompt_of(model, 5), max_new_tokens=9)
        run(slots, 4)
        assert np.asarray(engine.backend.merged.gates).any()
        slots.evict(0)
        assert not np.asarray(engine.backend.merged.gates).any()
        with pytest.raises(UserError, match="2 prompts; give one at a time"):
            engine.slots(2)
