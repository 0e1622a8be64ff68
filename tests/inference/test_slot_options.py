"""Options of rows in slots that servers need: log-probabilities, penalties of the output, contexts, prefixes of others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation import by_full_forward, prompt_of
from random_models import random_adapter, random_method

from adafuse_jax import UserError
from adafuse_jax.inference import prefill as prefill_module
from adafuse_jax.inference import programs
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.ahead import Program
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prefill import common_length
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.slots import Slots

CONTEXT = 100


@pytest.fixture
def model(models):
    return models("llama_gqa")


@pytest.fixture
def slots(model) -> Slots:
    return Engine(model, eos_ids=()).slots(3, context_length=CONTEXT)


def run(slots: Slots) -> None:
    while slots.step() is not None:
        pass


def log_softmax(model, tokens: list[int]) -> np.ndarray:
    """[T, V] in float64, from one full forward pass."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(model(padded, unroll=True).logits[0], np.float64)[: len(tokens)]
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


class TestLogProbabilities:
    def test_equal_those_of_the_full_forward(self, model, slots, monkeypatch):
        """A sampled answer and its prompt, which comes in several chunks, beside a row that wants none."""
        monkeypatch.setattr(prefill_module, "CHUNKS", (4, 16))
        prompt = prompt_of(model, 22)
        slots.insert(prompt_of(model, 5), max_new_tokens=20)
        for _ in range(3):
            slots.step()
        sampling = Sampling.of(temperature=1.5, repetition_penalty=1.3)
        slots.insert(prompt, max_new_tokens=6, sampling=sampling, logprobs=3, prompt_logprobs=2)
        run(slots)
        row, plain = slots.evict(1), slots.evict(0)
        assert (plain.logprobs, plain.prompt_logprobs) == ([], [])
        assert plain.token_ids == by_full_forward(model, None, plain.prompt, plain.token_ids)
        wanted = log_softmax(model, [*prompt, *row.token_ids])
        assert row.prompt_logprobs[0] is None
        found = [*row.prompt_logprobs[1:], *row.logprobs]
        assert [entry.token for entry in found] == [*prompt, *row.token_ids][1:]
        for at, entry in enumerate(found):
            likeliest = np.argsort(-wanted[at])[: 2 if at < len(prompt) - 1 else 3]
            np.testing.assert_allclose(entry.logprob, wanted[at, entry.token], atol=1e-4)
            assert [token for token, _ in entry.top] == likeliest.tolist()
            np.testing.assert_allclose([value for _, value in entry.top], wanted[at, likeliest], atol=1e-4)

    def test_of_a_prompt_beside_one_that_reuses_a_cache(self, model):
        slots = Engine(model, eos_ids=()).slots(2, context_length=CONTEXT)
        known, prompt = prompt_of(model, 30), prompt_of(model, 12, seed=4)
        slots.insert(known, max_new_tokens=2)
        run(slots)
        slots.evict(0)
        slots.insert([*known, 5], max_new_tokens=2, reuse_cache=True)
        slots.insert(prompt, max_new_tokens=2, prompt_logprobs=0)
        run(slots)
        assert slots.rows[0].cached == 30
        found = [entry.logprob for entry in slots.rows[1].prompt_logprobs[1:]]
        np.testing.assert_allclose(found, log_softmax(model, prompt)[np.arange(11), prompt[1:]], atol=1e-4)

    def test_bounds(self, slots):
        with pytest.raises(UserError, match="21 log-probabilities are wanted of each token; give 0 to 20"):
            slots.insert([3], max_new_tokens=1, logprobs=21)
        assert not slots.rows


