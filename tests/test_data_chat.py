"""Tokens and loss masks, token by token, against expectations written by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import tiny
from data_fixtures import BOS_CHATML, CHATML, write_tokenizer

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import templates
from adafuse_jax.data.chat import encode_all, encode_choices, encode_prompt, load_tokenizer, stop_tokens, template_date
from adafuse_jax.data.examples import Chat, Message, MultipleChoice, Text
from adafuse_jax.data.rendering import render
from adafuse_jax.data.sources import DatasetSpec, load_examples

S, U, A = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))
LONG = 10_000


def pieces(text: str) -> list[str]:
    """Byte tokens of ASCII text as ByteLevel spells them."""
    return ["Ċ" if c == "\n" else "Ġ" if c == " " else c for c in text]


def marked(*parts: tuple[str, bool]) -> tuple[list[str], list[bool]]:
    """Expected (tokens, mask) from (special token or text, is target) parts."""
    tokens: list[str] = []
    mask: list[bool] = []
    for part, target in parts:
        names = [part] if part in ("<s>", "</s>", "<|im_start|>", "<|im_end|>") else pieces(part)
        tokens += names
        mask += [target] * len(names)
    return tokens, mask


def encode(example, tokenizer, max_length):
    """The one row of an example, or None."""
    rows, dropped = encode_all([example], tokenizer, max_length)
    assert len(rows) + dropped == 1
    return rows[0] if rows else None


def told(encoded, tokenizer) -> tuple[list[str], list[bool]]:
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_
    return tokenizer.convert_ids_to_tokens(encoded.tokens.tolist()), encoded.loss_mask.tolist()


@pytest.fixture
def chatml(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tok", template=CHATML, eos="<|im_end|>"))


@pytest.fixture
def plain(tmp_path):
    return load_tokenizer(write_tokenizer(tmp_path / "tok", adds_bos=True))


class TestChatTemplate:
    def test_multi_turn(self, chatml):
        chat = Chat((S("be kind"), U("hi"), A("yo"), U("2+2?"), A("4 \n")))
        expected = marked(
            ("<|im_start|>", False), ("system\nbe kind", False), ("<|im_end|>", False), ("\n", False),
            ("<|im_start|>", False), ("user\nhi", False), ("<|im_end|>", False), ("\n", False),
            ("<|im_start|>", False), ("assistant\n", False), ("yo", True), ("<|im_end|>", True), ("\n", False),
            ("<|im_start|>", False), ("user\n2+2?", False), ("<|im_end|>", False), ("\n", False),
            ("<|im_start|>", False), ("assistant\n", False), ("4 \n", True), ("<|im_end|>", True),
        )  # fmt: skip
        assert told(encode(chat, chatml, LONG), chatml) == expected

    def test_decoding_stops_at_the_template_s_end_and_at_eos(self, tmp_path, chatml):
        other = load_tokenizer(write_tokenizer(tmp_path / "other", template=CHATML, eos="</s>"))
        names = {name: other.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>")}
        assert stop_tokens(other) == tuple(sorted(names.values()))
        assert stop_tokens(chatml) == (names["<|im_end|>"],)

    def test_special_token_inside_an_answer_does_not_end_the_turn(self, chatml):
        encoded = encode(Chat((U("tag?"), A("a<|im_end|>b"))), chatml, LONG)
        tokens, mask = told(encoded, chatml)
        assert tokens[-4:] == ["a", "<|im_end|>", "b", "<|im_end|>"]
        assert mask[-4:] == [True] * 4

    def test_bos_of_the_template_is_not_doubled(self, tmp_path):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=BOS_CHATML, adds_bos=True))
        tokens, mask = told(encode(Chat((U("x"), A("y"))), tokenizer, LONG), tokenizer)
        assert tokens[:2] == ["<s>", "<|im_start|>"]
        assert tokens.count("<s>") == 1
        assert (tokens[-2:], mask[-2:], sum(mask)) == (["y", "<|im_end|>"], [True, True], 2)

    def test_bos_of_the_tokenizer_is_added_to_a_template_without(self, tmp_path):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=CHATML, adds_bos=True))
        tokens, _ = told(encode(Chat((U("x"), A("y"))), tokenizer, LONG), tokenizer)
        assert tokens[:2] == ["<s>", "<|im_start|>"]
        assert tokens.count("<s>") == 1

    def test_template_that_strips_content(self, tmp_path):
        template = CHATML.replace("m['content']", "m['content'] | trim")
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
        tokens, mask = told(encode(Chat((U("x"), A("  y\n"))), tokenizer, LONG), tokenizer)
        assert (tokens[-2:], mask[-2:], sum(mask)) == (["y", "<|im_end|>"], [True, True], 2)

    def test_turns_closed_by_plain_text_get_an_eos(self, tmp_path):
        template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
        expected = marked(
            ("user: q\nassistant: ", False), ("a", True), ("\nuser: r\nassistant: ", False), ("b", True), ("</s>", True)
        )
        assert told(encode(Chat((U("q"), A("a"), U("r"), A("b"))), tokenizer, LONG), tokenizer) == expected

    def test_template_that_raises_is_told(self, tmp_path):
        template = "{{ raise_exception('System role not supported') }}"
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
        with pytest.raises(UserError, match="turns system, user: System role not supported"):
            encode(Chat((S("s"), U("x"), A("y"))), tokenizer, LONG)


PREFILLED = (  # the form of DeepSeek-R1's distilled models
    "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% elif m.role == 'assistant' %}"
    "[A]{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
REWRITING = (  # the form of Qwen3: reasoning stays in the last turn alone, where there is a block even without reasoning
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '') "
    "+ '\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMPTY_BLOCK = CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}")


def split_texts(row, tokenizer) -> tuple[str, str]:
    """(text before the targets, text of the targets) of a row with one reply."""
    at = int(np.argmax(row.loss_mask))
    assert row.loss_mask[at:].all()
    return tokenizer.decode(row.tokens[:at]), tokenizer.decode(row.tokens[at:])


class TestReasoningTemplates:
    """Before every reply stands, token for token, what decoding is given."""

    @pytest.fixture
    def load(self, tmp_path):
        return lambda template: load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))

    @pytest.mark.parametrize(
        ("reply", "wanted"),
        [
            ("yes", "yes</s>"),
            ("plan</think>yes", "plan</think>yes</s>"),
            ("<think>\nplan\n</think>\nyes", "plan\n</think>\nyes</s>"),
            ("<think>plan</think>yes", "plan</think>yes</s>"),
        ],
    )
    def test_reply_that_the_prompt_begins(self, load, reply, wanted):
        tokenizer = load(PREFILLED)
        row = encode(Chat((U("q"), A(reply))), tokenizer, LONG)
        assert split_texts(row, tokenizer) == ("[U]q[A]<think>\n", wanted)
        prompt = encode_prompt((U("q"),), tokenizer)
        np.testing.assert_array_equal(row.tokens[: len(prompt)], prompt)

    def test_empty_block_in_the_prompt(self, load):
        tokenizer = load(EMPTY_BLOCK)
        row = encode(Chat((U("q"), A("yes"))), tokenizer, LONG)
        assert split_texts(row, tokenizer) == (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "yes<|im_end|>",
        )  # fmt: skip

    def test_each_turn_is_a_row_where_earlier_turns_are_rewritten(self, load, caplog):
        tokenizer = load(REWRITING)
        chat = Chat((U("a"), A("<think>why</think>b"), U("c"), A("d")))
        with caplog.at_level("INFO"):
            rows, dropped = encode_all([chat, Chat((U("a"), A("b")))], tokenizer, LONG, name="set")
        assert dropped == 0
        start, end = "<|im_start|>", "<|im_end|>\n"
        first = f"{start}user\na{end}{start}assistant\n"
        assert [split_texts(row, tokenizer) for row in rows] == [
            (first, "<think>\nwhy\n</think>\n\nb<|im_end|>"),
            (f"{first}b{end}{start}user\nc{end}{start}assistant\n", "<think>\n\n</think>\n\nd<|im_end|>"),
            (first, "<think>\n\n</think>\n\nb<|im_end|>"),
        ]
        assert "set: 1 conversations are trained as 2 rows, one an assistant turn" in caplog.text
        for row, messages in zip(rows, (chat.messages[:1], chat.messages[:3], (U("a"),)), strict=True):
            prompt = encode_prompt(messages, tokenizer)
            np.testing.assert_array_equal(row.tokens[: len(prompt)], prompt)

    def test_prefilled_turns_are_rows_too(self, load):
        tokenizer = load(PREFILLED)
        rows, _ = encode_all([Chat((U("a"), A("x</think>b"), U("c"), A("y</think>d")))], tokenizer, LONG)
        assert [split_texts(row, tokenizer) for row in rows] == [
            ("[U]a[A]<think>\n", "x</think>b</s>"),
            ("[U]a[A]b</s>[U]c[A]<think>\n", "y</think>d</s>"),
        ]

    @pytest.mark.parametrize("template", [PREFILLED, REWRITING, EMPTY_BLOCK])
    def test_candidates_and_stops(self, load, template):
        tokenizer = load(template)
        for candidate, letters in zip(
            encode_choices(MultipleChoice("Q", ("t", "think"), 0), tokenizer, LONG), ("t", "think"), strict=True
        ):
            kept = candidate.tokens[candidate.loss_mask]
            assert tokenizer.decode(kept).strip() == letters
            assert candidate.loss_mask[-len(letters) :].all()
        end = "</s>" if template == PREFILLED else "<|im_end|>"
        ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
        assert stop_tokens(tokenizer) == tuple(sorted(ids))

    def test_template_that_needs_a_system_turn(self, load):
        tokenizer = load("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
        assert len(stop_tokens(tokenizer)) == 2
        row = encode(Chat((S("s"), U("a"), A("b"))), tokenizer, LONG)
        assert split_texts(row, tokenizer)[1] == "b<|im_end|>"
        (candidate,) = encode_choices(MultipleChoice("a", ("b",), 0), tokenizer, LONG, system="s")
        np.testing.assert_array_equal(candidate.tokens, row.tokens[:-1])
        with pytest.raises(UserError, match=r"turns user: no system.*give a system turn"):
            encode_prompt((U("a"),), tokenizer)

    def test_a_template_that_only_refuses_leaves_eos(self, load):
        tokenizer = load("{{ raise_exception('never') }}")
        assert stop_tokens(tokenizer) == (tokenizer.eos_token_id,)


class TestWeights:
    def test_turns_of_weight_0_are_no_targets(self, chatml):
        chat = Chat((U("a"), Message("assistant", "b", weight=0), U("c"), A("d"), U("e"), Message("assistant", "f", 0)))
        row = encode(chat, chatml, LONG)
        whole = encode(Chat((U("a"), A("b"), U("c"), A("d"))), chatml, LONG)
        np.testing.assert_array_equal(row.tokens, whole.tokens)
        assert chatml.decode(row.tokens[row.loss_mask]) == "d<|im_end|>"

    def test_nothing_is_left_without_weights(self, chatml):
        assert encode_all([Chat((U("a"), Message("assistant", "b", weight=0)))], chatml, LONG) == ([], 1)


def test_system_turns_that_the_template_leaves_out_are_logged(tmp_path, caplog, chatml):
    chats = [Chat((U("a"), A("b"))), Chat((Message("system", "s"), U("a"), A("b")))]
    encode_all(chats, chatml, 512, name="set")
    assert not caplog.records
    template = CHATML.replace("in messages %}", "in messages if m['role'] != 'system' %}")
    encode_all(chats, load_tokenizer(write_tokenizer(tmp_path / "t", template=template)), 512, name="set")
    assert [r.message for r in caplog.records] == ["set: the chat template leaves system turns out"]


def test_reasoning_that_the_template_leaves_out_is_logged(tmp_path, caplog, chatml):
    chats = [Chat((U("a"), replace(A("b"), extra='{"reasoning_content": "r"}')))]
    template = CHATML.replace("m['content']", "(m.thinking or '') + m['content']")
    encode_all(chats, load_tokenizer(write_tokenizer(tmp_path / "t", template=template)), 512, name="set")
    assert not caplog.records
    encode_all(chats, chatml, 512, name="set")
    assert [r.message for r in caplog.records] == ["set: the chat template leaves the reasoning of assistant turns out"]


def test_a_template_that_leaves_contents_out_is_refused(tmp_path):
    """It takes a text for a list of parts, as those of models with images do."""
    template = CHATML.replace(
        "m['content']", "(m.content | selectattr('text', 'defined') | map(attribute='text') | join)"
    )
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template=template))
    with pytest.raises(UserError, match="does not write the content of an assistant turn"):
        encode(Chat((U("a"), A("b"))), tokenizer, LONG)
    with pytest.raises(UserError, match="leaves the user turn out"):
        encode_prompt((U("a"),), tokenizer)
    altered = load_tokenizer(write_tokenizer(tmp_path / "u", template=CHATML.replace("content']", "content'] | upper")))
    assert altered.decode(encode(Chat((U("a"), A("b"))), altered, LONG).tokens).endswith("B<|im_end|>")
    assert "A<|im_end|>" in altered.decode(encode_prompt((U("a"),), altered))


def test_candidates_end_with_their_own_text(tmp_path):
    """Before the end-of-turn token the template writes a space, as Llama 2's does, or text that is no special token."""
    for number, end in enumerate((" </s>", "<end>\n")):
        template = CHATML.replace("<|im_end|>\n", end)
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / str(number), template=template))
        rows = encode_choices(MultipleChoice("Q", ("yes", "no"), 0), tokenizer, LONG)
        assert [tokenizer.decode(row.tokens[row.loss_mask]).strip("\n") for row in rows] == ["yes", "no"]
        assert all(row.loss_mask[-1] for row in rows)


