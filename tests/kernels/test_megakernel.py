"""The fused decoding step against the model's own modules: logits, new keys and values, experts.

Here its tile schedule runs in NumPy, with as many CTAs as a GPU has, and its kernel in the interpreter, one launch per phase
with several CTAs or one launch with one CTA; with `-m gpu`, compiled.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from fused_cases import GEMMA, GRANITE, LLAMA2_7B, Case, by_modules, in_fp32, make, plan_of
from fused_check import check, interpreted, on_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.megakernel import Fused, fused_step, fused_unsupported_reason
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.routing import route, tabulate
from adafuse_jax.models.config import LINEARS
from adafuse_jax.parallel.mesh import make_mesh, place_state, shard
from pallas_kernels.megakernel import Shape, buffers, executor_np, kernel_sm90, unsupported_reason
from pallas_kernels.megakernel import plan as plan_module
from pallas_kernels.megakernel.plan import MAX_INPUT_BYTES
from pallas_kernels.megakernel.schedule import TileSchedule
from pallas_kernels.megakernel.sizes import MAX_SPLIT_K, MAX_STAGES, padded
from pallas_kernels.quantised import INT4

INTERPRETED = {
    "bare, one launch": (Case(num_layers=2), {"num_ctas": 1}),
    "all 7, two rows": (Case(batch=2, targets=LINEARS), {"num_ctas": 3, "one_launch": False}),
    "128 dimensions, norms, biases, rank 40": (
        Case(
            embed_dim=192, hidden_dim=320, heads=(4, 2, 128), targets=("q_proj", "v_proj", "o_proj", "down_proj"),
            rank=40, top_k=1, bias=True, qk_norm=True,
        ),
        {"num_ctas": 3, "one_launch": False},
    ),
    "all 7, three experts, one launch": (Case(targets=LINEARS, top_k=3, num_layers=2), {"num_ctas": 1}),
    "more query heads than attention takes together": (
        Case(heads=(11, 1, 64), embed_dim=704, position=100), {"num_ctas": 2, "one_launch": False}
    ),
    "context in parts, window, router in the FFN, one of two adapted": (
        Case(batch=2, slots=1024, heads=(4, 1, 64), position=900, window=600, targets=("gate_proj",)),
        {"num_ctas": 5, "one_launch": False},
    ),
    "a single row's context in parts, o adapted": (
        Case(slots=1024, heads=(4, 1, 64), position=900, targets=("o_proj",)), {"num_ctas": 2, "one_launch": False}
    ),
    "two groups of a key's queries, three experts": (
        Case(heads=(16, 1, 64), embed_dim=192, targets=("q_proj", "o_proj"), top_k=3),
        {"num_ctas": 5, "one_launch": False},
    ),
    "two blocks attend to the same heads": (
        Case(heads=(4, 2, 64), embed_dim=448, targets=("o_proj", "v_proj")), {"num_ctas": 5, "one_launch": False}
    ),
    "a wide FFN": (
        Case(batch=17, hidden_dim=1600, heads=(2, 1, 64), targets=("down_proj",)), {"num_ctas": 2, "one_launch": False}
    ),
    "Granite": (GRANITE, {"num_ctas": 3, "one_launch": False}),
    "Gemma": (GEMMA, {"num_ctas": 1}),
    "Gemma, two rows": (replace(GEMMA, batch=2), {"num_ctas": 3, "one_launch": False}),
    "nothing in the cache yet": (Case(position=0, targets=LINEARS, top_k=3), {"num_ctas": 2, "one_launch": False}),
}  # fmt: skip
COMPILED = {
    "bare": Case(num_layers=3),
    "Granite, two rows": replace(GRANITE, num_layers=2, batch=2),
    "Gemma, eight heads": replace(GEMMA, heads=(8, 4, 256)),
    "Gemma, context in parts, three rows": replace(GEMMA, batch=3, slots=1024, position=900),
    "Gemma, as many keys as queries": replace(GEMMA, heads=(16, 16, 256), targets=()),
    "one piece of ranks": Case(num_layers=2, targets=LINEARS, top_k=1),
    "q, v": Case(num_layers=2, targets=("q_proj", "v_proj")),
    "all 7, two rows of two layers": Case(num_layers=2, batch=2, targets=LINEARS),
    "k, gate, two rows": Case(num_layers=2, batch=2, targets=("k_proj", "gate_proj")),
    "norms, biases": Case(
        num_layers=2, embed_dim=192, hidden_dim=320, heads=(4, 2, 128), targets=LINEARS, rank=128, top_k=1, bias=True,
        qk_norm=True,
    ),
    "parts, window": Case(
        num_layers=2, batch=2, slots=2048, heads=(4, 1, 64), position=1900, window=1600, targets=("gate_proj", "up_proj")
    ),
    "as many keys as queries": Case(num_layers=2, heads=(4, 4, 64), targets=LINEARS),
    "33 heads": Case(num_layers=2, heads=(33, 33, 64), targets=LINEARS, slots=512, position=400),
    "32 rows": Case(
        num_layers=2, batch=32, slots=512, position=400, embed_dim=576, hidden_dim=1536, heads=(9, 3, 64), targets=LINEARS
    ),
    "a wide FFN, 32 rows": Case(batch=32, hidden_dim=14336, targets=LINEARS),
    "a wide FFN, 16 rows": Case(batch=16, hidden_dim=25600),
}  # fmt: skip
SCHEDULED = {name: (case, options["num_ctas"]) for name, (case, options) in INTERPRETED.items()}
SCHEDULED |= {name: (case, 132) for name, case in COMPILED.items()}
assert len(SCHEDULED) == len(INTERPRETED) + len(COMPILED), "names of their own"


@pytest.mark.parametrize("name", quick.first(SCHEDULED, 4))
def test_schedule_in_numpy(name, monkeypatch):
    monkeypatch.setattr(kernel_sm90, "run_megakernel", executor_np.run)
    case, num_ctas = SCHEDULED[name]
    check(case, compiled=False, num_ctas=num_ctas)


def test_numpy_executor_finds_a_tile_that_no_cta_computes(monkeypatch):
    monkeypatch.setattr(kernel_sm90, "run_megakernel", executor_np.run)
    monkeypatch.setattr(TileSchedule, "num_a_ctas", None)  # the executor does not need it
    whole = TileSchedule.units
    monkeypatch.setattr(TileSchedule, "units", lambda self: (whole(self)[0] - (self.cta == 0), whole(self)[1]))
    with pytest.raises(AssertionError):
        check(Case(), compiled=False, num_ctas=3)


def test_buffers_are_those_of_the_table():
    names = [row.name for row in buffers.TABLE]
    assert sorted(names) == sorted(buffers.Buffers.__dataclass_fields__)
    assert buffers.markdown() in (Path(buffers.__file__).parent / "README.md").read_text()


@pytest.mark.parametrize("devices", [None, 2])
def test_scratch_buffers_are_in_the_table(devices):
    """Every scratch buffer of a launch is in the table, also where contexts are split; with all its letters in place,
    with the table's shape."""
    plan = plan_of(LLAMA2_7B, cache_slots=4096)
    made = buffers.scratch_and_outputs(plan, LLAMA2_7B, jnp.bfloat16, devices)
    normed = replace(LLAMA2_7B, norm_placement="both")
    batch = buffers.scratch_and_outputs(plan_of(LLAMA2_7B, batch=8), normed, jnp.bfloat16, devices)
    filled = {row.name for row in buffers.TABLE if "caller" not in row.writer}
    assert {*made, *batch} == filled - ({"device_partials"} if devices is None else set())


