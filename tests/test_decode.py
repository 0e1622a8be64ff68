"""`python decode.py` as people use it: every way to give a prompt, what is printed, and conversations."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import tiny

import decode as script
import train as train_script
from adafuse_jax import load_backbone
from adafuse_jax.interop import huggingface

FIELDS = {
    "prompt", "text", "token_ids", "finish_reason", "ms_per_token", "prompt_tokens", "prefill_ms", "strategy",
    "experts_used", "batch",
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
        kept = ("prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "experts_used")
        alone, *together = ([{k: a[k] for k in kept} for a in some] for some in answers.values())
        assert together == [alone, alone]
        assert [a["batch"] for a in answers[2]] == [2, 2, 2, 2, 1]
        assert [a["batch"] for a in answers[None]] == [5] * 5
        assert len({a["text"] for a in alone}) > 2
        out, _ = run(**flags | {"json": None})
        assert out == "".join(f"> {a['prompt']}\n{a['text']}\n" for a in alone)

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
    @pytest.mark.parametrize("strategy", ["golden", "switch", "simple"])
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


class TestHub:
    def test_a_hub_id_is_loaded_from_its_snapshot(self, folder, monkeypatch):
        asked = []

        def snapshot(repo: str, allow_patterns: list[str]) -> str:
            asked.append((repo, tuple(allow_patterns)))
            return str(folder / "model")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        model = load_backbone("some-org/some-model")
        assert asked[0][0] == "some-org/some-model"
        assert model.config == load_backbone(folder / "model").config
        assert "model*.safetensors" in asked[0][1]
        assert huggingface.model_directory("some-org/some-model") == folder / "model"


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
