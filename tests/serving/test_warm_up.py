"""The warm-up compiles what requests need, so that none holds up the others."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from random_models import random_adapter

from adafuse_jax.inference import prefill, programs
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.ahead import compiled_ahead
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.serving import models as served_models
from adafuse_jax.serving.models import Models, ServedModel

PROGRAMS = (
    programs.prefill_chunk,
    programs.prefill_chunk_by_kernels,
    programs.start,
    programs.decode_step,
    programs.copy_prefix,
    programs.release,
)
CONTEXT = 24
"""Below the largest chunk."""
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **more: (
        compiled.append(more["fun_name"]) if name.endswith("backend_compile_duration") else None
    )
)


def served_of(models: Any, with_bank: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Models]:
    """Two slots of a model with three stop ids, and its programs for chunks of 4 or 64 tokens, 8 or 64 of scored prompts."""
    monkeypatch.setattr(prefill, "CHUNKS", (4, 64))
    monkeypatch.setattr(prefill, "SCORED_CHUNKS", (8, 64))
    monkeypatch.setattr(served_models, "SCORED_CHUNKS", (8, 64))
    model = models("llama_gqa")
    bank = AdapterBank(model, max_experts=4) if with_bank else None
    if bank is not None:
        bank.load("a", random_adapter(model.config))
    engine = Engine(model, bank, eos_ids=())
    base = ServedModel(name="m", adapter=None, tokenizer=None, stop_ids=(1, 2, 3), created=0)
    return engine, Models(engine, bank, base, num_slots=2, context_length=CONTEXT)


def test_each_program_is_compiled_once(models: Any, monkeypatch: pytest.MonkeyPatch):
    """Ahead, before any runs."""
    jax.clear_caches()
    _, served = served_of(models, False, monkeypatch)
    settings = served_models.ALL_SETTINGS[0], served_models.ALL_SETTINGS[-1]
    names = {f"jit({program.__name__})" for program in PROGRAMS}
    compiled.clear()
    with compiled_ahead(lambda: served._compile(settings)):
        pass
    number = [*compiled].count("jit(_prefill_chunk)")
    assert names & {*compiled} == names - {"jit(_prefill_chunk_by_kernels)"}
    assert number == 8, "chunks of 4 and 64, or of 8 and 64 that are scored, of one row and of both"
    compiled.clear()
    slots = served.slots()
    for rows in served._warm_up_rows(slots, settings):
        while slots.step() is not None:
            pass
        for slot in rows:
            slots.evict(slot)
    assert not names & {*compiled}


@pytest.mark.slow
@pytest.mark.parametrize("with_bank", [False, True])
def test_no_request_compiles(models: Any, with_bank: bool, monkeypatch: pytest.MonkeyPatch):
    """Prompts of all lengths, greedy and sampled, with penalties and log-probabilities, with the model's three stop ids, one
    by one and filling all slots."""
    engine, served = served_of(models, with_bank, monkeypatch)
    slots = served.slots()
    served.warm_up(slots)
    assert slots.free == 2
    warm, sizes = {*engine._warm}, [program._cache_size() for program in PROGRAMS]
    prompts = np.random.default_rng(0).integers(5, 90, (2, CONTEXT)).tolist()
    samplings = Sampling.of(), Sampling.of(temperature=0.7), Sampling.of(temperature=0.7, repetition_penalty=1.2)
    for sampling, (logprobs, prompt_logprobs) in product(samplings, ((None, None), (3, None), (3, 3))):
        for length in (1, 10, CONTEXT - 1):
            for number in (1, 2):
                for row in prompts[:number]:
                    adapter = "a" if with_bank else None
                    slots.insert(
                        row[:length], max_new_tokens=3, sampling=sampling, stop_ids=served.base.stop_ids, reuse_cache=True,
                        adapter=adapter, logprobs=logprobs, prompt_logprobs=prompt_logprobs,
                    )  # fmt: skip
                while slots.step() is not None:
                    pass
                slots.close()
    assert engine._warm == warm
    assert [program._cache_size() for program in PROGRAMS] == sizes


@pytest.mark.parametrize(
    ("num_slots", "by_kernels", "longest"), [(2, False, {1: 1024, 2: 1024}), (32, True, {1: 2048, 32: 256})]
)
def test_no_prompt_is_longer_than_its_chunks(num_slots: int, by_kernels: bool, longest: dict[int, int]):
    """Prompts of one row, and of rows that fill all slots."""
    together: list[list[int]] = [[]]
    slots: Any = SimpleNamespace(num_slots=num_slots, by_kernels=by_kernels, can_compile_ahead=False)
    slots.insert = lambda prompt, **_: together[-1].append(len(prompt))
    slots.step = lambda: together.append([])
    slots.evict = lambda slot: None
    engine: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    base = ServedModel(name="m", adapter=None, tokenizer=None, stop_ids=(), created=0)
    Models(engine, None, base, num_slots=num_slots, context_length=8192).warm_up(slots)
    for number, length in longest.items():
        assert max(rows[0] for rows in together if len(rows) == number) == length