QUICK = "context in parts, window, router in the FFN, one of two adapted"


@interpreted
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in INTERPRETED]
)
def test_interpreted(name):
    case, options = INTERPRETED[name]
    parameters = plgpu.InterpretGPUParams(inline_mgpu="ignore")
    check(case, compiled=False, interpret=parameters, **options)


MANY_EXPERTS = Case(batch=32, targets=("q_proj", "down_proj"), num_experts=80)


@pytest.fixture
def pieces(monkeypatch) -> list[Any]:
    """Numbers of the pieces in which h was asked for."""
    found, number_of = [], TileSchedule.num_h_pieces

    def recorded(*given: Any) -> Any:
        found.append(number_of(*given))
        return found[-1]

    monkeypatch.setattr(TileSchedule, "num_h_pieces", recorded)
    return found


def test_schedule_of_many_experts_in_numpy(pieces, monkeypatch):
    """Rows use more experts than have room for their h in shared memory."""
    monkeypatch.setattr(kernel_sm90, "run_megakernel", executor_np.run)
    check(MANY_EXPERTS, compiled=False, num_ctas=132)
    assert max(pieces) > 4


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("rank", [64, 128])
def test_interpreted_with_h_in_pieces(rank, pieces, monkeypatch):
    """Pieces of two rank tiles, the last of which may be half of one."""
    monkeypatch.setattr(plan_module, "min_stages", lambda head_dim: MAX_STAGES + 1)
    monkeypatch.setattr(plan_module, "H_PIECE_BYTES", 2 * 8 * 64 * 2)
    case = Case(batch=3, targets=("q_proj", "down_proj"), num_experts=5, rank=rank)
    parameters = plgpu.InterpretGPUParams(inline_mgpu="ignore")
    check(case, compiled=False, interpret=parameters, num_ctas=3, one_launch=False)
    assert pieces


