"""adapter_config.json and adapter_model.safetensors: refusals in one line; keys of PEFT that are ignored are named."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from goldens.tiny_models import CASES, write_model_dir
from safetensors.numpy import load_file, save_file

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints.adapter_directory import load_adapter, save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.checkpoints.hf_config import parse_hf_config
from adafuse_jax.checkpoints.peft import save_peft_lora
from adafuse_jax.checkpoints.peft_files import INERT
from adafuse_jax.core.errors import MAX_MESSAGE, UserError
from adafuse_jax.export import ExportConfig, export
from adafuse_jax.models.config import LINEARS, ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT = tiny.GOLDENS / "peft" / "all_linears"
OURS: dict[str, dict[str, Any]] = {
    "adafuse": {"num_experts": 3}, "mola": {"experts_per_layer": (2, 3)}, "lora": {}, "pesc": {"num_experts": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return parse_hf_config(write_model_dir(CASES["llama_gqa_tied"], tmp_path_factory.mktemp("model"))).model


@pytest.fixture(params=[*OURS, "peft"])
def directory(request: pytest.FixtureRequest, model: ModelConfig, tmp_path: Path) -> Path:
    """An adapter of each kind, and a LoRA of PEFT."""
    out = tmp_path / "adapter"
    if request.param == "peft":
        return Path(shutil.copytree(PEFT, out))
    adapter = make_adapter(AdapterConfig(adapter=request.param, rank=2, **OURS[request.param]), model, rngs=nnx.Rngs(0))
    save_adapter(adapter, out, backbone_name="m", backbone_identity="id")
    return out


def load(directory: Path, model: ModelConfig) -> Any:
    return load_adapter(directory, model, backbone_identity="id", dtype=jnp.float32)


def refused(directory: Path, model: ModelConfig, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load(directory, model)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert all(text in message for text in expected), message
    assert len(message) <= MAX_MESSAGE
    assert "\n" not in message


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


WRONG = (
    None,
    True,
    "2",
    2.5,
    -1,
    0,
    10**12,
    10**400,
    float("nan"),
    float("inf"),
    [],
    [[1]],
    {},
    {"a": [{}]},
    "x" * 5000,
)


def test_wrong_values_never_end_in_a_traceback(directory: Path, model: ModelConfig):
    """Every key that is read with every wrong value: refused in one line, or of no consequence."""
    table = json.loads((directory / CONFIG).read_text())
    load(directory, model)
    messages = []
    for key in table.keys() - INERT:
        for value in WRONG:
            (directory / CONFIG).write_text(json.dumps(table | {key: value}))
            try:
                load(directory, model)
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > len(WRONG)
    assert [m for m in messages if str(directory) not in m or len(m) > MAX_MESSAGE or "\n" in m] == []


def test_files_have_the_permissions_of_any_new_file(directory: Path, model: ModelConfig, tmp_path: Path):
    """safetensors writes files that only their owner reads."""
    (tmp_path / "new").touch()
    save_adapter(load(directory, model), tmp_path / "out", backbone_name="m", backbone_identity="id")
    modes = {path.name: path.stat().st_mode for path in (*(tmp_path / "out").iterdir(), tmp_path / "new")}
    assert set(modes) == {CONFIG, WEIGHTS, "new"}
    assert len(set(modes.values())) == 1, modes


LEFT_OUT = (
    {"target_modules": ["q_proj"]}, {"target_modules": []}, {"target_modules": ["proj"]}, {"layers_to_transform": [0]},
    {"layers_to_transform": 1}, {"exclude_modules": ["up_proj"]},
)  # fmt: skip
SELECTED: tuple[dict[str, Any], ...] = (
    {"target_modules": "all-linear"}, {"target_modules": None}, {"layers_to_transform": [0, 1, 2, 3]},
    {"exclude_modules": ["lm_head"]},
    {"target_modules": [f"{block}.{linear}" for linear in LINEARS for block in ("self_attn", "mlp")]},
)  # fmt: skip


def test_tensors_that_peft_would_leave_out_are_refused(model: ModelConfig, tmp_path: Path):
    """A config that selects fewer modules than there are tensors: PEFT drops those, and the function is another one."""
    directory = Path(shutil.copytree(PEFT, tmp_path / "adapter"))
    table = json.loads((directory / CONFIG).read_text())
    for change in LEFT_OUT:
        (directory / CONFIG).write_text(json.dumps(table | change))
        refused(directory, model, WEIGHTS, "leaves out", next(iter(change)))
    for change in SELECTED:
        (directory / CONFIG).write_text(json.dumps(table | change))
        load(directory, model)


def test_tensors_that_are_not_finite_are_named(directory: Path, model: ModelConfig):
    name = sorted(load_file(directory / WEIGHTS))[0]
    for value in (np.nan, np.inf):
        edit(directory, lambda tensors, value=value: tensors[name].fill(value))
        refused(directory, model, f"{WEIGHTS}: tensor {name} holds NaN or infinite values", "restore")


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.uint16, np.int64])
def test_tensors_that_are_no_weights(directory: Path, model: ModelConfig, dtype: Any):
    name = sorted(load_file(directory / WEIGHTS))[0]
    edit(directory, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    refused(directory, model, f"tensor {name} is of type", "F32, BF16, F16, F64")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"{}", b"\x02\0\0\0\0\0\0\0{}"])
def test_broken_weights(directory: Path, model: ModelConfig, content: bytes):
    (directory / WEIGHTS).write_bytes(content)
    refused(directory, model, WEIGHTS)


def test_pipes_are_refused_at_once(directory: Path, model: ModelConfig):
    for name in (WEIGHTS, CONFIG):
        (directory / name).unlink()
        os.mkfifo(directory / name)
        refused(directory, model, name, "is not a regular file")


def test_sizes_that_no_tensor_has(model: ModelConfig, tmp_path: Path):
    """A rank of 60,000 is refused before arrays of that size are described or made."""
    for method, settings in OURS.items():
        adapter = make_adapter(AdapterConfig(adapter=method, rank=2, **settings), model, rngs=nnx.Rngs(0))
        save_adapter(adapter, tmp_path / method, backbone_name="m", backbone_identity="id")
        table = json.loads((tmp_path / method / CONFIG).read_text())
        (tmp_path / method / CONFIG).write_text(json.dumps(table | {"rank": 60_000}))
        refused(tmp_path / method, model, "no tensor has a shape with the rank 60000", CONFIG)
    shutil.copytree(PEFT, tmp_path / "peft")
    table = json.loads((PEFT / CONFIG).read_text())
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(table | {"r": 60_000}))
    refused(tmp_path / "peft", model, "has shape", CONFIG)


def test_keys_of_peft_that_are_not_known_are_named(
    model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    directory = Path(shutil.copytree(PEFT, tmp_path / "lora"))
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        load(directory, model)
        assert not caplog.records
        table = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(table | {"use_new_mathematics": True, "peft_version": "9"}))
        load(directory, model)
    (record,) = caplog.records
    assert record.getMessage() == f"{directory / CONFIG}: keys that are not used: use_new_mathematics"


class TestExportOfTokenizers:
    """An adapter's own tokenizer and chat template go with the model that it is merged into."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tiny.write_folder(tmp_path)
        checkpoint = HFCheckpoint.open(folder / "model")
        lora = make_adapter(AdapterConfig(adapter="lora", rank=2), checkpoint.config, rngs=nnx.Rngs(0))
        save_peft_lora(lora, folder / "lora", checkpoint.config, backbone_name="tiny")
        return folder

    def exported(self, folder: Path) -> Path:
        export(ExportConfig(model=str(folder / "model"), adapter=str(folder / "lora"), output=str(folder / "out")))
        return folder / "out"

    def test_a_template_alone(self, folder: Path):
        (folder / "lora" / "chat_template.jinja").write_text("of the adapter")
        out = self.exported(folder)
        assert (out / "chat_template.jinja").read_text() == "of the adapter"
        assert (out / "tokenizer.json").read_bytes() == (folder / "model" / "tokenizer.json").read_bytes()

    def test_a_template_in_its_tokenizer_config(self, folder: Path):
        (folder / "lora" / "tokenizer_config.json").write_text('{"chat_template": "of the adapter"}')
        assert (self.exported(folder) / "chat_template.jinja").read_text() == "of the adapter"

    def test_a_whole_tokenizer(self, folder: Path):
        """None of the model's files stays beside it: a template there would win over the adapter's."""
        (folder / "model" / "chat_template.jinja").write_text("of the model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            table = json.loads((folder / "model" / name).read_text())
            (folder / "lora" / name).write_text(json.dumps(table, indent=7))
        out = self.exported(folder)
        assert not (out / "chat_template.jinja").exists()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (folder / "lora" / name).read_bytes()

    def test_none(self, folder: Path):
        out = self.exported(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (folder / "model" / name).read_bytes()
