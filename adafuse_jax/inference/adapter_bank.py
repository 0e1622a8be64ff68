"""Adapters of one backbone, loaded and unloaded while rows decode: AdaFuse adapters and LoRAs as one list of experts.

    bank = AdapterBank(model, max_experts=64)
    bank.load("poems", adapter)                     # AdaFuse: its num_experts; a LoRA: one expert
    slots = Engine(model, bank).slots(32, context_length=4096)
    slots.insert(prompt, max_new_tokens=100, adapter="poems")
    bank.unload("poems")                            # its experts are free once its last row is evicted

The arrays of `stacked` are written in place. Their shapes are a bucket: rank and experts of an adapter padded to powers of
two, the linears and router inputs of all adapters, the largest top-k. An adapter beyond it enlarges the arrays, and the
programs that read them are compiled once more; any other compiles nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import MAX_EXPERTS
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.adapters.stacked import INPUT_NUMBERS, NO_ADAPTER, ROUTER_INPUTS, AdapterTable, StackedAdapters
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.parallel.axes import linear_axes, partition_spec
from adafuse_jax.parallel.mesh import mesh_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An adapter in the bank. `id`: its row in the tables; `version` is never used again; expert e of the adapter is expert
    `places[e]` of all."""

    name: str
    version: int
    id: int
    method: str
    top_k: int
    places: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return len(self.places)

    def numbers_of(self, experts: np.ndarray) -> np.ndarray:
        """Numbers within the adapter of the experts [k] that a token used."""
        return np.searchsorted(self.places, experts[: self.top_k]).astype(np.int32)


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
            targets=config.targets, inputs=(ROUTER_INPUTS[config.targets[0]],),
        )  # fmt: skip

    def __or__(self, other: Bucket) -> Bucket:
        """The least that holds both."""
        return Bucket(
            rank=max(self.rank, other.rank), experts=max(self.experts, other.experts),
            top_k=max(self.top_k, other.top_k),
            targets=tuple(name for name in LINEARS if name in self.targets + other.targets),
            inputs=tuple(name for name in INPUT_NUMBERS if name in self.inputs + other.inputs),
        )  # fmt: skip


