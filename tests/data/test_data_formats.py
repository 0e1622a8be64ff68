"""Every format and every preset's rows, written as local files in the published schema."""

from __future__ import annotations

import json
import logging

import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Message, MultipleChoice, Text
from adafuse_jax.data.formats import FORMATS, recognise
from adafuse_jax.data.sources import PRESETS, DatasetSpec, load, load_examples


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, *rows, fmt="auto"):
    return load_examples(DatasetSpec(source=write(tmp_path / "rows.jsonl", rows), format=fmt))


def chat(*texts: str) -> Chat:
    return Chat(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)))


QUESTION = "Question: Which?\nA. one\nB. two\n\nAnswer with the letter of the correct choice."
LETTERED = {"text": ["one", "two"], "label": ["A", "B"]}

PRESET_ROWS = {
    "slimorca": (
        {
            "conversations": [
                {"from": "system", "value": "You help.", "weight": None},
                {"from": "human", "value": "hi", "weight": 0.0},
                {"from": "gpt", "value": "hello", "weight": 1.0},
            ]
        },
        Chat((Message("system", "You help."), Message("user", "hi"), Message("assistant", "hello"))),
    ),
    "magicoder": (
        {"lang": "c", "raw_index": 1, "index": 2, "seed": "x", "problem": "p", "solution": "s"},
        chat("p", "s"),
    ),
    "metamathqa": (
        {"type": "GSM_AnsAug", "query": "q", "original_question": "o", "response": "r"},
        chat("q", "r"),
    ),
    "scienceqa": (
        {
            "image": None, "question": "Which?", "choices": ["one", "two"], "answer": 1, "hint": "Look.",
            "task": "closed choice", "grade": "grade2", "subject": "s", "topic": "t", "category": "c",
            "skill": "k", "lecture": "l", "solution": "z",
        },
        MultipleChoice("Context: Look.\n\n" + QUESTION, ("A", "B"), 1),
    ),
    "commonsenseqa": (
        {
            "id": "1", "question": "Which?", "question_concept": "c",
            "choices": {"label": ["A", "B"], "text": ["one", "two"]}, "answerKey": "A",
        },
        MultipleChoice(QUESTION, ("A", "B"), 0),
    ),
    "openbookqa": (
        {"id": "1", "question_stem": "Which?", "choices": LETTERED, "answerKey": "B"},
        MultipleChoice(QUESTION, ("A", "B"), 1),
    ),
    "arc-easy": (
        {"id": "1", "question": "Which?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"},
        MultipleChoice(QUESTION, ("A", "B"), 1),
    ),
    "arc-challenge": (
        {"id": "1", "question": "Which?", "choices": LETTERED, "answerKey": "B"},
        MultipleChoice(QUESTION, ("A", "B"), 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_preset_rows(tmp_path, name):
    row, expected = PRESET_ROWS[name]
    assert read(tmp_path, row) == [expected]
    assert read(tmp_path, row, fmt=PRESETS[name].format) == [expected]
    assert recognise(list(row), row, "auto", name) == PRESETS[name].format


PARTED = [{"label": "1", "text": "one"}, {"label": "2", "text": "two"}]
SECOND = MultipleChoice(QUESTION, ("A", "B"), 1)
SPOKEN = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ADAPTERS = {
    "instruction": "Choose: Which?\n\nOption1: one Option2: two Answer format: option1/option2",
    "input": "",
    "output": "the correct answer is option2",
    "answer": "option2",
}
FORMAT_ROWS = [
    ("alpaca", {"instruction": "add", "output": "3"}, chat("add", "3")),
    ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, chat("add\n\n1 2", "3")),
    ("alpaca", {"instruction": "add", "input": "", "output": "so 3", "answer": "3"}, chat("add", "so 3")),
    ("chat", {"messages": TURNS}, chat("hi", "yo")),
    ("sharegpt", {"id": "1", "conversations": SPOKEN}, chat("hi", "yo")),
    ("instruction_response", {"question": "1+1?", "answer": "#### 2"}, chat("1+1?", "#### 2")),
    ("text", {"text": "once", "meta": 1}, Text("once")),
    (
        "llm_adapters",
        ADAPTERS,
        MultipleChoice(ADAPTERS["instruction"], ("the correct answer is option1", "the correct answer is option2"), 1),
    ),
    ("multiple_choice", {"question": "Which?", "choices": {"A": "one", "B": "two"}, "answer": "B"}, SECOND),
    ("multiple_choice", {"question": "Which?", "choices": ["one", "two"], "answer": "b"}, SECOND),
    (
        "multiple_choice",
        {"question": "Which?", "choices": PARTED, "answer": "2"},
        SECOND,
    ),
    (
        "multiple_choice",
        {"question": "Which?", "choices": ["one", "two"], "answer": 0, "instruction": "i", "output": "o"},
        MultipleChoice(QUESTION, ("A", "B"), 0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "row", "expected"), FORMAT_ROWS)
def test_format_rows(tmp_path, fmt, row, expected):
    assert recognise(list(row), row, "auto", "rows") == fmt
    assert read(tmp_path, row) == [expected]
    assert read(tmp_path, row, fmt=fmt) == [expected]


def test_every_format_is_tested():
    assert {fmt for fmt, *_ in FORMAT_ROWS} == set(FORMATS)
    assert set(PRESET_ROWS) == set(PRESETS)


def test_rows_with_different_numbers_of_lettered_choices(tmp_path):
    rows = [{"question": "Q", "choices": dict(zip("ABCD"[:n], "wxyz", strict=False)), "answer": "B"} for n in (2, 4, 3)]
    assert [len(e.choices) for e in read(tmp_path, *rows)] == [2, 4, 3]


class TestConversations:
    def turns(self, text: str):
        names = {"g": "gpt", "h": "human", "s": "system"}
        return {"conversations": [{"from": names[c], "value": f"{c}{i}"} for i, c in enumerate(text)]}

    @pytest.mark.parametrize(
        ("given", "contents"),
        [("ghg", "h1 g2"), ("gghghg", "h2 g3 h4 g5"), ("shgh", "s0 h1 g2"), ("gshg", "s1 h2 g3"), ("hgg", "h0 g1 g2")],
    )
    def test_what_is_kept(self, tmp_path, given, contents):
        (example,) = read(tmp_path, self.turns(given))
        assert [m.content for m in example.messages] == contents.split()

    def test_rows_without_a_reply_are_counted(self, tmp_path):
        source = write(tmp_path / "rows.jsonl", [self.turns(t) for t in ("hg", "g", "gh", "", "h", "hg")])
        loaded = load(DatasetSpec(source=source))
        assert len(loaded.examples) == 2
        assert loaded.skipped == {"no assistant reply after a user turn": 4}

    def test_a_conversation_ends_before_an_empty_reply(self, tmp_path):
        row = self.turns("hghg")
        row["conversations"][3]["value"] = " "
        (example,) = read(tmp_path, row)
        assert [m.content for m in example.messages] == ["h0", "g1"]

    def test_rows_that_need_an_image_are_counted(self, tmp_path):
        rows = [{**self.turns("hg"), "image": "a.png"}, self.turns("hg")]
        loaded = load(DatasetSpec(source=write(tmp_path / "rows.jsonl", rows)))
        assert (len(loaded.examples), loaded.skipped) == (1, {"it needs an image": 1})

    def test_empty_responses_are_counted(self, tmp_path):
        rows = [{"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}]
        loaded = load(DatasetSpec(source=write(tmp_path / "rows.jsonl", rows)))
        assert (len(loaded.examples), loaded.skipped) == (1, {"an empty response": 1})


GOOD = {"question": "Which?", "choices": ["one", "two"], "answer": "A"}
BAD_ROWS = [
    (GOOD, GOOD | {"answer": "C"}, "'C'.*one of A, B"),
    (GOOD, GOOD | {"answer": ""}, "may have no answers"),
    (GOOD, GOOD | {"answer": None}, "column 'answer' is None"),
    (GOOD | {"answer": 0}, GOOD | {"answer": 2}, "from 0 to 1"),
    (GOOD | {"answer": 0}, GOOD | {"answer": -1}, "from 0 to 1"),
    (GOOD, GOOD | {"choices": ["one"]}, "2 to 26"),
    (GOOD, GOOD | {"choices": None}, "column 'choices' must hold"),
    (GOOD, GOOD | {"question": None}, "column 'question' is missing or null"),
    (ADAPTERS, ADAPTERS | {"answer": "option3"}, "one of option1, option2"),
    (ADAPTERS, ADAPTERS | {"instruction": "Choose."}, "Answer format"),
    ({"instruction": "a", "output": "b"}, {"instruction": "a"}, "column 'output' is missing or null"),
    ({"instruction": "a", "output": "b"}, {"instruction": ["a"], "output": "b"}, "holds a list, not text"),
    ({"text": "a"}, {"text": None}, "column 'text'"),
    ({"messages": TURNS}, {"messages": None}, "column 'messages' is missing or null"),
    ({"messages": TURNS}, {"messages": 5}, "must hold a list"),
    ({"messages": TURNS}, {"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
    ({"messages": TURNS}, {"messages": [{"role": "user", "content": None}]}, "turn 1"),
    ({"messages": TURNS}, {"messages": [{"role": "tool", "content": {"a": 1}}]}, "turn 1: its text holds a dict"),
    (GOOD, GOOD | {"choices": "one, two"}, "'choices' holds .*no JSON"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, good, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, good, bad)
    text = str(caught.value)
    assert "rows.jsonl" in text
    assert "row 2" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (
            {"instruction": "a", "output": "b", "system": "S", "system_prompt": "T"},
            "system_prompt is not used beside system",
        ),
        ({"conversations": TURNS, "conversation": TURNS}, "conversation is not used beside conversations"),
        (GOOD | {"question_stem": "What?"}, "question_stem is not used beside question"),
        (GOOD | {"answerKey": "B"}, "answerKey is not used beside answer"),
        (GOOD | {"hint": "H", "context": "C"}, "context is not used beside hint"),
    ],
)
def test_of_two_columns_for_one_thing_the_unused_is_logged(tmp_path, caplog, row, note):
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        read(tmp_path, row)
    assert f"1 rows whose {note}" in caplog.text


def test_choices_of_a_csv_are_json(tmp_path):
    (tmp_path / "a.csv").write_text('question,choices,answer\nq,"[""x"", ""y""]",B\n')
    (example,) = load(DatasetSpec(source=str(tmp_path / "a.csv"))).examples
    assert example.answer == 1
    assert "A. x\nB. y" in example.question


def test_unrecognised_columns_are_listed_with_the_formats(tmp_path):
    with pytest.raises(UserError, match="the columns are foo, bar") as caught:
        read(tmp_path, {"foo": 1, "bar": 2})
    assert all(name in str(caught.value) for name in FORMATS)


def test_a_named_format_needs_its_columns(tmp_path):
    with pytest.raises(UserError, match="alpaca needs instruction \\+ output; the columns are text"):
        read(tmp_path, {"text": "a"}, fmt="alpaca")