def test_a_reply_is_no_part_of_the_conversation_before_it(tmp_path):
    """A template of the last two turns: with the reply, the turns before it are other ones than in the prompt."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template=CHATML.replace("messages", "messages[-2:]")))
    rows, _ = encode_all([Chat((U("a"), A("b"), U("c"), A("d")))], tokenizer, LONG)
    assert [tokenizer.decode(row.tokens[row.loss_mask]) for row in rows] == ["b<|im_end|>", "d<|im_end|>"]
    prompt = encode_prompt((U("a"), A("b"), U("c")), tokenizer)
    np.testing.assert_array_equal(rows[1].tokens[: len(prompt)], prompt)


class TestToolTurns:
    TEMPLATE = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{{ m.content }}{% for c in m.tool_calls or [] %}<s>{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    CALL = Message("assistant", "", extra=json.dumps({"tool_calls": [{"function": {"name": "add", "arguments": [1]}}]}))
    TOOLS = json.dumps([{"type": "function", "function": {"name": "add"}}])

    def test_a_template_that_refuses_them(self, chatml):
        call = replace(self.CALL, extra=json.dumps({"content": None, **json.loads(self.CALL.extra)}))
        with pytest.raises(UserError, match=r"turns user, assistant with tool calls: .*has no attribute 'content'"):
            encode(Chat((U("1?"), call)), chatml, 512)

    @pytest.mark.parametrize(
        ("chat", "what"),
        [
            (Chat((U("1?"), CALL, Message("tool", "2"), A("two"))), "tool calls"),
            (Chat((U("1?"), A("two")), tools=TOOLS), "the tools"),
            (Chat((U("1?"), A("2"), Message("tool", "2"), A("two"))), "results of tools"),
        ],
    )
    def test_a_template_that_leaves_them_out_is_refused(self, tmp_path, chat, what):
        template = (
            "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
        )
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template=template))
        with pytest.raises(UserError, match=rf"a.jsonl: row 3: chat template: leaves out {what}:"):
            encode_all([replace(chat, where="a.jsonl: row 3")], tokenizer, 512)

    def test_text_beside_calls_that_the_template_leaves_out_is_logged(self, tmp_path, caplog):
        """As Llama 3.1's template does."""
        chats = [Chat((U("1?"), replace(self.CALL, content="I add.")))]
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", template=self.TEMPLATE))
        encode_all(chats, tokenizer, 512)
        assert not caplog.records
        template = self.TEMPLATE.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
        encode_all(chats, load_tokenizer(write_tokenizer(tmp_path / "u", template=template)), 512)
        assert caplog.messages == ["the chat template leaves the text beside tool calls out"]

    def test_calls_and_tools_reach_the_template(self, tmp_path):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=self.TEMPLATE))
        chat = Chat((U("1?"), self.CALL, Message("tool", "2"), A("two")), tools=self.TOOLS)
        row = encode(chat, tokenizer, LONG)
        assert tokenizer.decode(row.tokens) == (
            '[add]<|im_start|>user:1?<|im_end|><|im_start|>assistant:<s>{"name": "add", "arguments": [1]}<|im_end|>'
            "<|im_start|>tool:2<|im_end|><|im_start|>assistant:two<|im_end|>"
        )
        assert tokenizer.decode(row.tokens[row.loss_mask]) == (
            '<s>{"name": "add", "arguments": [1]}<|im_end|>two<|im_end|>'
        )

    @pytest.mark.parametrize(
        "chat", [Chat((U("1?"), CALL)), Chat((U("1?"), A("2")), tools=TOOLS), Chat((Message("tool", "2"), A("2")))]
    )
    def test_alpaca_text_has_no_place_for_them(self, plain, chat):
        with pytest.raises(UserError, match="no chat template"):
            encode(chat, plain, LONG)


