"""Slots: rows that decode together, inserted, stepped and evicted one by one.

    slot = slots.insert(prompt, max_new_tokens=100, sampling=Sampling.of(temperature=0.7), seed=1)
    while (step := slots.step()) is not None:
        for slot, row in step.rows.items():
            ...                                  # row.token_ids, row.finish_reason
    row = slots.evict(slot)

A row decodes what it would alone, whatever the other slots do, with its own adapter where the backend has a bank. Prompts
are prefilled a chunk per step, so that running rows go on meanwhile; if all slots wait for their prompts, these are
prefilled together, else, and with a bank, one after the other, first come, first served. Programs depend on the number of
slots, a few chunk lengths, the cache's length and the number of stop ids (powers of two), the bank's bucket, and on whether
any row samples, has a penalty or wants log-probabilities; not on a prompt's length or on the values of settings.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adafuse_jax.adapters.stacked import NO_ADAPTER
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.fields import MAX_SEED
from adafuse_jax.inference import programs
from adafuse_jax.inference.adapter_bank import Loaded
from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.logprobs import LogProbs, check_numbers, following_tokens, prompt_logprobs
from adafuse_jax.inference.prefill import Prefill, largest_chunk, prefills_by_kernels
from adafuse_jax.inference.prefix_cache import PrefixCache
from adafuse_jax.inference.programs import StepResult
from adafuse_jax.inference.row_settings import RowSettings
from adafuse_jax.inference.rows import Row, Step, check_prompt, fitting_tokens
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.state import DecodeState, cache_length
from adafuse_jax.inference.widths import Widths
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.parallel.mesh import place_state

LOOKAHEAD = 2
"""Steps queued on the device before the host waits for a token, so that reading tokens never stalls the device."""


class Slots:
    """Rows of one batch, over a backend that decodes so many together.

    Args:
      backend: see `backends.registry.choose_backend`.
      num_slots: rows decoded together.
      config, dtype, mesh: of the model.
      stop_ids: tokens that end a row, unless the row has its own.
      pad_id: the token that ended rows read.
      warm: the programs that have been compiled; shared by all slots of a backend.
      context_length: of every slot, fixed from the start; None: the model's, and a cache that grows with the rows.

    Raises:
      UserError: the backend cannot decode so many rows, or the model has a shorter context.
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
        context_length: int | None = None,
    ):
        limit = config.context_length
        if context_length is not None and not 2 <= context_length <= limit:
            raise UserError(f"the context is {context_length} tokens, and the model has {limit}; give 2 to {limit}")
        is_fixed = mesh is None and context_length is not None
        self._widths = Widths.of(num_slots, backend, cache_is_fixed=is_fixed)
        self._backend, self.num_slots = self._widths[num_slots], num_slots
        self._fixed_length, self.context_length = context_length, context_length or limit
        self._bank = self._backend.bank
        self._config, self._dtype, self._mesh = config, dtype, mesh
        self.by_kernels = prefills_by_kernels(config, dtype, mesh)
        self.can_compile_ahead = mesh is None  # else arguments of programs have places, too
        self._stop_ids, self._pad_id, self._warm = stop_ids, pad_id, warm
        self._state: DecodeState | None = None
        self._rows: list[Row | None] = [None] * num_slots
        self._prefixes = PrefixCache(num_slots, config)
        self._waiting: deque[Row] = deque()
        self._prefill: Prefill | None = None
        self._prompt_logprobs: list[tuple[int, LogProbs]] = []
        self._queue: deque[tuple[list[Row], StepResult, list[tuple[int, LogProbs]]]] = deque()
        self._settings = RowSettings(num_slots)
        self._clock = 0.0

    @property
    def rows(self) -> dict[int, Row]:
        """The rows by slot."""
        return {slot: row for slot, row in enumerate(self._rows) if row is not None}

    @property
    def free(self) -> int:
        """Number of slots without a row."""
        return self._rows.count(None)

    def max_new_tokens(self, prompt_tokens: int, wanted: int) -> int:
        """`wanted`, or what a slot has left after the prompt. Raises `UserError` if the prompt alone fills it."""
        context = min(self.context_length, self._config.context_after(prompt_tokens))
        return fitting_tokens(prompt_tokens, wanted, context)

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
        adapter: str | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> int:
        """Put a prompt into a free slot; the steps that follow prefill it, then decode it. Returns the slot.

        Args:
          max_new_tokens: at most; fewer where the context ends.
          seed, sample: the noise depends on the seed, the prompt and the sample's number alone.
          stop_ids: tokens that end the row.
          slot: a free one; default: with `reuse_cache` the one whose cache has most of the prompt.
          reuse_cache: prefill only what follows the tokens that the cache of a slot, of a running row too, has in common
            with the prompt, read by the same adapter. A row with a penalty, or whose prompt's log-probabilities are wanted,
            starts from an empty cache, as it needs all tokens.
          adapter: its name in the bank; None: the backbone, or the backend's only adapter.
          logprobs, prompt_logprobs: compute log-probabilities of the answer's or the prompt's tokens, with so many of the
            likeliest.

        Raises:
          UserError: an empty prompt, one that fills the context, or one with tokens that the model lacks; an adapter that is
            not loaded; too many log-probabilities.
          ValueError: no slot is free, no token is wanted, or a seed or sample of more than 32 bits.
        """
        prompt = [*prompt]
        check_prompt(prompt, self._config.vocab_size)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
        if not (0 <= seed <= MAX_SEED and 0 <= sample <= MAX_SEED):
            raise ValueError(f"seed {seed} or sample {sample} is not between 0 and {MAX_SEED}")
        check_numbers(logprobs, prompt_logprobs)
        budget = self.max_new_tokens(len(prompt), max_new_tokens)
        free = [i for i, row in enumerate(self._rows) if row is None]
        if slot is not None and slot not in free:
            raise ValueError(f"slot {slot} is not free; evict its row")
        if not free:
            raise ValueError("no free slot; evict a row")
        loaded = self._acquire(adapter)
        if slot is None:  # one of the first, so that steps are narrow
            first = self._widths.first(free)
            slot = self._prefixes.free_slot(first, prompt, loaded) if reuse_cache else first[0]
        self._rows[slot] = row = Row(
            slot=slot, prompt=prompt, budget=budget, sampling=sampling or Sampling.of(), seed=seed, sample=sample,
            stop_ids=tuple(self._stop_ids if stop_ids is None else stop_ids), reuse_cache=reuse_cache, adapter=loaded,
            wanted_logprobs=logprobs, wanted_prompt_logprobs=prompt_logprobs,
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
            started, result, of_prompts = self._queue.popleft()
            if any(row.finish_reason is None for row in started):
                break
        result, of_prompts = jax.device_get((result, of_prompts))
        ids, done, finite, experts, logprobs = result
        for number, row in enumerate(started):
            if of_prompts and row.wanted_prompt_logprobs is not None:
                row.prompt_logprobs = prompt_logprobs(row.prompt, row.wanted_prompt_logprobs, number, of_prompts)
        rows = [row for row in started if row.finish_reason is None]
        for row in rows:
            if finite[row.slot]:
                of_adapter = experts if self._bank is None or row.adapter is not None else None
                row.take(int(ids[row.slot]), bool(done[row.slot]), of_adapter, logprobs)
            else:
                row.finish_reason = "not_finite"
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        chosen, gates = (None, None) if experts is None else experts
        return Step(
            ids=ids, done=done, experts=chosen, gates=gates, rows={row.slot: row for row in rows}, seconds=seconds
        )

    def evict(self, slot: int) -> Row:
        """Free a slot and return its row, which ends here if it has not. Its cache stays for prompts that begin alike."""
        if (row := self._rows[slot]) is None:
            raise ValueError(f"slot {slot} is free")
        self._rows[slot] = None
        row.finish_reason = row.finish_reason or "evicted"
        if row.adapter is not None and self._bank is not None:
            self._bank.release(row.adapter)
        if row in self._waiting:
            self._waiting.remove(row)
        elif row.issued:
            self._prefixes.keep(row)
            self._release(row)
        if not self._running():
            self._backend.restore()
        return row

    def compile(self) -> None:
        """Trace what the waiting prompts need, inside `ahead.compiled_ahead`, once for all prompts that need the same.
        Nothing runs: afterwards these slots can but be evicted, and compile for other prompts."""
        self._warm = set(self._warm)  # other slots run their programs, once, before rows do
        self._begin([])

    def close(self) -> None:
        """Evict every row."""
        for slot, row in enumerate(self._rows):
            if row is not None:
                self.evict(slot)
        self._queue.clear()
        self._backend.restore()

    def _acquire(self, name: str | None) -> Loaded | None:
        """The adapter of a new row."""
        if name is None:
            return None
        if self._bank is None:
            raise UserError(f"a row wants adapter {quoted(name)}, and no bank of adapters is loaded; leave it out")
        return self._bank.acquire(name)

    def _running(self) -> list[Row]:
        """The rows whose next token is to be queued."""
        rows = [row for row in self._rows if row is not None and row.finish_reason is None]
        return [row for row in rows if 0 < row.issued < row.budget]

    def _issue(self) -> bool:
        """Queue the next chunk and the next token; False if there is neither."""
        if self._prefill is None and self._waiting:
            self._begin(self._running())
        if (prefill := self._prefill) is not None:
            self._next_chunk(prefill)
        if running := self._running():  # with those that the chunk has started
            for row in self.rows.values():
                if row.issued and row not in running and not row.is_released:
                    self._release(row)
            self._emit(running, self._advance(running, self._widths.narrowest(running)))
        return prefill is not None or bool(running)

    def _advance(self, rows: list[Row], width: int) -> StepResult:
        logprobs, settings = self._settings.variant.with_logprobs, self._settings.of_slots(rows)
        result, self._state = programs.advance(
            self._widths[width],
            self._take_state(),
            *settings,
            self._pad_id,
            logprobs,
            width if width < self.num_slots else None,
        )
        return result

    def _emit(self, rows: list[Row], result: StepResult, of_prompts: Sequence[tuple[int, LogProbs]] = ()) -> None:
        for row in rows:
            row.issued += 1
        self._queue.append((rows, result, [*of_prompts]))

    def _begin(self, running: list[Row]) -> None:
        """Begin to prefill: all rows if they are as many as the slots and need no adapters of their own, else the first.
        Compile what it needs, so that times hold no compilation."""
        whole = len(self._waiting) == self.num_slots and (self._bank is None or self.num_slots == 1)
        rows = sorted(self._waiting, key=lambda row: row.slot) if whole else [self._waiting[0]]
        length = max(cache_length(len(row.prompt) + row.budget, self._fixed_length) for row in rows)
        if self._state is None and not running:
            self._prefixes = PrefixCache(self.num_slots, self._config)
            with_bank = self._bank is not None
            self._state = DecodeState.empty(self._config, self.num_slots, length, self._dtype, with_bank=with_bank)
        state = self._take_state()
        self._settings.begin(rows, running)
        counts = self._settings.variant.penalize or self._fixed_length is not None  # fixed slots keep their programs
        self._state = self._placed(state.grown(length).with_seen(self._config.vocab_size if counts else None))
        for row in rows:
            self._prefixes.begin(row, self.rows, self._copy, keeps_more=len(self._widths) > 1)
        self._prompt_logprobs = []
        most = largest_chunk(len(rows), beside_rows=bool(running), by_kernels=self.by_kernels)
        prefill = Prefill.of(rows, self._config.vocab_size, whole=whole, most=most)
        prefill.logits = self._placed(prefill.logits)
        self._warm_up(prefill, running)
        self._prefill = prefill
        for row in rows:  # one that fails before waits on
            self._waiting.remove(row)
            row.begin()
        if not running:
            self._clock = time.perf_counter()

    def _copy(self, source: int, target: int, length: int) -> None:
        assert self._state is not None
        copied = next(size for size in self._state.cache.copied_positions() if size >= length)
        given = np.int32(source), np.int32(target), np.int32(length)
        self._state = self._placed(programs.copy_prefix(self._take_state(), *given, copied=copied))

    def _next_chunk(self, prefill: Prefill) -> None:
        if all(row.finish_reason for row in prefill.rows):
            self._prefill = None  # evicted meanwhile
            return
        self._run_chunk(prefill, *prefill.chunk(sum(prefill.sizes[: prefill.done]), prefill.sizes[prefill.done]))
        prefill.done += 1
        if prefill.done == len(prefill.sizes):
            self._prefill = None
            self._emit(prefill.rows, self._start(prefill), self._prompt_logprobs)
            for row in prefill.rows:
                if row.finish_reason is not None:
                    self._release(row)

    def _run_chunk(self, prefill: Prefill, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        model, adapter, rows = self._backend.model, self._backend.adapter, None if prefill.whole else prefill.slots
        ids, following, totals = None, None, None
        if self._bank is not None:
            ids = np.array([row.adapter.id if row.adapter else NO_ADAPTER for row in prefill.rows], np.int32)
        if any(row.wanted_prompt_logprobs is not None for row in prefill.rows):
            following = following_tokens([row.prompt for row in prefill.rows], starts, tokens.shape[1])
        if self._config.length_limits:
            totals = np.array([len(row.prompt) for row in prefill.rows], np.int32)
        run = programs.prefill_chunk_by_kernels if self.by_kernels else programs.prefill_chunk
        self._state, prefill.logits, logprobs = run(
            model, adapter, self._take_state(), prefill.logits, tokens, starts, lengths, rows, pad_id=self._pad_id,
            adapters=ids, following=following, totals=totals,
        )  # fmt: skip
        if logprobs is not None and lengths.any():
            self._prompt_logprobs.append((sum(prefill.sizes[: prefill.done]), logprobs))  # such rows reuse no cache

    def _start(self, prefill: Prefill) -> Any:
        positions = np.array([len(row.prompt) for row in prefill.rows], np.int32)
        settings = self._settings.of_slots if prefill.whole else self._settings.stacked
        given = prefill.logits, prefill.slots, positions, prefill.keys, *settings(prefill.rows)
        with_logprobs = self._settings.variant.with_logprobs
        result, state = programs.start(self._take_state(), *given, pad_id=self._pad_id, with_logprobs=with_logprobs)
        self._state = self._placed(state)
        return result

    def _warm_up(self, prefill: Prefill, running: list[Row]) -> None:
        """Run what will be run and has not been, on rows that have not begun: a step, unless rows run already, the first
        token, and a chunk without tokens for each length. Nothing of it stays."""
        assert self._state is not None
        bucket = None if self._bank is None else self._bank.bucket
        shapes = self.num_slots, self._state.cache.slots, self._state.seen is not None, bucket
        first = "start", prefill.whole, self._settings.variant, *shapes
        steps = {("step", self._settings.variant, width, *shapes): width for width in self._widths}
        of_prompts = any(row.wanted_prompt_logprobs is not None for row in prefill.rows)
        reuse = self.num_slots > 1 and any(row.reuse_cache for row in prefill.rows)
        copies = {("copy", copied, *shapes): copied for copied in self._state.cache.copied_positions() if reuse}
        chunks = {("chunk", prefill.whole, size, of_prompts, *shapes): size for size in sorted({*prefill.sizes})}
        new = {first, *([] if running else steps), *chunks, *copies} - self._warm
        if not new:
            return
        for width in [width for step, width in steps.items() if step in new]:
            self._advance(prefill.rows, width)
            self._backend.restore()
        for copied in [copied for copy, copied in copies.items() if copy in new]:
            self._copy(prefill.rows[0].slot, prefill.rows[0].slot, copied)
        if first in new:
            self._start(prefill)
        for size in [size for chunk, size in chunks.items() if chunk in new]:
            tokens, starts, lengths = prefill.chunk(0, size)
            self._run_chunk(prefill, tokens, starts, np.zeros_like(lengths))
        self._state = self._placed(programs.release(self._take_state(), prefill.rows[0].slot))
        jax.block_until_ready(self._state)
        self._warm |= new

    def _release(self, row: Row) -> None:
        """Let an ended row stand still on the device, as one that a stop id has ended does. One that was not finite
        leaves nothing."""
        row.is_released = True
        if self._state is not None:
            end = programs.clear if row.finish_reason == "not_finite" else programs.release
            self._state = self._placed(end(self._take_state(), row.slot))

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
