"""Turns of several conventions, system and history columns, weights and tool calls: the expected messages in full."""

from __future__ import annotations

import json
import logging

import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.data.sources import DatasetSpec, load

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo", "n": 1.5}}}


def read(tmp_path, row, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text(json.dumps(row) + "\n")
    (example,) = load(DatasetSpec(source=str(path))).examples
    return example


def turns(*texts: str, role="role", content="content", names=("user", "assistant")):
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CHATS = [
    ({"messages": [{"role": "user", "content": parts("2+2?", " Now.")}, {"role": "assistant", "content": parts("4")}]},
     [U("2+2? Now."), A("4")]),
    ({"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b", "image": None}]}, A("c").turn()]},
     [U("ab"), A("c")]),
    ({"messages": turns("a", "b", role="from", content="value", names=("human", "gpt"))}, [U("a"), A("b")]),
    ({"conversations": turns("a", "b")}, [U("a"), A("b")]),
    ({"conversation": turns("a", "b"), "conversation_id": 1}, [U("a"), A("b")]),
    ({"prompt": "a", "prompt_id": "x", "messages": turns("a", "b")}, [U("a"), A("b")]),
    ({"messages": [{"role": "developer", "content": "Be brief."}, *turns("a", "b")]}, [S("Be brief."), U("a"), A("b")]),
    ({"system": "Arr.", "conversations": turns("a", "b", role="from", content="value", names=("human", "gpt"))},
     [S("Arr."), U("a"), A("b")]),
    ({"system": "Arr.", "messages": [{"role": "system", "content": "Arr."}, *turns("a", "b")]}, [S("Arr."), U("a"), A("b")]),
    ({"system": " ", "messages": turns("a", "b")}, [U("a"), A("b")]),
    ({"instruction": "And 3+3?", "input": "", "output": "6", "system": "Count.", "history": [["2+2?", "4"], ["1+1?", "2"]]},
     [S("Count."), U("2+2?"), A("4"), U("1+1?"), A("2"), U("And 3+3?"), A("6")]),
    ({"instruction": "a", "output": "b", "history": turns("x", "y")}, [U("x"), A("y"), U("a"), A("b")]),
    ({"instruction": "a", "output": "b", "system": None, "history": []}, [U("a"), A("b")]),
    ({"system_prompt": "S", "question": "q", "response": "r", "id": "1"}, [S("S"), U("q"), A("r")]),
    ({"messages": [*turns("a"), {**A("b").turn(), "weight": 0}, *turns("c"), {**A("d").turn(), "weight": 1.0}]},
     [U("a"), Message("assistant", "b", 0), U("c"), A("d")]),
    ({"instruction": "Add", "context": "2+2", "response": "4", "category": "math"}, [U("Add\n\n2+2"), A("4")]),
    ({"instruction": "Add", "context": "", "response": 4}, [U("Add"), A("4")]),
    ({"prompt": "a", "completion": " b"}, [U("a"), A(" b")]),
    ({"prompt": "a", "response": "b"}, [U("a"), A("b")]),
    ({"input": "a", "output": "b"}, [U("a"), A("b")]),
    ({"prompt": turns("a", "b", "c"), "completion": [A("d").turn()]}, [U("a"), A("b"), U("c"), A("d")]),
    ({"prompt": "a", "response": "b", "messages": None}, [U("a"), A("b")]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), CHATS)
def test_chats(tmp_path, row, expected):
    assert read(tmp_path, row) == Chat(tuple(expected))


def test_values_of_turns_that_nothing_reads_are_logged(tmp_path, caplog):
    user = {"role": "user", "from": "human", "content": "a", "value": "x", "tool_calls": [1]}
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        assert read(tmp_path, {"messages": [user, A("b").turn()]}) == Chat((U("a"), A("b")))
    (message,) = caplog.messages
    wanted = "from of turns, beside role, value of turns, beside content, tool_calls of user turns"
    assert message.endswith(f"columns not used: {wanted}")


