"""What `benchmarks.decode` measures in JAX, each job in a process of its own: ceilings, decoding rows, one layer's parts.

    python -m benchmarks.decode_rows --job JOB.json --result RESULT.json

A row is timed through `Engine.generate`, which is what a user gets. Weights are random and made on the device, in their
own type and slice by slice, so that no peak is above what decoding needs; batches go from small to large, so that the
peak of the process is that of the row. Decoding is greedy among the tokens that the text does not have yet: a random
model would otherwise repeat one token, and its experts would never change.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.core import runtime
from adafuse_jax.inference import engine as engine_module
from adafuse_jax.inference.backends.megakernel import fused_unsupported_reason
from adafuse_jax.inference.config import Strategy
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.parallel.mesh import make_mesh, shard
from benchmarks.decode_costs import MOLA_EXPERTS, SIZES, TARGETS, Shapes, costs

NO_REPEATS = Sampling.of(repetition_penalty=1e6)
LAYERS = 4
"""Of the breakdown: enough that a step on the device takes longer than its dispatch."""
CONTEXT = 512
"""Cache slots of the breakdown's decode step."""
Tell = Callable[[dict[str, Any]], None]


def model_config(shapes: Shapes) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=shapes.vocab_size, embed_dim=shapes.embed_dim, hidden_dim=shapes.hidden_dim,
        num_layers=shapes.num_layers, num_heads=shapes.num_heads, num_kv_heads=shapes.num_heads,
        head_dim=shapes.embed_dim // shapes.num_heads, max_position_embeddings=shapes.max_position_embeddings,
        norm_eps=1e-5,
    )  # fmt: skip


def adapter_config(shapes: Shapes, targets: str, rank: int | None = None, method: Any = "adafuse") -> AdapterConfig:
    """The same rank, experts and top-k for every method, as far as it has them."""
    wanted: dict[str, Any] = {
        "targets": TARGETS[targets], "num_experts": shapes.num_experts, "rank": rank or shapes.rank,
        "top_k": shapes.top_k, "alpha": shapes.alpha, "experts_per_layer": experts_per_layer(shapes),
    }  # fmt: skip
    return AdapterConfig(adapter=method, **{k: v for k, v in wanted.items() if k in PRESETS[method].settings})


def experts_per_layer(shapes: Shapes) -> tuple[int, ...]:
    """MoLA's, in a model that has fewer layers the first of them."""
    return MOLA_EXPERTS[: shapes.num_layers]


@partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """N(0, 0.02²), matrix by matrix."""
    matrix, keys = shape[-2:], jax.random.split(key, shape[:-2])
    count = int(np.prod(shape[:-2]))
    return jax.lax.map(
        lambda key: (0.02 * jax.random.normal(key, matrix)).astype(dtype),
        keys.reshape(count, *keys.shape[len(shape) - 2 :]),
    ).reshape(shape)


def random_module[Module](make: Callable[[], Module], dtype: Any, seed: int) -> Module:
    """What `make` makes, with random leaves instead: norms are 1, routers stay in fp32, the rest is of `dtype`.

    The largest matrices come first, as what is drawn last adds its temporaries to all the others.
    """
    paths, tree = jax.tree.flatten_with_path(jax.eval_shape(make))
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
    leaves: dict[int, Array] = {}
    for at in sorted(range(len(named)), key=lambda at: -int(np.prod(named[at][1].shape[-2:]))):
        name, leaf = named[at]
        kept = jnp.float32 if "router" in name else dtype
        if "norm" in name:
            leaves[at] = jnp.ones(leaf.shape, kept)
        else:
            leaves[at] = draw(jax.random.key(1000 * seed + at, impl="rbg"), leaf.shape, jnp.dtype(kept))
    return jax.block_until_ready(jax.tree.unflatten(tree, [leaves[at] for at in range(len(named))]))


def random_backbone(config: ModelConfig, dtype: Any = jnp.bfloat16) -> Backbone:
    return random_module(lambda: Backbone(config, dtype=dtype, rngs=nnx.Rngs(0)), dtype, seed=1)


def random_adapter(config: AdapterConfig, model: ModelConfig, dtype: Any = jnp.bfloat16) -> Any:
    return random_module(lambda: make_adapter(config, model, rngs=nnx.Rngs(0)), dtype, seed=3)


