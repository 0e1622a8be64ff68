"""Linears with pre-gated experts at the shapes of Llama-2-7B on one GPU: time and bandwidth, for a token and for batches.

    python -m benchmarks.kernels.pregated_linear [--sweep] [--quantize int4]

8 experts of rank 64, top-2, bfloat16, random numbers. y = W x + Σ_u g_u B[e_u] (A[e_u] x) of the linears that share an
input reads

    bytes = W + A and B of the experts that some row uses (rows choose their own, so a batch of 8 uses all)

A call runs every layer once, each with its own input, so that no weights are in a cache when they are read and nothing is
shared among layers. `plain` is the same without experts, the backbone's own product. Every layer is
compared with the reference first; a wrong one is not timed, and ends the run with an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adafuse_jax.models.config import Quantize
from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common.records import first_line
from benchmarks.common.timing import Timing, time_calls
from pallas_kernels.pregated_linear import (
    Group,
    Mixture,
    Tiles,
    make_mixture,
    pregated_linear,
    pregated_linear_xla,
    tiles_for,
)
from pallas_kernels.quantised import QuantArray, QuantLayout, quantise

DTYPE = jnp.bfloat16
NUM_EXPERTS, RANK, TOP_K, SCALE = 8, 64, 2, 2.0
GROUPS = {
    "q, k, v": ({"q": 4096, "k": 4096, "v": 4096}, 4096),
    "o": ({"o": 4096}, 4096),
    "gate, up": ({"gate": 11008, "up": 11008}, 4096),
    "down": ({"down": 4096}, 11008),
}
TOLERANCE = 2**-6
"""Largest error, relative to the largest element: two roundings to bfloat16 of numbers of that size, and a margin."""


def draw(
    outs: dict[str, int], in_dim: int, num_layers: int
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """weights, a and b."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * len(outs)))

    def normal(shape: tuple[int, ...]) -> Array:
        return jax.random.normal(next(keys), shape, DTYPE) / shape[-1] ** 0.5

    return (
        {name: normal((num_layers, out_dim, in_dim)) for name, out_dim in outs.items()},
        {name: normal((num_layers, NUM_EXPERTS, RANK, in_dim)) for name in outs},
        {name: normal((num_layers, NUM_EXPERTS, out_dim, RANK)) for name, out_dim in outs.items()},
    )


def mixture_of(batch: int) -> Mixture:
    """Row b uses the experts 3b + 1 and 3b + 2 modulo E."""
    experts = (3 * np.arange(batch)[:, None] + 1 + np.arange(TOP_K)) % NUM_EXPERTS
    gates = np.tile([[0.7, 0.3]], (batch, 1))
    return make_mixture(jnp.asarray(experts), jnp.asarray(gates), SCALE, NUM_EXPERTS)


def moved_bytes(weights: dict[str, Array], a: dict[str, Array], b: dict[str, Array], mixture: Mixture | None) -> float:
    """Bytes that one layer reads: W, and the factors of the experts in use."""
    used = 0 if mixture is None else len({*np.asarray(mixture.experts)[np.any(np.asarray(mixture.gates) != 0, axis=1)]})
    factors = sum(x.nbytes for x in (*a.values(), *b.values())) * used / NUM_EXPERTS
    return (sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) + factors) / next(iter(weights.values())).shape[0]


Linear = Callable[..., dict[str, Array]]


def by_xla(
    x: Array, weights: dict[str, Array], a: dict[str, Array], b: dict[str, Array], mixture: Mixture | None, layer: Array
) -> dict[str, Array]:
    """The definition, in XLA ops."""
    whole = {name: w.dequantised(jnp.float32) if isinstance(w, QuantArray) else w for name, w in weights.items()}
    return {name: pregated_linear_xla(x, w, a.get(name), b.get(name), mixture, layer) for name, w in whole.items()}


def by_kernel(
    x: Array,
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
    layer: Array,
    tiles: Tiles | None = None,
) -> dict[str, Array]:
    """One launch, as in the decode step."""
    first = next(iter(weights.values()))
    layout = first.layout if isinstance(first, QuantArray) else None
    outs = [w.shape[1] for w in weights.values()]
    tiles = tiles or tiles_for(len(x), outs, x.shape[1], x.dtype.itemsize, layout=layout)
    group = Group(tiles=tiles, out_dtype=x.dtype)
    num_used = jnp.zeros(1, jnp.int32)
    if mixture is not None:
        num_used = (mixture.gates != 0).any(axis=1).sum(dtype=jnp.int32)[None]
    ready = jnp.zeros(next(iter(weights.values())).shape[0], jnp.int32)
    return pregated_linear(x, weights, a, b, mixture, num_used, layer[None], ready, group=group)[0]


IMPLEMENTATIONS: dict[str, Linear] = {"triton": by_kernel, "xla": by_xla}


def all_layers(
    linear: Linear,
    xs: list[Array],
    weights: dict[str, Array],
    a: dict[str, Array],
    b: dict[str, Array],
    mixture: Mixture | None,
) -> list[dict[str, Array]]:
    """Layer l of xs[l]."""
    return [linear(x, weights, a, b, mixture, jnp.int32(layer)) for layer, x in enumerate(xs)]


def worst_error(linear: Linear, x: Array, *arguments: Any) -> float:
    """Largest error of any layer and linear, relative to the largest element of the reference."""
    reference, linear, worst = jax.jit(by_xla), jax.jit(linear), 0.0
    for layer in range(next(iter(arguments[0].values())).shape[0]):
        found, wanted = (f(x, *arguments, jnp.int32(layer)) for f in (linear, reference))
        for name, y in wanted.items():
            difference = abs(found[name].astype(jnp.float32) - y.astype(jnp.float32)).max() / abs(y).max()
            worst = max(worst, float(difference) if bool(jnp.isfinite(difference)) else float("inf"))
    return worst


