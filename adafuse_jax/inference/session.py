"""What `python decode.py` does with an engine: prompts in, streamed text or JSON lines out, and conversations."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.hf_config import generation_remark
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import encode_prompt, stop_tokens
from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.data.left_out import log_unwritten_system
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.inference.backends.registry import require_strategy
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.detokenizer import TextStream
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prompts import Prompt, read_prompts, stdin_lines
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.parallel.mesh import make_mesh, shard

log = logging.getLogger(__name__)

NEW_CONVERSATION = "/new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt. `finish_reason` is `stop` (end token or stop string) or `length`.

    `token_ids` leaves out the end token, and holds those of a stop string. `ms_per_token` is the mean over the tokens
    after the first, which prefill makes in `prefill_ms`; None if there is no other. Neither holds compilation. `batch`
    prompts were decoded together, and each of them got a token in that time.
    `strategy` is how the adapter acted, None without one. `experts_used` counts, per expert, the tokens read with it,
    once for every router that chose it; None without routers.
    `peak_device_gib` is the process's peak so far; None where the device does not tell.
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


class Session:
    """A loaded model, its adapter and its tokenizer, ready to answer."""

    def __init__(self, config: DecodeConfig):
        checkpoint = HFCheckpoint.open(config.model)
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
        adapter = None
        if config.adapter is not None:  # before the backbone: a mistake here shows before the large files are read
            adapter = load_adapter(
                config.adapter,
                checkpoint.config,
                backbone_identity=checkpoint.identity(),
                # Merged once, a LoRA is rounded once.
                dtype=jnp.dtype("float32" if config.strategy == "merged" else dtype),
            )
            if config.strategy is not None:
                require_strategy(adapter.config, config.strategy)
        mesh = None if config.tensor_parallel == 1 else make_mesh(config.tensor_parallel, checkpoint.config)
        model = load_backbone(checkpoint, dtype, place=Stacked(mesh))
        if mesh is not None and adapter is not None:
            adapter = shard(adapter, mesh)
        eos_ids = {*model.config.eos_token_ids, *stops}
        self.engine = Engine(model, adapter, strategy=config.strategy, eos_ids=sorted(eos_ids))
        self.adapted, self.num_experts = adapter is not None, adapter.config.max_experts if adapter else 0
        self.sampling = Sampling.of(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
        )

    def next_sample(self, prompt: Sequence[int]) -> int:
        """How often the session has been asked for an answer to this prompt before."""
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

        `samples` says which sample of its prompt each one is, as in `Engine.generate`. `emit` gets the first one's text. The
        answers are those that each prompt would get alone.
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


def decode(config: DecodeConfig) -> None:
    """Answer what `config` asks: one prompt, a file of them, those of stdin, or a conversation."""
    prompts: list[Prompt] | None = None
    if config.prompts_file is not None:
        prompts = read_prompts(Path(config.prompts_file))
        if config.raw and any(isinstance(prompt, Chat) for prompt in prompts):
            raise UserError(
                f"--prompts-file {config.prompts_file}: has messages, which need the chat template; leave --raw out"
            )
    elif config.prompt is not None:
        prompts = [config.prompt]
    session = Session(config)
    if config.chat:
        _chat(session)
        return
    several = prompts is None or len(prompts) * config.num_samples > 1
    asked: Iterable[tuple[Prompt, list[int]]]
    if prompts is None:
        asked = ((line, session.tokens_of(line)) for line in stdin_lines("prompt> "))
    else:
        asked = zip(prompts, session.tokens_of_all(prompts), strict=True)
    for batch in _batches(asked, config):
        streams = len(batch) == 1 and not config.json
        if streams and several:
            print(f"> {_shown(batch[0][0])}")
        emit = _print_piece if streams else lambda text: None
        rows = [ids for _, ids, _ in batch]
        completions = session.answer_all(rows, samples=[session.next_sample(ids) for ids in rows], emit=emit)
        for (prompt, _, sample), completion in zip(batch, completions, strict=True):
            if config.json:
                table = {"prompt": _shown(prompt), "sample": sample, **_as_json(completion)}
                print(json.dumps(table, ensure_ascii=False), flush=True)
                continue
            print("" if streams else f"> {_shown(prompt)}\n{completion.text}", flush=True)
            if config.stats:
                print(_stats_line(completion), file=sys.stderr)


def _batches(
    asked: Iterable[tuple[Prompt, list[int]]], config: DecodeConfig
) -> Iterator[tuple[tuple[Prompt, list[int], int], ...]]:
    """(prompt, its ids, number of the sample) of the rows that are decoded together: those of a file; else those of a
    prompt, which may have been typed and wait for its answer."""
    samples = range(config.num_samples)
    if config.prompts_file is not None:
        yield from batched(((prompt, ids, n) for prompt, ids in asked for n in samples), config.rows)
        return
    for prompt, ids in asked:
        yield from batched(((prompt, ids, n) for n in samples), config.rows)


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content


def _chat(session: Session) -> None:
    """Read the user's turns from stdin until its end; every answer continues the conversation and its cache."""
    messages: list[Message] = []
    for line in stdin_lines("you> "):
        if line.strip() == NEW_CONVERSATION:
            messages.clear()
            continue
        messages.append(Message("user", line))
        try:
            completion = session.answer(Chat(tuple(messages)), emit=_print_piece, keep_cache=True)
        except UserError as error:
            messages.pop()
            print(f"error: {error}, or begin anew with {NEW_CONVERSATION}", file=sys.stderr)
            continue
        print(flush=True)
        if session.config.stats:
            print(_stats_line(completion), file=sys.stderr)
        messages.append(Message("assistant", completion.text))


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _as_json(completion: Completion) -> dict[str, Any]:
    return {name: getattr(completion, name) for name in Completion.__dataclass_fields__}


def _stats_line(completion: Completion) -> str:
    line = f"[{completion.prompt_tokens} prompt tokens in {completion.prefill_ms:.1f} ms, {len(completion.token_ids)} tokens"
    if completion.ms_per_token is not None:
        line += f", {completion.ms_per_token:.2f} ms/token, {1e3 / completion.ms_per_token:.1f} tokens/s"
    if completion.batch > 1:
        line += f", {completion.batch} prompts together"
    if completion.strategy is not None:
        line += f", {completion.strategy}"
    line += f", {completion.finish_reason}]"
    used = completion.experts_used
    if used and sum(used):
        line += " experts: " + " ".join(f"{e}:{n / sum(used):.0%}" for e, n in enumerate(used))
    return line
