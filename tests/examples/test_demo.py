"""The demo: its generated data is right and fair, it writes the files it documents, and it removes no file of another."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.data.examples import Chat
from adafuse_jax.data.sources import DatasetSpec, load_examples
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.training.config import TrainConfig
from examples.skills.answers import Answers
from examples.skills.config import DemoConfig
from examples.skills.report import answers_table, expert_shares, expert_table
from examples.skills.skills import ECHO, SKILLS, Case, draw_material
from examples.skills.story import MARKER, adapter_configs, claim, command, run_demo, verdict

ROOT = tiny.REPOSITORY
NEXT = dict(zip("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza", strict=True))


def argument(prompt: str) -> str:
    return prompt.rpartition(": ")[2].strip()


def expected(skill: str, given: str) -> str:
    """Expected answer of every skill, computed independently."""
    if skill == "reverse":
        return "".join(given[i] for i in range(len(given) - 1, -1, -1))
    if skill == "upper-case":
        return "".join(chr(ord(c) - 32) for c in given)
    if skill == "next letters":
        return "".join(NEXT[c] for c in given)
    if skill == "consonants":
        return given.translate({ord(c): None for c in "aeiou"})
    if skill == "spell out":
        return given[0] + "".join(f"-{c}" for c in given[1:])
    if skill == "count on":
        return " ".join(map(str, range(int(given) + 1, int(given) + 4)))
    assert skill == ECHO
    return given


@pytest.fixture(scope="module")
def material():
    return draw_material(0, raw=3000, train=550, held_out=40)


class TestMaterial:
    def test_every_answer_is_right(self, material):
        held_out = [case for cases in material.held_out.values() for case in cases]
        for case in [*material.raw, *material.train, *held_out]:
            assert case.answer == expected(case.skill, argument(case.prompt)), case

    def test_counts_and_mixture(self, material):
        assert list(material.held_out) == [skill.name for skill in SKILLS]
        assert {len(cases) for cases in material.held_out.values()} == {40}
        names = [case.skill for case in material.train]
        assert {name: names.count(name) for name in set(names)} == {s.name: 50 * s.practice for s in SKILLS}
        assert len(set(names[:60])) == len(SKILLS)
        assert 2900 <= len(material.raw) <= 3000

    def test_held_out_arguments_are_seen_nowhere_else(self, material):
        numbers = {argument(case.prompt) for case in material.held_out["count on"]}
        for name, cases in material.held_out.items():
            arguments = {argument(case.prompt) for case in cases}
            assert len(arguments) == 40
            seen = {argument(case.prompt) for case in [*material.raw, *material.train] if case.skill == name}
            assert not arguments & seen
        echoed = {argument(case.prompt) for case in material.raw if case.skill == ECHO}
        assert not numbers & echoed

    def test_no_phrasing_occurs_in_pretraining(self, material):
        tags = {case.prompt.rpartition(": ")[0] for case in material.raw}
        phrasings = {phrasing.rpartition(": ")[0] for skill in SKILLS for phrasing in skill.phrasings}
        assert len(phrasings) == sum(len(skill.phrasings) for skill in SKILLS)
        assert not tags & phrasings

    def test_is_a_function_of_the_seed(self, material):
        assert draw_material(0, raw=3000, train=550, held_out=40) == material
        assert draw_material(1, raw=3000, train=550, held_out=40) != material


class TestOutputDirectory:
    def test_a_foreign_directory_is_refused_unchanged(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match=r"is not an earlier demo; give another directory"):
            run_demo(DemoConfig(output=str(tmp_path)))
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_file_is_refused_unchanged(self, tmp_path):
        (tmp_path / "demo").write_text("mine")
        with pytest.raises(UserError, match="give another directory"):
            claim(tmp_path / "demo")
        assert (tmp_path / "demo").read_text() == "mine"

    def test_an_earlier_demo_and_an_empty_directory_are_taken(self, tmp_path):
        out = tmp_path / "demo"
        out.mkdir()
        claim(out)
        (out / "data").mkdir()
        (out / "data" / "train.jsonl").touch()
        (out / "expert_use.png").touch()
        claim(out)
        assert [p.name for p in out.iterdir()] == [MARKER]

    def test_a_users_file_in_an_earlier_demo_stays(self, tmp_path):
        claim(tmp_path)
        (tmp_path / "data").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="give another directory"):
            claim(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([MARKER, "data", "notes.txt"])

    def test_refusal_is_one_line_and_exit_code_2(self, tmp_path):
        (tmp_path / "mine").touch()
        done = subprocess.run(
            [sys.executable, "-m", "examples.skills", "--output", str(tmp_path)],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: --output {tmp_path}: ")


class TestReport:
    @pytest.fixture
    def answers(self):
        cases = [Case("a", "A: x", "1"), Case("a", "A: y", "2")]
        return {"a": Answers(cases=cases, texts=["1", "wrong\n"], experts=np.array([3, 1, 0]))}

    def test_exact_match_and_shares(self, answers):
        assert answers["a"].exact_match == 0.5
        np.testing.assert_allclose(expert_shares(answers), [[0.75, 0.25, 0]])

    def test_tables(self, answers):
        table = answers_table(answers, answers).splitlines()
        assert table[2].split() == ["a", "A:", "x", "1", "1", "50%", "50%"]
        assert len({len(line) for line in table}) == 1
        row = expert_table(["a"], expert_shares(answers)).splitlines()[1]
        assert row.split() == ["a", "██", "75%", "▓▓", "25%", "0%"]

    @pytest.mark.parametrize(
        ("backbone", "adapted", "code"), [(0.1, 0.9, 0), (0.11, 1.0, 1), (0.0, 0.89, 1), (0.5, 0.5, 1)]
    )
    def test_verdict(self, backbone, adapted, code, capsys):
        assert verdict(backbone, adapted) == code
        assert ("FAILED" in capsys.readouterr().out) == bool(code)


def test_printed_commands_give_the_same_configs():
    train_config, adapter_config = adapter_configs(DemoConfig(output="some where", seed=3))
    words = command("train.py", train_config, adapter_config)
    flags = shlex.split(words)[2:]
    assert parse_flags("", (TrainConfig, AdapterConfig), flags) == [train_config, adapter_config]
    decode_config = DecodeConfig(model="m", adapter="a", prompt="Write backwards: world", stats=True)
    assert parse_flags("", (DecodeConfig,), shlex.split(command("decode.py", decode_config))[2:]) == [decode_config]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of a few steps, run as its user runs it, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    flags = ["--pretrain-steps", "20", "--train-steps", "3", "--train-prompts", "66", "--held-out-prompts", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "examples.skills", *flags],
        capture_output=True, text=True, cwd=folder, env=environment,
    )  # fmt: skip
    return folder, done


@pytest.mark.slow
class TestTinyDemo:
    def test_too_little_training_gives_exit_code_1(self, finished):
        _, done = finished
        assert done.returncode == 1, done.stderr
        assert "FAILED: with adapters" in done.stdout
        assert "Traceback" not in done.stderr

    def test_writes_the_documented_files(self, finished):
        folder, _ = finished
        assert [p.name for p in folder.iterdir()] == ["demo"]
        names = {str(p.relative_to(folder / "demo")) for p in (folder / "demo").rglob("*")}
        promised = {
            "expert_use.png", "data/train.jsonl", "data/held_out.jsonl", "data/pretrain.txt",
            "backbone/model.safetensors", "backbone/tokenizer.json", "run/adapter/adapter_model.safetensors",
            "run/training.png", "run/metrics.jsonl",
        }  # fmt: skip
        assert promised <= names
        assert (folder / "demo/expert_use.png").read_bytes().startswith(b"\x89PNG")

    def test_data_is_read_by_the_package(self, finished):
        folder, _ = finished
        examples = load_examples(DatasetSpec.parse(str(folder / "demo/data/train.jsonl")))
        assert len(examples) == 66
        for example in examples:
            assert isinstance(example, Chat)
            question, answer = (message.content for message in example.messages)
            assert any(
                answer == expected(skill.name, argument(question))
                for skill in SKILLS
                if question.rpartition(": ")[0] in {p.rpartition(": ")[0] for p in skill.phrasings}
            )

    def test_prints_tables_and_a_command_that_works(self, finished):
        folder, done = finished
        for skill in SKILLS:
            assert done.stdout.count(f"\n  {skill.name} ") == 2
        printed = next(line for line in done.stdout.splitlines() if "decode.py" in line)
        answered = subprocess.run(
            [sys.executable, ROOT / "decode.py", *shlex.split(printed)[2:], "--json"],
            capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert answered.returncode == 0, answered.stderr
        assert '"prompt": "Write backwards: world"' in answered.stdout
