"""Random models and adapters at the shapes of a benchmark.

Weights are made on the device, in their own type and matrix by matrix, so that no peak is above what decoding needs. With a
`Place` they are made in their shards, a matrix at a time as well, and are the same on every mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.models.config import ModelConfig, Quantize
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import LAYOUTS, quantised
from adafuse_jax.parallel.axes import logical_axes, partition_spec
from benchmarks.common.timing import wait
from benchmarks.decode.costs import MOLA_EXPERTS, TARGETS, Shapes

Place = Callable[[tuple[Any, ...]], Sharding]
"""Path of a leaf in a backbone or an adapter → its sharding."""


def place_on(mesh: Mesh | None) -> Place:
    """Shards over `mesh` by the rules of `axes`; None: whole on the first device."""
    if mesh is None:
        return lambda path: SingleDeviceSharding(jax.devices()[0])
    return lambda path: NamedSharding(mesh, partition_spec(logical_axes(path), mesh.axis_names))


def model_config(shapes: Shapes) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=shapes.vocab_size, embed_dim=shapes.embed_dim, hidden_dim=shapes.hidden_dim,
        num_layers=shapes.num_layers, num_heads=shapes.num_heads, num_kv_heads=shapes.num_kv_heads or shapes.num_heads,
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


@partial(jax.jit, static_argnames=("shape", "dtype", "sharding", "bits"))
def draw(key: Array, shape: tuple[int, ...], dtype: Any, sharding: Sharding | None = None, bits: int = 8) -> Array:
    """N(0, 0.02²), matrix by matrix; of uint8 the bytes of codes that are uniform around their offset, of so many `bits`."""
    matrix, keys = shape[-2:], jax.random.split(key, shape[:-2])
    count = int(np.prod(shape[:-2]))

    def draw_one(key: Array) -> Array:
        if dtype == jnp.uint8:
            codes = jax.random.randint(key, (8 // bits, *matrix), 1, 2**bits, jnp.int32).astype(jnp.uint8)
            one = codes[0] if bits == 8 else codes[0] | codes[1] << 4
        else:
            one = (0.02 * jax.random.normal(key, matrix)).astype(dtype)
        return one if sharding is None else jax.lax.with_sharding_constraint(one, of_matrix(sharding, len(shape)))

    leaf = jax.lax.map(draw_one, keys.reshape(count, *keys.shape[len(shape) - 2 :])).reshape(shape)
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def in_float32[Tree](tree: Tree) -> Tree:
    """Copy of a tree of arrays, floating ones in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def of_matrix(sharding: Sharding, ndim: int) -> Sharding:
    """Sharding of the last two of `ndim` axes; those before are whole."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[-2:]))


def random_module[Module](make: Callable[[], Module], dtype: Any, seed: int, place: Place | None = None) -> Module:
    """The module that `make` makes, with random leaves: norms are 1, routers stay in fp32, the rest is of `dtype`.

    The largest matrices come first, as what is drawn last adds its temporaries to all the others.
    """
    paths, tree = jax.tree.flatten_with_path(jax.eval_shape(make))
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
    shardings = [place and place(path) for path, _ in paths]
    impl = "rbg" if place is None else "threefry2x32"  # rbg is faster, and its bits differ with the sharding
    leaves: dict[int, Array] = {}
    in_groups = {name.removesuffix("group_scales") for name, _ in named if name.endswith("group_scales")}
    for at in sorted(range(len(named)), key=lambda at: -int(np.prod(named[at][1].shape[-2:]))):
        name, leaf = named[at]
        leaf_dtype = jnp.dtype(jnp.float32 if "router" in name else dtype)
        if "norm" in name:
            leaves[at] = jnp.ones(leaf.shape, leaf_dtype, device=shardings[at])
        elif name.endswith(("group_scales", "channel_scales")):
            codes = 2 ** (4 if name.endswith("group_scales") else 8) - 1
            scale = 0.02 * (12 / (codes**2 - 1)) ** 0.5
            leaves[at] = jnp.full(leaf.shape, scale, leaf_dtype, device=shardings[at])
        else:
            is_codes = leaf.dtype == jnp.uint8
            bits = 4 if name.removesuffix("codes") in in_groups else 8
            key = jax.random.key(1000 * seed + at, impl=impl)
            leaves[at] = draw(key, leaf.shape, leaf.dtype if is_codes else leaf_dtype, shardings[at], bits)
    return wait(jax.tree.unflatten(tree, [leaves[at] for at in range(len(named))]))


def random_backbone(
    config: ModelConfig, dtype: Any = jnp.bfloat16, quantize: Quantize | None = None, place: Place | None = None
) -> Backbone:
    def make() -> Backbone:
        model = Backbone(config, dtype=dtype, rngs=nnx.Rngs(0))
        return model if quantize is None else quantised(model, LAYOUTS[quantize])

    return random_module(make, dtype, seed=1, place=place)


def random_adapter(
    config: AdapterConfig, model: ModelConfig, dtype: Any = jnp.bfloat16, seed: int = 3, place: Place | None = None
) -> Any:
    """An adapter of the method in `config`."""
    return random_module(lambda: make_adapter(config, model, rngs=nnx.Rngs(0)), dtype, seed=seed, place=place)