class TestBadRows:
    ALTERNATING = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )

    def test_named_by_place_or_left_out_and_counted(self, tmp_path, caplog):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=self.ALTERNATING))
        good, bad = (
            Chat((U("a"), A("b")), where="a.jsonl: line 1"),
            Chat((U("a"), U("a"), A("b")), where="a.jsonl: line 2"),
        )
        with pytest.raises(
            UserError, match=r"^a\.jsonl: line 2: chat template: turns user, user: roles must alternate"
        ):
            encode_all([good, bad], tokenizer, LONG)
        rows, dropped = encode_all([good, bad, good], tokenizer, LONG, name="a.jsonl", skip_bad_rows=True)
        assert (len(rows), dropped) == (2, 0)
        assert "a.jsonl: 1 of 3 examples left out" in caplog.text
        with pytest.raises(UserError, match="line 2"):
            encode_all([bad, bad], tokenizer, LONG, skip_bad_rows=True)


class TestTemplatesAreBounded:
    @pytest.mark.parametrize(
        "template",
        [
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ 'x' * 10**10 }}",
            "{{ '%99999999999d' % 1 }}",
            "{{ 'x'.ljust(10**11) }}",
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ ''.__class__.__mro__ }}",
            "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
            "{% for %}",
            "{{ '\\ud800' }}",
        ],
    )
    def test_errors_in_one_line(self, tmp_path, template):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
        with pytest.raises(UserError, match="chat template") as caught:
            encode_prompt((U("x"),), tokenizer)
        assert "\n" not in str(caught.value)

    def test_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
        for text in (
            "{{ 10 ** (10 ** 9) }}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        ):
            tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=text))
            with pytest.raises(UserError, match=r"takes more than 0.2 seconds"):
                encode_all([Chat((U("x"), A("y")))] * 3, tokenizer, LONG, skip_bad_rows=True)
            with pytest.raises(UserError, match=r"takes more than 0.2 seconds"):
                stop_tokens(tokenizer)
        chatml = load_tokenizer(write_tokenizer(tmp_path / "tok", template=CHATML))
        assert encode_prompt((U("x"),), chatml).size


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{%- set n = namespace(i=0) -%}{% for m in messages %}{% set n.i = n.i + 1 %}{{ n.i }}{{ m.content }}\n"
        "  {% if n.i == 2 %}{% break %}{% endif %}\n{% endfor %}{{ bos_token }}{{ documents }}{{ tools }}",
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ dict(a=1) }}{{ messages | length }}{{ undefined }}",
        "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'none' }}",
    ],
)
def test_rendering_equals_transformers(tmp_path, template):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
    messages = (S("be <b>\u2028é</b>"), U(" hi "), A("yo\n"), U("🙂?"))
    for add in (False, True):
        wanted = tokenizer.apply_chat_template([m.turn() for m in messages], tokenize=False, add_generation_prompt=add)
        assert render(messages, tokenizer, add_generation_prompt=add) == wanted


