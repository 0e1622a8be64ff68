"""Assistant turns in rendered conversations: which characters are a reply, in a row of which text.

    prompt_i  = template(messages[:i], add_generation_prompt=True)         what decoding is given before reply i
    whole_i   = template(messages[:i + 1])
    reply_i   = whole_i[len(prompt_i) : end of the end-of-turn token]      where the loss is

A conversation is one row if each whole_i begins with prompt_i and with the whole of the reply before: the template only
appends. Templates of reasoning models do not: some leave the reasoning of earlier turns out, some begin a reply in the
generation prompt ("<think>") that the finished conversation writes otherwise. Then each assistant turn becomes a row of its
own, prompt_i + reply_i, with the loss on that turn; where whole_i does not begin with prompt_i, reply_i is the message's
content, less what the generation prompt has already begun of it, and the template's end-of-turn token. So what training sees
before a reply is always what decoding is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Example, Message, MultipleChoice, Text
from adafuse_jax.data.left_out import require_written
from adafuse_jax.data.rendering import MARK, Part, render, render_conversations
from adafuse_jax.data.templates import TemplateLimit
from adafuse_jax.data.tokenizer import special_token_texts


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text, the character spans that are targets, and whether an EOS token, also a target, follows the text."""

    text: str
    targets: tuple[tuple[int, int], ...]
    append_eos: bool


@dataclass(frozen=True, slots=True)
class Reply:
    """An assistant turn in its row's text: text[start:end] with its end-of-turn token, if it has one (`closed`), of which
    text[content:content_end] is the message's own."""

    text: str
    start: int
    content: int
    content_end: int
    end: int

    @property
    def closed(self) -> bool:
        return self.end > self.content_end


def around_mark(messages: Sequence[Message], tokenizer: Any, tools: str = "") -> tuple[str, str]:
    """Text that a template writes before and after the content of the last message, which is `MARK`."""
    text = render(messages, tokenizer, add_generation_prompt=False, tools=tools)
    at = text.rfind(MARK)
    if at < 0:
        raise UserError("chat template: does not write the content of an assistant turn; correct the template")
    return text[:at], text[at + 1 :]


def first_special(text: str, tokenizer: Any, *, last: bool = False) -> tuple[int, str]:
    """(where, which) of the first, or last, special token in `text`; (its length without trailing space, "") without one."""
    find = text.rfind if last else text.find
    hits = [(at, token) for token in special_token_texts(tokenizer) if token and (at := find(token)) >= 0]
    if not hits:
        return len(text.rstrip()), ""
    return max(hits) if last else min(hits, key=lambda hit: (hit[0], -len(hit[1])))


