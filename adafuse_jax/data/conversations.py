"""Turns of a row to a Chat: roles and contents of several conventions, system and history columns, weights, tool calls.

    {role, content}   OpenAI: content a text or a list of text parts; assistant turns may hold tool_calls; weight 0 or 1
    {from, value}     ShareGPT: human, gpt, system, function_call (a JSON object {name, arguments}), observation

Turns stand as they are but for what `notes` counts: a conversation begins at its first user turn (system turns before it
stay), ends at its last reply, and before its first empty one, which would teach the model to stay silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adafuse_jax.core.errors import quoted
from adafuse_jax.data.examples import Chat, Message, Role
from adafuse_jax.data.rows import (
    Notes,
    Number,
    Repeated,
    Row,
    RowError,
    SkipRow,
    first_given,
    is_blank,
    json_text,
    json_value,
    text_of,
)

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
PLAIN_ROLES = frozenset(ROLES) - {"developer", *CALL_ROLES}
NEEDED = "it needs the text fields 'role' and 'content' (or 'from' and 'value')"
TEMPLATE_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Keys of a turn that chat templates read beside role, content and tool_calls."""
TURN_KEYS = frozenset({"role", "from", "content", "value", "weight", "tool_calls", "function_call", *TEMPLATE_KEYS})
SYSTEM_COLUMNS = ("system", "system_prompt")
CHAT_COLUMNS = (*SYSTEM_COLUMNS, "history", "tools")
"""Columns that add to any conversation."""


def conversation(turns: Any, row: Row, column: str, notes: Notes) -> Chat:
    """The Chat of a list of turns. Raises RowError, which names the turn, and SkipRow without a reply to learn."""
    if turns is None:
        raise RowError(f"column {column!r} is missing or null: every row needs it")
    turns = json_value(turns, f"column {column!r}") if isinstance(turns, str) else turns
    if not isinstance(turns, list | tuple):
        raise RowError(f"column {column!r} must hold a list of turns {{role, content}} or {{from, value}}")
    try:
        messages = messages_of(turns, notes)
    except RowError as error:
        raise RowError(f"column {column!r}, {error}") from None
    return chat([*_history(row, notes), *messages], row, notes)


def messages_of(turns: Sequence[Any], notes: Notes) -> list[Message]:
    """The messages of a list of turns. Raises RowError, which names the turn."""
    messages: list[Message] = []
    try:
        for turn in turns:
            messages.append(message_of(turn, notes))
    except RowError as error:
        raise RowError(f"turn {len(messages) + 1}: {error}") from None
    return messages


def exchange(prompt: str, reply: str, row: Row, notes: Notes) -> Chat:
    """The Chat of one prompt and its reply, with the row's system text and history. Raises SkipRow for an empty reply."""
    if not reply.strip():
        raise SkipRow("an empty response")
    return chat([*_history(row, notes), Message("user", prompt), Message("assistant", reply)], row, notes)


def chat(turns: Sequence[Message], row: Row, notes: Notes) -> Chat:
    """The Chat of messages and of the row's system text and tools."""
    messages: list[Message] = []
    answerable = False
    for message in turns:
        if message.role == "user":
            answerable = True
        elif message.role != "system":
            if not answerable:
                notes.altered["turns before the first user turn left out"] += 1
                continue
            if message.role == "assistant" and not message.content.strip() and "tool_calls" not in message.extra:
                notes.altered["conversations ended before an empty reply"] += 1
                break
        messages.append(message)
    ends = len(messages)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise SkipRow("no assistant reply after a user turn")
    if len(messages) < ends:
        notes.altered["conversations ended at their last reply"] += 1
    if not any(message.weight for message in messages if message.role == "assistant"):
        raise SkipRow("weight 0 on every reply")
    return Chat(tuple(_with_system(messages, row, notes)), tools_of(row))


def _with_system(messages: list[Message], row: Row, notes: Notes) -> list[Message]:
    column = first_given(row, SYSTEM_COLUMNS, notes)
    if column is None:
        return messages
    text = text_of(row[column], f"column {column!r}")
    present = [message.content for message in messages if message.role == "system"]
    if present and present != [text]:
        raise RowError(f"column {column!r} and a system turn differ: keep one of them")
    return messages if present else [Message("system", text), *messages]