@pytest.mark.gpu
@on_gpu
def test_compiled_with_many_experts():
    check(MANY_EXPERTS, compiled=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    check(COMPILED[name], compiled=True)


@pytest.mark.gpu
@on_gpu
def test_compiled_with_few_blocks():
    """Several units for each, A in those that have fewer of them, and sums gathered among products."""
    check(COMPILED["32 rows"], compiled=True, num_ctas=2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_with_nan(batch):
    """Activations that are NaN are no partial sums that are not stored: the launch ends, and the logits are NaN."""
    model, adapter, cache, tokens, positions = make(Case(num_layers=2, batch=batch, targets=LINEARS))
    model.embed_tokens[...] = model.embed_tokens[...].at[tokens].set(jnp.nan)
    logits, *_ = jax.jit(fused_step)(model, adapter, Fused.of(model, adapter), tokens, positions, cache)
    assert jnp.isnan(logits).all()


TOGETHER = {
    "bare, tied": Case(embed_dim=192, hidden_dim=256, num_layers=2, tied=True),
    "all 7": Case(targets=LINEARS, hidden_dim=1024, num_layers=6, embed_dim=512, heads=(8, 4, 128), vocab_size=1024),
    "32 rows": Case(batch=32, targets=LINEARS, hidden_dim=1024, num_layers=3, embed_dim=512, heads=(8, 4, 64)),
    "biases, context router": Case(batch=3, targets=("o_proj", "up_proj"), hidden_dim=256, bias=True, rank=40),
    "a vocabulary of 258": Case(hidden_dim=256, vocab_size=258),
    "as many keys as queries": Case(num_layers=3, heads=(8, 8, 64), hidden_dim=256, targets=LINEARS),
    "Gemma": replace(GEMMA, heads=(4, 2, 256), hidden_dim=256),
    "int4, two rows": Case(batch=2, targets=LINEARS, hidden_dim=512, num_layers=2, embed_dim=256, layout=INT4),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="not two GPUs")
@pytest.mark.parametrize("name", TOGETHER)
def test_compiled_for_two_devices(name):
    check(TOGETHER[name], compiled=True, devices=2)


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [4, 8])
def test_compiled_for_more_devices(devices):
    """A head of 65 tokens on each, which is padded; of 8 devices each has one head."""
    if jax.default_backend() != "gpu" or jax.device_count() < devices:
        pytest.skip(f"not {devices} GPUs")
    case = Case(batch=2, targets=LINEARS, heads=(8, 8, 64), hidden_dim=512, num_layers=2, vocab_size=65 * devices)
    check(case, compiled=True, devices=devices)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="not two GPUs")