class AdapterBank:
    """Stacked experts and routers of the adapters that rows may name; stands in an adapter's place in `Engine`.

    Args:
      model: their backbone; the experts have its type, and are sharded as it is.
      max_experts: of all adapters together, C.

    Attributes:
      stacked: what programs read; its arrays are replaced by `load`.
      bucket: the shapes at present.
    """

    def __init__(self, model: Backbone, *, max_experts: int):
        if not 1 <= max_experts <= MAX_EXPERTS:
            raise UserError(f"the adapters' experts are {max_experts} at most; give 1 to {MAX_EXPERTS}")
        self.max_experts, self.bucket = max_experts, Bucket()
        self._config, self._dtype, self._mesh = model.config, model.dtype, mesh_of(model)
        self._limits: list[Callable[[Bucket], str | None]] = []
        self._adapters: dict[str, Loaded] = {}
        self._unloaded: dict[int, Loaded] = {}
        self._rows: Counter[int] = Counter()
        self._version = 0
        self._owner = np.full(max_experts, NO_ADAPTER, np.int32)
        num_ids = max_experts + 1
        self._settings: dict[str, np.ndarray] = {
            "members": np.full((num_ids, 1), -1, np.int32), "top_k": np.zeros(num_ids, np.int32),
            "renormalize": np.ones(num_ids, bool), "scale": np.zeros(num_ids, np.float32),
            "router_input": np.zeros(num_ids, np.int32),
        }  # fmt: skip
        self.stacked = StackedAdapters(experts=nnx.Dict(), routers={}, table=self._table(), max_top_k=1)

    @property
    def adapters(self) -> Mapping[str, Loaded]:
        """The adapters that new rows may name."""
        return MappingProxyType(self._adapters)

    @property
    def free_experts(self) -> int:
        """Experts that may still be loaded."""
        return int((self._owner == NO_ADAPTER).sum())

    def load(self, name: str, adapter: AnyAdapter) -> Loaded:
        """Write an adapter into the stacked arrays; rows of others go on.

        Raises:
          UserError: the name is in use, too few experts are free, the adapter has routers in its layers or is of another
            backbone, its weights are not finite, or the enlarged arrays do not fit the device.
        """
        if name in self._adapters:
            raise UserError(f"adapter {quoted(name)} is loaded already; unload it first, or give another name")
        adapter = self._fitting(name, adapter)
        factors, router = _on_host(adapter)
        if not all(np.isfinite(x).all() for x in (router, *jax.tree.leaves(factors))):
            raise UserError(f"adapter {quoted(name)} has weights that are not finite; restore its files")
        self.reserve(Bucket.of(adapter))
        free = np.flatnonzero(self._owner == NO_ADAPTER)
        ids = set(range(1, self.max_experts + 1)) - {a.id for a in (*self._adapters.values(), *self._unloaded.values())}
        self._version += 1
        loaded = Loaded(
            name=name, version=self._version, id=min(ids), method=adapter.config.adapter,
            top_k=adapter.config.top_k or 1, places=tuple(free[: len(router)].tolist()),
        )  # fmt: skip
        for number, place in enumerate(loaded.places):
            self._write_expert(place, number, factors, router, ROUTER_INPUTS[adapter.config.targets[0]])
        self._owner[[*loaded.places]] = loaded.id
        self._set(loaded, adapter)
        self._adapters[name] = loaded
        return loaded

    def unload(self, name: str) -> None:
        """Remove a name at once; its experts are free when its last row is evicted. Raises `UserError` if there is none."""
        if name not in self._adapters:
            raise UserError(f"no adapter {quoted(name)} is loaded; there {self._names()}")
        loaded = self._adapters.pop(name)
        self._unloaded[loaded.id] = loaded
        self._free_unused(loaded)

    def acquire(self, name: str) -> Loaded:
        """The adapter of a new row, which keeps its experts until `release`. Raises `UserError` if none has the name."""
        if name not in self._adapters:
            raise UserError(f"no adapter {quoted(name)} is loaded; there {self._names()}")
        loaded = self._adapters[name]
        self._rows[loaded.id] += 1
        return loaded

    def release(self, loaded: Loaded) -> None:
        """A row with this adapter is gone."""
        self._rows[loaded.id] -= 1
        self._free_unused(loaded)

    def limit(self, unsupported_reason: Callable[[Bucket], str | None]) -> None:
        """Refuse adapters from now on that need a bucket for which there is a reason."""
        self._limits.append(unsupported_reason)

    def reserve(self, bucket: Bucket) -> None:
        """Enlarge the arrays to hold adapters of this bucket too. Raises `UserError` where the backend cannot read such
        arrays, or the device has no room."""
        before, after = self.bucket, self.bucket | bucket
        if after == before:
            return
        for reason in filter(None, (unsupported_reason(after) for unsupported_reason in self._limits)):
            raise UserError(f"the adapter cannot be loaded, as {reason}; give one of a lower rank, or decode unmerged")
        experts = dict(self.stacked.experts.items())
        routers = dict(self.stacked.routers)
        try:
            for name in after.targets:
                if name not in experts:
                    experts[name] = self._zero_experts(name, after.rank)
                elif after.rank > before.rank:
                    more = after.rank - before.rank
                    enlarge = partial(_with_ranks, more=more)
                    experts |= jax.tree_util.tree_map_with_path(enlarge, {name: experts[name]})
            for name in after.inputs:
                if name not in routers:
                    shape = self.max_experts, self._config.linear_shape(name)[1]
                    routers[name] = self._placed(np.zeros(shape, np.float32))
            jax.block_until_ready((experts, routers))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{self.max_experts} experts of rank {after.rank} on {' '.join(after.targets)} do not fit the device's "
                "memory; allow fewer experts, or give adapters of a lower rank"
            ) from error
        self.bucket = after
        members = self._settings["members"]
        self._settings["members"] = np.pad(members, ((0, 0), (0, after.experts - members.shape[1])), constant_values=-1)
        ordered = nnx.Dict({name: experts[name] for name in after.targets})
        self.stacked = StackedAdapters(
            experts=ordered, routers=routers, table=self._table(), max_top_k=min(after.top_k, self.max_experts)
        )

    def _fitting(self, name: str, adapter: AnyAdapter) -> AdaFuse | LoRA:
        """The adapter, if it can stand beside others."""
        if not isinstance(adapter, AdaFuse | LoRA):
            raise UserError(
                f"adapter {quoted(name)} is of {adapter.config.adapter}, which has routers in every layer; beside others "
                "stand adapters of adafuse and lora; decode it alone"
            )
        wanted, free = adapter.config.num_experts or 1, self.free_experts
        if wanted > free:
            raise UserError(
                f"adapter {quoted(name)} has {wanted} experts, and {free} of {self.max_experts} are free; unload an "
                "adapter, or allow more experts"
            )
        for linear, experts in adapter.experts.items():
            shapes = experts.B.shape[0], experts.B.shape[2], experts.A.shape[3]
            if shapes != (self._config.num_layers, *self._config.linear_shape(linear)):
                raise UserError(f"adapter {quoted(name)} is of another backbone: its {linear} is {list(shapes)}")
        return adapter

    def _names(self) -> str:
        return f"are {', '.join(map(quoted, sorted(self._adapters)))}" if self._adapters else "is none"

    def _free_unused(self, loaded: Loaded) -> None:
        """Give the experts of an unloaded adapter back when no row has it."""
        if self._rows[loaded.id] == 0 and loaded.id in self._unloaded:
            del self._unloaded[loaded.id]
            self._owner[[*loaded.places]] = NO_ADAPTER
            self.stacked = replace(self.stacked, table=self._table())

    def _set(self, loaded: Loaded, adapter: AdaFuse | LoRA) -> None:
        config, settings = adapter.config, self._settings
        settings["members"][loaded.id] = -1
        settings["members"][loaded.id, : loaded.num_experts] = loaded.places
        settings["top_k"][loaded.id] = loaded.top_k
        settings["renormalize"][loaded.id] = config.renormalize is not False
        settings["scale"][loaded.id] = config.scale
        settings["router_input"][loaded.id] = INPUT_NUMBERS[ROUTER_INPUTS[config.targets[0]]]
        self.stacked = replace(self.stacked, table=self._table())

    def _table(self) -> AdapterTable:
        """The tables on the device; copies, as the host goes on changing its own."""
        return AdapterTable(
            owner=self._placed(self._owner), **{name: self._placed(x) for name, x in self._settings.items()}
        )

    def _write_expert(self, place: int, number: int, factors: Any, router: np.ndarray, input_name: str) -> None:
        """Put one expert of an adapter, with its row of the router, at a place of every stacked array."""

        def expert(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            name, factor = _names_of(path)
            padded = np.zeros((leaf.shape[0], 1, *leaf.shape[2:]), leaf.dtype)
            if name in factors:
                own = factors[name][factor][:, number : number + 1]
                padded[tuple(slice(size) for size in own.shape)] = own
            return self._placed(padded, linear_axes(name, factor))

        rows = {
            name: self._placed(router[number] if name == input_name else np.zeros(array.shape[1], np.float32))
            for name, array in self.stacked.routers.items()
        }
        new = jax.tree_util.tree_map_with_path(expert, self.stacked.experts)
        experts, routers = _write(self.stacked.experts, self.stacked.routers, np.int32(place), new, rows)
        self.stacked = replace(self.stacked, experts=experts, routers=routers)

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

    def _placed(self, array: np.ndarray, axes: Any = ()) -> jax.Array:
        """A copy on the model's devices."""
        return jax.device_put(array.copy(), self._sharding(axes))


@partial(jax.jit, donate_argnames=("experts", "routers"))
def _write(experts: Any, routers: Any, place: Any, new: Any, rows: Any) -> tuple[Any, Any]:
    """Replace one expert in every stacked array, in place."""
    update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place)
    return (
        jax.tree.map(lambda old, one: update(old, one, axis=1), experts, new),
        jax.tree.map(lambda old, row: update(old, row[None], axis=0), routers, rows),
    )


def _on_host(adapter: AdaFuse | LoRA) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """(linear → A [L, E, R, in] and B [L, E, out, R], router [E, in]; a LoRA's is zero, and its gate 1)."""
    factors = {name: {"A": np.asarray(e.A[...]), "B": np.asarray(e.B[...])} for name, e in adapter.experts.items()}
    if isinstance(adapter, LoRA):
        into = factors[adapter.config.targets[0]]["A"].shape[-1]
        return factors, np.zeros((1, into), np.float32)
    return factors, np.asarray(adapter.router.weight[...], np.float32)


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
