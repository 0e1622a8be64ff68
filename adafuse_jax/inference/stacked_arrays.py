"""The stacked arrays of a bank of adapters: C experts of every linear, and their rows of every router. Their shapes are a
bucket, which is enlarged when an adapter needs it; they are written in place, one expert at a time.

    experts: linear → A [L, C, R, in], B [L, C, out, R];   routers: input → W_g [C, in], fp32
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.adapters.stacked import INPUT_NUMBERS, router_input
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.parallel.axes import linear_axes, partition_spec
from adafuse_jax.parallel.mesh import mesh_of

MOST_WEIGHT = 1e20
"""Size of a weight, at most. Where products are of all experts, A x of other rows' experts has a gate of 0: it must not
overflow, as 0 times infinity would be NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Shapes of the stacked arrays: `experts`, of one adapter at most; `targets` and `inputs` in execution order."""

    rank: int = 1
    experts: int = 1
    top_k: int = 1
    targets: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, adapter: AdaFuse | LoRA) -> Bucket:
        """The least that holds an adapter."""
        config = adapter.config
        return cls(
            rank=_power_of_two(config.rank), experts=_power_of_two(config.num_experts or 1), top_k=config.top_k or 1,
            targets=config.targets, inputs=(router_input(adapter),),
        )  # fmt: skip

    def __or__(self, other: Bucket) -> Bucket:
        """The least that holds both."""
        return Bucket(
            rank=max(self.rank, other.rank), experts=max(self.experts, other.experts),
            top_k=max(self.top_k, other.top_k),
            targets=tuple(name for name in LINEARS if name in self.targets + other.targets),
            inputs=tuple(name for name in INPUT_NUMBERS if name in self.inputs + other.inputs),
        )  # fmt: skip


class Expert(NamedTuple):
    """One expert of all linears: `factors` by linear, A [L, 1, R, in] and B [L, 1, out, R], and its row of every router."""

    factors: dict[str, dict[str, Array]]
    router: dict[str, Float[Array, " in"]]


class StackedArrays:
    """Arrays of `max_experts` experts for a backbone, in its type and sharded as it is; without effect at first."""

    def __init__(self, model: Backbone, max_experts: int):
        self.max_experts, self.bucket = max_experts, Bucket()
        self._config, self._dtype, self._mesh = model.config, model.dtype, mesh_of(model)
        self.experts: nnx.Dict = nnx.Dict()
        self.routers: dict[str, Array] = {}

    def enlarge(self, bucket: Bucket) -> None:
        """Take over the shapes of a bucket that holds the present one. Raises `UserError` where the device has no room."""
        before, experts, routers = self.bucket, dict(self.experts.items()), dict(self.routers)
        try:
            for name in bucket.targets:
                if name not in experts:
                    experts[name] = self._zero_experts(name, bucket.rank)
                elif bucket.rank > before.rank:
                    enlarge = partial(_with_ranks, more=bucket.rank - before.rank)
                    experts |= jax.tree_util.tree_map_with_path(enlarge, {name: experts[name]})
            for name in bucket.inputs:
                if name not in routers:
                    shape = self.max_experts, self._config.linear_shape(name)[1]
                    routers[name] = self.placed(np.zeros(shape, np.float32))
            jax.block_until_ready((experts, routers))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{self.max_experts} experts of rank {bucket.rank} on {' '.join(bucket.targets)} do not fit the device's "
                "memory; allow fewer experts, or give adapters of a lower rank"
            ) from error
        self.bucket, self.routers = bucket, routers
        self.experts = nnx.Dict({name: experts[name] for name in bucket.targets})

    def experts_of(self, adapter: AdaFuse | LoRA, bucket: Bucket) -> tuple[Expert, ...] | None:
        """The experts of an adapter on the device, in the shapes of a bucket; None if they have numbers that are not
        finite, or larger than `MOST_WEIGHT`."""
        factors, router = _on_host(adapter, self._config.linear_shape(router_input(adapter))[1])
        experts = tuple(self._expert(number, factors, router, adapter, bucket) for number in range(len(router)))
        are_finite = [_is_finite(expert) for expert in experts]
        return experts if all(map(bool, are_finite)) else None

    def write(self, place: int, expert: Expert) -> None:
        """Replace one expert, in place."""
        self.experts, self.routers = _write(self.experts, self.routers, np.int32(place), expert)

    def placed(self, array: np.ndarray, axes: Any = ()) -> jax.Array:
        """A copy on the model's devices."""
        return jax.device_put(array.copy(), self._sharding(axes))

    def _expert(self, number: int, factors: Any, router: np.ndarray, adapter: AdaFuse | LoRA, bucket: Bucket) -> Expert:
        """One expert of an adapter, zero where the adapter has nothing."""

        def factor(linear: str, name: str, *shape: int) -> jax.Array:
            padded = np.zeros((self._config.num_layers, 1, *shape), self._dtype)
            if linear in factors:
                own = factors[linear][name][:, number : number + 1]
                padded[tuple(slice(size) for size in own.shape)] = own
            return self.placed(padded, linear_axes(linear, name))

        def row(name: str) -> jax.Array:
            is_own = name == router_input(adapter)
            return self.placed(router[number] if is_own else np.zeros(self._config.linear_shape(name)[1], np.float32))

        shapes = {name: self._config.linear_shape(name) for name in bucket.targets}
        return Expert(
            factors={
                name: {"A": factor(name, "A", bucket.rank, into), "B": factor(name, "B", out, bucket.rank)}
                for name, (out, into) in shapes.items()
            },
            router={name: row(name) for name in bucket.inputs},
        )

    def _zero_experts(self, name: str, rank: int) -> LoRAExperts:
        """C experts of a linear without effect."""
        shape = self._config.num_layers, *self._config.linear_shape(name)

        def make() -> dict[str, LoRAExperts]:
            return {name: LoRAExperts(*shape, num_experts=self.max_experts, rank=rank, scale=1.0, rngs=nnx.Rngs(0))}

        def zeros(path: tuple[Any, ...], leaf: Any) -> jax.Array:
            return jnp.zeros(leaf.shape, self._dtype, device=self._sharding(linear_axes(*_names_of(path))))

        return jax.tree_util.tree_map_with_path(zeros, jax.eval_shape(make))[name]

    def _sharding(self, axes: Any = ()) -> NamedSharding | None:
        return (
            None if self._mesh is None else NamedSharding(self._mesh, partition_spec(axes) if axes else PartitionSpec())
        )


