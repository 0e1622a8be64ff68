"""A session: a loaded model, its adapter and its tokenizer, answering prompts with streamed text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np

from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, empty_backbone, load_backbone
from adafuse_jax.checkpoints.hf_config import generation_remark
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import encode_prompt, stop_tokens
from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.data.left_out import log_unwritten_system
from adafuse_jax.data.templates import start_rendering
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.inference import backends
from adafuse_jax.inference.ahead import compiled_ahead
from adafuse_jax.inference.backends.registry import require_reads_quantised, require_strategy
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.detokenizer import TextStream
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prompts import Prompt
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.slots import Slots
from adafuse_jax.models.quantised import linears_of
from adafuse_jax.parallel.mesh import make_mesh, shard

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt. `finish_reason` is `stop` (end token or stop string) or `length`.

    `token_ids` leaves out the end token, and holds those of a stop string. `ms_per_token` is the mean over the tokens
    after the first, which prefill makes in `prefill_ms`; None if there is no other. Neither holds compilation. `batch`
    prompts were decoded together, and each of them got a token in that time.
    `strategy` is how the adapter acted, None without one. `experts_used` counts, per expert, the tokens read with it,
    once for every router that chose it; None without routers.
    `peak_device_gib` is the process's peak so far; None where the device does not report it.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    prefill_ms: float
    ms_per_token: float | None
    batch: int
    strategy: str | None
    experts_used: list[int] | None
    peak_device_gib: float | None


@contextmanager
def _backends_not_logged() -> Iterator[None]:
    """Context in which the choice of a backend is not logged: it is made again for the loaded weights."""
    logger = logging.getLogger(backends.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class Session:
    """A loaded model, its adapter and its tokenizer, ready to answer.

    `first`: the prompts that will be answered first, together. What they need is compiled while the weights are loaded.
    """

    def __init__(self, config: DecodeConfig, first: Sequence[Prompt] = ()):
        start_rendering()
        checkpoint = HFCheckpoint.open(config.model, config.quantize, config.quantize_head)
        if remark := generation_remark(checkpoint.hf_config.generation):
            log.info("%s", remark)
        self.config = config
        self.tokenizer = load_tokenizer(checkpoint.directory, config.adapter)
        stops = stop_tokens(self.tokenizer)
        if config.system is not None:
            log_unwritten_system(self.tokenizer, config.model)
        self._asked: Counter[tuple[int, ...]] = Counter()
        dtype = config.dtype or checkpoint.dtype
        if dtype == "float32":
            runtime.exact_float32()
        layout = linears_of(checkpoint.quantisation)
        if config.strategy is not None:
            require_reads_quantised(config.strategy, layout)
        adapter = None
        if config.adapter is not None:  # before the backbone: a mistake here shows before the large files are read
            adapter = load_adapter(
                config.adapter,
                checkpoint.config,
                backbone_identity=checkpoint.identity(),
                # Merged once, a LoRA is rounded once.
                dtype=jnp.dtype("float32" if config.strategy == "merged" else dtype),
                quantization=checkpoint.quantisation,
            )
            if config.strategy is not None:
                require_strategy(adapter.config, config.strategy)
        mesh = None if config.tensor_parallel == 1 else make_mesh(config.tensor_parallel, checkpoint.config, layout)
        if mesh is not None and adapter is not None:
            adapter = shard(adapter, mesh)
        self.adapted, self.num_experts = adapter is not None, adapter.config.max_experts if adapter else 0
        self.sampling = Sampling.of(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
        )
        eos_ids = sorted({*checkpoint.config.eos_token_ids, *stops})
        prepare = partial(Engine, adapter=adapter, strategy=config.strategy, eos_ids=eos_ids)
        place = Stacked(mesh)
        empty = empty_backbone(checkpoint, dtype, place=place)
        # A strategy that merges would take the empty weights over.
        can_compile = bool(first) and mesh is None and config.strategy in (None, "unmerged", "fused")
        with _backends_not_logged():
            slots = self._waiting(prepare(empty), first) if can_compile else None
        with ThreadPoolExecutor(1, "load") as thread:
            loading = thread.submit(load_backbone, checkpoint, dtype, place=place, into=empty)
            try:
                with compiled_ahead(slots.compile if slots is not None else None):
                    self.engine = prepare(loading.result())
            except BaseException:  # Ctrl-C: the thread would read on
                checkpoint.tensors.stop()
                raise

    def _waiting(self, engine: Engine, prompts: Sequence[Prompt]) -> Slots | None:
        """Slots in which the prompts wait; None where one of them is refused, which is reported when it is asked."""
        try:
            rows = [self.tokens_of(prompt) for prompt in prompts]
            slots = engine.slots(len(rows))
            for slot, ids in enumerate(rows):
                slots.insert(ids, max_new_tokens=self.config.max_new_tokens, sampling=self.sampling, slot=slot)
        except UserError:
            return None
        return slots

    def next_sample(self, prompt: Sequence[int]) -> int:
        """Index of the prompt's next sample: the number of answers to it that the session has been asked for before."""
        self._asked[tuple(prompt)] += 1
        return self._asked[tuple(prompt)] - 1

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        A conversation, or a text with a chat template or an adapter (which was trained on one), becomes the beginning of
        an assistant's turn; a text for a bare model without a chat template, or with `--raw`, is continued as it is.
        """
        if isinstance(prompt, str):
            trained_on_one = self.adapted or self.tokenizer.chat_template
            if self.config.raw or not (trained_on_one or self.config.system):
                return list(self.tokenizer(prompt)["input_ids"]) or self._begin()
            prompt = Chat((Message("user", prompt),))
        messages = prompt.messages
        if self.config.system is not None and messages[0].role != "system":
            messages = (Message("system", self.config.system), *messages)
        return encode_prompt(messages, self.tokenizer, tools=prompt.tools).tolist()

    def _begin(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def answer(
        self,
        prompt: Prompt,
        *,
        emit: Callable[[str], object] = lambda text: None,
        keep_cache: bool = False,
    ) -> Completion:
        """Generate, calling `emit` with each piece of text as it becomes certain. A prompt again is another sample."""
        ids = self.tokens_of(prompt)
        (completion,) = self.answer_all([ids], samples=[self.next_sample(ids)], emit=emit, keep_cache=keep_cache)
        return completion

    def answer_all(
        self,
        prompts: Sequence[list[int]],
        *,
        samples: Sequence[int] | None = None,
        emit: Callable[[str], object] = lambda text: None,
        keep_cache: bool = False,
    ) -> list[Completion]:
        """Answer several prompts at once, given by their token ids, each a row with its own experts and its own end.

        `samples`: the index of each one among the samples of its prompt, as in `Engine.generate`. `emit` gets the first
        one's text. The answers are those that each prompt would get alone.
        """
        config = self.config
        streams = [TextStream(self.tokenizer, config.stop) for _ in prompts]
        rows: dict[int, Row] = {}
        for step in self.engine.generate(
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=self.sampling,
            seed=config.seed,
            samples=samples,
            keep_cache=keep_cache,
        ):
            rows |= step.rows
            for index, row in step.rows.items():
                text = streams[index].read(row)
                if index == 0:
                    emit(text)
        return [self._completion(rows[index], stream.text, len(rows)) for index, stream in enumerate(streams)]

    def _completion(self, row: Row, text: str, batch: int) -> Completion:
        prefill, *steps = row.seconds
        used = np.bincount(np.ravel(row.experts).astype(int), minlength=self.num_experts)
        return Completion(
            text=text,
            token_ids=row.token_ids,
            finish_reason=row.finish_reason or "length",
            prompt_tokens=len(row.prompt),
            prefill_ms=round(1e3 * prefill, 3),
            ms_per_token=round(1e3 * float(np.mean(steps)), 3) if steps else None,
            batch=batch,
            strategy=self.engine.strategy_of(batch) if self.adapted else None,
            experts_used=used.tolist() if self.num_experts else None,
            peak_device_gib=runtime.peak_device_gib(),
        )

    def tokens_of_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """`tokens_of` each. Raises `UserError` for the first that the chat template refuses, that leaves no room for an
        answer or has tokens that the model has not, before any is answered."""
        found = []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids = self.tokens_of(prompt)
                self.engine.check_prompt(ids)
                self.engine.max_new_tokens(len(ids), self.config.max_new_tokens)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
            found.append(ids)
        return found
