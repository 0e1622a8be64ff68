"""Generation: prompts in, tokens out, with the programs of `steps` and the strategy for the experts.

Prompts run through prefill in chunks whose lengths come from a few buckets. So programs depend on a few chunk lengths and
cache sizes (powers of two), not on the prompt's length: a new length compiles nothing, unless it is the first to need a
larger cache.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.adapters.adafuse import AdaFuse
from adafuse_jax.adapters.baselines.layerwise import LayerWise
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.lora import merged as with_lora
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.megakernel import Fused, fused_unsupported_reason
from adafuse_jax.inference.backends.merged import Merged, unmerge, with_weights
from adafuse_jax.inference.backends.simple import LayerWiseMerging
from adafuse_jax.inference.config import TOKEN_STRATEGIES, Strategy
from adafuse_jax.inference.programs import DecodeState, decode_step, first_token, prefill_chunk
from adafuse_jax.inference.sampling import Sampling, row_keys
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.parallel.mesh import mesh_of, place_state

log = logging.getLogger(__name__)

CHUNKS = (16, 64, 256, 1024)
"""Prompt tokens per prefill program; a prompt runs through the largest and then the smallest that holds the rest."""
MIN_SLOTS = 128
TRIED_DEVICES = 2
"""Devices that a launch has run on together, at most."""
LOOKAHEAD = 2
"""Steps queued on the device before the host waits for a token, so that reading tokens never stalls the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token of every row: ids [B], whether each row has ended, and the experts [B, k] that *read* the
    token before it (None for the bare backbone, and for the token that prefill sampled)."""

    ids: np.ndarray
    done: np.ndarray
    experts: np.ndarray | None
    seconds: float
    """Host time since the generation of this token's predecessor (of the first token: since the call)."""


def dispatch_log_level() -> int:
    """The level of what is said about one launch: on a CPU nobody expects it."""
    return logging.INFO if jax.default_backend() == "gpu" else logging.DEBUG


def bucket(length: int, smallest: int) -> int:
    """Slots of the cache that holds `length` tokens: the next power of two."""
    return max(smallest, 1 << (length - 1).bit_length())