class TestTemplateDate:
    def test_the_date_is_fixed_inside_and_today_s_outside(self, tmp_path):
        tokenizer = load_tokenizer(
            write_tokenizer(tmp_path / "tok", template="{{ strftime_now('%d %b %Y %H:%M:%S') }}")
        )
        with template_date(datetime(2024, 2, 29, 23, 59, 58)) as given:
            assert given == datetime(2024, 2, 29, 23, 59, 58)
            assert render((U("x"),), tokenizer, add_generation_prompt=False) == "29 Feb 2024 23:59:58"
            with template_date(datetime(2025, 1, 1)):
                assert render((U("x"),), tokenizer, add_generation_prompt=False) == "01 Jan 2025 00:00:00"
            assert render((U("x"),), tokenizer, add_generation_prompt=False) == "29 Feb 2024 23:59:58"
        today = render((U("x"),), tokenizer, add_generation_prompt=False)
        assert abs((datetime.strptime(today, "%d %b %Y %H:%M:%S") - datetime.now()).total_seconds()) < 60


class TestAlpacaText:
    def test_single_turn(self, plain):
        expected = marked(
            ("<s>", False), ("### Instruction:\nadd 1\n\n### Response:\n", False), ("2", True), ("</s>", True)
        )
        assert told(encode(Chat((U("add 1"), A("2"))), plain, LONG), plain) == expected

    def test_system_and_two_turns(self, plain):
        expected = marked(
            ("<s>", False), ("Be brief.\n\n### Instruction:\na\n\n### Response:\n", False), ("b", True), ("</s>", True),
            ("\n\n### Instruction:\nc\n\n### Response:\n", False), ("d", True), ("</s>", True),
        )  # fmt: skip
        assert told(encode(Chat((S("Be brief."), U("a"), A("b"), U("c"), A("d"))), plain, LONG), plain) == expected

    def test_text(self, plain):
        expected = marked(("<s>", False), ("once", True), ("</s>", True))
        assert told(encode(Text("once"), plain, LONG), plain) == expected

    def test_text_without_bos_predicts_from_the_second_token_on(self, chatml):
        expected = marked(("o", False), ("nce", True), ("<|im_end|>", True))
        assert told(encode(Text("once"), chatml, LONG), chatml) == expected


