"""Answers of a server to the official client: those of `decode.py` for each request alone, in every form."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from data_fixtures import write_tokenizer
from serving import BASE, Expected, ServerProcess

from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.inference.logprobs import TokenLogprobs
from adafuse_jax.serving.models import ServedModel
from adafuse_jax.serving.replies import CompletionReply
from adafuse_jax.serving.text import Answer, token_bytes
from adafuse_jax.serving.work import Token

PROMPTS = ("Once upon a time", "Lily and Tom went to", "The dog was")
NAMES = (BASE, "tales", "verse", "plain")


def complete(server: ServerProcess, **body: Any) -> Any:
    return server.openai.completions.create(**{"model": BASE, "prompt": PROMPTS[0], "temperature": 0, **body})


class TestTheSameAsDecode:
    def test_of_every_model_together(self, server: ServerProcess, expected: Expected):
        """Twelve requests of four models at once, over four slots: half of them streamed."""
        asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]

        def ask(number: int) -> str:
            name, prompt = asked[number]
            if number % 2:
                stream = complete(server, model=name, prompt=prompt, max_tokens=20, stream=True)
                return "".join(chunk.choices[0].text for chunk in stream)
            return complete(server, model=name, prompt=prompt, max_tokens=20).choices[0].text

        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            found = dict(zip(asked, pool.map(ask, range(len(asked))), strict=True))
        wanted = {}
        for name in NAMES:
            answers = expected.completions(name, PROMPTS, 20)
            wanted |= {(name, prompt): answer.text for prompt, answer in zip(PROMPTS, answers, strict=True)}
        assert found == wanted
        assert len({found[name, PROMPTS[0]] for name in NAMES}) == len(NAMES), "the adapters change the answers"

    @pytest.mark.parametrize("name", ["tales", "verse"])
    def test_a_chat(self, server: ServerProcess, expected: Expected, name: str):
        """Without a chat template, and with the one in the adapter's directory."""
        messages: list[Any] = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Tell"}, {"type": "text", "text": " a tale."}]},
        ]
        turns = Chat((Message("system", "Be kind."), Message("user", "Tell a tale.")))
        (wanted,) = expected.completions(name, [turns], 24)
        asked: dict[str, Any] = {"model": name, "messages": messages, "temperature": 0, "max_completion_tokens": 24}
        whole = server.openai.chat.completions.create(**asked)
        choice = whole.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
        assert choice.finish_reason == wanted.finish_reason
        assert whole.usage.prompt_tokens == wanted.prompt_tokens
        assert whole.usage.completion_tokens == len(wanted.token_ids)
        stream = server.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        *chunks, usage = stream
        assert [c.choices[0].delta.role for c in chunks].count("assistant") == 1
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted.text
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [wanted.finish_reason]
        assert (usage.choices, usage.usage.total_tokens) == ([], whole.usage.total_tokens)
        assert len({c.id for c in [*chunks, usage]}) == 1

    def test_token_ids_and_several_prompts(self, server: ServerProcess, expected: Expected):
        ids = [expected.session(BASE).tokens_of(prompt) for prompt in PROMPTS]
        wanted = [answer.text for answer in expected.completions(BASE, PROMPTS, 20)]
        assert complete(server, prompt=ids[0], max_tokens=20).choices[0].text == wanted[0]
        several = complete(server, prompt=ids, max_tokens=20)
        assert [choice.text for choice in several.choices] == wanted
        assert [choice.index for choice in several.choices] == [0, 1, 2]
        assert several.usage.prompt_tokens == sum(map(len, ids))

    @pytest.mark.parametrize("stream", [False, True])
    def test_stop_strings_across_tokens(self, server: ServerProcess, expected: Expected, stream: bool):
        (plain,) = expected.completions(BASE, PROMPTS[:1], 30)
        stop = plain.text[10:19]
        (wanted,) = expected.completions(BASE, PROMPTS[:1], 30, stop=(stop,))
        assert wanted.finish_reason == "stop"
        asked = complete(server, max_tokens=30, stop=["nowhere in it", stop], stream=stream)
        chunks = [*asked] if stream else [asked]
        assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text
        assert chunks[-1].choices[0].finish_reason == "stop"
        server.wait_until_idle()