def time_layers(linear: Linear, x: Array, *arguments: Any, repeats: int) -> Timing:
    """Times of all layers, one after the other."""
    call = jax.jit(partial(all_layers, linear))
    xs = [x + layer for layer in range(next(iter(arguments[0].values())).shape[0])]
    return time_calls(lambda _: call(xs, *arguments), None, calls=10, repeats=repeats)[0]


def measure(linear: Linear, label: str, x: Array, *arguments: Any, repeats: int) -> bool:
    """Print one line; False if the result was wrong."""
    error = worst_error(linear, x, *arguments)
    line = f"{label}   worst error {error:.1e}"
    if error > TOLERANCE:
        print(f"{line}   WRONG", flush=True)
        return False
    timing, num_layers = time_layers(linear, x, *arguments, repeats=repeats), next(iter(arguments[0].values())).shape[0]
    ms, spread = timing.ms / num_layers, timing.spread_ms / num_layers
    print(f"{line}   {ms:8.4f} ± {spread:.4f} ms   {moved_bytes(*arguments) / ms / 1e6:7.0f} GB/s", flush=True)
    return True


def swept_tiles(batch: int, layout: QuantLayout | None = None) -> list[Tiles]:
    """Tiles around the ones that the decode step takes."""
    if layout is not None:
        choices = (
            product((4, 8, 16), (512, 1024, 2048), (2, 4), (1, 2))
            if batch == 1
            else product((16, 32, 64), (64, 128), (4, 8), (2, 4))
        )
        tile_k = 512 if batch == 1 else 128
        return [
            Tiles(tile_m=m, tile_k=tile_k, tile_q=q, num_warps=warps, num_stages=stages)
            for m, q, warps, stages in choices
            if batch == 1 or q == (layout.group_size or q)  # of several rows a group is a step
        ]
    if batch == 1:
        of_one_row = product((2, 4, 8, 16), (256, 512, 1024), (0, 1024, 2048, 4096), (2, 4, 8), (1, 2))
        return [
            Tiles(
                tile_m=m, tile_k=k, shrink_m=max(1, m * k // shrink_k) if shrink_k else 0, shrink_k=shrink_k,
                num_warps=warps, num_stages=stages,
            )
            for m, k, shrink_k, warps, stages in of_one_row
        ]  # fmt: skip
    shared = ((0, 1, 1), (32, 1, 1), (0, 1, 2), (0, 2, 4), (0, 2, 8), (0, 3, 8))
    return [
        Tiles(tile_m=m, tile_k=k, num_stages=stages, num_warps=4, shrink_m=shrink_m, splits=splits, shrink_splits=parts)
        for m, k, stages, (shrink_m, splits, parts) in product((32, 64), (64, 128), (3, 4), shared)
    ]


def run(
    groups: dict[str, tuple[dict[str, int], int]],
    num_layers: int,
    repeats: int,
    batches: tuple[int, ...] = (1, 8, 32),
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS),
    sweep: bool = False,
    quantize: Quantize | None = None,
) -> None:
    """Print a line for every group, batch and implementation. Raises `SystemExit` if a result was wrong."""
    wrong, layout = 0, quantize and LAYOUTS[quantize]
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    linears = {f"{name:6}": IMPLEMENTATIONS[name] for name in implementations}
    for (group, (outs, in_dim)), batch in product(groups.items(), batches):
        factors = draw(outs, in_dim, num_layers)
        if layout is not None:
            whole = jax.jit(quantise, static_argnums=(1, 2))
            factors = {name: whole(w, layout, DTYPE) for name, w in factors[0].items()}, *factors[1:]
        x = jax.random.normal(jax.random.key(1), (batch, in_dim), DTYPE)
        experts: tuple = (*factors, mixture_of(batch))
        plain: tuple = (factors[0], {}, {}, None)
        cases: list[tuple[str, Linear, tuple]] = [
            (f"{name}   {kind:7}", linear, arguments)
            for name, linear in linears.items()
            for kind, arguments in (("plain", plain), ("experts", experts))
        ]
        if sweep:
            cases += [(str(tiles), partial(by_kernel, tiles=tiles), experts) for tiles in swept_tiles(batch, layout)]
        for name, linear, arguments in cases:
            label = f"{group:8}   B {batch:2}   {name}"
            try:
                wrong += not measure(linear, label, x, *arguments, repeats=repeats)
            except Exception as error:  # tiles that do not fit; the others still run
                print(f"{label}   {first_line(error)}", flush=True)
    if wrong:
        raise SystemExit(f"{wrong} wrong results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try many tiles of the Triton kernel too")
    parser.add_argument("--quantize", choices=LAYOUTS, help="the weights in codes and scales")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=[*IMPLEMENTATIONS])
    parser.add_argument("--layers", type=int, default=16, help="layers that a call runs through (default: 16)")
    parser.add_argument("--group", choices=GROUPS, action="append", help="these only")
    arguments = parser.parse_args()
    run(
        {name: GROUPS[name] for name in arguments.group or GROUPS}, arguments.layers, repeats=7, sweep=arguments.sweep,
        batches=tuple(arguments.batches), implementations=tuple(arguments.implementations), quantize=arguments.quantize,
    )  # fmt: skip


if __name__ == "__main__":
    main()
