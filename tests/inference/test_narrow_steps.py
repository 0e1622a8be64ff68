"""Steps of the first slots only, over the cache of all: kernels, slots, and beginnings of prompts that stay in the cache."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import Case, make
from generation import prompt_of
from jax.experimental.pallas import mosaic_gpu as plgpu
from random_models import random_adapter

from adafuse_jax.inference import prefix_cache, programs
from adafuse_jax.inference.backends.megakernel import Fused, fused_step
from adafuse_jax.inference.backends.portable import portable_step
from adafuse_jax.inference.backends.unfused import Unfused
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.slots import Slots
from adafuse_jax.inference.widths import Widths
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.kv_cache import KVCache
from pallas_kernels.megakernel import executor_np, kernel_sm90

CONTEXT = 96
ON_CPU = pytest.mark.skipif(
    jax.__version_info__ < (0, 12) or jax.default_backend() != "cpu", reason="the interpreter of Mosaic GPU is for CPUs"
)
ON_GPU = pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


@pytest.mark.parametrize(
    ("form", "targets", "batch"),
    [
        ("schedule", LINEARS, 1), ("schedule", ("o_proj",), 2), ("kernels", ("o_proj",), 2),
        pytest.param("kernels", LINEARS, 1, marks=pytest.mark.slow),
        pytest.param("megakernel", ("q_proj",), 2, marks=(ON_CPU, pytest.mark.slow)),
        *(
            pytest.param(f"compiled {kind}", LINEARS, batch, marks=ON_GPU)
            for kind, batch in (("megakernel", 1), ("megakernel", 2), ("kernels", 2))
        ),
    ],
)  # fmt: skip
def test_rows_behind_the_tokens_are_not_read(form: str, targets: Any, batch: int, monkeypatch: pytest.MonkeyPatch):
    """NaN stays NaN; all else is as without them. A router that sees o's input runs layer 0 before the rest."""
    model, adapter, cache, tokens, positions = make(Case(batch=batch, targets=targets))
    wide = KVCache(*(jnp.pad(x, [(0, 0), (0, 3)] + 3 * [(0, 0)], constant_values=jnp.nan) for x in (cache.k, cache.v)))
    fused: Any = partial(fused_step, model, adapter, Fused.of(model, adapter), tokens, positions)
    portable: Any = partial(portable_step, model, adapter, tokens, positions)
    if form == "schedule":
        monkeypatch.setattr(kernel_sm90, "run_megakernel", executor_np.run)
    interpret = plgpu.InterpretGPUParams(inline_mgpu="ignore")
    step = {
        "schedule": partial(fused, num_ctas=3),
        "megakernel": partial(fused, interpret=interpret, num_ctas=2, one_launch=False),
        "kernels": partial(portable, interpret=True),
        "compiled megakernel": jax.jit(fused),
        "compiled kernels": jax.jit(portable),
    }[form]
    wanted, _, wanted_cache = step(cache=cache)
    logits, _, found = step(cache=wide)
    equal = partial(np.testing.assert_allclose, rtol=0, atol=0.02 if form.startswith("compiled") else 0)
    equal(logits, wanted)
    for name in ("k", "v"):
        equal(*(np.asarray(getattr(c, name)[:, :batch], np.float32) for c in (found, wanted_cache)))
        assert jnp.isnan(getattr(found, name)[:, batch:]).all()


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Widths of the steps, of a backend in XLA ops that copies the rows that it reads; None are all slots."""
    found: list[int | None] = []
    advance, step = programs.advance, Unfused.step

    def narrow(reads: Any, carry: Any, token: Any, position: Any, cache: KVCache, hold: Any) -> Any:
        rows = jnp.arange(len(token))
        logits, experts, new, carry = step(reads, carry, token, position, cache.of_rows(rows), hold)
        return logits, experts, cache.with_rows(rows, new), carry

    def recorded(*given: Any) -> Any:
        found.append(given[-1])
        return advance(*given)

    monkeypatch.setattr(Unfused, "takes_wider_cache", True)
    monkeypatch.setattr(Unfused, "step", staticmethod(narrow))
    monkeypatch.setattr(programs, "advance", recorded)
    return found


def finish(slots: Slots, slot: int) -> list[int]:
    while slots.rows[slot].finish_reason is None:
        slots.step()
    return slots.evict(slot).token_ids


def test_steps_are_as_wide_as_the_rows_need(models: Any, widths: list[int | None]):
    """Rows in one slot, three and ten of twelve, and one again; sampled, with a penalty: each as alone."""
    model = models("llama_gqa")
    engine = Engine(model, random_adapter(model.config), eos_ids=())
    settings = {"max_new_tokens": 12, "sampling": Sampling.of(temperature=0.8, repetition_penalty=1.3)}
    slots = engine.slots(12, context_length=CONTEXT)
    prompts = [prompt_of(model, 4 + i, seed=i) for i in range(10)]
    alone = []
    for seed, prompt in enumerate(prompts):
        slots.insert(prompt, seed=seed, **settings)
        alone.append(finish(slots, 0))
    assert {*widths[-8:]} == {1}, "always the first slot"
    widths.clear()
    together = [slots.insert(prompts[0], seed=0, **settings)]
    for _ in range(3):
        slots.step()
    together += [slots.insert(prompts[i], seed=i, **settings) for i in (1, 2)]
    for _ in range(4):
        slots.step()
    together += [slots.insert(prompts[i], seed=i, **settings) for i in range(3, 10)]
    assert together == [*range(10)]
    found = [finish(slots, slot) for slot in together]
    assert found == alone
    assert [width for i, width in enumerate(widths) if width != widths[i - 1] or not i][:3] == [1, 8, None]
    widths.clear()
    slots.insert(prompts[0], seed=0, **settings)
    assert finish(slots, 0) == alone[0]
    assert {*widths} == {1}


def test_slots_that_grow_and_backends_in_xla_ops_have_one_width(models: Any):
    engine = Engine(models("llama_gqa"), eos_ids=())
    assert [*engine.slots(12)._widths] == [*engine.slots(12, context_length=CONTEXT)._widths] == [12]


def test_conversations_in_turns_stay_in_the_cache(
    models: Any, widths: list[int | None], monkeypatch: pytest.MonkeyPatch
):
    """Rows in the first slot only; what one of them would overwrite goes to another slot, and comes back."""
    monkeypatch.setattr(prefix_cache, "LEAST_MOVED", 10)
    model = models("llama_gqa")
    engine = Engine(model, eos_ids=())
    slots, told = engine.slots(12, context_length=CONTEXT), [prompt_of(model, 20, seed=i) for i in range(3)]
    for turn in range(2):
        for i, prompt in enumerate(told):
            assert slots.insert(prompt, max_new_tokens=4, reuse_cache=True) == 0
            row = slots.rows[0]
            answer = finish(slots, 0)
            assert row.cached == (23 if turn else 0)
            (wanted,) = zip(*(s.ids for s in engine.generate([prompt], max_new_tokens=4)), strict=True)
            assert answer == [*wanted]
            told[i] = [*prompt, *answer, *prompt_of(model, 3, seed=9)]


def test_what_a_row_begins_from_is_not_overwritten(models: Any, widths: list[int | None], monkeypatch: Any):
    """A conversation in every slot: the one that waited the longest comes back, and another makes room."""
    monkeypatch.setattr(prefix_cache, "LEAST_MOVED", 10)
    model = models("llama_gqa")
    slots = Engine(model, eos_ids=()).slots(3, context_length=CONTEXT)
    told = [prompt_of(model, 20, seed=i) for i in range(3)]
    for prompt in told:
        slots.insert(prompt, max_new_tokens=2, reuse_cache=True)
        finish(slots, 0)
    slots.insert([*told[0], 5, 6], max_new_tokens=2, reuse_cache=True)
    assert (slots.rows[0].slot, slots.rows[0].cached) == (0, 0), "it has not begun"
    slots.step()
    assert slots.rows[0].cached == 20
    finish(slots, 0)
    slots.insert([*told[2], 5, 6], max_new_tokens=2, reuse_cache=True)
    slots.step()
    assert slots.rows[0].cached == 20, "it was moved"


def test_every_width_has_the_backend_of_so_many_rows(models: Any):
    """A megakernel hands on rows that it cannot decode, or not as fast; a backend must take the cache of all slots."""
    few, many, neither = (SimpleNamespace(takes_wider_cache=takes) for takes in (True, True, False))
    backend: Any = SimpleNamespace(for_batch=lambda batch: few if batch == 8 else many if batch == 32 else neither)
    assert Widths.of(32, backend, cache_is_fixed=True) == {8: few, 32: many}
    assert Widths.of(32, backend, cache_is_fixed=False) == {32: many}


def test_steps_are_decoded_by_the_backend_of_their_width(models: Any, widths: list[int | None]):
    model = models("llama_gqa")
    backend, others = Engine(model, eos_ids=()).backend, Unfused(model, None)
    asked: list[int] = []

    def for_batch(batch: int) -> Unfused:
        asked.append(batch)
        return backend if batch == 12 else others

    top: Any = SimpleNamespace(for_batch=for_batch)
    slots = Slots(
        top,
        12,
        config=model.config,
        dtype=model.dtype,
        mesh=None,
        stop_ids=(),
        pad_id=0,
        warm=set(),
        context_length=CONTEXT,
    )
    assert asked == [12, 1, 8]
    used: list[Any] = []
    real = programs.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "advance", lambda *given: used.append((given[0], given[-1])) or real(*given))
        slots.insert(prompt_of(model, 4), max_new_tokens=3)
        finish(slots, 0)
    assert {(by is others, width) for by, width in used} == {(True, 1), (True, 8), (False, None)}, (
        "others when warming up"
    )