class TestLength:
    def test_long_text_goes_on_in_further_pieces(self, plain):
        whole = encode(Text("abcdefghij" * 5), plain, LONG)
        rows, dropped = encode_all([Text("abcdefghij" * 5)], plain, 16)
        assert dropped == 0
        np.testing.assert_array_equal(np.concatenate([row.tokens for row in rows]), whole.tokens)
        assert max(len(row.tokens) for row in rows) == 16
        for row in rows:
            assert row.loss_mask.tolist() == [False] + [True] * (len(row.tokens) - 1)

    def test_cut_at_the_end(self, chatml):
        chat = Chat((U("hi"), A("abcdef")))
        full = encode(chat, chatml, LONG)
        cut = encode(chat, chatml, len(full.tokens) - 3)
        np.testing.assert_array_equal(cut.tokens, full.tokens[:-3])
        np.testing.assert_array_equal(cut.loss_mask, full.loss_mask[:-3])

    def test_no_response_token_left(self, chatml):
        chat = Chat((U("hi"), A("abcdef")))
        prompt = encode_prompt(chat.messages[:1], chatml)
        assert encode(chat, chatml, len(prompt)) is None
        assert encode(chat, chatml, len(prompt) + 1).loss_mask.tolist() == [False] * len(prompt) + [True]

    def test_all_counts_what_it_leaves_out(self, chatml):
        chats = [Chat((U("x" * n), A("y" * 30))) for n in range(60)]
        kept, dropped = encode_all(chats, chatml, 60)
        single = [encode(chat, chatml, 60) for chat in chats]
        assert dropped == sum(e is None for e in single)
        assert dropped not in (0, len(chats))
        for one, other in zip(kept, [e for e in single if e is not None], strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


class TestBoundary:
    SPACED = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' + ' ' }}{% endif %}"
    )

    @pytest.mark.parametrize("trim_offsets", [False, True])
    def test_a_straddling_token_belongs_to_the_prompt(self, tmp_path, trim_offsets):
        directory = write_tokenizer(
            tmp_path / "tok", template=self.SPACED, merges_from=" yes", trim_offsets=trim_offsets
        )
        tokenizer = load_tokenizer(directory)
        tokens, mask = told(encode(Chat((U("q"), A("yes no"))), tokenizer, LONG), tokenizer)
        assert "Ġyes" in tokens, "the test needs a token over the boundary"
        at = tokens.index("Ġyes")
        assert mask[: at + 1] == [False] * (at + 1)
        assert mask[at + 1 :] == [True] * len(mask[at + 1 :])

    def test_characters_of_several_tokens(self, chatml):
        encoded = encode(Chat((U("é"), A("ü🙂"))), chatml, LONG)
        assert encoded.loss_mask.sum() == len("ü🙂".encode()) + 1
        assert encoded.loss_mask[-7:].all()