def tools_of(row: Row) -> str:
    """The column `tools` as JSON text, "" without one. Raises RowError."""
    if is_blank(row.get("tools")):
        return ""
    tools = json_value(row["tools"], "column 'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"column 'tools' holds {quoted(tools)}: it must be a list of objects")
    return json_text(tools, "column 'tools'") if tools else ""


def _history(row: Row, notes: Notes) -> list[Message]:
    """Earlier turns: pairs [prompt, reply], or turns as in a conversation."""
    if "history" not in row or is_blank(row["history"]):
        return []
    entries = json_value(row["history"], "column 'history'")
    if not isinstance(entries, list | tuple):
        raise RowError("column 'history' must hold a list of [prompt, reply] pairs")
    messages: list[Message] = []
    for n, entry in enumerate(entries, 1):
        try:
            if isinstance(entry, list | tuple) and len(entry) == 2:
                prompt, reply = (text_of(text, "a text") for text in entry)
                messages += (Message("user", prompt), Message("assistant", reply))
            else:
                messages.append(message_of(entry, notes))
        except RowError as error:
            raise RowError(f"column 'history', entry {n}, a [prompt, reply] pair or a turn: {error}") from None
    if any(m.role == "assistant" and not m.content.strip() and "tool_calls" not in m.extra for m in messages):
        raise RowError("column 'history' has an empty reply: correct it or leave it out")
    return messages


def message_of(turn: Any, notes: Notes) -> Message:
    """The Message of a turn; `notes` gets the keys that nothing reads. Raises RowError."""
    if type(turn) is dict and len(turn) == 2:  # nearly all turns
        pair = ("role", "content") if "role" in turn else ("from", "value")
        label, content = turn.get(pair[0]), turn.get(pair[1])
        if type(label) is str and label in PLAIN_ROLES and type(content) is str:
            return Message(ROLES[label], text_of(content, pair[1]))
    if not isinstance(turn, Mapping):
        raise RowError(f"no object but {quoted(turn)}: {NEEDED}")
    if type(turn) is Repeated:
        raise RowError(f"has the key {quoted(turn.key)} more than once")
    for key in turn.keys() - TURN_KEYS:
        if turn[key] is not None:
            notes.unused[f"{key} of turns"] = None
    for key, other in (("from", "role"), ("value", "content")):
        if None not in (turn.get(key), turn.get(other)) and turn[key] != turn[other]:
            notes.unused[f"{key} of turns, beside {other}"] = None
    given = turn.get("role")
    given = turn.get("from") if given is None else given
    if given is None:
        raise RowError(f"no role: {NEEDED}")
    label = str(given).strip().lower()
    role = ROLES.get(label)
    if role is None:
        raise RowError(f"unknown role {quoted(given)}: use {', '.join(ROLES)}")
    if label == "developer":
        notes.altered["developer turns read as system turns"] += 1
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    weight = 1 if turn.get("weight") is None else _weight(turn["weight"])
    extra = {key: turn[key] for key in TEMPLATE_KEYS if turn.get(key) is not None}
    if role != "assistant":
        notes.unused |= {f"{key} of {role} turns": None for key in ("tool_calls", "function_call") if turn.get(key)}
    if role == "assistant":
        calls, content = _tool_calls(turn, label, content)
        if calls:
            extra["tool_calls"] = calls
            if content is None:
                extra["content"] = None  # as it is: templates distinguish null from ""
                content = ""
    text = _content(content)
    if not extra:
        return Message(role, text, weight) if role == "assistant" else Message(role, text)
    return Message(role, text, weight if role == "assistant" else 1, json_text(extra, "a tool call or name"))


def _content(content: Any) -> str:
    """A text, or the texts of a list of parts, joined. Raises RowError that names a part of another type."""
    if isinstance(content, list | tuple):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(part, Mapping) and kind in (None, "text") and part.get("text") is not None:
                part = part["text"]
            if not isinstance(part, str):
                raise RowError(f"a part of type {quoted(kind or type(part).__name__)}: only text is supported")
            texts.append(text_of(part, "a text part"))
        return "".join(texts)
    if content is None:
        raise RowError(f"no text: {NEEDED}")
    return text_of(content, "its text")


def _weight(value: Any) -> int:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1
    if weight not in (0, 1):
        raise RowError(f"weight is {quoted(str(value))}: 0 and 1 are supported")
    return int(weight)


def _tool_calls(turn: Mapping[str, Any], label: str, content: Any) -> tuple[list[Any], Any]:
    """(the tool calls of an assistant turn as chat templates take them, the content that is left)."""
    if label in CALL_ROLES:
        given = json_value(content, "a function call") if isinstance(content, str) else content
        functions = given if isinstance(given, list) else [given]
        return [_call({"type": "function", "function": f}) for f in functions], None
    if turn.get("function_call") is not None:
        return [_call({"type": "function", "function": turn["function_call"]})], content
    calls = turn.get("tool_calls")
    if is_blank(calls):
        return [], content
    calls = json_value(calls, "tool_calls")
    if not isinstance(calls, list):
        raise RowError("tool_calls must be a list")
    return [_call(call) for call in calls], content


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"a tool call must be an object with a name and arguments, not {quoted(call)}")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str) and not isinstance(arguments, Number):
        parsed = json_value(arguments, "arguments") if arguments.strip() else {}
        arguments = parsed if isinstance(parsed, Mapping) else arguments  # templates want the object, not its text
    rest = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}