def random_adafuse(config: AdapterConfig, model: ModelConfig, dtype: Any = jnp.bfloat16) -> AdaFuse:
    return random_module(lambda: AdaFuse(config, model, rngs=nnx.Rngs(0)), dtype, seed=2)


def time_chain(call: Callable[[Any], Any], state: Any, seconds: float, repeats: int = 5) -> list[float]:
    """Seconds per call of state = call(state), enqueued without waiting; the repeats fill `seconds` together."""
    state = jax.block_until_ready(call(state))
    begun = time.perf_counter()
    state = jax.block_until_ready(call(state))
    calls = max(3, round(seconds / repeats / (time.perf_counter() - begun)))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(calls):
            state = call(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - begun) / calls)
    return times


def measure_ceilings(elements: int = 2**30, seconds: float = 0.3) -> dict[str, Any]:
    """Read and copy in TB/s, the best of some ways of each over `elements` int32; copy counts bytes read and written."""
    x = jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(0, impl="rbg"), (elements,), jnp.uint32), jnp.int32)
    reads: dict[str, Callable[[Array], Array]] = {
        "sum": jnp.sum,
        "max": jnp.max,
        "sums of 4096": lambda x: jnp.sum(x.reshape(-1, min(4096, elements)), axis=1),
        "sums of 16384": lambda x: jnp.sum(x.reshape(-1, min(16384, elements)), axis=1),
        "xor": lambda x: jax.lax.reduce(x, jnp.int32(0), jax.lax.bitwise_xor, (0,)),
    }
    copies: dict[str, Callable[[Array], Array]] = {"copy": jnp.copy, "x + 1": lambda x: x + 1}
    found: dict[str, Any] = {"array_gb": x.nbytes / 1e9, "read": {}, "copy": {}}

    def read(function: Callable[[Array], Array], _: Any) -> Array:
        return function(x)

    for name, function in reads.items():
        times = time_chain(partial(read, jax.jit(function)), None, seconds)
        found["read"][name] = x.nbytes / statistics.median(times) / 1e12
    for name, function in copies.items():
        times = time_chain(jax.jit(function), x, seconds)
        found["copy"][name] = 2 * x.nbytes / statistics.median(times) / 1e12
    for kind in ("read", "copy"):
        found[f"{kind}_tbps"] = max(found[kind].values())
    return found


def time_rows(
    engine: Engine, batches: Iterable[Sequence[Sequence[int]]], new_tokens: int, seconds: float = 60.0
) -> dict[str, Any]:
    """Decode each batch of prompts, of as many as `seconds` allow. ms per step: the median and slowest less fastest."""
    steps, prefills, contexts, pairs, begun = [], [], [], [], time.perf_counter()
    for seed, prompts in enumerate(batches):
        tokens = list(engine.generate(prompts, max_new_tokens=new_tokens, sampling=NO_REPEATS, seed=seed))
        assert len(tokens) == new_tokens, f"{len(tokens)} tokens came of {new_tokens}"
        prefills.append(1e3 * tokens[0].seconds)
        steps.append(1e3 * sum(token.seconds for token in tokens[1:]) / (new_tokens - 1))
        contexts.append(statistics.mean(map(len, prompts)) + new_tokens / 2)
        pairs += [[np.sort(token.experts, axis=-1) for token in tokens if token.experts is not None]]
        if time.perf_counter() - begun > seconds:
            break
    row = {
        "ms_per_token": statistics.median(steps), "spread_ms": max(steps) - min(steps), "queries": len(steps),
        "new_tokens": new_tokens, "prefill_ms": statistics.median(prefills), "context": statistics.mean(contexts),
        "peak_gib": runtime.peak_device_gib(),
    }  # fmt: skip
    if pairs[0]:
        row["distinct_experts"] = float(np.mean([len(np.unique(chosen)) for of in pairs for chosen in of]))
        changed = [(a != b).any(-1) for of in pairs for a, b in pairwise(of)]
        row["experts_change_pct"] = 100 * float(np.mean(changed)) if changed else 0.0
    return row


