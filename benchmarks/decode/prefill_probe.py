"""Probe of prefill variants, to be removed: which tiles, XLA options and products of experts are fastest.

python -m benchmarks.decode.prefill_probe attention options adapters
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.core import runtime
from adafuse_jax.inference import prefill as prefill_module
from adafuse_jax.inference import programs
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


def attention() -> None:
    key = jax.random.key(0)
    for heads, kv, dim in ((32, 32, 128), (32, 8, 128), (32, 8, 64)):
        for start in (0, 6144, 30720):
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
                    call = partial(prefill_attention, q, k, k, *ints, tiles=tiles)
                    timing, _ = time_calls(lambda _: call(), None, repeats=3, seconds=0.02)  # noqa: B023
                    say(f"{heads}/{kv}/{dim} start {start}: {tiles} {timing}, {work / timing.ms / 1e9:.0f} TFLOP/s")
                except Exception as error:
                    say(heads, kv, dim, start, tiles, first_line(error))
            if start == 0:
                call = jax.jit(partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
                timing, _ = time_calls(lambda _: call(q, k[0], k[0]), None, repeats=3, seconds=0.02)  # noqa: B023
                say(f"{heads}/{kv}/{dim} cudnn causal {timing}, {work / timing.ms / 1e9:.0f} TFLOP/s")


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
    for name, chosen in (
        ("default", {}), ("fusion", {"xla_gpu_enable_dynamic_slice_fusion": True}),
        ("no fusion", {"xla_gpu_enable_dynamic_slice_fusion": False}),
        ("fusion, no triton gemm", {"xla_gpu_enable_dynamic_slice_fusion": True, "xla_gpu_enable_triton_gemm": False}),
        ("fusion, no command buffer",
         {"xla_gpu_enable_dynamic_slice_fusion": True, "xla_gpu_enable_command_buffer": ""}),
        ("fusion, cublaslt", {"xla_gpu_enable_dynamic_slice_fusion": True, "xla_gpu_enable_cublaslt": True}),
    ):  # fmt: skip
        bench.prefill_chunk = with_options(chosen)
        for tokens in (128, 512, 2048):
            run(name, model, None, tokens, with_profile=name in ("default", "fusion") and tokens != 512)


def adapters() -> None:
    shapes = SIZES["llama2-7b"]
    config = model_config(shapes)
    model, adapter = random_backbone(config), random_adapter(adapter_config(shapes, "all7"), config)
    for products in ("dense", "grouped"):
        prefill_module.choose_products = lambda *_: (products, "probe")  # noqa: B023
        bench.prefill_chunk = with_options(programs.PREFILL_OPTIONS)
        for tokens in (128, 512, 2048):
            run(products, model, adapter, tokens, with_profile=tokens != 512)
    prefill_module.choose_products = lambda *_: ("dense", "probe")
    prefill_module.RoutedAdaFuse = type("Plain", (), {"of": staticmethod(lambda adapter, _: adapter)})
    bench.prefill_chunk = with_options(programs.PREFILL_OPTIONS)
    run("dense, routed in the scan", model, adapter, 2048)


if __name__ == "__main__":
    runtime.set_up()
    say(jax.devices()[0].device_kind, jax.__version__)
    for part in sys.argv[1:]:
        {"attention": attention, "options": options, "adapters": adapters}[part]()