def occurrences(prompts: Sequence[Sequence[Any]]) -> list[int]:
    """How many equal prompts come before each: 0, 1, … for those of one kind."""
    counts: Counter[tuple[Any, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(counts[prompt])
        counts[prompt] += 1
    return found


def _chunks(length: int) -> list[int]:
    """Chunk lengths that hold a prompt: the largest as often as it is filled, then the smallest for the rest."""
    whole, rest = divmod(length, CHUNKS[-1])
    return [CHUNKS[-1]] * whole + [next(c for c in CHUNKS if c >= rest)] * (rest > 0)


class Engine:
    """Generation with one backbone and, if given, one adapter.

    The engine keeps the cache of its last generation: when a new prompt begins with tokens that are already in it (the
    next turn of a conversation), only the rest is prefilled.

    Args:
      model: may be sharded over several devices (`adafuse_jax.parallel.mesh.shard`), to decode unmerged, or fused. With
        strategy *switch* the engine takes its adapted weights over and changes them: use `engine.model` instead.
      adapter: its experts are cast to the model's type where they are merged or read by one launch.
      strategy: how the experts act while decoding; *golden*, *switch* and *simple* decode one row at a time. *fused*
        runs a step as one launch, with or without an adapter; *merged* puts a LoRA into a copy of the adapted weights
        and then decodes the plain backbone. Default: *fused* where it can run, on two devices at most, else *unmerged*;
        the log says which.
      eos_ids: tokens that end a row; default: the model's own.

    Raises:
      UserError: an unknown strategy, one that merges and no adapter, one that does not fit the adapter or several
        devices, or *fused* where it cannot run.
    """

    def __init__(
        self,
        model: Backbone,
        adapter: AnyAdapter | None = None,
        *,
        strategy: Strategy | None = None,
        eos_ids: Sequence[int] | None = None,
    ):
        self._mesh = mesh_of(model)
        fusable_adapter = adapter if isinstance(adapter, AdaFuse) else None
        no_launch, self._by_default = fused_unsupported_reason(model, adapter=fusable_adapter), strategy is None
        devices = 1 if self._mesh is None else self._mesh.size
        untried = f"over more than {TRIED_DEVICES} devices it must be asked for" if devices > TRIED_DEVICES else None
        if strategy is None:
            fits, reason = (
                adapter is None or "fused" in PRESETS[adapter.config.adapter].strategies,
                no_launch or untried,
            )
            strategy = "fused" if fits and reason is None else "unmerged"
            why = f": fused is not used, as {reason}" if fits and reason else ""
            log.log(dispatch_log_level(), "decoding %s%s", strategy, why)
        if strategy not in get_args(Strategy):
            raise UserError(f"strategy {strategy!r} is none of {', '.join(get_args(Strategy))}")
        if strategy in TOKEN_STRATEGIES and self._mesh is not None:
            raise UserError(
                f"strategy {strategy} runs on one device, and the model is on {self._mesh.size}; decode unmerged"
            )
        if strategy == "fused":
            if adapter is not None:
                adapter.config.require_strategy(strategy)
            if no_launch is not None:
                raise UserError(f"strategy fused cannot run: {no_launch}; decode unmerged")
        self._merged: Merged | None = None
        if strategy not in ("unmerged", "fused"):
            if adapter is None:
                raise UserError(f"strategy {strategy} merges the experts of an adapter; give one, or decode unmerged")
            adapter.config.require_strategy(strategy)
        acting: AnyAdapter | LayerWiseMerging | None = adapter
        if isinstance(adapter, LoRA) and strategy == "merged":
            model, acting = with_lora(model, adapter), None
        elif isinstance(adapter, LayerWise) and strategy == "simple":
            acting = LayerWiseMerging(adapter, model.dtype)
        elif isinstance(adapter, AdaFuse) and strategy not in ("unmerged", "fused"):
            cast: AdaFuse = jax.tree.map(lambda leaf: leaf, adapter)
            cast.experts = jax.tree.map(lambda leaf: leaf.astype(model.dtype), cast.experts)
            acting, self._merged = cast, Merged.nothing(strategy, model, cast)
            if strategy == "switch":
                model = with_weights(model, dict.fromkeys(self._merged.weights))
        self._merges = self._merged is not None
        self._model, self.adapter, self.strategy = model, acting, strategy
        self._fused: Fused | None = None
        in_merged = strategy in ("golden", "switch", "merged")
        self._read = None if in_merged else fusable_adapter
        no_launch = fused_unsupported_reason(model) or untried if in_merged else no_launch
        if strategy == "fused" or (in_merged and no_launch is None):
            self._fused = Fused.of(model, acting if isinstance(acting, AdaFuse) else None, merged=in_merged)
        elif in_merged:
            log.log(
                dispatch_log_level(),
                "decoding %s with single operations: one launch cannot run, as %s",
                strategy,
                no_launch,
            )
        self._unsupported_reasons: dict[int, str | None] = {1: no_launch}
        config = model.config
        self.context_length = config.max_position_embeddings
        vocab = range(config.vocab_size)
        self.eos_ids = tuple(i for i in (config.eos_token_ids if eos_ids is None else eos_ids) if i in vocab)
        # Rows that have ended read it, and what they read concerns nobody: any token will do.
        self.pad_id = config.pad_token_id if config.pad_token_id in vocab else 0
        self._kept: tuple[DecodeState, list[list[int]]] | None = None
        self._warm: set = set()
        self._switched = False

    @property
    def model(self) -> Backbone:
        """The backbone. With *switch*: without what was merged, and only until the next token is decoded."""
        self.restore()
        return self._model if self.strategy != "switch" else with_weights(self._model, self._present().weights)

    def restore(self) -> None:
        """Take out what *switch* has merged into the backbone: exact but for rounding, which stays. `generate` does so
        before a prompt and at its end, however it ends; the other strategies never change the backbone."""
        if self._switched:
            assert self.adapter is not None
            merged, self._merged, self._switched = self._present(), None, False
            self._merged = unmerge(self.adapter, merged)

    def _present(self) -> Merged:
        if self._merged is None:
            raise UserError("a decoding step failed and took the merged weights with it; load the model again")
        return self._merged

    def _unsupported_reason(self, batch: int) -> str | None:
        """Why a step of so many rows cannot be one launch, which the log says once, or None."""
        if self._fused is not None and batch not in self._unsupported_reasons:
            self._unsupported_reasons[batch] = reason = fused_unsupported_reason(self._model, batch, self._read)
            if reason is not None:
                log.log(
                    dispatch_log_level(),
                    "decoding %d prompts with single operations instead of one launch: %s",
                    batch,
                    reason,
                )
        return self._unsupported_reasons.get(batch)

    def strategy_of(self, batch: int) -> Strategy:
        """How so many rows are decoded together: `strategy`, or unmerged where that is *fused* by default and cannot
        run."""
        return "unmerged" if self.strategy == "fused" and self._unsupported_reason(batch) else self.strategy

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raise `UserError` for a prompt without tokens or with ids that the model has not."""
        if not len(prompt):
            raise UserError("a prompt is empty; give it at least one token")
        vocab_size = self._model.config.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"the prompt has token {wrong} and the model {vocab_size} tokens: its tokenizer is of another model; "
                "restore the files in --model"
            )

    def max_new_tokens(self, prompt_tokens: int, asked: int) -> int:
        """`asked`, or what the context has left after the prompt. Raises `UserError` if the prompt alone fills it."""
        left = self.context_length - prompt_tokens
        if left < 1:
            raise UserError(
                f"the prompt has {prompt_tokens} tokens and the context holds {self.context_length}, the answer included; "
                "shorten the prompt"
            )
        return min(asked, left)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        samples: Sequence[int] | None = None,
        keep_cache: bool = False,
    ) -> Iterator[Token]:
        """Yield one `Token` a step until every row has ended or has its number of new tokens.

        A row decodes what it would alone: the same tokens greedily, and the same with the same seed and the same number in
        `samples`. What comes for a row after its end, or after its number of tokens, means nothing.

        Args:
          prompts: token ids of every row; lengths may differ, none may be empty.
          max_new_tokens: per row; the method of that name says how many of them fit behind a prompt.
          samples: which sample of its prompt each row draws; default: rows of the same prompt are counted from 0.
          keep_cache: use the cache of the last such call for a common beginning, and keep this one for the next.

        Raises:
          UserError: an empty prompt, one that leaves no room for an answer, or one with tokens that the model lacks;
            several prompts and a strategy that merges; logits that are not finite.
        """
        for prompt in prompts:
            self.check_prompt(prompt)
        if self.strategy in TOKEN_STRATEGIES and len(prompts) > 1:
            raise UserError(
                f"strategy {self.strategy} merges the experts of one row into the weights, and there are {len(prompts)} "
                "prompts; give one at a time, or decode unmerged"
            )
        if self.strategy == "fused" and not self._by_default and (reason := self._unsupported_reason(len(prompts))):
            raise UserError(f"strategy fused cannot run: {reason}; decode fewer prompts together, or unmerged")
        sampling = sampling or Sampling.of()
        budgets = np.array([self.max_new_tokens(len(p), max_new_tokens) for p in prompts])
        budget, slots = int(budgets.max()), bucket(int((budgets + [len(p) for p in prompts]).max()), MIN_SLOTS)
        state, cached = self._take_kept(prompts, slots, sampling) if keep_cache else (None, [0] * len(prompts))
        if state is None:
            state = self._empty_state(len(prompts), slots, sampling)
        rest = [p[c:] for p, c in zip(prompts, cached, strict=True)]
        state = self._warm_up(state, max(map(len, rest)), sampling)
        state = self._placed(
            replace(
                state,
                key=row_keys(seed, prompts, occurrences(prompts) if samples is None else samples),
                done=jnp.zeros(len(prompts), bool),
                position=jnp.array(cached, jnp.int32),
            )
        )

        emitted: list[list[int]] = [[] for _ in prompts]
        before = time.perf_counter()
        output, state = self._prefill(state, rest, sampling)
        pending, issued = deque([output]), 1
        try:
            while pending:
                while issued < budget and len(pending) <= LOOKAHEAD:
                    output, state = self._step(state, sampling)
                    pending.append(output)
                    issued += 1
                ids, done, finite, experts = jax.device_get(pending.popleft())
                going = len(emitted[0]) < budgets
                if (going & ~finite).any():
                    raise UserError(
                        "the logits are not finite: the weights of --model or --adapter hold NaN or "
                        "overflow; restore them, or try --dtype float32"
                    )
                now = time.perf_counter()
                for row, token in zip(emitted, ids, strict=True):
                    row.append(int(token))
                yield Token(ids=ids, done=done, experts=experts, seconds=now - before)
                before = now
                if (done | (len(emitted[0]) >= budgets)).all():
                    return
        finally:
            self.restore()
            if keep_cache:
                # The last emitted token may not be in the cache yet, so it does not count as kept.
                self._kept = state, [[*map(int, p), *e[:-1]] for p, e in zip(prompts, emitted, strict=True)]

    def _empty_state(self, batch: int, slots: int, sampling: Sampling) -> DecodeState:
        config = self._model.config
        return DecodeState(
            cache=KVCache.empty(config, batch, slots, self._model.dtype),
            token=jnp.zeros(batch, jnp.int32),
            position=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
            seen=jnp.zeros((batch, config.vocab_size), bool) if sampling.penalize else None,
            key=jax.random.split(jax.random.key(0), batch),
        )

    def _placed(self, state: DecodeState) -> DecodeState:
        """The state where the model is: a program is compiled for the places of what it is given."""
        return state if self._mesh is None else place_state(state, self._mesh)

    def _take_kept(
        self, prompts: Sequence[Sequence[int]], slots: int, sampling: Sampling
    ) -> tuple[DecodeState | None, list[int]]:
        kept, self._kept = self._kept, None
        # `seen` would have to forget the tokens after the common beginning, so a penalty starts from an empty cache.
        if kept is None or sampling.penalize or len(kept[1]) != len(prompts):
            return None, [0] * len(prompts)
        common = []
        for prompt, tokens in zip(prompts, kept[1], strict=True):
            same = 0
            while same < min(len(prompt) - 1, len(tokens)) and prompt[same] == tokens[same]:
                same += 1
            common.append(same)
        return replace(kept[0], seen=None, cache=kept[0].cache.grown(slots)), common

    def _warm_up(self, state: DecodeState, longest: int, sampling: Sampling) -> DecodeState:
        """Compile what this generation needs, so that its times hold no compilation: one step, and a prefill without
        tokens for each chunk length. All of it happens past the last slot and to rows that count as ended, so nothing
        enters the cache or the weights."""
        batch, slots = len(state.token), state.cache.slots
        key = (batch, slots, sampling.greedy, sampling.penalize)
        new = {(*key, size) for size in (0, *_chunks(longest))} - self._warm
        if not new:
            return state
        for *_, size in sorted(new):
            state = replace(state, position=jnp.full(batch, slots, jnp.int32), done=jnp.ones(batch, bool))
            state = self._placed(state)
            if size:
                _, state = self._prefill(state, [()] * batch, sampling, chunks=[size])
            else:
                _, state = self._step(state, sampling)
                self.restore()
        self._warm |= new
        if state.seen is not None:
            state = replace(state, seen=jnp.zeros_like(state.seen))
        return jax.block_until_ready(state)

    def _step(self, state: DecodeState, sampling: Sampling) -> tuple[Any, DecodeState]:
        merged = self._present() if self._merges else None
        self._merged, self._switched = None, False  # if the step fails, what it was given is gone
        fused = None if self._unsupported_reason(len(state.token)) else self._fused
        output, state, self._merged = decode_step(
            self._model,
            self.adapter,
            state,
            merged,
            sampling,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            fused=fused,
        )
        self._switched = self.strategy == "switch"
        return output, state

    def _prefill(
        self,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        chunks: Sequence[int] | None = None,
    ) -> tuple[Any, DecodeState]:
        model = self.model
        logits = jnp.zeros((len(prompts), model.config.vocab_size), jnp.float32)
        start = 0
        for size in _chunks(max(map(len, prompts))) if chunks is None else chunks:
            tokens = np.zeros((len(prompts), size), np.int32)
            lengths = np.array([min(max(len(p) - start, 0), size) for p in prompts], np.int32)
            for row, prompt, n in zip(tokens, prompts, lengths, strict=True):
                row[:n] = prompt[start : start + n]
            state, logits = prefill_chunk(model, self.adapter, state, logits, tokens, lengths, pad_id=self.pad_id)
            start += size
        return first_token(state, logits, sampling, eos_ids=self.eos_ids, pad_id=self.pad_id)
