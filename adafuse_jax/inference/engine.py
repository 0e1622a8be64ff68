"""The engine: a model, its adapter, and the backend by which the experts act. `generate` is a loop over `Slots`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.backends.registry import choose_backend
from adafuse_jax.inference.rows import Step, check_prompt, fitting_tokens
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.slots import Slots
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.hooks import Adapter
from adafuse_jax.parallel.mesh import mesh_of


def occurrences(prompts: Sequence[Sequence[Any]]) -> list[int]:
    """Number of equal prompts before each: 0, 1, … for copies of one prompt."""
    counts: Counter[tuple[Any, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(counts[prompt])
        counts[prompt] += 1
    return found


class Engine:
    """Generation with one backbone and, if given, one adapter or a bank of them.

    Args:
      model: may be sharded over several devices (`adafuse_jax.parallel.mesh.shard`), to decode unmerged, fused or with a
        merged LoRA. With *switch* the engine takes its adapted weights over and changes them: use `engine.model` instead.
      adapter: its experts are cast to the model's type where they are merged or read by the megakernel. With a bank, rows
        of `slots` name theirs.
      strategy: a name of `backends.registry.BACKENDS`; default: see `choose_backend`.
      eos_ids: tokens that end a row; default: the model's own.

    Raises:
      UserError: what `choose_backend` refuses.
    """

    def __init__(
        self,
        model: Backbone,
        adapter: AnyAdapter | AdapterBank | None = None,
        *,
        strategy: str | None = None,
        eos_ids: Sequence[int] | None = None,
    ):
        self.config, self._dtype, self._mesh = model.config, model.dtype, mesh_of(model)
        self.backend = choose_backend(strategy, model, adapter)
        self.context_length = self.config.context_length
        vocab = range(self.config.vocab_size)
        self.eos_ids = tuple(i for i in (self.config.eos_token_ids if eos_ids is None else eos_ids) if i in vocab)
        self._warm: set[Any] = set()
        self._idle_slots: Slots | None = None

    @property
    def model(self) -> Backbone:
        """The backbone. With *switch*: without what was merged, and only until the next token is decoded."""
        return self.backend.model

    @property
    def adapter(self) -> Adapter | None:
        return self.backend.adapter

    @property
    def strategy(self) -> str:
        return self.backend.strategy

    def strategy_of(self, batch: int) -> str:
        """Strategy that decodes `batch` rows: `strategy`, or *unmerged* where *fused* by default cannot run."""
        return self.backend.for_batch(batch).strategy

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raise `UserError` for a prompt without tokens or with ids that the model has not."""
        check_prompt(prompt, self.config.vocab_size)

    def max_new_tokens(self, prompt_tokens: int, wanted: int) -> int:
        """`wanted`, or what the context has left after the prompt. Raises `UserError` if the prompt alone fills it."""
        return fitting_tokens(prompt_tokens, wanted, self.config.context_after(prompt_tokens))

    def slots(self, num_slots: int, context_length: int | None = None) -> Slots:
        """Slots for rows that are decoded together, each with a cache of `context_length` tokens from the start on; by
        default it grows with the rows. Raises `UserError` if the strategy cannot decode so many rows, or the model such a
        context."""
        pad_id = self.config.pad_token_id
        return Slots(
            self.backend, num_slots, config=self.config, dtype=self._dtype, mesh=self._mesh, stop_ids=self.eos_ids,
            pad_id=pad_id if pad_id is not None and 0 <= pad_id < self.config.vocab_size else 0, warm=self._warm,
            context_length=context_length,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        samples: Sequence[int] | None = None,
        keep_cache: bool = False,
    ) -> Iterator[Step]:
        """Yield one `Step` after the other until every row has ended or has its number of new tokens.

        A row decodes what it would alone: the same tokens greedily, and the same with the same seed and the same number in
        `samples`. Row i is slot i.

        Args:
          prompts: token ids of every row; lengths may differ, none may be empty.
          max_new_tokens: per row; the method of that name returns how many fit behind a prompt.
          samples: which sample of its prompt each row draws; default: rows of the same prompt are counted from 0.
          keep_cache: use the cache of the last such call for a common beginning, and keep this one for the next.

        Raises:
          UserError: an empty prompt, one that leaves no room for an answer, or one with tokens that the model lacks;
            several prompts and a strategy that merges; logits that are not finite.
        """
        slots = None
        if keep_cache:
            slots, self._idle_slots = self._idle_slots, None
        if slots is None or slots.num_slots != len(prompts):
            slots = self.slots(len(prompts))
        try:
            samples = occurrences(prompts) if samples is None else samples
            for slot, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
                slots.insert(
                    prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, sample=sample, slot=slot,
                    reuse_cache=keep_cache,
                )  # fmt: skip
            while (step := slots.step()) is not None:
                if any(row.finish_reason == "not_finite" for row in step.rows.values()):
                    raise UserError(
                        "the logits are not finite: the weights of --model or --adapter hold NaN or overflow; restore "
                        "them, or try --dtype float32"
                    )
                yield step
        finally:
            self.backend.restore()
            if keep_cache:
                slots.close()
                self._idle_slots = slots