def _appended(prompt: str, whole: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> Reply:
    """A reply whose text continues that of its prompt. Its end is the first special token behind the content; of a turn
    with tool calls, which special tokens may enclose, the last one."""
    turn, content = whole[len(prompt) :], messages[-1].content.strip()
    found_at = max(turn.find(content), 0)
    if turn[:found_at].strip():  # a reasoning block, say, which may hold the content too
        header, _ = around_mark((*messages[:-1], replace(messages[-1], content=MARK)), tokenizer, tools)
        found_at = max(turn.find(content, len(header.rstrip()) - len(prompt)), found_at)
    if content not in turn and "tool_calls" not in messages[-1].turn():
        around_mark((*messages[:-1], replace(messages[-1], content=MARK)), tokenizer, tools)
    behind = found_at + (len(content) if content in turn else 0)
    at, token = first_special(turn[behind:], tokenizer, last="tool_calls" in messages[-1].turn())
    # Space before the content may be one token with it.
    start = len(prompt) + len(turn[:found_at].rstrip())
    content_end = len(prompt) + behind + at
    return Reply(whole, len(prompt), start, content_end, content_end + len(token))


def _composed(prompt: str, whole: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> Reply:
    """A reply whose text in the finished conversation does not continue its prompt. What the template writes around the
    content is part of the reply, unless the conversation before it is another one, too."""
    message = messages[-1]
    if not whole.startswith(_before_reply(prompt, messages, tokenizer, tools)):
        return _rewritten(prompt, messages, tokenizer, tools)
    header, tail = around_mark((*messages[:-1], replace(message, content=MARK)), tokenizer, tools)
    if "tool_calls" in message.turn():
        body = whole[_common(whole, prompt) :]
        at, token = first_special(body, tokenizer, last=True)
        body = body[:at]
    else:
        common = _common(prompt, header)
        begun, body = prompt[common:], message.content if message.content in whole else message.content.strip()
        if begun.strip() and body.lstrip().startswith(begun.strip()):
            body = body.lstrip()[len(begun.strip()) :].removeprefix(begun[len(begun.rstrip()) :])
        at, token = first_special(tail, tokenizer)
        body = header[common:] + body + tail[:at]
    content_end = len(prompt) + len(body)
    return Reply(prompt + body + token, len(prompt), len(prompt), content_end, content_end + len(token))


def _before_reply(prompt: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> str:
    """The prompt's text before the assistant's turn begins, without trailing space; empty if the template rewrites it."""
    text = render(messages[:-1], tokenizer, add_generation_prompt=False, tools=tools).rstrip()
    return text if prompt.startswith(text) else ""


def _rewritten(prompt: str, messages: Sequence[Message], tokenizer: Any, tools: str) -> Reply:
    """A reply of the message's content and the end-of-turn token alone."""
    if "tool_calls" in messages[-1].turn():
        raise UserError(
            "chat template: rewrites the conversation before a tool call; use a model whose template does not"
        )
    _, tail = around_mark((*messages[:-1], replace(messages[-1], content=MARK)), tokenizer, tools)
    at, token = first_special(tail, tokenizer)
    body = messages[-1].content.strip() + tail[:at]
    content_end = len(prompt) + len(body)
    return Reply(prompt + body + token, len(prompt), len(prompt), content_end, content_end + len(token))


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def rows_of(examples: Sequence[Example], tokenizer: Any) -> Iterator[list[Rendered] | UserError]:
    """The rows of each example, or why the chat template refuses it. Raises `TemplateLimit`."""
    chats = [_chat(example) for example in examples]
    texts = render_conversations([(reply_parts(chat), chat.tools) for chat in chats if chat], tokenizer)
    for example, chat in zip(examples, chats, strict=True):
        if chat is None:
            assert isinstance(example, Text)
            yield [Rendered(example.text, ((0, len(example.text)),), append_eos=True)]
            continue
        rendered = next(texts)
        yield rendered if isinstance(rendered, UserError) else _rows_or_error(chat, rendered, tokenizer)


def _rows_or_error(chat: Chat, texts: Sequence[str], tokenizer: Any) -> list[Rendered] | UserError:
    try:
        return _rows(*replies(chat, texts, tokenizer))
    except TemplateLimit:
        raise
    except UserError as error:
        return error


def _chat(example: Example) -> Chat | None:
    if isinstance(example, Text):
        return None
    return example.chat() if isinstance(example, MultipleChoice) else example


def _asked(chat: Chat) -> list[int]:
    """Where the assistant turns with weight are."""
    return [i for i, message in enumerate(chat.messages) if message.role == "assistant" and message.weight]


def reply_parts(chat: Chat) -> list[Part]:
    """The renderings that `replies` reads: prompt and whole of each assistant turn with weight."""
    return [part for i in _asked(chat) for part in ((chat.messages[:i], True), (chat.messages[: i + 1], False))]


def replies(chat: Chat, texts: Sequence[str], tokenizer: Any) -> tuple[list[Reply], bool]:
    """The assistant turns with weight, and whether all of them are in one text, that of the last. `texts` are those of
    `reply_parts`. Raises UserError where the template leaves a turn or tools out."""
    messages, asked = chat.messages, _asked(chat)
    if asked and (chat.tools or any(message.extra or message.role == "tool" for message in messages)):
        require_written(messages[: asked[-1] + 1], texts[-1], tokenizer, chat.tools)
    found = []
    appends = True
    for n, i in enumerate(asked):
        prompt, whole = texts[2 * n : 2 * n + 2]
        if whole.startswith(prompt):
            found.append(_appended(prompt, whole, messages[: i + 1], tokenizer, chat.tools))
        else:
            found.append(_composed(prompt, whole, messages[: i + 1], tokenizer, chat.tools))
        appends &= whole.startswith(prompt) and whole.startswith(texts[2 * n - 1] if n else "")
    return found, appends


def _rows(found: Sequence[Reply], appends: bool) -> list[Rendered]:
    if not found:
        return [Rendered("", (), append_eos=False)]
    if not appends:
        return [Rendered(r.text[: r.end], ((r.start, r.end),), append_eos=not r.closed) for r in found]
    last = found[-1]
    return [Rendered(last.text[: last.end], tuple((r.start, r.end) for r in found), append_eos=not last.closed)]
