"""`python decode.py` as people use it: every way to give a prompt, what is printed, and conversations."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny

import decode as script
import train as train_script
from adafuse_jax import UserError
from adafuse_jax.inference.prompts import read_prompts

SPECIAL = {256: "<s>", 258: "<|im_start|>"}
FIELDS = {
    "prompt", "text", "token_ids", "finish_reason", "ms_per_token", "prompt_tokens", "prefill_ms", "strategy",
    "experts_used", "batch", "sample",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and an adapter of it in run/adapter."""
    out = tiny.write_folder(tmp_path_factory.mktemp("decode"))
    assert train_script.main(tiny.train_flags(out, steps=12, learning_rate=1e-2, eval_examples=4)) == 0
    return out


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Run decode.py in this process; (stdout, stderr)."""

    def run(stdin: str = "", **changes) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert script.main(tiny.decode_flags(folder, **changes)) == 0
        return capsys.readouterr()

    return run


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.split("\n") if line]


class TestPrompts:
    def test_a_file_of_text(self, run, folder):
        (folder / "prompts.txt").write_bytes("Hi\r\n\nfirst\fsecond \u2028 third\n".encode())
        out, _ = run(prompt=None, prompts_file=folder / "prompts.txt", json=True)
        assert [o["prompt"] for o in objects(out)] == ["Hi", "first\fsecond \u2028 third"]

    def test_a_file_of_objects(self, run, folder):
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        lines = [{"prompt": "x\u2028y"}, {"messages": turns}]
        path = folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        out, _ = run(prompt=None, prompts_file=path, json=True)
        assert [o["prompt"] for o in objects(out)] == ["x\u2028y", "c"]
        assert objects(out)[1]["prompt_tokens"] > objects(out)[0]["prompt_tokens"]

    @pytest.mark.parametrize("temperature", [0, 0.9])
    def test_prompts_decoded_together_answer_as_each_alone(self, run, folder, temperature):
        """Five prompts of different lengths, two or eight at a time, one by one; with a stop string and own experts."""
        lines = ["Hi", "What is two and three, and what is it not?", "a", "b c d e f g h i j k l m n o p", "Hi"]
        (folder / "five.txt").write_text("\n".join(lines))
        flags = {
            "prompt": None, "prompts_file": folder / "five.txt", "json": True, "adapter": folder / "run" / "adapter",
            "max_new_tokens": 12, "temperature": temperature, "stop": "e", "dtype": "float32",
        }  # fmt: skip
        answers = {size: objects(run(**flags, batch_size=size)[0]) for size in (1, 2, None)}
        keys = ("prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "experts_used")
        alone, *together = ([{k: a[k] for k in keys} for a in some] for some in answers.values())
        assert together == [alone, alone]
        assert [a["batch"] for a in answers[2]] == [2, 2, 2, 2, 1]
        assert [a["batch"] for a in answers[None]] == [5] * 5
        assert len({a["text"] for a in alone}) > 2
        out, _ = run(**flags | {"json": None})
        assert out == "".join(f"> {a['prompt']}\n{a['text']}\n" for a in alone)

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    def test_a_byte_order_mark_is_no_text(self, run, folder, suffix):
        path = folder / f"mark{suffix}"
        path.write_bytes(b"\xef\xbb\xbf" + (b"Hi\n" if suffix == ".txt" else b'{"prompt": "Hi"}\n'))
        wanted = objects(run(json=True)[0])[0]["token_ids"]
        for flags in ({"prompts_file": path}, {"stdin": "\ufeffHi\n"}):
            (answer,) = objects(run(**flags, prompt=None, json=True)[0])
            assert (answer["prompt"], answer["token_ids"]) == ("Hi", wanted)

    def test_utf16_is_named(self, folder, monkeypatch):
        path = folder / "utf16.txt"
        path.write_bytes("Hi\n".encode("utf-16"))
        with pytest.raises(UserError, match=r"utf16\.txt: is UTF-16; save it as UTF-8"):
            script.main(tiny.decode_flags(folder, prompt=None, prompts_file=path))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Hi\n".encode("utf-16"))))
        with pytest.raises(UserError, match="stdin: is UTF-16; give UTF-8 text"):
            script.main(tiny.decode_flags(folder, prompt=None))

    def test_pipes(self, folder):
        """A pipe whose writer ends is read; one without a writer is empty, and decoding does not wait for it."""
        fifo = folder / "fifo"
        os.mkfifo(fifo)
        with pytest.raises(UserError, match="has no prompt"):
            read_prompts(fifo)
        reader, writer = os.pipe()
        os.write(writer, b"\xef\xbb\xbfone\ntwo\n")
        os.close(writer)
        assert read_prompts(Path(f"/dev/fd/{reader}")) == ["one", "two"]
        os.close(reader)
        with pytest.raises(UserError, match="is not a regular file"):
            read_prompts(Path("/dev/zero"))
        with pytest.raises(UserError) as caught:
            read_prompts(folder)
        assert str(caught.value) == f"--prompts-file {folder}: is not a regular file; give an existing file of prompts"

    def test_tool_turns_in_a_file(self, folder):
        turns = [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
            {"role": "tool", "content": "2", "name": "add"},
        ]
        path = folder / "tools.jsonl"
        path.write_text(json.dumps({"messages": turns, "tools": [{"function": {"name": "add"}}]}) + "\n")
        (chat,) = read_prompts(path)
        call = {"type": "function", "function": {"name": "add", "arguments": {}}}  # as in training
        assert [m.turn() for m in chat.messages] == [turns[0], turns[1] | {"tool_calls": [call]}, turns[2]]
        assert json.loads(chat.tools) == [{"function": {"name": "add"}}]

    def test_lines_of_a_file(self, tmp_path, caplog):
        """Line ends of every system; turns as training reads them; what nothing reads is logged."""
        (tmp_path / "p.txt").write_bytes(b"one\rtwo\r\n\nthree\xe2\x80\xa8four\n")
        assert read_prompts(tmp_path / "p.txt") == ["one", "two", "three\u2028four"]
        parts = '[{"type": "text", "text": "a"}, "b"]'
        (tmp_path / "p.JSONL").write_text(
            f'{{"messages": [{{"from": "human", "content": {parts}, "mood": "x"}}]}}\n{{"prompt": 1.50, "system": "S"}}\n'
        )
        chat, number = read_prompts(tmp_path / "p.JSONL")
        assert [m.turn() for m in chat.messages] == [{"role": "user", "content": "ab"}]
        assert number == "1.50"
        assert caplog.messages == [f"--prompts-file {tmp_path}/p.JSONL: keys not used: mood of turns, system"]

    def test_keys_that_stand_twice_are_refused(self, tmp_path):
        (tmp_path / "p.jsonl").write_text('{"prompt": "a", "prompt": "b"}\n')
        with pytest.raises(UserError, match="line 1: has the key 'prompt' more than once"):
            read_prompts(tmp_path / "p.jsonl")

    def test_nul_characters_are_refused(self, folder, tmp_path, monkeypatch):
        """UTF-16 without a byte order mark, mostly."""
        (tmp_path / "p.txt").write_bytes(b"Hi\na\0b\n")
        with pytest.raises(UserError, match=r"p\.txt, line 2: holds a NUL character"):
            read_prompts(tmp_path / "p.txt")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\0b\n")))
        with pytest.raises(UserError, match="stdin: holds a NUL character"):
            script.main(tiny.decode_flags(folder, prompt=None))

    def test_messages_are_refused_with_raw(self, folder):
        path = folder / "messages.jsonl"
        path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
        with pytest.raises(UserError, match="has messages, which need the chat template; leave --raw out"):
            script.main(tiny.decode_flags(folder, prompt=None, prompts_file=path, raw=True))

    def test_ids_are_checked_before_anything_is_answered(self, folder, tmp_path, capsys):
        """The tokenizer has a token that the model has not, in the second prompt."""
        shutil.copytree(folder / "model", tmp_path / "model")
        path = tmp_path / "model" / "tokenizer.json"
        table = json.loads(path.read_text())
        table["added_tokens"].append({**table["added_tokens"][-1], "id": 260, "content": "<new>"})
        path.write_text(json.dumps(table))
        (tmp_path / "p.txt").write_text("Hi\nx <new> y\n")
        flags = {"model": tmp_path / "model", "prompt": None, "prompts_file": tmp_path / "p.txt", "batch_size": 1}
        capsys.readouterr()
        with pytest.raises(UserError, match="prompt 2: the prompt has token 260 and the model 260 tokens"):
            script.main(tiny.decode_flags(folder, **flags))
        assert capsys.readouterr().out == ""

    def test_standard_input(self, run):
        out, _ = run(stdin="one\n\ntwo\r\n", prompt=None, json=True)
        assert [o["prompt"] for o in objects(out)] == ["one", "two"]

    def test_all_ways_give_the_same_answer(self, run, folder):
        (folder / "one.txt").write_text("Hi\n")
        answers = [
            objects(run(json=True)[0])[0],
            objects(run(prompt=None, prompts_file=folder / "one.txt", json=True)[0])[0],
            objects(run(stdin="Hi\n", prompt=None, json=True)[0])[0],
        ]
        assert len({tuple(a["token_ids"]) for a in answers}) == 1
        assert run()[0] == answers[0]["text"] + "\n"

    @pytest.mark.parametrize("batch_size", [1, None])
    def test_several_answers_to_a_prompt(self, run, folder, batch_size):
        """Distinct answers; the same one by one and together; and the n-th is that of a prompt asked n times."""
        flags = {"temperature": 1.0, "max_new_tokens": 12, "seed": 5, "json": True}
        answers = objects(run(num_samples=5, batch_size=batch_size, **flags)[0])
        assert [a["sample"] for a in answers] == [0, 1, 2, 3, 4]
        assert len({tuple(a["token_ids"]) for a in answers}) == 5
        repeated = objects(run(stdin="Hi\nother\nHi\n", prompt=None, **flags)[0])
        assert [repeated[i]["token_ids"] for i in (0, 2)] == [a["token_ids"] for a in answers[:2]]
        (folder / "two.txt").write_text("other\nHi\n")
        rows = objects(
            run(prompt=None, prompts_file=folder / "two.txt", num_samples=2, batch_size=batch_size, **flags)[0]
        )
        assert [(a["prompt"], a["sample"]) for a in rows] == [("other", 0), ("other", 1), ("Hi", 0), ("Hi", 1)]
        assert [a["token_ids"] for a in rows[2:]] == [a["token_ids"] for a in answers[:2]]
        assert rows[0]["token_ids"] == repeated[1]["token_ids"]
        out, _ = run(num_samples=2, batch_size=batch_size, **flags | {"json": None})
        assert out == "".join(f"> Hi\n{a['text']}\n" for a in answers[:2])

    @pytest.mark.parametrize(
        "flags",
        [
            {"num_samples": 2},
            {"num_samples": 2, "temperature": 1e-9},
            {"num_samples": 0, "temperature": 1},
            {"batch_size": 2},
            {"num_samples": 2, "chat": True},
        ],
    )
    def test_samples_that_cannot_be_drawn(self, folder, flags):
        with pytest.raises((UserError, SystemExit)):
            script.main(tiny.decode_flags(folder, **flags | ({"prompt": None} if "chat" in flags else {})))

    @pytest.mark.parametrize("temperature", ["1e-9", "1e-38", "1e-45", "5e-324"])
    def test_tiny_temperatures_are_greedy(self, run, temperature):
        greedy, tiny_one = (run(temperature=t, max_new_tokens=24, json=True)[0] for t in (0, temperature))
        assert objects(greedy)[0]["token_ids"] == objects(tiny_one)[0]["token_ids"]

    def test_raw_and_system_change_the_prompt(self, run):
        lengths = [
            objects(run(json=True, **more)[0])[0]["prompt_tokens"]
            for more in ({}, {"raw": True}, {"system": "Be brief."})
        ]
        assert lengths[1] < lengths[0] < lengths[2]


class TestOutput:
    def test_json_fields(self, run, folder):
        bare = objects(run(json=True)[0])[0]
        adapted = objects(run(json=True, adapter=folder / "run" / "adapter")[0])[0]
        assert bare.keys() >= FIELDS
        assert bare["experts_used"] is None
        assert bare["finish_reason"] == "length"
        assert len(bare["token_ids"]) == 4
        assert bare["ms_per_token"] > 0
        read = len(adapted["token_ids"]) - 1 + (adapted["finish_reason"] == "stop")  # the prompt is not counted
        assert sum(adapted["experts_used"]) == 2 * read  # k = 2

    def test_one_token_has_no_time_between_tokens(self, run):
        only = objects(run(json=True, max_new_tokens=1)[0])[0]
        assert only["ms_per_token"] is None
        assert "ms/token" not in run(stats=True, max_new_tokens=1)[1]

    def test_stats(self, run, folder):
        _, err = run(stats=True, adapter=folder / "run" / "adapter")
        assert "prompt tokens in" in err
        assert "ms/token" in err
        assert "tokens/s" in err
        assert "experts: 0:" in err

    def test_stop_string(self, run):
        whole = objects(run(json=True, max_new_tokens=24)[0])[0]["text"]
        stop = whole[len(whole) // 2 :][:2]
        stopped = objects(run(json=True, max_new_tokens=24, stop=[stop])[0])[0]
        assert stopped["finish_reason"] == "stop"
        assert stopped["text"] == whole[: whole.index(stop)]

    def test_stop_at_a_special_token(self, run):
        """A special token that is no end token: the answer ends at it, and shows as little of it as before."""
        flags = {"raw": True, "json": True, "temperature": 1e30, "max_new_tokens": 100}
        for seed in range(9):
            free = objects(run(**flags, seed=seed)[0])[0]
            found = [token for token in free["token_ids"] if token in SPECIAL]
            if found:
                break
        stopped = objects(run(**flags, seed=seed, stop=SPECIAL[found[0]])[0])[0]
        ids = free["token_ids"][: free["token_ids"].index(found[0]) + 1]
        assert (stopped["finish_reason"], stopped["token_ids"]) == ("stop", ids)
        assert free["text"].startswith(stopped["text"].rstrip("\ufffd"))
        assert SPECIAL[found[0]] not in stopped["text"]

    def test_end_token(self, run, folder):
        """The adapter has learned to end its answers."""
        answer = objects(run(json=True, prompt="Double 3.", max_new_tokens=64, adapter=folder / "run" / "adapter")[0])[
            0
        ]
        assert tiny.EOS_ID not in answer["token_ids"]

    def test_sampling_depends_on_the_seed_alone(self, run):
        texts = [run(temperature=1.0, seed=seed, max_new_tokens=16)[0] for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


class TestChat:
    def test_turns_continue_the_conversation(self, run, folder):
        """The second answer is that to the whole conversation."""
        out, _ = run(stdin="Hi\nAgain\n", prompt=None, chat=True)
        first, second = out.split("\n")[:2]
        turns = [("user", "Hi"), ("assistant", first), ("user", "Again")]
        path = folder / "conversation.jsonl"
        path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
        assert objects(run(prompt=None, prompts_file=path, json=True)[0])[0]["text"] == second

    def test_new_conversation(self, run):
        out, _ = run(stdin="Hi\n/new\nHi\n", prompt=None, chat=True)
        first, second = out.split("\n")[:2]
        assert first == second

    def test_full_context_is_told_and_left_by_new(self, run):
        out, err = run(stdin="Hi\n" + "x" * 300 + "\n/new\nHi\n", prompt=None, chat=True)
        assert "/new" in err
        assert out.split("\n")[0] == out.split("\n")[1]


class TestStrategies:
    @pytest.mark.parametrize("strategy", ["golden", "switch"])
    def test_same_answers_and_conversations_as_unmerged(self, run, folder, strategy):
        adapter = folder / "run" / "adapter"
        one = objects(run(json=True, max_new_tokens=24, adapter=adapter)[0])[0]
        other = objects(run(json=True, max_new_tokens=24, adapter=adapter, strategy=strategy)[0])[0]
        assert (one["strategy"], other["strategy"]) == ("unmerged", strategy)
        for name in ("text", "token_ids", "finish_reason", "experts_used"):
            assert one[name] == other[name]
        talk = {"stdin": "Hi\nDouble 7.\n/new\nHi\n", "prompt": None, "chat": True, "adapter": adapter}
        assert run(**talk, strategy=strategy)[0] == run(**talk)[0]

    def test_stats_name_the_strategy(self, run, folder):
        adapter = folder / "run" / "adapter"
        assert ", golden, " in run(stats=True, adapter=adapter, strategy="golden")[1]
        assert ", unmerged, " in run(stats=True, adapter=adapter)[1]
        assert "merged" not in run(stats=True)[1]


class TestHelp:
    @pytest.mark.parametrize("main", [script.main, train_script.main], ids=["decode", "train"])
    def test_explains_every_flag(self, main, capsys):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        lines = capsys.readouterr().out.split("options:")[1]
        for flag in lines.split("\n  --")[1:]:
            assert len(flag.split()) > 2, flag


class TestMetrics:
    def test_every_line_has_loss_and_router_statistics(self, folder):
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, 13))
        for line in steps:
            assert sum(line["load"]) == pytest.approx(1, abs=1e-4)
            assert 0 < line["entropy"] <= 1.3863  # ln 4
            assert len(line["pair"]) == len(line["pair"][0]) == 4
            assert {"lr", "grad_norm", "balance", "tokens_per_second"} <= line.keys()
        assert {line["step"] for line in lines if "eval_loss" in line} == {0, 12}
        assert (folder / "run" / "training.png").stat().st_size > 10_000