def test_two_devices_keep_in_step():
    """100 steps one after the other, with the same tokens: the logits of one device but for rounding, equal on both."""
    model, adapter, cache, _, _ = make(replace(TOGETHER["all 7"], batch=2))
    mesh = make_mesh(2, model.config)
    alone: Any = model, adapter, Fused.of(model, adapter)
    cut = shard(model, mesh), shard(adapter, mesh)
    together = *cut, Fused.of(*cut)
    caches, tokens = [cache, place_state(cache, mesh)], np.random.default_rng(5).integers(0, 1024, (100, 2))
    step = jax.jit(fused_step)
    for position, token in enumerate(jnp.asarray(tokens, jnp.int32)):
        found = []
        for at, parts in enumerate((alone, together)):
            logits, _, caches[at] = step(*parts, token, jnp.full(2, position, jnp.int32), caches[at])
            found.append(logits)
        one, *shares = (np.asarray(x, np.float64) for x in (found[0], *(s.data for s in found[1].addressable_shards)))
        assert all(np.linalg.norm(share - one) < 0.05 * np.linalg.norm(one) for share in shares), position
        np.testing.assert_array_equal(*shares)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(batch=2, targets=("q_proj", "down_proj")), COMPILED["as many keys as queries"], MANY_EXPERTS],
    ids=["bare", "two rows", "as many keys as queries", "many experts"],
)
def test_lowers_for_a_gpu_without_one(case):
    """Lower also what the interpreter leaves out: semaphores, and shared memory that is used in turn."""
    model, adapter, cache, tokens, positions = make(case)
    arguments = jax.eval_shape(lambda: (model, adapter, Fused.of(model, adapter), tokens, positions, cache))
    step = jax.jit(partial(fused_step, num_ctas=132))
    step.trace(*arguments).lower(lowering_platforms=("cuda",))


def attended(cases: dict[str, tuple[Case, int]], devices: int = 1) -> set[str]:
    """Names of the cases, of so many blocks each, in which every block attends to the heads of its slice of o itself."""
    found = set()
    for name, (case, num_ctas) in cases.items():
        heads, kv, head_dim = case.heads
        shape = Shape(
            num_layers=case.num_layers, embed_dim=case.embed_dim, hidden_dim=case.hidden_dim // devices, norm_eps=1e-5,
            num_heads=heads // devices, num_kv_heads=kv // devices, head_dim=head_dim, vocab_size=case.vocab_size // devices,
        )  # fmt: skip
        options = {"batch": case.batch, "cache_slots": case.slots, "num_ctas": num_ctas, "adapted": case.targets}
        options |= {"layout": case.layout}
        if plan_of(shape, **options, max_experts_used=min(case.num_experts, case.top_k * case.batch)).o.fused_attention:
            found.add(name)
    return found


def test_cases_have_slices_of_wide_inputs():
    """Slices that are larger than those of other inputs, in compiled and interpreted cases."""
    cases = ((INTERPRETED["a wide FFN"][0], 2), *((COMPILED[f"a wide FFN, {n} rows"], 132) for n in (16, 32)))
    for case, num_ctas in cases:
        row_bytes = case.hidden_dim * 2
        assert row_bytes * padded(case.batch) > min(num_ctas, MAX_SPLIT_K) * MAX_INPUT_BYTES


def test_cases_have_blocks_that_attend_themselves():
    assert attended({name: (case, options["num_ctas"]) for name, (case, options) in INTERPRETED.items()}) == {
        "two blocks attend to the same heads", "two groups of a key's queries, three experts", "nothing in the cache yet",
        "Granite", "Gemma",
    }  # fmt: skip
    assert attended({name: (case, 132) for name, case in COMPILED.items()}) == {
        "as many keys as queries", "33 heads", "Gemma, as many keys as queries",
    }  # fmt: skip
    assert attended({name: (case, 132) for name, case in TOGETHER.items()}, devices=2) == {"as many keys as queries"}