class TestSampling:
    def test_seeds(self, server: ServerProcess):
        """A seed draws the same again, n answers differ, and those of the streamed request are the same."""
        asked: dict[str, Any] = {"model": "tales", "max_tokens": 12, "temperature": 1.2, "seed": 7, "n": 3}
        first, again = (complete(server, **asked) for _ in range(2))
        texts = [choice.text for choice in first.choices]
        assert texts == [choice.text for choice in again.choices]
        assert len({*texts}) == 3
        assert first.usage.completion_tokens <= 36
        streamed = ["", "", ""]
        for chunk in complete(server, **asked, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts
        other = complete(server, **asked | {"seed": 8})
        assert [choice.text for choice in other.choices] != texts

    def test_without_a_seed_draws_anew(self, server: ServerProcess):
        texts = {complete(server, max_tokens=16, temperature=1.5).choices[0].text for _ in range(3)}
        assert len(texts) > 1

    def test_likeliest_tokens_only(self, server: ServerProcess):
        greedy = complete(server, max_tokens=10).choices[0].text
        for more in ({"extra_body": {"top_k": 1}}, {"top_p": 0}):
            assert complete(server, max_tokens=10, temperature=2, **more).choices[0].text == greedy

    def test_penalties(self, server: ServerProcess, expected: Expected):
        """An adapter that repeats itself repeats less with penalties; the repetition penalty is that of decode.py."""

        def tokens(**more: Any) -> list[str]:
            reply = complete(server, model="plain", max_tokens=24, logprobs=0, **more)
            return reply.choices[0].logprobs.tokens

        def repeats(found: list[str]) -> int:
            return len(found) - len({*found})

        plain, by_presence = tokens(), tokens(presence_penalty=2)
        by_frequency, by_repetition = tokens(frequency_penalty=2), tokens(extra_body={"repetition_penalty": 100})
        assert repeats(plain) > 10
        assert repeats(by_presence) < repeats(plain)
        assert repeats(by_frequency) < repeats(plain)
        assert repeats(by_repetition) == 0
        (wanted,) = expected.completions("plain", PROMPTS[:1], 24, repetition_penalty=100.0)
        assert "".join(by_repetition).lstrip() == wanted.text


class TestLogprobs:
    def test_of_a_completion(self, server: ServerProcess, expected: Expected):
        """The greedy token is the likeliest, and the probabilities are those of the whole text scored again."""
        choice = complete(server, max_tokens=8, logprobs=3).choices[0]
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == choice.text
        assert all(
            lp == max(top.values()) for lp, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
        )
        assert all(len(top) == 3 for top in logprobs.top_logprobs)
        assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(8)]
        session = expected.session(BASE)
        ids = [*session.tokens_of(PROMPTS[0]), *expected.completions(BASE, PROMPTS[:1], 8)[0].token_ids]
        scored = complete(server, prompt=ids, max_tokens=0, echo=True, logprobs=3)
        echoed = scored.choices[0].logprobs
        assert (echoed.token_logprobs[0], echoed.top_logprobs[0]) == (None, None)
        assert echoed.token_logprobs[-8:] == pytest.approx(logprobs.token_logprobs, abs=1e-4)
        assert len(echoed.tokens) == len(ids)
        assert scored.usage.completion_tokens == 0
        assert scored.choices[0].text == session.tokenizer.decode(ids)

    def test_of_a_chat(self, server: ServerProcess):
        asked: dict[str, Any] = {
            "model": "verse", "messages": [{"role": "user", "content": "Tell a tale."}], "temperature": 0,
            "max_tokens": 6, "logprobs": True, "top_logprobs": 2,
        }  # fmt: skip
        content = server.openai.chat.completions.create(**asked).choices[0].logprobs.content
        assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
        assert all(bytes(entry.bytes).decode() == entry.token for entry in content)
        chunks = [*server.openai.chat.completions.create(**asked, stream=True)]
        streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
        assert [entry.token for entry in streamed] == [entry.token for entry in content]
        assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in content], abs=1e-4)

    def test_a_stream_of_echo_alone_ends_as_others_do(self, server: ServerProcess):
        chunks = [*complete(server, max_tokens=0, echo=True, n=2, stream=True)]
        ends = sorted((c.choices[0].index, c.choices[0].finish_reason) for c in chunks if c.choices[0].finish_reason)
        assert ends == [(0, "length"), (1, "length")]

    def test_echo_without_probabilities(self, server: ServerProcess):
        plain = complete(server, max_tokens=5).choices[0].text
        assert complete(server, max_tokens=5, echo=True).choices[0].text == PROMPTS[0] + plain
        stream = complete(server, max_tokens=5, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == PROMPTS[0] + plain

    def test_echo_keeps_the_space_of_the_first_word(self, server: ServerProcess):
        asked: dict[str, Any] = {"prompt": "Once", "max_tokens": 3}
        assert complete(server, **asked).choices[0].text == "upon a time"  # as decode.py has it
        assert complete(server, **asked, echo=True).choices[0].text == "Once upon a time"
        stream = complete(server, **asked, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "Once upon a time"
        assert complete(server, prompt="", max_tokens=2, echo=True).choices[0].text[:1] != " "

    def test_bytes_of_tokens(self, stories260k_dir: Path, tmp_path: Path):
        """Joined, those of tokens are the text's, also where one token is part of a character."""
        write_tokenizer(tmp_path)
        text = " Zo\u00eb, \U0001f600 a\u0102"
        for directory in (stories260k_dir, tmp_path):
            tokenizer = load_tokenizer(directory)
            ids = tokenizer(text.removeprefix(" ") if directory == stories260k_dir else text, add_special_tokens=False)
            parts = [token_bytes(tokenizer, token_id) for token_id in ids["input_ids"]]
            assert b"".join(parts) == text.encode()
            assert len(parts) > len(text)

    def test_offsets_of_parts_of_a_character(self, tmp_path: Path):
        """A token begins where the characters that are complete before it end, as in the text of the answer."""
        write_tokenizer(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        text = "a\U0001f600b\u0102c"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        model = ServedModel(name="m", adapter=None, tokenizer=tokenizer, stop_ids=(), created=0)
        answer = Answer(model, (), [0])
        for token_id in ids:
            entry = TokenLogprobs(token=token_id, logprob=-1.0, top=())
            answer.take(Token(id=token_id, finish_reason=None, logprobs=entry))
        reply = CompletionReply("m", None, 1, logprobs=0, with_experts=False)
        (choice,) = reply.whole([answer], 1)["choices"]
        offsets = choice["logprobs"]["text_offset"]
        ends = [
            len(b"".join(token_bytes(tokenizer, i) for i in ids[:n]).decode(errors="ignore")) for n in range(len(ids))
        ]
        assert offsets == ends
        assert len(ids) > len(text), "some characters have several tokens"


class TestExperts:
    def test_every_token_read_has_its_own(self, server: ServerProcess):
        """Experts and gates of each token but the last, which was not read; the sum of the gates is 1."""
        reply = complete(server, model="verse", max_tokens=9, extra_body={"return_experts": True})
        experts = reply.choices[0].experts
        assert len(experts) == 8
        assert all(sum(gate for _, gate in token) == pytest.approx(1, abs=1e-3) for token in experts)
        assert {expert for token in experts for expert, _ in token} <= {0, 1, 2}
        assert len({json.dumps(token) for token in experts}) > 1

    def test_are_counted(self, server: ServerProcess):
        before = server.metric("expert_tokens_total")
        complete(server, model="tales", max_tokens=9)
        assert server.metric("expert_tokens_total") == before + 2 * 8

    def test_of_the_bare_backbone(self, server: ServerProcess):
        reply = complete(server, max_tokens=4, extra_body={"return_experts": True})
        assert reply.choices[0].experts == []


def test_the_context_ends_an_answer(server: ServerProcess):
    """A row that reaches the end of its slot finishes as `length`; a prompt that leaves no room is refused at once."""
    reply = complete(server, prompt=[1] + [300] * 499, max_tokens=400)
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage.total_tokens <= 512
    with pytest.raises(openai.BadRequestError) as refusal:
        complete(server, prompt=[300] * 512)
    assert refusal.value.code == "context_length_exceeded"
    assert refusal.value.param == "prompt"


def test_a_common_beginning_comes_from_the_cache(server: ServerProcess, expected: Expected):
    prompts = [f"Ben had a big red ball and a small blue ball. He loved to {verb}" for verb in ("play", "sing")]
    replies = [complete(server, model="tales", prompt=prompt, max_tokens=12) for prompt in prompts]
    assert replies[1].usage.prompt_tokens_details.cached_tokens > 10
    other = complete(server, model="plain", prompt=prompts[0], max_tokens=12)
    assert other.usage.prompt_tokens_details.cached_tokens < 10, "the cache is of another adapter"
    wanted = expected.completions("tales", prompts, 12)
    assert [reply.choices[0].text for reply in replies] == [answer.text for answer in wanted]
