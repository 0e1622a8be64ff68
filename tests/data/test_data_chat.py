"""Tokens and loss masks, token by token, against expectations written by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from chats import LONG, A, S, U, encode, marked, tokens_and_mask
from data_fixtures import BOS_CHATML, CHATML, write_tokenizer

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import encode_all, encode_choices, encode_prompt, load_tokenizer, stop_tokens
from adafuse_jax.data.examples import Chat, Message, MultipleChoice, Text
from adafuse_jax.data.sources import DatasetSpec, load_examples


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
        assert tokens_and_mask(encode(chat, chatml, LONG), chatml) == expected

    def test_decoding_stops_at_the_template_s_end_and_at_eos(self, tmp_path, chatml):
        other = load_tokenizer(write_tokenizer(tmp_path / "other", template=CHATML, eos="</s>"))
        names = {name: other.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>")}
        assert stop_tokens(other) == tuple(sorted(names.values()))
        assert stop_tokens(chatml) == (names["<|im_end|>"],)

    def test_special_token_inside_an_answer_does_not_end_the_turn(self, chatml):
        encoded = encode(Chat((U("tag?"), A("a<|im_end|>b"))), chatml, LONG)
        tokens, mask = tokens_and_mask(encoded, chatml)
        assert tokens[-4:] == ["a", "<|im_end|>", "b", "<|im_end|>"]
        assert mask[-4:] == [True] * 4

    def test_bos_of_the_template_is_not_doubled(self, tmp_path):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=BOS_CHATML, adds_bos=True))
        tokens, mask = tokens_and_mask(encode(Chat((U("x"), A("y"))), tokenizer, LONG), tokenizer)
        assert tokens[:2] == ["<s>", "<|im_start|>"]
        assert tokens.count("<s>") == 1
        assert (tokens[-2:], mask[-2:], sum(mask)) == (["y", "<|im_end|>"], [True, True], 2)

    def test_bos_of_the_tokenizer_is_added_to_a_template_without(self, tmp_path):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=CHATML, adds_bos=True))
        tokens, _ = tokens_and_mask(encode(Chat((U("x"), A("y"))), tokenizer, LONG), tokenizer)
        assert tokens[:2] == ["<s>", "<|im_start|>"]
        assert tokens.count("<s>") == 1

    def test_template_that_strips_content(self, tmp_path):
        template = CHATML.replace("m['content']", "m['content'] | trim")
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
        tokens, mask = tokens_and_mask(encode(Chat((U("x"), A("  y\n"))), tokenizer, LONG), tokenizer)
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
        assert tokens_and_mask(encode(Chat((U("q"), A("a"), U("r"), A("b"))), tokenizer, LONG), tokenizer) == expected

    def test_template_that_raises_is_told(self, tmp_path):
        template = "{{ raise_exception('System role not supported') }}"
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tok", template=template))
        with pytest.raises(UserError, match="turns system, user: System role not supported"):
            encode(Chat((S("s"), U("x"), A("y"))), tokenizer, LONG)


class TestWeights:
    def test_turns_of_weight_0_are_no_targets(self, chatml):
        chat = Chat((U("a"), Message("assistant", "b", weight=0), U("c"), A("d"), U("e"), Message("assistant", "f", 0)))
        row = encode(chat, chatml, LONG)
        whole = encode(Chat((U("a"), A("b"), U("c"), A("d"))), chatml, LONG)
        np.testing.assert_array_equal(row.tokens, whole.tokens)
        assert chatml.decode(row.tokens[row.loss_mask]) == "d<|im_end|>"

    def test_nothing_is_left_without_weights(self, chatml):
        assert encode_all([Chat((U("a"), Message("assistant", "b", weight=0)))], chatml, LONG) == ([], 1)


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


class TestAlpacaText:
    def test_single_turn(self, plain):
        expected = marked(
            ("<s>", False), ("### Instruction:\nadd 1\n\n### Response:\n", False), ("2", True), ("</s>", True)
        )
        assert tokens_and_mask(encode(Chat((U("add 1"), A("2"))), plain, LONG), plain) == expected

    def test_system_and_two_turns(self, plain):
        expected = marked(
            ("<s>", False), ("Be brief.\n\n### Instruction:\na\n\n### Response:\n", False), ("b", True), ("</s>", True),
            ("\n\n### Instruction:\nc\n\n### Response:\n", False), ("d", True), ("</s>", True),
        )  # fmt: skip
        assert (
            tokens_and_mask(encode(Chat((S("Be brief."), U("a"), A("b"), U("c"), A("d"))), plain, LONG), plain)
            == expected
        )

    def test_text(self, plain):
        expected = marked(("<s>", False), ("once", True), ("</s>", True))
        assert tokens_and_mask(encode(Text("once"), plain, LONG), plain) == expected

    def test_text_without_bos_predicts_from_the_second_token_on(self, chatml):
        expected = marked(("o", False), ("nce", True), ("<|im_end|>", True))
        assert tokens_and_mask(encode(Text("once"), chatml, LONG), chatml) == expected


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
        rows, dropped = encode_all(chats, chatml, 60)
        single = [encode(chat, chatml, 60) for chat in chats]
        assert dropped == sum(e is None for e in single)
        assert dropped not in (0, len(chats))
        for one, other in zip(rows, [e for e in single if e is not None], strict=True):
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
        tokens, mask = tokens_and_mask(encode(Chat((U("q"), A("yes no"))), tokenizer, LONG), tokenizer)
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
            tokens, mask = tokens_and_mask(encoded, chatml)
            np.testing.assert_array_equal(encoded.tokens[: len(prompt)], prompt)
            assert tokens[len(prompt) :] == letters
            assert mask == [False] * len(prompt) + [True] * len(letters)

    def test_training_is_on_the_right_answer(self, chatml):
        tokens, mask = tokens_and_mask(encode(self.EXAMPLE, chatml, LONG), chatml)
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