class TestChoices:
    EXAMPLE = MultipleChoice("Q?\nA. x\nB. y", ("A", "BC"), 1)

    def test_masks_are_on_the_candidates(self, chatml):
        first, second = encode_choices(self.EXAMPLE, chatml, LONG)
        prompt = encode_prompt((U(self.EXAMPLE.question),), chatml)
        for encoded, letters in ((first, ["A"]), (second, ["B", "C"])):
            tokens, mask = told(encoded, chatml)
            np.testing.assert_array_equal(encoded.tokens[: len(prompt)], prompt)
            assert tokens[len(prompt) :] == letters
            assert mask == [False] * len(prompt) + [True] * len(letters)

    def test_training_is_on_the_right_answer(self, chatml):
        tokens, mask = told(encode(self.EXAMPLE, chatml, LONG), chatml)
        assert [t for t, m in zip(tokens, mask, strict=True) if m] == ["B", "C", "<|im_end|>"]

    def test_cut_candidates_are_not_compared(self, chatml):
        second = encode_choices(self.EXAMPLE, chatml, LONG)[1]
        assert encode_choices(self.EXAMPLE, chatml, len(second.tokens)) is not None
        assert encode_choices(self.EXAMPLE, chatml, len(second.tokens) - 1) is None


class TestLoadTokenizer:
    def test_errors_name_the_place(self, tmp_path):
        (tmp_path / "empty").mkdir()
        broken = write_tokenizer(tmp_path / "broken")
        (broken / "tokenizer.json").write_text("{")
        no_eos = write_tokenizer(tmp_path / "no_eos")
        config = json.loads((no_eos / "tokenizer_config.json").read_text())
        (no_eos / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
        for name in ("empty", "broken", "no_eos", "missing"):
            with pytest.raises(UserError, match=name) as caught:
                load_tokenizer(tmp_path / name)
            assert "\n" not in str(caught.value)

    def test_nothing_on_stderr(self, tmp_path):
        directory = write_tokenizer(tmp_path / "tok")
        code = f"from adafuse_jax.data.chat import load_tokenizer; load_tokenizer({str(directory)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=tiny.REPOSITORY,
            env={k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")},
        )
        assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("model", ["stories260k_dir", "smollm2_dir"])
def test_decoding_starts_from_what_training_saw(model, request, shared_dir):
    """Every prompt of real conversations is, token for token, what precedes its reply in training."""
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    files = (
        "sharegpt_500.jsonl.gz",
        "gsm8k_test.jsonl.gz",
        "code_alpaca_2k.json.gz",
        "scienceqa_think_textonly.jsonl.gz",
    )
    replies = 0
    for file in files:
        examples = load_examples(DatasetSpec(source=str(shared_dir / "assets" / "data" / file)))[:100]
        encoded, dropped = encode_all(examples, tokenizer, 10**6)
        assert dropped == 0
        for example, row in zip(examples, encoded, strict=True):
            messages = (example.chat() if isinstance(example, MultipleChoice) else example).messages
            for i in [i for i, m in enumerate(messages) if m.role == "assistant"]:
                prompt = encode_prompt(messages[:i], tokenizer)
                np.testing.assert_array_equal(prompt, row.tokens[: len(prompt)])
                assert not row.loss_mask[len(prompt) - 1]
                assert row.loss_mask[len(prompt)]
                replies += 1
            assert row.tokens[-1] == tokenizer.eos_token_id
    assert replies > 600


def test_smollm2_spans_decode_to_the_replies(smollm2_dir, shared_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    source = str(shared_dir / "assets" / "data" / "sharegpt_500.jsonl.gz")
    for chat in load_examples(DatasetSpec(source=source))[:50]:
        row = encode(chat, tokenizer, 10**6)
        wanted = "".join(m.content + "<|im_end|>" for m in chat.messages if m.role == "assistant")
        assert tokenizer.decode(row.tokens[row.loss_mask]) == wanted
