"""No writer touches a file or folder of the user's beside what it writes, whatever its name."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.checkpoints.hf_config import parse_hf_config
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.checkpoints.peft import save_peft_lora
from adafuse_jax.core.errors import UserError
from adafuse_jax.evaluation.__main__ import write
from adafuse_jax.training.metrics import Report, read_metrics

SUFFIXES = (".old", ".partial", ".new", ".tmp", ".bak")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "model")


def write_export(out: Path, model_dir: Path, *, replace: bool) -> None:
    export_backbone(load_backbone(model_dir), out, source=model_dir, replace=replace)


def write_adapter(out: Path, model_dir: Path, *, replace: bool) -> None:
    config = AdapterConfig(adapter="adafuse", rank=2, num_experts=4)
    adapter = make_adapter(config, parse_hf_config(model_dir).model, rngs=nnx.Rngs(0))
    save_adapter(adapter, out, backbone_name="tiny", backbone_identity="id", replace=replace)


def write_peft(out: Path, model_dir: Path, *, replace: bool) -> None:
    model = parse_hf_config(model_dir).model
    lora = make_adapter(AdapterConfig(adapter="lora", rank=2), model, rngs=nnx.Rngs(0))
    save_peft_lora(lora, out, model, backbone_name="tiny")


@pytest.fixture
def neighbours(tmp_path: Path) -> dict[str, tuple]:
    """Folders and files named after `out` and `model`, with or without a dot: they are returned as they must stay."""
    for name in ("out", "model", ".out", "metrics", "metrics.jsonl", "results.json"):
        for suffix in SUFFIXES:
            path = tmp_path / (name + suffix)
            if "." in name.strip("."):
                path.write_text("precious")
            else:
                path.mkdir()
                (path / "precious").write_text("mine")
    return tiny.snapshot(tmp_path)


def check(folder: Path, before: dict[str, tuple], *written: str) -> None:
    """`folder` holds what it held, and `written`."""
    after = {name: facts for name, facts in tiny.snapshot(folder).items() if Path(name).parts[0] not in written}
    assert after == before


@pytest.mark.parametrize("writer", [write_export, write_adapter, write_peft])
def test_directories(writer, tmp_path: Path, model_dir: Path, neighbours: dict[str, tuple]):
    writer(tmp_path / "out", model_dir, replace=False)
    check(tmp_path, neighbours, "out")
    content = tiny.snapshot(tmp_path / "out")
    with pytest.raises(UserError, match="not an empty directory"):
        writer(tmp_path / "out", model_dir, replace=False)
    assert tiny.snapshot(tmp_path / "out") == content


@pytest.mark.parametrize("writer", [write_export, write_adapter])
def test_replacement(writer, tmp_path: Path, model_dir: Path, neighbours: dict[str, tuple]):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of the user")
    (tmp_path / "out" / "config.json").write_text("earlier")
    writer(tmp_path / "out", model_dir, replace=True)
    check(tmp_path, neighbours, "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "of the user"
    if writer is write_export:
        assert load_backbone(tmp_path / "out").dtype == jnp.float32  # config.json is the new one


def test_files(tmp_path: Path, neighbours: dict[str, tuple]):
    write({"mean": 1}, tmp_path / "results.json")
    for start in (0, 1):  # a new run, and one resumed at step 1
        report = Report(tmp_path / "metrics.jsonl", start=start, steps=2, log_every=1)
        report.open()
        report.evaluation(start, {"eval_loss": 1.0})
        report.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == [0, 1]
    check(tmp_path, neighbours, "results.json", "metrics.jsonl")
