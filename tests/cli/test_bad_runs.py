"""Mistakes in resuming, places and machines that cannot hold a run, and scripts as processes: one line, exit code 2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tiny
from mistakes import (
    ADAPTER,
    ADAPTER_CONFIG,
    WEIGHTS,
    Case,
    check_message,
    check_refused,
    cut_files,
    edit_tensors,
    flags_of,
    other_backbone,
    parametrize,
    remove,
    truncate,
    write,
)

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.training.config import TrainConfig

STEP_2 = "run/checkpoints/2"
RESUME = [
    Case("output in use", ("--output {}/run", "in use", "--resume"), {"resume": None}),
    Case("another method", ("{}/" + STEP_2, "adapter 'adafuse'", "'moral'", "resume with"), {"adapter": "moral"}),
    Case("another beginning", ("{}/" + STEP_2, "initial", "resume with the same"), {"init_lora": "{}/lora"}),
    Case("another rank", ("{}/" + STEP_2, "rank 2", "has 3", "resume with the same"), {"rank": 3}),
    Case("other targets", ("{}/" + STEP_2, "targets", "resume with the same"), {"targets": ["q_proj"]}),
    Case("tied experts", ("{}/" + STEP_2, "tied_share 0.0", "has 0.5", "resume with the same"), {"tied_share": 0.5}),
    Case("another seed", ("{}/" + STEP_2, "seed 0", "resume with the same"), {"seed": 1}),
    Case("another length", ("{}/" + STEP_2, "total_steps 2", "resume with the same"), {"steps": 4}),
    Case("another data set", ("{}/" + STEP_2, "data", "resume with the same"), {"dataset": "{}/beta.jsonl"}),
    Case("another weight", ("{}/" + STEP_2, "data", "resume with the same"), {"dataset": "{}/alpha.jsonl=2"}),
    Case(
        "changed data set",
        ("{}/" + STEP_2, "data", "resume with the same"),
        damage=lambda folder: shutil.copy(folder / "beta.jsonl", folder / "alpha.jsonl"),
    ),
    Case("another backbone", ("{}/" + STEP_2, "backbone", "resume with the same"), damage=other_backbone),
    Case("run lost its config", ("{}/run", "no run to resume"), damage=remove("run/train_config.json")),
    *(
        Case(f"checkpoint without {name}", ("{}/" + STEP_2, "no checkpoint can be used", "restore"), damage=damage)
        for name, damage in (
            ("state", lambda folder: shutil.rmtree(folder / STEP_2 / "state")),
            ("arrays", lambda folder: shutil.rmtree(folder / STEP_2 / "state/d")),
            ("identity", lambda folder: shutil.rmtree(folder / STEP_2 / "identity")),
            ("a whole array", lambda folder: cut_files(folder / STEP_2, "state/**/d/*")),
            ("a whole identity", lambda folder: cut_files(folder / STEP_2, "identity/metadata")),
            ("sense in its identity", write(STEP_2 + "/identity/metadata", "null")),
        )
    ),
]


@parametrize(("train", RESUME))
def test_resume_told_and_nothing_changed(
    script: str,
    case: Case,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    folder = Path(shutil.copytree(finished_run, tmp_path / "work"))
    check_refused(script, replace(case, flags={"resume": True} | case.flags), folder, monkeypatch, capfd)


def test_read_only_output(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("train", Case("read-only", ("--output {}/run", "{} is not a writable directory", "give another")))


def test_full_disk(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(
        "train",
        Case("full disk", ("--output {}/run", "2 checkpoints", "GB are free", "free space"), {"checkpoint_every": 1}),
    )


def test_space_is_asked_for_as_many_checkpoints_as_the_run_writes(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    """--keep-checkpoints 1000000000 means all of them."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    flags = {"keep_checkpoints": 10**9, "steps": 9, "checkpoint_every": 4}
    refused("train", Case("all checkpoints", ("--output {}/run: 3 checkpoints", "GB are free"), flags))


def test_too_little_memory(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    def load(*args: object, **options: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nAnd more.")

    monkeypatch.setattr("adafuse_jax.training.trainer.load_backbone", load)
    refused("train", Case("memory", ("too little memory", "allocating 5 bytes", "lower --batch-size")))


def test_a_run_can_be_repeated_from_its_own_config(finished_run: Path, tmp_path: Path):
    """Every value that train_config.json holds is accepted by --config."""
    again = [f"--config={finished_run}/run/train_config.json", f"--output={tmp_path}/again"]
    configs = parse_flags("", (TrainConfig, AdapterConfig), again)
    first = parse_flags("", (TrainConfig, AdapterConfig), tiny.train_flags(finished_run))
    assert [replace(configs[0], output=first[0].output), configs[1]] == first


PROCESSES = [
    ("train", Case("flag", ("--top-k 5", "--num-experts 4", "choose at most"), {"top_k": 5})),
    ("train", Case("data", ("{}/alpha.jsonl", "line 1", "fix"), damage=write("alpha.jsonl", "{"))),
    ("train", Case("weights", ("{}/" + WEIGHTS, "truncated", "restore"), damage=truncate(WEIGHTS))),
    ("train", Case("hub", ("nobody/nothing", "hub", "check the id"), {"model": "nobody/nothing"})),
    ("train", Case("output", ("--output {}/model", "in use", "give another"), {"output": "{}/model"})),
    ("decode", Case("adapter", ("{}/" + ADAPTER_CONFIG, "restore"), ADAPTER, truncate(ADAPTER_CONFIG))),
    ("decode", Case("prompt", ("the prompt has", "context holds 256", "shorten"), {"prompt": "a" * 300})),
    ("decode", Case("stdin", ("stdin: not UTF-8", "give UTF-8"), {"prompt": None})),
]


@pytest.mark.parametrize(("script", "case"), PROCESSES, ids=[f"{s}-{c.name}" for s, c in PROCESSES])
def test_process(script: str, case: Case, folder: Path):
    case.damage(folder)
    before = tiny.snapshot(folder)
    done = tiny.run_script(script, flags_of(case, script, folder), input=b"caf\xe9\n")
    check_message(done.stderr, case.expected, folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert tiny.snapshot(folder) == before


def test_answers_print_in_any_locale(folder: Path):
    edit_tensors(WEIGHTS, lambda t: t["model.embed_tokens.weight"].__setitem__(slice(0, 140), 0))(folder)
    done = tiny.run_script("decode", tiny.decode_flags(folder), env=tiny.environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout
