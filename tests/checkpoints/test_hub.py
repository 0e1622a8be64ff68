"""Models by their hub id; the hub is a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adafuse_jax import UserError, load_backbone
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, model_directory
from adafuse_jax.export import ExportConfig, export


def hub(directory: Path, monkeypatch) -> list[tuple[str, list[str], str | None]]:
    """List what is asked of a hub whose only model is in `directory`, as it comes."""
    asked = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns, revision))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_a_hub_id_is_loaded_from_its_snapshot(folder, monkeypatch):
    asked = hub(folder / "model", monkeypatch)
    model = load_backbone("some-org/some-model")
    assert model.config == load_backbone(folder / "model").config
    (one, before, any_revision), (other, patterns, revision) = asked
    assert one == other == "some-org/some-model"
    assert before == ["*.json"]
    assert any_revision is None
    assert "model*.safetensors" in patterns
    assert revision == "model"  # that of the config
    assert model_directory("some-org/some-model") == folder / "model"


@pytest.mark.parametrize(
    ("change", "quantize", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, None, "awq"),
        ({"model_type": "mamba"}, None, "mamba"),
        ({}, "int4", "--quantize int4: "),
    ],
)
def test_what_cannot_be_read_is_not_downloaded(folder, tmp_path, monkeypatch, change, quantize, message):
    config = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    asked = hub(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=message):
        HFCheckpoint.open("some-org/some-model", quantize)
    assert [patterns for _, patterns, _ in asked] == [["*.json"]]


def test_an_export_that_is_not_possible_downloads_nothing(folder, tmp_path, monkeypatch):
    asked = hub(folder / "model", monkeypatch)
    with pytest.raises(UserError, match="--quantize int4: "):
        export(ExportConfig(model="some-org/some-model", quantize="int4", output=str(tmp_path / "out")))
    assert [patterns for _, patterns, _ in asked] == [["*.json"]]
