"""Backends: how the experts act in a decoding step, one class per `--strategy`.

    step(reads, carry, token [B], position [B], cache, hold [B])  →  logits [B, V] fp32, TokenExperts | None, cache, carry

`reads` is the pytree that every step reads; `carry` the one that a step is donated and replaces (merged weights), None where
nothing is merged. `step` is pure: `programs.decode_step` traces it. Prompts are prefilled with `model` and `adapter`,
unmerged with every backend. An `AdapterBank` stands in the place of an adapter where a backend `takes_bank`.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int

from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter, TokenExperts
from adafuse_jax.models.kv_cache import KVCache

StepOutput = tuple[Float[Array, "B V"], TokenExperts | None, KVCache, Any]
"""(logits, the experts that read the tokens, cache, carry) of a step."""


class Backend(Protocol):
    """One strategy, prepared for a model and its adapter.

    Attributes:
      strategy: its name in `registry.BACKENDS`.
      requires: the capability that an adapter must have (`adapters.presets.Capability`); None: any adapter.
      needs_adapter: there is nothing to do without one.
      one_row: one set of weights serves one token, so it decodes one row, on one device.
      takes_bank: rows may have adapters of their own.
      reads_quantised: the backbone's linears may be codes and scales.
      takes_wider_cache: `step` may get a cache of more rows than tokens, which are those of the first rows.
      model, adapter: of the prefill.
      reads: what every step reads.
    """

    strategy: str
    requires: ClassVar[str | None] = None
    needs_adapter: ClassVar[bool] = False
    one_row: ClassVar[bool] = False
    takes_bank: ClassVar[bool] = False
    reads_quantised: ClassVar[bool] = False
    takes_wider_cache: ClassVar[bool] = False
    _model: Backbone
    _adapter: Adapter | AdapterBank | None
    _reads: tuple[Any, ...]

    def __init__(self, model: Backbone, adapter: Any): ...

    @property
    def model(self) -> Backbone:
        return self._model

    @property
    def bank(self) -> AdapterBank | None:
        return self._adapter if isinstance(self._adapter, AdapterBank) else None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter; those of a bank as they are at present."""
        return _at_present(self._adapter)

    @property
    def reads(self) -> tuple[Any, ...]:
        return tuple(map(_at_present, self._reads))

    @classmethod
    def unsupported_reason(
        cls, model: Backbone, adapter: AnyAdapter | AdapterBank | None, batch: int = 1
    ) -> str | None:
        """The reason why this backend cannot decode `batch` rows with the model and adapter on this device, or None.
        Allocates nothing."""
        return None

    @classmethod
    def prepare(cls, model: Backbone, adapter: Any) -> Backend:
        """Lay out the pytree that the step reads."""
        return cls(model, adapter)

    def for_batch(self, batch: int) -> Backend:
        """The backend that decodes `batch` rows together: this one, or the fallback that the registry gave it. Raises
        `UserError` where there is none."""
        if self.one_row and batch > 1:
            raise UserError(
                f"strategy {self.strategy} merges the experts of one row into the weights, and there are {batch} prompts; "
                "give one at a time, or decode unmerged"
            )
        return self

    def faster_reason(self, batch: int) -> str | None:
        """The reason why `batch` rows decode by this backend rather than by the megakernel, whose fallback it is, although
        either can; or None."""
        return None

    @staticmethod
    def step(
        reads: Any,
        carry: Any,
        token: Int[Array, " B"],
        position: Int[Array, " B"],
        cache: KVCache,
        hold: Bool[Array, " B"],
    ) -> StepOutput:
        """Read one token of every row; a row with `hold` has ended, and must change no weights."""
        ...

    def take_carry(self) -> Any:
        """Hand the carry to a step, which consumes it. Raises `UserError` if a step failed and took it along."""
        return None

    def put_carry(self, carry: Any) -> None:
        """Take back what the step returned."""
        return

    def restore(self) -> None:
        """Take out of the model what steps have merged into it."""
        return


def _at_present(part: Any) -> Any:
    return part.stacked if isinstance(part, AdapterBank) else part


def dispatch_log_level() -> int:
    """The level of messages about the megakernel: on a CPU nobody expects it."""
    return logging.INFO if jax.default_backend() == "gpu" else logging.DEBUG