class TestPenaltiesOfTheOutput:
    @pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.6), (-3.0, 1.0)])
    def test_equal_a_loop_over_full_forwards(self, model, slots, presence, frequency):
        """A prompt of one token often: it is not penalized. The neighbour has other penalties."""
        prompt = [*prompt_of(model, 4), 9, 9, 9]
        sampling = Sampling.of(presence_penalty=presence, frequency_penalty=frequency)
        slots.insert(prompt, max_new_tokens=14, sampling=sampling)
        slots.insert(prompt, max_new_tokens=14, sampling=Sampling.of(repetition_penalty=1.5))
        run(slots)
        row = slots.evict(0)
        logits = log_softmax(model, [*prompt, *row.token_ids])[len(prompt) - 1 :]
        counts = np.zeros(logits.shape[-1])
        for at, token in enumerate(row.token_ids):
            penalized = logits[at] - frequency * counts - presence * (counts > 0)
            assert penalized[token] >= penalized.max() - 1e-5
            counts[token] += 1
        assert row.token_ids != by_full_forward(model, None, prompt, row.token_ids)

    def test_leave_out_what_a_slot_reads_while_its_prompt_comes_in_chunks(self, model, slots, monkeypatch):
        """Pad tokens, which the row would repeat."""
        monkeypatch.setattr(prefill_module, "CHUNKS", (4,))
        prompt, pad = prompt_of(model, 20), slots._pad_id
        slots.insert(prompt_of(model, 4), max_new_tokens=20)
        for _ in range(3):
            slots.step()
        slots.insert(prompt, max_new_tokens=1, sampling=Sampling.of(frequency_penalty=-100))
        run(slots)
        assert pad not in prompt
        row = slots.evict(1)
        assert row.token_ids == by_full_forward(model, None, prompt, row.token_ids) != [pad]


class TestContext:
    def test_a_row_that_reaches_the_end_finishes_and_the_cache_stays_as_it_is(self, model, slots):
        prompt = prompt_of(model, 90)
        slots.insert(prompt_of(model, 3), max_new_tokens=4)
        run(slots)
        state = slots._state.cache.slots
        slots.insert(prompt, max_new_tokens=1000)
        run(slots)
        row = slots.evict(1)
        assert (len(row.token_ids), row.finish_reason) == (CONTEXT - 90, "length")
        assert row.token_ids == by_full_forward(model, None, prompt, row.token_ids)
        assert state == slots._state.cache.slots == 128
        assert slots.max_new_tokens(99, 5) == 1
        with pytest.raises(UserError, match="the prompt has 100 tokens and the context holds 100"):
            slots.insert(prompt_of(model, 100), max_new_tokens=1)

    @pytest.mark.parametrize("length", [1, 10_000])
    def test_of_a_length_that_the_model_has_not(self, model, length):
        with pytest.raises(UserError, match=f"the context is {length} tokens, and the model has"):
            Engine(model).slots(1, context_length=length)