@partial(jax.jit, donate_argnames=("experts", "routers"))
def _write(experts: nnx.Dict, routers: Any, place: Int[Array, ""], new: Expert) -> tuple[nnx.Dict, Any]:
    """Replace one expert in every stacked array, in place."""
    update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place)

    def with_factor(path: tuple[Any, ...], stacked: Array) -> Array:
        linear, factor = _names_of(path)
        return update(stacked, new.factors[linear][factor], axis=1)

    written = jax.tree_util.tree_map_with_path(with_factor, experts)
    return written, {name: update(router, new.router[name][None], axis=0) for name, router in routers.items()}


@jax.jit
def _is_finite(expert: Expert) -> Bool[Array, ""]:
    sizes = (jnp.abs(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(expert))
    return jnp.stack([(size <= MOST_WEIGHT).all() for size in sizes]).all()


def _on_host(adapter: AdaFuse | LoRA, into: int) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """(linear → A [L, E, R, in] and B [L, E, out, R], router [E, into]; a LoRA's is zero, and its gate 1)."""
    factors = {name: {"A": np.asarray(e.A[...]), "B": np.asarray(e.B[...])} for name, e in adapter.experts.items()}
    router = np.zeros((1, into)) if isinstance(adapter, LoRA) else adapter.router.weight[...]
    return factors, np.asarray(router, np.float32)


def _with_ranks(path: tuple[Any, ...], leaf: jax.Array, *, more: int) -> jax.Array:
    """A [L, C, R, in] or B [L, C, out, R] with ranks of zeros added."""
    axis = {"A": 2, "B": 3}[_names_of(path)[1]]
    return jnp.pad(leaf, [(0, more if i == axis else 0) for i in range(leaf.ndim)])


def _names_of(path: tuple[Any, ...]) -> tuple[str, str]:
    """(linear, factor) of a leaf of stacked experts."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    linear, factor, *_ = (name for name in names if name in (*LINEARS, "A", "B"))
    return linear, factor


def _power_of_two(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
