"""Tile schedule of the megakernel: every chunk and tile once, in shared memory that fits, evenly over the CTAs."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import LLAMA2_7B, SMOLLM2, plan_of

from adafuse_jax.inference.backends.megakernel import shape_of
from adafuse_jax.models.config import LINEARS
from benchmarks.decode.costs import SIZES
from benchmarks.decode.models import model_config
from pallas_kernels.megakernel import unsupported_reason
from pallas_kernels.megakernel.plan import num_tiles
from pallas_kernels.megakernel.schedule import Scalars, TileSchedule
from pallas_kernels.megakernel.sizes import SMEM_BYTES
from pallas_kernels.quantised import INT4, INT4_G64, INT8


@pytest.mark.parametrize(
    "shape", [LLAMA2_7B, SMOLLM2, replace(LLAMA2_7B, hidden_dim=25600)], ids=["7B", "135M", "wide"]
)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("num_ctas", [78, 114, 132])
def test_plan_covers_every_chunk_once_and_fits(shape, batch, num_ctas):
    plan = plan_of(shape, batch=batch, max_experts_used=min(8, 2 * batch), num_ctas=num_ctas)
    assert plan.padded_batch >= batch
    for group in plan.groups:
        chunks, units = Counter(), sum(map(group.units, group.passes))
        for block in range(num_ctas):
            part, member = block % group.split_k, block // group.split_k
            if member < group.cta_groups:
                low, high = (s * group.chunks // group.split_k for s in (part, part + 1))
                assert 0 < high - low <= group.max_slice_chunks
                for unit in range(member, units, group.cta_groups):
                    chunks.update((unit, c) for c in range(low, high))
        assert set(chunks.values()) == {1}
        assert len(chunks) == units * group.in_dim // 64
        has_experts = bool(group.adapted)
        assert has_experts <= group.a_split_k <= has_experts * (group.chunks // group.split_k)
    assert plan.stages >= 4
    assert plan.stages * 128 * 64 * 2 + (plan.x_smem_rows + plan.h_smem_rows) * 64 * 2 < SMEM_BYTES


@pytest.mark.parametrize(("batch", "max_experts_used", "used"), [(1, 2, 2), (1, 4, 1), (8, 8, 7), (32, 8, 8)])
@pytest.mark.parametrize(
    "adapted", [LINEARS, ("q_proj", "v_proj"), ("k_proj", "up_proj")], ids=["all 7", "q, v", "k, up"]
)
def test_blocks_share_the_experts_products(batch, max_experts_used, used, adapted):
    """All of A, of the sums h, of B and of the sums y, each once; what waits for A counts the blocks that have some; no
    block has more than an eighth more chunks than the mean, or two tiles of B, if so many experts are in use as planned;
    and none takes a linear's h twice."""
    plan = plan_of(LLAMA2_7B, batch=batch, max_experts_used=max_experts_used, adapted=adapted)
    scalars = Scalars(list(range(used)), used, [])
    for group in (plan.qkv, plan.o, plan.gate_up, plan.down):
        a, h, b, y = Counter(), Counter(), Counter(), Counter()
        with_a, chunks = 0, np.zeros(plan.num_ctas)
        for block in range(plan.num_ctas):
            schedule = TileSchedule(group, plan, scalars, block)
            number, at = schedule.a_tiles()
            mine = [(schedule.slice, *map(int, at(n))) for n in range(int(number))]
            a.update(mine)
            with_a += bool(mine)
            chunks[block] += sum(schedule.a_chunks(part)[1] for *_, part in mine)
            first, number = schedule.h_share()
            h.update(int(first + n * group.reducer_ctas) for n in range(int(number)))
            chunks[block] += int(schedule.num_w) * schedule.num_chunks
            number, at = schedule.epilogue_share()
            firsts = [tuple(map(int, at(n))) for n in range(int(number))]
            y.update((unit, half, first + i) for unit, half, first in firsts for i in range(schedule.n_tiles_at_once))
            number, at = schedule.b_tiles()
            tiles = [tuple(map(int, at(n))) for n in range(int(number))]
            tiles = [(list(group.outs)[linear], *others) for linear, *others in tiles if others[-1]]
            for name, tile, place, pieces in tiles:
                assert (group.adapted[place], pieces) == (name, used)
                b.update([(name, tile)])
            chunks[block] += used * len(tiles)
            assert len({name for name, *_ in tiles}) == len(tiles)
        pairs = range(len(group.adapted)), range(-(-used // 2))
        assert a == Counter(itertools.product(range(group.split_k), *pairs, range(group.a_split_k)))
        assert int(schedule.num_a_ctas()) == with_a
        narrow = range(plan.padded_batch // 8)
        assert h == Counter(range(len(group.adapted) * used * len(narrow)))
        assert y == Counter(itertools.product(range(group.num_units), (0, 1), narrow))
        assert b == Counter((name, t) for name in group.adapted for t in range(num_tiles(group.outs[name])))
        assert used < max_experts_used or chunks.max() <= max(
            1.13 * chunks.mean(), chunks.mean() + 2 * max_experts_used
        )


MODELS = {  # D, F, query and key-value heads, their dimensions, V
    "Qwen2.5 0.5B": (896, 4864, 14, 2, 64, 151936), "Qwen2.5 1.5B": (1536, 8960, 12, 2, 128, 151936),
    "Qwen2.5 3B": (2048, 11008, 16, 2, 128, 151936), "Qwen2.5 7B": (3584, 18944, 28, 4, 128, 152064),
    "Qwen2.5 14B": (5120, 13824, 40, 8, 128, 152064), "Qwen3 0.6B": (1024, 3072, 16, 8, 128, 151936),
    "Qwen3 1.7B": (2048, 6144, 16, 8, 128, 151936), "Qwen3 4B": (2560, 9728, 32, 8, 128, 151936),
    "Qwen3 8B": (4096, 12288, 32, 8, 128, 151936), "Qwen3 14B": (5120, 17408, 40, 8, 128, 151936),
    "Granite 3 2B": (2048, 8192, 32, 8, 64, 49155), "Granite 3 8B": (4096, 12800, 32, 8, 128, 49155),
    "Gemma 3 270M": (640, 2048, 4, 1, 256, 262144), "Gemma 3 1B": (1152, 6912, 4, 1, 256, 262144),
    "Gemma 3 4B": (2560, 10240, 8, 4, 256, 262208),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_are_planned(name):
    """At 1, 8 and 32 rows, bare and with experts in all linears, in bfloat16 and quantised."""
    sizes = ("embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    shape = replace(LLAMA2_7B, **dict(zip(sizes, MODELS[name], strict=True)))
    layouts = None, INT8, INT4, INT4_G64
    for batch, targets, layout in itertools.product((1, 8, 32), ((), LINEARS), layouts):
        used = {"rank": 128, "max_experts_used": 2 * batch, "layout": layout}
        assert unsupported_reason(shape, jnp.bfloat16, batch, targets, **used) is None


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("layout", [None, INT8, INT4, INT4_G64])
def test_llama2_70b_over_devices(devices, layout):
    """Over 8 devices each has 4,000 tokens of the vocabulary, and 4,032 rows of a head that is padded."""
    shape = shape_of(model_config(SIZES["llama2-70b"]), devices)
    assert (shape.vocab_size, shape.head_rows) == {4: (8000, 8000), 8: (4000, 4032)}[devices]
    for targets in ((), LINEARS):
        used = {"rank": 64, "max_experts_used": 2, "layout": layout}
        assert unsupported_reason(shape, jnp.bfloat16, 1, targets, **used) is None


def test_plan_counts_tiles_and_semaphores_once():
    plan = plan_of(LLAMA2_7B)
    for group in plan.groups:
        tiles = [group.first_tile(name) + t for name, out in group.outs.items() for t in range(num_tiles(out))]
        units = [group.first_unit(names) + t for names in group.passes for t in range(group.units(names))]
        assert tiles == list(range(group.num_tiles))
        assert units == list(range(len(units)))
    semaphores = [group.first_semaphore + i for group in plan.groups for i in range(2 + group.cta_groups)]
    assert semaphores == list(range(plan.num_semaphores))


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("adapted", [(), ("q_proj", "down_proj")])
def test_every_part_that_a_layer_stores_is_kept_in_the_cache(batch, adapted):
    plan = plan_of(LLAMA2_7B, batch=batch, adapted=adapted, max_experts_used=min(8, 2 * batch))
    planned = {(part, t) for part, tiles in enumerate(plan.tiles_by_partial()) for t in range(tiles)}
    step = 8 if plan.is_batch_one else 1
    stored = set()
    for group in (plan.qkv, plan.o, plan.gate_up, plan.down):
        parts = range(group.split_k + bool(group.adapted))
        stored |= {(part // step, t) for part in parts for t in range(group.num_tiles)}
    assert stored <= planned


def test_long_contexts_are_shared_by_blocks_that_batches_do_not_need():
    assert [plan_of(LLAMA2_7B, cache_slots=n).context_splits for n in (512, 1024, 4096)] == [1, 2, 4]
    assert plan_of(LLAMA2_7B, cache_slots=4096, batch=8).context_splits == 1


def test_groups_in_a_row_use_different_places_for_polled_partial_sums():
    """A group marks the places that the one before it has read, also the first of a layer those of the last."""
    plan = plan_of(LLAMA2_7B)
    buffers = [turn % plan.t_buffers for turn, _ in enumerate(plan.layer_groups)]
    assert all(one != other for one, other in itertools.pairwise([*buffers, buffers[0]]))
    assert plan_of(LLAMA2_7B, batch=2).t_buffers == 1