class TestPrefixes:
    @pytest.fixture
    def copies(self, monkeypatch) -> list[tuple[int, ...]]:
        """(source, target, length) of the copies."""
        found, copy = [], Slots._copy

        def recorded(self: Any, *given: int) -> None:
            if given[0] != given[1]:  # as the warm-up does
                found.append(given)
            copy(self, *given)

        monkeypatch.setattr(Slots, "_copy", recorded)
        return found

    def test_come_from_a_running_row_of_the_same_adapter_and_version(self, model, copies):
        adapters = {"a": random_adapter(model.config, 0), "lora": random_method("lora", model.config)}
        bank = AdapterBank(model, max_experts=9)
        for name, adapter in adapters.items():
            bank.load(name, adapter)
        slots = Engine(model, bank, eos_ids=()).slots(4, context_length=CONTEXT)
        system = prompt_of(model, 30)
        prompts = [[*system, *prompt_of(model, 5, seed=n)] for n in range(6)]

        def insert(number: int, adapter: str | None) -> int:
            return slots.insert(prompts[number], max_new_tokens=8, adapter=adapter, reuse_cache=True)

        def finish(slot: int) -> list[int]:
            while slots.rows[slot].finish_reason is None:
                slots.step()
            row = slots.evict(slot)
            adapter = row.adapter and adapters[row.adapter.name]
            assert row.token_ids == by_full_forward(model, adapter, row.prompt, row.token_ids)
            return [slot, row.cached]

        first = insert(0, "a")
        for _ in range(3):
            slots.step()
        assert slots.rows[first].finish_reason is None
        second, other = insert(1, "a"), insert(2, "lora")
        assert finish(second) == [1, 30]
        assert finish(other) == [2, 0]
        assert finish(first) == [0, 0]
        assert copies == [(0, 1, 30)]
        bank.unload("a")
        adapters["a"] = random_adapter(model.config, 5)
        bank.load("a", adapters["a"])
        assert finish(insert(3, "a"))[1] == 0  # of another version
        assert finish(insert(4, "lora")) == [2, 30]  # what the slot itself has is not copied
        assert len(copies) == 1
        assert finish(insert(5, None))[1] == 0

    def test_stay_whole_while_programs_are_compiled(self, model, slots, copies):
        """They come into a slot whose last row ended at a position that they have."""
        prompt = prompt_of(model, 40)
        slots.insert(prompt, max_new_tokens=3)
        slots.insert(prompt_of(model, 5, seed=3), max_new_tokens=3)
        run(slots)
        slots.evict(1)
        slots.insert([*prompt, 7, 8], max_new_tokens=8, reuse_cache=True, slot=1, logprobs=0)
        run(slots)
        assert copies == [(0, 1, 40)]
        for slot in (0, 1):
            row = slots.evict(slot)
            assert row.token_ids == by_full_forward(model, None, row.prompt, row.token_ids)

    def test_leave_running_rows_alone_while_programs_are_compiled(self, model, slots):
        slots.insert(prompt_of(model, 4), max_new_tokens=20)
        for _ in range(3):
            slots.step()
        slots.insert(prompt_of(model, 9), max_new_tokens=2, reuse_cache=True)
        run(slots)
        row = slots.evict(0)
        assert row.token_ids == by_full_forward(model, None, row.prompt, row.token_ids)

    def test_common_length_leaves_the_last_token(self):
        rng = np.random.default_rng(0)
        for length in (1, 2, 7, 40):
            for same in range(length + 3):
                prompt, cached = rng.integers(0, 9, length).tolist(), rng.integers(0, 9, 40).tolist()
                cached[:same] = prompt[:same]
                cached[same : same + 1] = [10]
                assert common_length(prompt, cached) == max(0, min(same, length - 1))

    def test_chunks_are_short_while_others_run(self, model, slots, monkeypatch):
        monkeypatch.setattr(prefill_module, "LARGEST_BESIDE_ROWS", 16)
        sizes, chunk = [], programs.prefill_chunk

        def recorded(*given: Any, **options: Any) -> Any:
            sizes.append(given[4].shape[1])
            return chunk(*given, **options)

        monkeypatch.setattr(programs, "prefill_chunk", recorded)
        prompt = prompt_of(model, 40)
        slots.insert(prompt, max_new_tokens=12)
        slots.step()
        assert set(sizes) == {64}
        slots.insert([*prompt, 4], max_new_tokens=3)
        run(slots)
        assert set(sizes) == {64, 16}
        row = slots.evict(1)
        assert row.token_ids == by_full_forward(model, None, row.prompt, row.token_ids)


def test_an_evicted_row_frees_its_slot_at_once(model, slots):
    for _ in range(3):
        slots.insert(prompt_of(model, 5), max_new_tokens=50)
    slots.step()
    slots.evict(1)
    assert (slots.free, sorted(slots.rows)) == (1, [0, 2])
    assert slots.insert(prompt_of(model, 6), max_new_tokens=2) == 1
    steps = [slots.step() for _ in range(5)]
    assert [slot for step in steps for slot in step.rows].count(1) == 2
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), slots._state.cache))


def test_no_program_of_a_request_asks_the_host_whether_to_go_on(model, monkeypatch):
    """No loop has a length that is a value: the host would wait until the device gets there, and queue nothing."""
    traced = {}

    def trace(program, *arguments, **named):
        traced[program.__name__] = str(program.trace(*arguments, **named).jaxpr)
        return call(program, *arguments, **named)

    call = Program.__call__
    monkeypatch.setattr(Program, "__call__", trace)
    slots = Engine(model, eos_ids=()).slots(2, context_length=64)
    sampling = Sampling.of(temperature=0.7, top_k=3, top_p=0.9)
    for slot, sampled in ((0, sampling), (1, None)):
        slots.insert([1, 2, 3, 4, 5], max_new_tokens=4, sampling=sampled, slot=slot, reuse_cache=True)
        slots.step()
        slots.step()
    assert {"copy_prefix", "start", "decode_step"} <= {*traced}
    assert any("prefill" in name for name in traced)
    assert not [name for name, jaxpr in traced.items() if "while[" in jaxpr]
