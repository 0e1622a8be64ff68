"""Chat templates: reasoning, tools, what they leave out or rewrite, and bounds on what they may take."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from chats import LONG, A, S, U, encode, split_texts
from data_fixtures import CHATML, transformers_tokenizer, write_tokenizer

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import templates
from adafuse_jax.data.chat import encode_all, encode_choices, encode_prompt, load_tokenizer, stop_tokens, template_date
from adafuse_jax.data.examples import Chat, Message, MultipleChoice
from adafuse_jax.data.rendering import render

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


class TestReasoningTemplates:
    """The prompt of training before every reply is, token for token, the prompt of decoding."""

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
            targets = candidate.tokens[candidate.loss_mask]
            assert tokenizer.decode(targets).strip() == letters
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
    """The template takes a text for a list of parts, as those of models with images do."""
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
    """The template writes a space before the end-of-turn token, as Llama 2's does, or text that is no special token."""
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
        """Text that Llama 3.1's template, for example, leaves out."""
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
    directory = write_tokenizer(tmp_path / "tok", template=template)
    tokenizer, reference = load_tokenizer(directory), transformers_tokenizer(directory)
    messages = (S("be <b>\u2028é</b>"), U(" hi "), A("yo\n"), U("🙂?"))
    for add in (False, True):
        wanted = reference.apply_chat_template([m.turn() for m in messages], tokenize=False, add_generation_prompt=add)
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
