"""Adapters, runs and configs that version 0.1 wrote (`goldens/save_version.py`) are taken as that version took them."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from goldens import save_version
from safetensors.numpy import load_file

import decode
import train

ARCHIVE = Path(save_version.__file__).parent / "version_0_1.tar.xz"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which that version ran, as it left it."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("version"))
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("method", save_version.METHODS)
def test_its_adapters_give_its_tokens(
    method: str, written: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(written)
    expected = json.loads((written / "answers.json").read_text())[method]
    for prompt, tokens in zip(save_version.PROMPTS, expected, strict=True):
        decode.main(save_version.decode_flags(method, prompt))
        assert json.loads(capfd.readouterr().out)["token_ids"] == tokens


@pytest.mark.usefixtures("optimised")
@pytest.mark.slow
def test_its_run_is_resumed_to_the_same_end(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("adafuse/adapter")
    train.main(save_version.train_flags("adafuse", resume=True))
    name = "adafuse/adapter/adapter_model.safetensors"
    before, after = load_file(written / name), load_file(tmp_path / name)
    assert before.keys() == after.keys()
    for leaf, expected in before.items():
        np.testing.assert_allclose(after[leaf], expected, rtol=2e-4, atol=2e-5, err_msg=leaf)
    lines = [json.loads(line) for line in Path("adafuse/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_its_config_is_a_config_file(written: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.chdir(written)
    config = written / "adafuse" / "train_config.json"
    train.main(["--config", str(config), "--output", "again"])
    again = json.loads(Path("again/train_config.json").read_text())
    before = json.loads(config.read_text())
    assert before["remat"] is True
    assert {name: again[name] for name in before} == before | {"output": "again", "remat": "full"}
    assert "--remat true of earlier versions is full now" in caplog.text