def warm_up(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Compile; returns the seconds that took, with some tokens."""
    begun = time.perf_counter()
    tokens = engine.generate(prompts, max_new_tokens=new_tokens, sampling=NO_REPEATS)
    for _ in zip(range(8), tokens, strict=False):
        pass
    tokens.close()  # type: ignore[attr-defined]
    return time.perf_counter() - begun


def batches_of(prompts: Sequence[Sequence[int]], batch: int, count: int) -> list[list[Sequence[int]]]:
    """`count` batches; the prompts begin again when they are used up."""
    return [[prompts[(i * batch + j) % len(prompts)] for j in range(batch)] for i in range(count)]


def time_steps(engine: Engine, batch: int, context: int, steps: int = 40, repeats: int = 5) -> float:
    """ms of a step at `context` tokens in the cache: the median of the repeats. The steps are chained, and no token of
    theirs is handed to the host. The rows begin with different tokens, and so use experts of their own."""
    slots = engine_module.bucket(context + steps, engine_module.MIN_SLOTS)
    state = engine._empty_state(batch, slots, NO_REPEATS)
    state = replace(state, token=jnp.arange(batch, dtype=jnp.int32))
    times = []
    for _ in range(repeats + 1):
        state = engine._placed(replace(state, position=jnp.full(batch, context, jnp.int32)))
        jax.block_until_ready(state)
        begun = time.perf_counter()
        for _ in range(steps):
            _, state = engine._step(state, NO_REPEATS)
        jax.block_until_ready(state)
        times.append(1e3 * (time.perf_counter() - begun) / steps)
    engine.restore()
    return statistics.median(times[1:])  # the first compiles


def measure_contexts(job: dict[str, Any], tell: Tell) -> None:
    """ms of a step of one row by the tokens in its cache, for the backbone and for the default with all linears adapted."""
    shapes, found = SIZES[job["size"]], []
    config = model_config(shapes)
    model = random_backbone(config)
    for method, targets in (("backbone", "-"), ("adafuse", "all7")):
        adapter = None if method == "backbone" else random_adapter(adapter_config(shapes, targets), config)
        engine = Engine(model, adapter, eos_ids=())
        for context in job["contexts"]:
            moved = costs(shapes, method, targets, engine.strategy, 1, context).bytes_gb
            row = {
                "method": method,
                "targets": targets,
                "strategy": engine.strategy,
                "context": context,
                "bytes_gb": moved,
            }
            row["ms"] = time_steps(engine, 1, context)
            found.append(row)
            print("  {method} {targets}, {context} tokens: {ms:.3f} ms, {bytes_gb:.3f} GB".format(**row), flush=True)
            tell({"contexts": found})


def measure_devices(job: dict[str, Any], tell: Tell) -> None:
    """ms of a step of one row, as one launch where that can run, and with single operations: on one device, and on several
    that share the model."""
    shapes, found, most = SIZES[job["size"]], [], max(job["devices"])
    if jax.device_count() < most:
        raise SystemExit(f"{most} devices are needed, and there are {jax.device_count()}")
    config = model_config(shapes)
    model = random_backbone(config)
    for method, targets in (("backbone", "-"), ("adafuse", "all7")):
        adapter = None if method == "backbone" else random_adapter(adapter_config(shapes, targets), config)
        for devices in job["devices"]:
            share, its = model, adapter
            if devices > 1:
                mesh = make_mesh(devices, config)
                share, its = shard(model, mesh), adapter and shard(adapter, mesh)
            launch: Strategy = "unmerged" if fused_unsupported_reason(share, adapter=its) else "fused"
            for strategy in (launch, "unmerged"):
                engine = Engine(share, its, strategy=strategy, eos_ids=())
                row = {"method": method, "targets": targets, "strategy": engine.strategy, "devices": devices}
                row["ms"] = time_steps(engine, 1, job["context"])
                found.append(row)
                print("  {method} {targets} {strategy}, {devices} devices: {ms:.3f} ms".format(**row), flush=True)
                tell({"devices": found})


def measure_rows(job: dict[str, Any], tell: Tell) -> None:
    """Rows of one strategy and its targets, batch by batch; `tell` gets all rows so far."""
    shapes, prompts, method = SIZES[job["size"]], job["prompts"], job["method"]
    strategy, targets = job["strategy"], job["targets"]
    name = " ".join(word for word in (method, strategy, targets) if word != "-")
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    config = model_config(shapes)
    adapter = None if method == "backbone" else random_adapter(adapter_config(shapes, targets, None, method), config)
    options = {} if strategy == "-" else {"strategy": strategy}
    engine = Engine(random_backbone(config), adapter, eos_ids=(), **options)
    del adapter
    print(f"  {name}: model made in {time.perf_counter() - begun:.1f} s", flush=True)
    for batch in job["batches"]:
        row = {"method": method, "targets": targets, "strategy": strategy, "batch": batch}
        try:
            queries = batches_of(prompts, batch, job["queries"] if batch == 1 else job["batch_queries"])
            longest = max(queries, key=lambda rows: max(map(len, rows)))
            row["warm_up_s"] = warm_up(engine, longest, job["new_tokens"])
            row |= time_rows(engine, queries, job["new_tokens"], job["row_seconds"])
            row["step_ms"] = time_steps(engine, batch, round(row["context"]))
            row["stall_pct"] = 100 * (row["ms_per_token"] / row["step_ms"] - 1)
            text = "{ms_per_token:.3f} ± {spread_ms:.3f} ms, {queries} queries, warm-up {warm_up_s:.0f} s".format(**row)
        except Exception as error:
            text = row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
        rows.append(row)
        print(f"  {name}, batch {batch}: {text}", flush=True)
        tell({"rows": rows})


def layer_call(model: Backbone, adapter: Adapter | None, length: int) -> tuple[Callable[[Any], Any], Any]:
    """(call, state): run tokens [1, length] through the layers, the next ones depending on what came out."""
    slots = CONTEXT if length == 1 else length
    leaves, tree = jax.tree.flatten((model, adapter))

    @partial(jax.jit, donate_argnums=1)
    def run(leaves: list[Array], state: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        model, adapter = jax.tree.unflatten(tree, leaves)
        tokens, cache = state
        positions = slots - length + jnp.arange(length)[None]
        out = model.run(tokens, adapter=adapter, positions=positions, cache=cache, unroll=True)
        tokens = jnp.where(jnp.isfinite(out.hidden[..., 0]), tokens + 1, 0) % model.config.vocab_size
        return tokens, out.cache

    state = jnp.arange(length)[None] % model.config.vocab_size, KVCache.empty(model.config, 1, slots, model.dtype)
    return partial(run, leaves), state


def layer_points(ranks: Sequence[int], lengths: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """(rank, length): every rank at the first and the middle length, every length at the rank of the rows."""
    swept = [(r, t) for t in (lengths[0], lengths[len(lengths) // 2]) for r in ranks]
    return swept + [(rank, t) for t in lengths if (rank, t) not in swept]


def measure_layer(
    shapes: Shapes, ranks: Sequence[int], lengths: Sequence[int], seconds: float, tell: Tell, num_layers: int = LAYERS
) -> None:
    """ms of one layer with all seven linears adapted: the bare layer, and what each kind of mixture adds."""
    config = replace(model_config(shapes), num_layers=num_layers, vocab_size=min(shapes.vocab_size, 256))
    model = random_backbone(config)
    found: list[dict[str, Any]] = []

    def per_layer(adapter: Adapter | None, length: int) -> float:
        return 1e3 * statistics.median(time_chain(*layer_call(model, adapter, length), seconds)) / num_layers

    bare = {length: per_layer(None, length) for length in lengths}
    print("  bare layer: " + ", ".join(f"T={t} {ms:.4f} ms" for t, ms in bare.items()), flush=True)
    for rank, length in layer_points(ranks, lengths, shapes.rank):
        row: dict[str, Any] = {"rank": rank, "length": length, "backbone_ms": bare[length]}
        for name, method in (("adafuse", "adafuse"), ("layerwise", "moral")):
            try:
                adapter = random_adapter(adapter_config(shapes, "all7", rank, method), config)
                row[f"{name}_ms"] = per_layer(adapter, length) - bare[length]
            except Exception as error:
                row[f"{name}_error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
        found.append(row)
        parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  layer: " + ", ".join(parts), flush=True)
        tell({"breakdown": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text())
    runtime.set_up()
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def tell(found: dict[str, Any]) -> None:
        arguments.result.write_text(json.dumps(facts | found))

    shapes = SIZES[job["size"]]
    tiny = job["size"] == "tiny"
    if job["kind"] == "ceilings":
        tell({"ceilings": measure_ceilings(2**12 if tiny else 2**30, job["seconds"])})
    elif job["kind"] == "contexts":
        measure_contexts(job, tell)
    elif job["kind"] == "devices":
        measure_devices(job, tell)
    elif job["kind"] == "layer":
        measure_layer(shapes, job["ranks"], job["lengths"], job["seconds"], tell)
    else:
        measure_rows(job, tell)


if __name__ == "__main__":
    main()
