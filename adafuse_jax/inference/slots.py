"""Slots: rows that decode together, inserted, stepped and evicted one by one.

    slot = slots.insert(prompt, max_new_tokens=100, sampling=Sampling.of(temperature=0.7), seed=1)
    while (step := slots.step()) is not None:
        for slot, row in step.rows.items():
            ...                                  # row.token_ids, row.finish_reason
    row = slots.evict(slot)

A row decodes what it would alone, whatever the other slots do. Prompts are prefilled a chunk per step, so that running rows
go on meanwhile; if all slots wait for their prompts, these are prefilled together, else one after the other. Programs depend
on the number of slots, a few chunk lengths, the cache's length and the number of stop ids (powers of two), and on whether
any row samples or has a penalty; not on a prompt's length or on the values of settings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.prefill import Prefill, common_length
from adafuse_jax.inference.programs import advance, prefill_chunk, release, start
from adafuse_jax.inference.rows import Row, Step, check_prompt, fitting_tokens
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.state import DecodeState, cache_length
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.parallel.mesh import place_state

LOOKAHEAD = 2
"""Steps queued on the device before the host waits for a token, so that reading tokens never stalls the device."""
NO_ROW: tuple[Sampling, tuple[int, ...]] = Sampling.of(), ()
"""Sampling and stop ids of a slot whose tokens nobody reads."""


class Slots:
    """Rows of one batch, over a backend that decodes so many together.

    Args:
      backend: see `backends.registry.choose_backend`.
      num_slots: rows decoded together.
      config, dtype, mesh: of the model.
      stop_ids: tokens that end a row, unless the row has its own.
      pad_id: the token that ended rows read.
      warm: the programs that have been compiled; shared by all slots of a backend.

    Raises:
      UserError: the backend cannot decode so many rows.
    """

    def __init__(
        self,
        backend: Backend,
        num_slots: int,
        *,
        config: ModelConfig,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        stop_ids: Sequence[int],
        pad_id: int,
        warm: set[Any],
    ):
        self._backend, self.num_slots = backend.for_batch(num_slots), num_slots
        self._config, self._dtype, self._mesh = config, dtype, mesh
        self._stop_ids, self._pad_id, self._warm = stop_ids, pad_id, warm
        self._state: DecodeState | None = None
        self._rows: list[Row | None] = [None] * num_slots
        self._cached: list[list[int]] = [[] for _ in range(num_slots)]
        self._waiting: deque[Row] = deque()
        self._prefill: Prefill | None = None
        self._queue: deque[tuple[list[Row], Any]] = deque()
        self._greedy, self._stop_width = True, 1
        self._settings: tuple[Any, Any] = None, None
        self._clock = 0.0

    @property
    def rows(self) -> dict[int, Row]:
        """The rows by slot."""
        return {slot: row for slot, row in enumerate(self._rows) if row is not None}

    def insert(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        sample: int = 0,
        stop_ids: Sequence[int] | None = None,
        slot: int | None = None,
        reuse_cache: bool = False,
    ) -> int:
        """Put a prompt into a free slot; the steps that follow prefill it, then decode it. Returns the slot.

        Args:
          max_new_tokens: at most; fewer where the context ends.
          seed, sample: the noise depends on the seed, the prompt and the sample's number alone.
          stop_ids: tokens that end the row.
          slot: a free one; default: with `reuse_cache` the one whose cache has most of the prompt.
          reuse_cache: prefill only what follows the tokens that the slot's cache has in common with the prompt. A penalty
            starts from an empty cache, as it would have to forget tokens.

        Raises:
          UserError: an empty prompt, one that fills the context, or one with tokens that the model lacks.
          ValueError: no slot is free, or no token is wanted.
        """
        check_prompt(prompt, self._config.vocab_size)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
        slot = self._free_slot(prompt if reuse_cache else ()) if slot is None else slot
        if self._rows[slot] is not None:
            raise ValueError(f"slot {slot} is not free; evict its row")
        self._rows[slot] = row = Row(
            slot=slot, prompt=[*prompt], budget=fitting_tokens(len(prompt), max_new_tokens, self._config),
            sampling=sampling or Sampling.of(), seed=seed, sample=sample,
            stop_ids=tuple(self._stop_ids if stop_ids is None else stop_ids), reuse_cache=reuse_cache,
        )  # fmt: skip
        self._waiting.append(row)
        return slot

    def step(self) -> Step | None:
        """Queue a chunk of a waiting prompt and a token of every running row, and read the oldest tokens of the queue. None:
        every row has ended. A row whose logits are not finite ends without a token, as `not_finite`."""
        while True:
            while len(self._queue) <= LOOKAHEAD and self._issue():
                pass
            if not self._queue:
                return None
            rows, result = self._queue.popleft()
            if any(row.finish_reason is None for row in rows):
                break
        ids, done, finite, experts = jax.device_get(result)
        rows = [row for row in rows if row.finish_reason is None]
        for row in rows:
            if finite[row.slot]:
                row.take(int(ids[row.slot]), bool(done[row.slot]), None if experts is None else experts[row.slot])
            else:
                row.finish_reason = "not_finite"
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        return Step(ids=ids, done=done, experts=experts, rows={row.slot: row for row in rows}, seconds=seconds)

    def evict(self, slot: int) -> Row:
        """Free a slot and return its row, which ends here if it has not. Its cache stays for prompts that begin alike."""
        row = self._rows[slot]
        if row is None:
            raise ValueError(f"slot {slot} is free")
        self._rows[slot] = None
        row.finish_reason = row.finish_reason or "evicted"
        if row in self._waiting:
            self._waiting.remove(row)
        elif row.issued:
            self._cached[slot] = row.tokens_in_cache()
            self._release(row)
        if not self._running():
            self._backend.restore()
        return row

    def compile(self) -> None:
        """Trace what the waiting prompts need, inside `ahead.compiled_ahead`. Nothing runs: afterwards the slots are of no
        use."""
        self._begin([])

    def close(self) -> None:
        """Evict every row."""
        for slot, row in enumerate(self._rows):
            if row is not None:
                self.evict(slot)
        self._queue.clear()
        self._backend.restore()

    def _free_slot(self, prompt: Sequence[int]) -> int:
        """The free slot whose cache has most of the prompt."""
        free = [i for i, row in enumerate(self._rows) if row is None]
        if not free:
            raise ValueError("no free slot; evict a row")
        return max(free, key=lambda i: common_length(prompt, self._cached[i]))

    def _running(self) -> list[Row]:
        """The rows whose next token is to be queued."""
        rows = [row for row in self._rows if row is not None and row.finish_reason is None]
        return [row for row in rows if 0 < row.issued < row.budget]

    def _issue(self) -> bool:
        """Queue the next chunk and the next token; False if there is neither."""
        if self._prefill is None and self._waiting:
            self._begin(self._running())
        if prefilling := self._prefill is not None:
            self._next_chunk()
        if running := self._running():  # with those that the chunk has started
            for row in self.rows.values():
                if row.issued and row not in running and not row.is_released:
                    self._release(row)
            sampling, stop_ids = self._settings_of(running)
            result, self._state = advance(self._backend, self._take_state(), sampling, stop_ids, self._pad_id)
            self._emit(running, result)
        return prefilling or bool(running)

    def _emit(self, rows: list[Row], result: Any) -> None:
        for row in rows:
            row.issued += 1
        self._queue.append((rows, result))

    def _begin(self, running: list[Row]) -> None:
        """Begin to prefill: all rows if they are as many as the slots, else the first. Compile what it needs, so that times
        hold no compilation."""
        whole = len(self._waiting) == self.num_slots
        rows = sorted(self._waiting, key=lambda row: row.slot) if whole else [self._waiting[0]]
        for row in rows:
            self._waiting.remove(row)
        length = max(cache_length(len(row.prompt) + row.budget) for row in rows)
        if self._state is None and not running:
            self._cached = [[] for _ in self._rows]
            self._state = DecodeState.empty(self._config, self.num_slots, length, self._dtype)
        state = self._take_state()
        # What a program depends on only grows while rows run, so that none is compiled because one of them ends.
        penalized = any(row.sampling.penalize for row in rows) or bool(running and state.seen is not None)
        self._greedy = all(row.sampling.greedy for row in rows) and (self._greedy or not running)
        self._stop_width = max(1 if not running else self._stop_width, *(len(row.stop_ids) for row in rows))
        self._state = self._placed(state.grown(length).with_seen(self._config.vocab_size if penalized else None))
        for row in rows:
            if row.reuse_cache and not row.sampling.penalize:
                row.cached = common_length(row.prompt, self._cached[row.slot])
            self._cached[row.slot] = []
        self._prefill = Prefill.of(rows, self._config.vocab_size, whole=whole)
        self._prefill.logits = self._placed(self._prefill.logits)
        self._warm_up(self._prefill, running)
        for row in rows:
            row.begin()
        if not running:
            self._clock = time.perf_counter()

    def _next_chunk(self) -> None:
        prefill = self._prefill
        assert prefill is not None
        if all(row.finish_reason for row in prefill.rows):
            self._prefill = None  # evicted meanwhile
            return
        self._run_chunk(prefill, *prefill.chunk(sum(prefill.sizes[: prefill.done]), prefill.sizes[prefill.done]))
        prefill.done += 1
        if prefill.done == len(prefill.sizes):
            self._prefill = None
            self._emit(prefill.rows, self._start(prefill))
            for row in prefill.rows:
                if row.finish_reason is not None:
                    self._release(row)

    def _run_chunk(self, prefill: Prefill, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        model, adapter, rows = self._backend.model, self._backend.adapter, None if prefill.whole else prefill.slots
        self._state, prefill.logits = prefill_chunk(
            model, adapter, self._take_state(), prefill.logits, tokens, starts, lengths, rows, pad_id=self._pad_id
        )

    def _start(self, prefill: Prefill) -> Any:
        positions = np.array([len(row.prompt) for row in prefill.rows], np.int32)
        settings = self._settings_of if prefill.whole else self._stacked
        given = prefill.logits, prefill.slots, positions, prefill.keys, *settings(prefill.rows)
        result, state = start(self._take_state(), *given, pad_id=self._pad_id)
        self._state = self._placed(state)
        return result

    def _warm_up(self, prefill: Prefill, running: list[Row]) -> None:
        """Run what will be run, on rows that have not begun: a step, unless rows run already, the first token, and a chunk
        without tokens for each length. Nothing of it stays."""
        assert self._state is not None
        shapes = self.num_slots, prefill.whole, self._state.cache.slots, self._state.seen is None
        sampling, stop_ids = self._settings_of(prefill.rows)
        step = "step", *shapes, sampling.greedy, sampling.penalize, stop_ids.shape
        new = {*(() if running else (step,)), *((*step, size) for size in prefill.sizes)} - self._warm
        if not new:
            return
        if not running:
            _, self._state = advance(self._backend, self._take_state(), sampling, stop_ids, self._pad_id)
            self._backend.restore()
        self._start(prefill)
        for size in sorted(set(prefill.sizes)):
            tokens, starts, lengths = prefill.chunk(0, size)
            self._run_chunk(prefill, tokens, starts, np.zeros_like(lengths))
        self._state = self._placed(release(self._take_state(), prefill.rows[0].slot))
        jax.block_until_ready(self._state)
        self._warm |= new

    def _release(self, row: Row) -> None:
        """Let an ended row stand still on the device, as one that a stop id has ended does."""
        row.is_released = True
        if self._state is not None:
            self._state = self._placed(release(self._take_state(), row.slot))

    def _settings_of(self, rows: Sequence[Row]) -> tuple[Sampling, jax.Array]:
        """Sampling and stop ids of every slot, [B]; on the device, until other rows run."""
        by_slot = {row.slot: row for row in rows}
        wanted = tuple(by_slot.get(slot) for slot in range(self.num_slots))
        program = self._greedy, self._state is not None and self._state.seen is not None, self._stop_width
        if (wanted, program) != self._settings[0]:
            self._settings = (wanted, program), self._stacked(wanted)
        return self._settings[1]

    def _stacked(self, rows: Sequence[Row | None]) -> tuple[Sampling, jax.Array]:
        """Sampling [R] and stop ids [R, M]; None: a slot whose tokens nobody reads."""
        settings = [NO_ROW if row is None else (row.sampling, row.stop_ids) for row in rows]
        samplings, stop_ids = zip(*settings, strict=True)
        penalize = self._state is not None and self._state.seen is not None
        sampling = replace(Sampling.stack(samplings), greedy=self._greedy, penalize=penalize)
        return sampling, padded(stop_ids, self._stop_width)

    def _take_state(self) -> DecodeState:
        """The state, for a program that consumes it; one that fails takes it along."""
        state, self._state = self._state, None
        if state is None:
            raise UserError(
                "a decoding step failed and took the rows with it; evict them, and insert their prompts again"
            )
        return state

    def _placed[Tree](self, tree: Tree) -> Tree:
        """The arrays where the model is: a program is compiled for the places of what it is given."""
        return tree if self._mesh is None else place_state(tree, self._mesh)


def padded(rows: Sequence[Sequence[int]], width: int) -> jax.Array:
    """Stop ids [B, M], filled up with -1, which is no token; M is the power of two that holds `width`."""
    width = 1 << (width - 1).bit_length()
    return jnp.array([[*ids, *[-1] * (width - len(ids))] for ids in rows], jnp.int32)