class TestTools:
    def test_openai(self, tmp_path):
        call = CALL | {"function": {"name": "weather", "arguments": '{"city": "Oslo", "n": 1.5}'}}
        row = {
            "messages": [
                U("Weather?").turn(),
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "name": None, "content": "12 C"},
                {"role": "assistant", "content": "12 C.", "tool_calls": []},
            ],
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"max": 10}}}],
        }
        chat = read(tmp_path, row)
        assert [m.turn() for m in chat.messages] == [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "12 C", "tool_call_id": "c1"},
            {"role": "assistant", "content": "12 C."},
        ]
        assert json.loads(chat.tools) == row["tools"]
        assert read(tmp_path, row | {"tools": json.dumps(row["tools"])}) == chat

    @pytest.mark.parametrize(
        "value", ['{"name": "w", "arguments": {"x": 1}}', '[{"name": "w", "arguments": "{\\"x\\": 1}"}]']
    )
    def test_sharegpt(self, tmp_path, value):
        said = [("human", "Weather?"), ("function_call", value), ("observation", "12"), ("gpt", "12 C")]
        chat = read(tmp_path, {"conversations": [{"from": role, "value": text} for role, text in said]})
        assert [m.turn() for m in chat.messages] == [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "12"},
            {"role": "assistant", "content": "12 C"},
        ]  # fmt: skip

    def test_older_openai(self, tmp_path):
        call = {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": ""}}
        result = {"role": "function", "name": "w", "content": "12"}
        chat = read(tmp_path, {"messages": [U("a").turn(), call, result, A("b").turn()]})
        assert chat.messages[1].turn()["tool_calls"] == [
            {"type": "function", "function": {"name": "w", "arguments": {}}}
        ]
        assert chat.messages[2].turn() == {"role": "tool", "content": "12", "name": "w"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
         "turn 1: a part of type 'image_url': only text is supported"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1: no text"),
        ({"messages": [{"content": "a"}]}, "turn 1: no role"),
        ({"messages": [*turns("a"), {"role": [], "content": "x"}]}, "turn 2: unknown role []"),
        ({"messages": [*turns("a"), "b"]}, "turn 2: no object but 'b'"),
        ({"messages": "a"}, "column 'messages' holds 'a', which is no JSON"),
        ({"messages": [*turns("a"), {**A("b").turn(), "weight": 0.5}]}, "turn 2: weight is '0.5': 0 and 1 are supported"),
        ({"messages": [*turns("a"), {**A("b").turn(), "weight": "x"}]}, "turn 2: weight is 'x': 0 and 1 are supported"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "w(1)"}]},
         "turn 2: a function call holds 'w(1)', which is no JSON"),
        ({"messages": [*turns("a"), {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "turn 2: a tool call must be"),
        ({"messages": turns("a", "b"), "tools": {"name": "x"}}, "column 'tools' holds"),
        ({"system": "x", "messages": [S("y").turn(), *turns("a", "b")]}, "column 'system' and a system turn differ"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "column 'history', entry 1"),
        ({"instruction": "a", "output": "b", "history": [["a", ""]]}, "column 'history' has an empty reply"),
        ({"instruction": "a", "output": "b", "history": {"a": "b"}}, "column 'history' must hold a list"),
    ],
)  # fmt: skip
def test_faults(tmp_path, row, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, row)
    assert f"rows.jsonl: row 1, line 1: {message}" in str(caught.value).replace(
        "column 'messages', turn", "turn"
    ).replace("column 'conversations', turn", "turn")


def test_alterations_are_logged(tmp_path, caplog):
    rows = [
        turns("a", "b", "c"),
        [A("x").turn(), *turns("a", "b")],
        turns("a", "b", "c", " ", "d", "e"),
        [{"role": "developer", "content": "s"}, *turns("a", "b")],
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": [{**t, "id": 1} for t in messages]}) + "\n" for messages in rows))
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        loaded = load(DatasetSpec(source=str(path)))
    assert [len(e.messages) for e in loaded.examples] == [2, 2, 2, 3]
    assert [r.message for r in caplog.records] == [
        f"{path}: 2 conversations ended at their last reply; 1 turns before the first user turn left out; "
        "1 conversations ended before an empty reply; 1 developer turns read as system turns",
        f"{path}: columns not used: id of turns",
    ]


def test_weight_0_on_every_reply(tmp_path):
    with pytest.raises(UserError, match=r"no usable rows.*1 with weight 0 on every reply"):
        read(tmp_path, {"messages": [U("a").turn(), {**A("b").turn(), "weight": 0}]})