@pytest.mark.parametrize("targets", [("k_proj",), ("o_proj",), ("up_proj", "down_proj")])
def test_route_before_the_token_equals_the_modules(targets):
    model, adapter, cache, tokens, positions = make(Case(batch=3, num_layers=2, targets=targets, window=40))
    assert adapter is not None
    table = tabulate(model, adapter) if targets == ("k_proj",) else None
    experts, gates = route(model, adapter, table, tokens, positions, cache)
    routing = by_modules(model, adapter, cache, tokens, positions)[1]
    np.testing.assert_array_equal(experts, routing.experts[:, 0])
    np.testing.assert_allclose(gates, routing.gates[:, 0], atol=1e-2)
    assert (Fused.of(model, adapter).table is None) == (table is None)


def test_what_it_cannot_do_is_said():
    for changes, dtype, options, said in (
        ({}, jnp.float32, {}, "float32"),
        ({}, jnp.float16, {}, "float16"),
        ({"head_dim": 96}, jnp.bfloat16, {}, "96 dimensions"),
        ({"embed_dim": 4100}, jnp.bfloat16, {}, "q_proj is [4096, 4100]"),
        ({"activation": "gelu"}, jnp.bfloat16, {}, "activation 'gelu'"),
        ({"norm_placement": "post"}, jnp.bfloat16, {}, "norm_placement 'post'"),
        ({"hidden_dim": 25600, "head_dim": 256}, jnp.bfloat16, {"batch": 32}, "heads of 256 dimensions need 8"),
        ({}, jnp.bfloat16, {"batch": 33}, "33 rows"),
        ({"hidden_dim": 28736}, jnp.bfloat16, {"batch": 32}, "with 32 rows"),
        ({}, jnp.bfloat16, {"rank": 40}, "rank 40"),
        ({}, jnp.bfloat16, {"max_experts_used": 64}, "64 experts of rank 64 in use by 1 rows do not fit"),
    ):
        options = {"batch": 1, "targets": LINEARS, "rank": 64} | options
        assert said in (unsupported_reason(replace(LLAMA2_7B, **changes), dtype, **options) or "")
    for batch in (2, 8, 16, 32):  # as many experts as the rows can use
        for rank in (64, 512):
            used = {"rank": rank, "max_experts_used": 8 * batch}
            assert unsupported_reason(LLAMA2_7B, jnp.bfloat16, batch, LINEARS, **used) is None
    for hidden_dim in (14336, 17408, 25600, 28672):
        wide = replace(LLAMA2_7B, hidden_dim=hidden_dim)
        for batch in (8, 16, 32):
            for used in ({"rank": 128, "max_experts_used": 8}, {"rank": 64, "max_experts_used": 64}):
                assert unsupported_reason(wide, jnp.bfloat16, batch, LINEARS, **used) is None
    with pytest.raises(ValueError, match="down_proj has 11008 columns: slices for 3 CTAs do not fit"):
        plan_of(LLAMA2_7B, batch=17, num_ctas=3)
    model, adapter, cache, tokens, positions = make(Case())
    with pytest.raises(ValueError, match="float32"):
        fused_step(
            in_fp32(model), adapter, Fused.of(in_fp32(model), None), tokens, positions, in_fp32(cache), num_ctas=2
        )  # fmt: skip
    arguments = model, None, Fused.of(model, None), tokens, positions, cache
    with pytest.raises(ValueError, match="compiled, all phases are one launch"):
        fused_step(*arguments, num_ctas=2, one_launch=False)
    with pytest.raises(ValueError, match="interpreted, several CTAs need a launch"):
        fused_step(*arguments, num_ctas=2, interpret=plgpu.InterpretGPUParams())
    with pytest.raises(ValueError, match="interpreted, devices do not reach each other's memory"):
        fused_step(*arguments, num_ctas=1, interpret=plgpu.InterpretGPUParams(), axis="tensor")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="on a CPU")
def test_engine_refuses_it_where_it_cannot_run():
    model, *_ = make(Case())
    assert "Hopper" in (fused_unsupported_reason(model) or "")
    with pytest.raises(UserError, match="fused cannot run: it needs a Hopper GPU"):
        Engine(model, strategy="fused")
