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
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.config import MAX_EXPERTS
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.adapters.stacked import INPUT_NUMBERS, NO_ADAPTER, AdapterTable, StackedAdapters, router_input
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.inference.stacked_arrays import MOST_WEIGHT, Bucket, Expert, StackedArrays
from adafuse_jax.models.decoder import Backbone


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
class Prepared:
    """An adapter on the device, expert by expert, in the shapes of a bucket."""

    adapter: AdaFuse | LoRA
    bucket: Bucket
    experts: tuple[Expert, ...]


class AdapterBank:
    """Stacked experts and routers of the adapters that rows may name; stands in an adapter's place in `Engine`.

    Args:
      model: their backbone; the experts have its type, and are sharded as it is.
      max_experts: of all adapters together, C.

    """

    def __init__(self, model: Backbone, *, max_experts: int):
        if not 1 <= max_experts <= MAX_EXPERTS:
            raise UserError(f"the adapters' experts are {max_experts} at most; give 1 to {MAX_EXPERTS}")
        self.max_experts, self._config = max_experts, model.config
        self._arrays = StackedArrays(model, max_experts)
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
        self._set_table()

    @property
    def bucket(self) -> Bucket:
        """Shapes of the arrays at present."""
        return self._arrays.bucket

    @property
    def stacked(self) -> StackedAdapters:
        """The adapters as programs read them, at present."""
        arrays = self._arrays
        return StackedAdapters(
            experts=arrays.experts,
            routers=arrays.routers,
            table=self._table,
            max_top_k=min(arrays.bucket.top_k, self.max_experts),
        )

    @property
    def adapters(self) -> Mapping[str, Loaded]:
        """The adapters that new rows may name."""
        return MappingProxyType(self._adapters)

    @property
    def free_experts(self) -> int:
        """Experts that may still be loaded."""
        return int((self._owner == NO_ADAPTER).sum())

    def prepare(self, name: str, adapter: AnyAdapter) -> Prepared:
        """Check an adapter and copy it to the device, expert by expert, which takes the most of the time of `load`. Changes
        nothing, so another thread may call it while rows run.

        Raises:
          UserError: the adapter has routers in its layers or is of another backbone, or its weights are not finite.
        """
        adapter = self._fitting(name, adapter)
        bucket = self.bucket | Bucket.of(adapter)
        experts = self._arrays.experts_of(adapter, bucket)
        if experts is None:
            raise UserError(
                f"adapter {quoted(name)} has weights that are not finite or above {MOST_WEIGHT:g}; restore its files"
            )
        return Prepared(adapter=adapter, bucket=bucket, experts=experts)

    def load(self, name: str, adapter: AnyAdapter | Prepared) -> Loaded:
        """Write an adapter into the stacked arrays; rows of others go on.

        Raises:
          UserError: the name is in use, too few experts are free, the enlarged arrays do not fit the device, or what
            `prepare` refuses.
        """
        if name in self._adapters:
            raise UserError(f"adapter {quoted(name)} is loaded already; unload it first, or give another name")
        prepared = adapter if isinstance(adapter, Prepared) else None
        adapter = prepared.adapter if prepared else self._fitting(name, adapter)  # type: ignore[arg-type]
        wanted, free = adapter.config.num_experts or 1, np.flatnonzero(self._owner == NO_ADAPTER)
        if wanted > len(free):
            raise UserError(
                f"adapter {quoted(name)} has {wanted} experts, and {len(free)} of {self.max_experts} are free; unload an "
                "adapter, or allow more experts"
            )
        bucket = self.bucket | Bucket.of(adapter)
        if prepared is None or prepared.bucket != bucket:  # others have been loaded meanwhile
            prepared = self.prepare(name, adapter)
        self.reserve(bucket)
        ids = set(range(1, self.max_experts + 1)) - {a.id for a in (*self._adapters.values(), *self._unloaded.values())}
        self._version += 1
        loaded = Loaded(
            name=name, version=self._version, id=min(ids), method=adapter.config.adapter,
            top_k=adapter.config.top_k or 1, places=tuple(free[:wanted].tolist()),
        )  # fmt: skip
        for place, expert in zip(loaded.places, prepared.experts, strict=True):
            self._arrays.write(place, expert)
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
        self._arrays.enlarge(after)
        members = self._settings["members"]
        more = after.experts - members.shape[1]
        self._settings["members"] = np.pad(members, ((0, 0), (0, more)), constant_values=-1)
        self._set_table()

    def _fitting(self, name: str, adapter: AnyAdapter) -> AdaFuse | LoRA:
        """The adapter, if it can stand beside others."""
        if not isinstance(adapter, AdaFuse | LoRA):
            raise UserError(
                f"adapter {quoted(name)} is of {adapter.config.adapter}, which has routers in every layer; beside others "
                "stand adapters of adafuse and lora; decode it alone"
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
            self._set_table()

    def _set(self, loaded: Loaded, adapter: AdaFuse | LoRA) -> None:
        config, settings = adapter.config, self._settings
        settings["members"][loaded.id] = -1
        settings["members"][loaded.id, : loaded.num_experts] = loaded.places
        settings["top_k"][loaded.id] = loaded.top_k
        settings["renormalize"][loaded.id] = config.renormalize is not False
        settings["scale"][loaded.id] = config.scale
        settings["router_input"][loaded.id] = INPUT_NUMBERS[router_input(adapter)]
        self._set_table()

    def _set_table(self) -> None:
        """Put the tables on the device."""
        placed = self._arrays.placed
        of_settings = {name: placed(values) for name, values in self._settings.items()}
        self._table = AdapterTable(owner=placed(self._owner), **of_settings)
