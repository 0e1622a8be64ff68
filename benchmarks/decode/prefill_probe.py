# ruff: noqa: B023
"""Probe of prefill variants, to be removed: which tiles, XLA options and products of experts are fastest.

python -m benchmarks.decode.prefill_probe attention options adapters
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.core import runtime
from adafuse_jax.inference import prefill as prefill_module
from adafuse_jax.inference import programs
from adafuse_jax.models import decoder as decoder_module
from adafuse_jax.models.decoder import Backbone
from benchmarks.common.records import first_line
from benchmarks.common.timing import time_calls
from benchmarks.decode import prefill as bench
from benchmarks.decode.costs import SIZES
from benchmarks.decode.models import adapter_config, model_config, random_adapter, random_backbone
from benchmarks.training.profile import profile
from pallas_kernels.prefill_attention import Tiles, prefill_attention

BEGUN = time.time()


def say(*words: Any) -> None:
    print(f"[{time.time() - BEGUN:5.0f} s]", *words, flush=True)


def device_ms(call: Any, state: Any, *rest: Any) -> float:
    """Milliseconds of the kernels of a call, from the profiler."""
    state = jax.block_until_ready(call(state, *rest))

    def calls() -> Any:
        nonlocal state
        for _ in range(10):
            state = call(state, *rest)
        return state

    kinds, _ = profile(calls, 10)
    return sum(kinds.values())


def attention() -> None:
    key = jax.random.key(0)
    for heads, kv, dim in ((32, 32, 128), (32, 8, 64)):
        for start in (0, 30720):
            slots, length = start + 2048, 2048
            q = jax.random.normal(key, (1, length, heads, dim), jnp.bfloat16)
            k = jax.random.normal(key, (1, 1, slots, kv, dim), jnp.bfloat16)
            ints = [jnp.array([value], jnp.int32) for value in (0, 0, start, length)]
            work = 4 * heads * dim * (length * start + length * length / 2)
            for tiles in (
                Tiles(block_q=128, block_k=64, num_warps=8), Tiles(block_q=128, block_k=64, num_warps=8, num_stages=3),
                Tiles(block_q=128, block_k=128, num_warps=8), Tiles(block_q=128, block_k=128, num_warps=8, num_stages=3),
                Tiles(block_q=128, block_k=64, num_warps=4, num_stages=3), Tiles(block_q=64, block_k=64, num_warps=4),
                Tiles(block_q=64, block_k=64, num_warps=4, num_stages=3), Tiles(block_q=128, block_k=32, num_warps=4),
                Tiles(block_q=64, block_k=128, num_warps=4),
            ):  # fmt: skip
                try:
                    ms = device_ms(lambda _: prefill_attention(q, k, k, *ints, tiles=tiles), None)
                    say(f"{heads}/{kv}/{dim} start {start}: {tiles} {ms:.3f} ms, {work / ms / 1e9:.0f} TFLOP/s")
                except Exception as error:
                    say(heads, kv, dim, start, tiles, first_line(error))
            if start == 0:
                by_cudnn = jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
                ms = device_ms(lambda _: by_cudnn(q, k[0], k[0]), None)
                say(f"{heads}/{kv}/{dim} cudnn causal {ms:.3f} ms, {work / ms / 1e9:.0f} TFLOP/s")


def with_options(options: dict[str, Any]) -> Any:
    return jax.jit(
        programs.prefill_chunk.__wrapped__, static_argnames=("pad_id", "by_kernels"), donate_argnames=("state", "logits"),
        compiler_options=options,
    )  # fmt: skip


def run(name: str, model: Any, adapter: Any, tokens: int, *, with_profile: bool = False) -> None:
    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, tokens, np.int32)
    try:
        call = bench.prompt_programs(model, adapter, prompt, by_kernels=True)
        carry = jax.block_until_ready(call(bench.empty(model, tokens)))
        timing, carry = time_calls(call, carry, repeats=3, seconds=0.1)
        say(f"{name}, {tokens} tokens: {timing}")
        if with_profile:
            kinds, longest = profile(lambda: call(carry), 1)
            say({kind: round(ms, 2) for kind, ms in kinds.items()})
            for kernel, ms in [*longest.items()][:22]:
                say(f"      {ms:8.3f}  {kernel[:110]}")
    except Exception as error:
        say(name, tokens, first_line(error))


def options() -> None:
    model = random_backbone(model_config(replace(SIZES["llama2-7b"], max_position_embeddings=32768)))
    fusion = {"xla_gpu_enable_dynamic_slice_fusion": True}
    for name, chosen, barrier in (
        ("fusion", fusion, False), ("default", {}, False), ("fusion, barrier", fusion, True), ("default, barrier", {}, True),
        ("fusion, no command buffer", fusion | {"xla_gpu_enable_command_buffer": ""}, False),
        ("fusion, no triton gemm", fusion | {"xla_gpu_enable_triton_gemm": False}, False),
        ("no fusion", {"xla_gpu_enable_dynamic_slice_fusion": False}, False),
    ):  # fmt: skip
        decoder_module.PROBE_BARRIER = barrier
        bench.prefill_chunk = with_options(chosen)
        first = name in ("default", "fusion")
        for tokens in (128, 512, 2048) if first else (128, 2048):
            run(name, model, None, tokens, with_profile=first and tokens != 512)
    decoder_module.PROBE_BARRIER = False


def unrolled() -> None:
    model = random_backbone(model_config(replace(SIZES["llama2-7b"], max_position_embeddings=32768)))
    Backbone.run = partialmethod(Backbone.run, unroll=True)  # type: ignore[assignment, method-assign]
    for name, chosen in (("fusion", {"xla_gpu_enable_dynamic_slice_fusion": True}), ("default", {})):
        bench.prefill_chunk = with_options(chosen)
        for tokens in (128, 2048):
            run(f"unrolled, {name}", model, None, tokens, with_profile=tokens == 128)


def adapters() -> None:
    shapes = SIZES["llama2-7b"]
    config = model_config(shapes)
    model, adapter = random_backbone(config), random_adapter(adapter_config(shapes, "all7"), config)
    for products, reason in (("dense", "probe"), ("chosen", None)):
        prefill_module.all_experts_reason = lambda *_: reason
        bench.prefill_chunk = with_options(programs.PREFILL_OPTIONS)
        for tokens in (128, 512, 2048):
            run(products, model, adapter, tokens, with_profile=tokens != 512)
    prefill_module.all_experts_reason = lambda *_: "probe"
    prefill_module.is_routed_by_token = lambda adapter: False
    bench.prefill_chunk = with_options(programs.PREFILL_OPTIONS)
    run("dense, routed in the scan", model, adapter, 2048)


def layer() -> None:
    """Products of experts alone, with all layers' factors of one linear."""
    from adafuse_jax.adapters.low_rank import low_rank_product
    from pallas_kernels.prompt_experts import expand_into, pair_tokens, shrink
    from pallas_kernels.prompt_experts.kernel_triton import Tiles as T

    keys, one = jax.random.split(jax.random.key(0), 6), jnp.array([1], jnp.int32)
    num_experts, rank, top_k = 8, 64, 2

    def timed(name: str, call: Any, state: Any, *rest: Any) -> None:
        try:
            say(f"   {name}: {1e3 * device_ms(call, state, *rest):.1f} us")
        except Exception as error:
            say(f"   {name}: {first_line(error)}")

    for tokens in (2048,):
        gates, chosen = jax.lax.top_k(jax.random.uniform(keys[0], (tokens, num_experts)), top_k)
        make = jax.jit(partial(pair_tokens, num_experts=num_experts, scale=1.0))
        pairs = make(chosen, gates)
        timed(f"pair_tokens {tokens}", lambda _, *given: make(*given), None, chosen, gates)
        dense = jnp.zeros((tokens, num_experts)).at[jnp.arange(tokens)[:, None], chosen].set(gates)
        for into, out, n in ((4096, 4096, 1), (4096, 4096, 3), (4096, 11008, 2), (11008, 4096, 1)):
            x = jax.random.normal(keys[1], (tokens, into), jnp.bfloat16)
            y = jax.random.normal(keys[2], (tokens, out), jnp.bfloat16)
            a = [jax.random.normal(keys[3], (2, num_experts, rank, into), jnp.bfloat16) for _ in range(n)]
            b = jax.random.normal(keys[4], (2, num_experts, out, rank), jnp.bfloat16)
            say(f"{tokens} tokens, {into} to {out}, {n} linears")
            both = jax.jit(lambda y, x, a, b, gates: y + low_rank_product(x[None], a, b, gates[None])[0])
            timed("dense, both products of one linear", both, y, x, a[0][1], b[1], dense)
            joined = jnp.concatenate([f[1].reshape(-1, into) for f in a])
            timed("dense shrink, joined", lambda _, *given: jnp.matmul(*given), None, x, joined.T)
            for t in (
                T(block=64), T(block=128), T(block=64, num_warps=8), T(block=128, num_warps=8), T(block=64, num_stages=4),
                T(block=32, num_stages=5),
            ):  # fmt: skip
                call = jax.jit(partial(shrink, tiles=t))
                timed(f"shrink {t}", lambda _, *given: call(*given), None, x, a, one, pairs)
            h = jax.jit(shrink)(x, a, one, pairs)
            for t in (
                T(block=128, num_stages=2), T(block=256, num_stages=2), T(block=256, num_warps=8, num_stages=2),
                T(block=128, num_stages=3), T(block=64, num_stages=2), T(block=128, num_stages=1),
            ):  # fmt: skip
                timed(f"expand {t}", jax.jit(partial(expand_into, tiles=t), donate_argnums=0), y + 0, h, b, one, pairs)


if __name__ == "__main__":
    runtime.set_up()
    say(jax.devices()[0].device_kind, jax.__version__)
    for part in sys.argv[1:]:
        {"attention": attention, "options": options, "adapters": adapters, "layer": layer, "unrolled": unrolled}[part]()
