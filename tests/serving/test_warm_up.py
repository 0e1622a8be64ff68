"""The warm-up compiles what requests need, so that none holds up the others."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_models import random_adapter

from adafuse_jax.inference import prefill, programs
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
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


@pytest.mark.slow
@pytest.mark.parametrize("with_bank", [False, True])
def test_no_request_compiles(models: Any, with_bank: bool, monkeypatch: pytest.MonkeyPatch):
    """Prompts of all lengths, greedy and sampled, with penalties and log-probabilities, with the model's three stop ids, one
    by one and filling all slots."""
    monkeypatch.setattr(prefill, "CHUNKS", (4, 64))
    model = models("llama_gqa")
    bank = AdapterBank(model, max_experts=4) if with_bank else None
    if bank is not None:
        bank.load("a", random_adapter(model.config))
    engine = Engine(model, bank, eos_ids=())
    base = ServedModel(name="m", adapter=None, tokenizer=None, stop_ids=(1, 2, 3), created=0)
    served = Models(engine, bank, base, num_slots=2, context_length=CONTEXT)
    slots = served.slots()
    served.warm_up(slots)
    assert slots.free == 2
    warm, compiled = {*engine._warm}, [program._cache_size() for program in PROGRAMS]
    prompts = np.random.default_rng(0).integers(5, 90, (2, CONTEXT)).tolist()
    samplings = Sampling.of(), Sampling.of(temperature=0.7), Sampling.of(temperature=0.7, repetition_penalty=1.2)
    for sampling, logprobs in product(samplings, (None, 3)):
        for length in (1, 10, CONTEXT - 1):
            for number in (1, 2):
                for row in prompts[:number]:
                    adapter = "a" if with_bank else None
                    slots.insert(
                        row[:length], max_new_tokens=3, sampling=sampling, stop_ids=base.stop_ids, reuse_cache=True,
                        adapter=adapter, logprobs=logprobs,
                    )  # fmt: skip
                while slots.step() is not None:
                    pass
                slots.close()
    assert engine._warm == warm
    assert [program._cache_size() for program in PROGRAMS] == compiled


@pytest.mark.parametrize(
    ("num_slots", "by_kernels", "longest"), [(2, False, {1: 1024, 2: 1024}), (32, True, {1: 2048, 32: 256})]
)
def test_no_prompt_is_longer_than_its_chunks(num_slots: int, by_kernels: bool, longest: dict[int, int]):
    """Prompts of one row, and of rows that fill all slots."""
    together: list[list[int]] = [[]]
    slots: Any = SimpleNamespace(num_slots=num_slots, by_kernels=by_kernels)
    slots.insert = lambda prompt, **_: together[-1].append(len(prompt))
    slots.step = lambda: together.append([])
    slots.evict = lambda slot: None
    engine: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    base = ServedModel(name="m", adapter=None, tokenizer=None, stop_ids=(), created=0)
    Models(engine, None, base, num_slots=num_slots, context_length=8192).warm_up(slots)
    for number, length in longest.items():
        assert max(rows[0] for rows in together if len(rows) == number) == length
