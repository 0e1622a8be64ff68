"""What `python decode.py` does with an engine: prompts in, streamed text or JSON lines out, and conversations."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from adafuse_jax.adapters.directory import load_adapter
from adafuse_jax.configs import DecodeConfig, Strategy
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.fields import require_text
from adafuse_jax.data.chat import encode_prompt, load_tokenizer, stop_tokens
from adafuse_jax.data.examples import Message, Role
from adafuse_jax.decoding.engine import Engine, Token
from adafuse_jax.decoding.sampling import Sampling
from adafuse_jax.decoding.stream import TextStream
from adafuse_jax.interop.hf_config import generation_remark
from adafuse_jax.interop.huggingface import Checkpoint, load_backbone
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
    strategy: Strategy | None
    experts_used: list[int] | None
    peak_device_gib: float | None


class Session:
    """A loaded model, its adapter and its tokenizer, ready to answer."""

    def __init__(self, config: DecodeConfig):
        checkpoint = Checkpoint.open(config.model)
        if remark := generation_remark(checkpoint.directory):
            log.info("%s", remark)
        self.config = config
        self.tokenizer = load_tokenizer(checkpoint.directory)
        dtype = config.dtype or checkpoint.dtype
        if dtype == "float32":
            runtime.exact_float32()
        adapter = None
        if config.adapter:  # before the backbone: a mistake here shows before the large files are read
            adapter = load_adapter(
                config.adapter,
                checkpoint.config,
                backbone_identity=checkpoint.identity(),
                # Merged once, a LoRA is rounded once.
                dtype=jnp.dtype("float32" if config.strategy == "merged" else dtype),
            )
            if config.strategy is not None:
                adapter.config.require_strategy(config.strategy)
        model = load_backbone(checkpoint, dtype)
        if config.tensor_parallel > 1:
            mesh = make_mesh(config.tensor_parallel, model.config)
            model, adapter = shard(model, mesh), adapter and shard(adapter, mesh)
        eos_ids = {*model.config.eos_token_ids, *stop_tokens(self.tokenizer)}
        self.engine = Engine(model, adapter, strategy=config.strategy, eos_ids=sorted(eos_ids))
        self.adapted, self.num_experts = adapter is not None, adapter.config.max_experts if adapter else 0
        self.sampling = Sampling.of(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
        )

    def tokens_of(self, prompt: str | list[Message]) -> list[int]:
        """Token ids of a prompt.

        A conversation, or a text with a chat template or an adapter (which was trained on one), becomes the beginning of
        an assistant's turn; a text for a bare model without a chat template, or with `--raw`, is continued as it is.
        """
        if isinstance(prompt, str):
            trained_on_one = self.adapted or self.tokenizer.chat_template is not None
            if self.config.raw or not (trained_on_one or self.config.system):
                return list(self.tokenizer(prompt)["input_ids"]) or self._begin()
            prompt = [Message("user", prompt)]
        if self.config.system is not None and prompt[0].role != "system":
            prompt = [Message("system", self.config.system), *prompt]
        return encode_prompt(prompt, self.tokenizer).tolist()

    def _begin(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def answer(
        self,
        prompt: str | list[Message],
        *,
        emit: Callable[[str], object] = lambda text: None,
        keep_cache: bool = False,
    ) -> Completion:
        """Generate, calling `emit` with each piece of text as it becomes certain."""
        (completion,) = self.answer_all([self.tokens_of(prompt)], emit=emit, keep_cache=keep_cache)
        return completion

    def answer_all(
        self,
        prompts: Sequence[list[int]],
        *,
        emit: Callable[[str], object] = lambda text: None,
        keep_cache: bool = False,
    ) -> list[Completion]:
        """Answer several prompts at once, given by their token ids, each a row with its own experts and its own end.

        `emit` gets the first one's text. The answers are those that each prompt would get alone.
        """
        config = self.config
        rows = [_Row(self, ids, emit if i == 0 else lambda text: None) for i, ids in enumerate(prompts)]
        tokens = self.engine.generate(
            [row.prompt for row in rows],
            max_new_tokens=config.max_new_tokens,
            sampling=self.sampling,
            seed=config.seed,
            keep_cache=keep_cache,
        )
        for token in tokens:
            for index, row in enumerate(rows):
                if row.finish_reason is None:
                    row.take(token, index)
            if all(row.finish_reason for row in rows):
                break
        return [row.completion(len(rows)) for row in rows]

    def tokens_of_all(self, prompts: Sequence[str | list[Message]]) -> list[list[int]]:
        """`tokens_of` each. Raises `UserError` for the first that leaves no room for an answer, before any is answered."""
        found = [self.tokens_of(prompt) for prompt in prompts]
        for number, ids in enumerate(found, 1):
            try:
                self.engine.max_new_tokens(len(ids), self.config.max_new_tokens)
            except UserError as error:
                raise UserError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
        return found


class _Row:
    """One prompt's answer while it is generated."""

    def __init__(self, session: Session, prompt: list[int], emit: Callable[[str], object]):
        self.session, self.prompt, self.emit = session, prompt, emit
        self.stream = TextStream(session.tokenizer, session.config.stop)
        self.room = session.engine.max_new_tokens(len(prompt), session.config.max_new_tokens)
        self.experts_used = np.zeros(session.num_experts, int)
        self.token_ids: list[int] = []
        self.seconds: list[float] = []
        self.finish_reason: str | None = None

    def take(self, token: Token, index: int) -> None:
        """This row's part of a step."""
        self.seconds.append(token.seconds)
        if token.experts is not None:
            self.experts_used += np.bincount(token.experts[index], minlength=self.session.num_experts)
        if token.done[index]:
            self.finish_reason = "stop"
        else:
            self.token_ids.append(int(token.ids[index]))
            self.emit(self.stream.push(self.token_ids[-1]))
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.room:
                self.finish_reason = "length"
        if self.finish_reason:
            self.emit(self.stream.flush())

    def completion(self, batch: int) -> Completion:
        seconds, num_experts = self.seconds, self.session.num_experts
        return Completion(
            text=self.stream.text,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "length",
            prompt_tokens=len(self.prompt),
            prefill_ms=round(1e3 * seconds[0], 3),
            ms_per_token=round(1e3 * float(np.mean(seconds[1:])), 3) if len(seconds) > 1 else None,
            batch=batch,
            strategy=self.session.engine.strategy_of(batch) if self.session.adapted else None,
            experts_used=self.experts_used.tolist() if num_experts else None,
            peak_device_gib=runtime.peak_device_gib(),
        )


def read_prompts(path: Path) -> list[str | list[Message]]:
    """Prompts of a file, one a line: text, or in a .jsonl file an object with `prompt` or `messages`.

    Raises `UserError` for a file that cannot be read, is not UTF-8, or has no prompt; and for a bad line, by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"--prompts-file {path}: cannot be read ({error.strerror}); give an existing file") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            is_json, where = path.suffix == ".jsonl", f"--prompts-file {path}, line {number}"
            prompts.append(_json_prompt(line, where) if is_json else line.rstrip("\r"))
    if not prompts:
        raise UserError(f"--prompts-file {path}: has no prompt; write one a line")
    return prompts


def _json_prompt(line: str, where: str) -> str | list[Message]:
    try:
        table: Any = json.loads(line)
        if isinstance(table, dict) and isinstance(table.get("prompt"), str):
            require_text(where, table["prompt"])
            return table["prompt"]
        messages = [Message(m["role"], m["content"]) for m in table["messages"]]
        if messages and all(m.role in get_args(Role) and isinstance(m.content, str) for m in messages):
            require_text(where, "".join(m.content for m in messages))
            return messages
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        pass
    roles = ", ".join(get_args(Role))
    raise UserError(f'{where}: give {{"prompt": TEXT}} or {{"messages": [{{"role", "content"}}, …]}} of roles {roles}')


def decode(config: DecodeConfig) -> None:
    """Answer what `config` asks: one prompt, a file of them, those of stdin, or a conversation."""
    prompts: list[str | list[Message]] | None = None
    if config.prompts_file is not None:
        prompts = read_prompts(Path(config.prompts_file))
    elif config.prompt is not None:
        prompts = [config.prompt]
    session = Session(config)
    if config.chat:
        _chat(session)
        return
    several = prompts is None or len(prompts) > 1
    together = config.rows if config.prompts_file else 1
    asked: Iterable[tuple[str | list[Message], list[int]]]
    if prompts is None:
        asked = ((line, session.tokens_of(line)) for line in _stdin_lines("prompt> "))
    else:
        asked = zip(prompts, session.tokens_of_all(prompts), strict=True)
    for batch in batched(asked, together):
        streams = len(batch) == 1 and not config.json
        if streams and several:
            print(f"> {_shown(batch[0][0])}")
        emit = _print_piece if streams else lambda text: None
        completions = session.answer_all([ids for _, ids in batch], emit=emit)
        for (prompt, _), completion in zip(batch, completions, strict=True):
            if config.json:
                print(json.dumps({"prompt": _shown(prompt), **_as_json(completion)}, ensure_ascii=False), flush=True)
                continue
            print("" if streams else f"> {_shown(prompt)}\n{completion.text}", flush=True)
            if config.stats:
                print(_stats_line(completion), file=sys.stderr)


def _shown(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].content


def _chat(session: Session) -> None:
    """Read the user's turns from stdin until its end; every answer continues the conversation and its cache."""
    messages: list[Message] = []
    for line in _stdin_lines("you> "):
        if line.strip() == NEW_CONVERSATION:
            messages.clear()
            continue
        messages.append(Message("user", line))
        try:
            completion = session.answer(messages, emit=_print_piece, keep_cache=True)
        except UserError as error:
            messages.pop()
            print(f"error: {error}, or begin anew with {NEW_CONVERSATION}", file=sys.stderr)
            continue
        print(flush=True)
        if session.config.stats:
            print(_stats_line(completion), file=sys.stderr)
        messages.append(Message("assistant", completion.text))


def _stdin_lines(ask: str = "") -> Iterator[str]:
    if sys.stdin is None:
        raise UserError("stdin is closed; give --prompt or --prompts-file")
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # a C locale lets broken bytes through
    while True:
        if interactive and ask:
            print(ask, end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: not UTF-8 (byte {error.start}); give UTF-8 text") from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


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
