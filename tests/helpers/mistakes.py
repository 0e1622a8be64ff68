"""Mistakes of users: functions that damage a folder of good files, the error messages, and the check of both.

A mistake ends in one line with the fault, its place and the remedy; exit code 2; nothing on disk changed.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint

Damage = Callable[[Path], object]
WEIGHTS = "model/model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
LONG_NAME = "x" * 300


def cut_files(folder: Path, pattern: str) -> None:
    """Leave the first half of each file."""
    for path in folder.glob(pattern):
        os.truncate(path, path.stat().st_size // 2)


@dataclass(frozen=True)
class Case:
    """Case of bad input: `flags` change those of a good call, `{}` in a text is the folder, `damage` spoils the folder,
    `expected` are parts of the message."""

    name: str
    expected: tuple[str, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    damage: Damage = lambda folder: None


def edit_json(name: str, **changes: Any) -> Damage:
    """Change keys of a JSON object; None takes a key out."""

    def damage(folder: Path) -> None:
        table = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in table.items() if v is not None}))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def pipe(name: str) -> Damage:
    """A FIFO without a writer, at which a read waits for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def loop(name: str) -> Damage:
    """A symbolic link to itself."""
    return lambda folder: (folder / name).symlink_to(name)


def folder_at(name: str) -> Damage:
    return lambda folder: (folder / name).mkdir()


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def edit_tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def shard(*without: str) -> Damage:
    """The model in two shards and an index; then the files of `without` are removed."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / "model")
        tiny.write_model(folder / "model", num_shards=2)
        for name in without:
            (folder / "model" / name).unlink()

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def drop_model_files(pattern: str) -> Damage:
    return lambda folder: [path.unlink() for path in (folder / "model").glob(pattern)]


def other_backbone(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    tiny.write_model(folder / "model", name="another")


ADAPTER = {"adapter": "{}/adapter"}
PROMPTS = {"prompt": None, "prompts_file": "{}/p.jsonl"}
OTHERS: dict[str, dict[str, Any]] = {
    "lora": {}, "moral": {"num_experts": 4}, "mola": {"experts_per_layer": (2, 3)}, "pesc": {"num_experts": 4},
}  # fmt: skip


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything good in it: model, data, an adapter of AdaFuse in `adapter`, and one of each other method."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("template"))
    checkpoint = HFCheckpoint.open(folder / "model")
    model, identity = checkpoint.config, checkpoint.identity()
    for method, settings in {"adafuse": {"num_experts": 4}, **OTHERS}.items():
        adapter = make_adapter(AdapterConfig(adapter=method, rank=2, **settings), model, rngs=nnx.Rngs(0))
        out = folder / ("adapter" if method == "adafuse" else method)
        save_adapter(adapter, out, backbone_name="tiny", backbone_identity=identity)
    return folder


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_folder, tmp_path / "work", copy_function=shutil.copy2))


@pytest.fixture(scope="session")
def finished_run(good_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of `good_folder` with a run of two steps in `run`."""
    folder = Path(shutil.copytree(good_folder, tmp_path_factory.mktemp("finished") / "work"))
    done = tiny.run_script("train", tiny.train_flags(folder))
    assert done.returncode == 0, done.stderr
    return folder


def run_here(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The script's exit code, run in this process as `python SCRIPT.py FLAGS` would."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tiny.REPOSITORY / f"{script}.py"), run_name="__main__")
    return end.value.code


def flags_of(case: Case, script: str, folder: Path) -> list[str]:
    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(v) for v in value]
        return value.replace("{}", str(folder)) if isinstance(value, str) else value

    build = tiny.train_flags if script == "train" else tiny.decode_flags
    return build(folder, **{name: placed(value) for name, value in case.flags.items()})


def check_message(stderr: str, expected: tuple[str, ...], folder: Path) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    for text in expected:
        assert text.replace("{}", str(folder)) in line, line


def parametrize(*tables: tuple[str, list[Case]]) -> pytest.MarkDecorator:
    cases = [(script, case) for script, table in tables for case in table]
    ids = [f"{script}-{case.name.replace(' ', '_')}" for script, case in cases]
    return pytest.mark.parametrize(("script", "case"), cases, ids=ids)


def check_refused(
    script: str, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run the script: one line with the texts that the case expects, exit code 2, and the folder as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    case.damage(folder)
    before = tiny.snapshot(folder)
    code = run_here(script, flags_of(case, script, folder), monkeypatch)
    out, err = capfd.readouterr()
    check_message(err, case.expected, folder)
    assert (code, out) == (2, "")
    assert tiny.snapshot(folder) == before


@pytest.fixture
def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str, Case], None]:
    return lambda script, case: check_refused(script, case, folder, monkeypatch, capfd)
