"""The command line of decoding: prompts in, streamed text or JSON lines out, and conversations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.prompts import Prompt, read_prompts, stdin_lines
from adafuse_jax.inference.session import Completion, Session

NEW_CONVERSATION = "/new"


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
    session = Session(config, first=_first_batch(prompts or [], config))
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


def _first_batch(prompts: Sequence[Prompt], config: DecodeConfig) -> list[Prompt]:
    """The prompts of the first of `_batches`."""
    some = prompts if config.prompts_file is not None else prompts[:1]
    return [prompt for prompt in some[: config.rows] for _ in range(config.num_samples)][: config.rows]


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
