"""Model directories: which files are read, types of weights, values that are not finite, and what an export leaves."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx
from goldens.tiny_models import CASES, weights, write_json, write_model_dir, write_tensors
from safetensors.numpy import load_file, save_file

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone, tensor_shapes
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core.errors import MAX_MESSAGE, UserError
from adafuse_jax.evaluation.__main__ import run as evaluate
from adafuse_jax.evaluation.config import EvaluationConfig
from adafuse_jax.evaluation.loading import load
from adafuse_jax.export import ExportConfig, export
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.session import Session
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.registry import FAMILIES
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.trainer import train

GOLDENS = tiny.GOLDENS
SINGLE, SHARDED = "llama_mha", "llama_mqa_sharded"
INDEX = "model.safetensors.index.json"


def stored(out: Path, kind: Any, named: str | None, base: str = SINGLE, **changes: Any) -> Path:
    """A case with its weights cast to `kind` and config.json naming `named`."""
    tensors = {name: tensor.astype(kind) for name, tensor in weights(CASES[base]).items()}
    config = {key: value for key, value in CASES[base].config.items() if key != "torch_dtype"} | changes
    out.mkdir(exist_ok=True)
    write_json(config | ({"torch_dtype": named} if named else {}), out / "config.json")
    write_tensors(tensors, out)
    return out


def logged(caplog: pytest.LogCaptureFixture, action: Callable[[], Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        action()
    return [record.getMessage() for record in caplog.records]


def refused(directory: Path, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_backbone(directory)
    message = str(caught.value)
    assert all(text in message for text in expected), message
    assert len(message) <= MAX_MESSAGE
    assert "\n" not in message


def edit_map(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    table = json.loads((directory / INDEX).read_text())
    edit(table["weight_map"])
    write_json(table, directory / INDEX)


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    """A safetensors file of any types."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class TestFiles:
    def test_shapes_are_those_of_the_module(self, tmp_path: Path):
        """The list that files are checked with, against the leaves that are filled from them."""
        for name in CASES:
            config = HFCheckpoint.open(write_model_dir(CASES[name], tmp_path / name)).config
            abstract = nnx.to_flat_state(nnx.state(jax.eval_shape(lambda c=config: Backbone(c, rngs=nnx.Rngs(0)))))
            leaves = {}
            for path, leaf in abstract:
                pattern = FAMILIES[config.model_type].tensor_name(path)
                stack = {pattern.format(i): leaf.shape[1:] for i in range(leaf.shape[0])}
                leaves |= stack if "{}" in pattern else {pattern: leaf.shape}
            assert dict(tensor_shapes(config)) == leaves

    @pytest.mark.parametrize("name", ["model.safetensors", INDEX, "model-00002-of-00003.safetensors"])
    def test_a_pipe_is_refused_at_once(self, tmp_path: Path, name: str):
        write_model_dir(CASES[SINGLE if name == "model.safetensors" else SHARDED], tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        refused(tmp_path, name, "is not a regular file")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("/etc/passwd", "outside of the directory"),
            ("../model.safetensors", "outside of the directory"),
            ("a/../../b.safetensors", "outside of the directory"),
            ("", "outside of the directory"),
            ("x" * 300, "too long"),
            ("nul\0.safetensors", "null"),
        ],
        ids=["absolute", "parent", "hidden parent", "empty", "long", "NUL"],
    )
    def test_shards_lie_inside_the_directory(self, tmp_path: Path, name: str, expected: str):
        write_model_dir(CASES[SHARDED], tmp_path)
        edit_map(tmp_path, lambda weight_map: weight_map.update({"lm_head.weight": name}))
        refused(tmp_path, expected)

    def test_one_tensor_in_two_shards(self, tmp_path: Path):
        write_model_dir(CASES[SHARDED], tmp_path)
        second = tmp_path / "model-00002-of-00003.safetensors"
        save_file(load_file(second) | {"model.embed_tokens.weight": np.zeros((96, 64), np.float32)}, second)
        refused(tmp_path, "model.embed_tokens.weight", "another file too")

    def test_no_tensor_at_all(self, tmp_path: Path):
        write_model_dir(CASES[SINGLE], tmp_path)
        save_file({}, tmp_path / "model.safetensors")
        refused(tmp_path, "hold no tensor")

    def test_more_layers_than_the_files_have(self, tmp_path: Path):
        write_model_dir(CASES[SINGLE], tmp_path)
        write_json(CASES[SINGLE].config | {"num_hidden_layers": 9999}, tmp_path / "config.json")
        refused(tmp_path, "model.layers.2.", "missing", "9999 layers in config.json")

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL", "I64"])
    def test_types_that_are_no_weights(self, tmp_path: Path, dtype: str):
        write_model_dir(CASES[SINGLE], tmp_path)
        width = 8 if dtype == "I64" else 1
        header, data = {}, b""
        for name, shape in tensor_shapes(HFCheckpoint.open(tmp_path).config):
            size = int(np.prod(shape)) * width
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
            data += bytes(size)
        write_raw(tmp_path / "model.safetensors", header, data)
        refused(tmp_path, f"model.embed_tokens.weight is of type {dtype}", "F32, BF16, F16, F64")

    @pytest.mark.parametrize(
        "header",
        [
            {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}},
            {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
            {"a": [1]},
            {"a" * 5000: {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        ],
        ids=["overflow", "offsets", "type", "list", "name"],
    )
    def test_broken_headers(self, tmp_path: Path, header: dict[str, Any]):
        write_model_dir(CASES[SINGLE], tmp_path)
        write_raw(tmp_path / "model.safetensors", header, bytes(4))
        refused(tmp_path, "model.safetensors", "restore")

    def test_keys_and_files_that_are_not_read_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        write_model_dir(CASES[SINGLE], tmp_path)
        assert logged(caplog, lambda: HFCheckpoint.open(tmp_path)) == []
        write_json(CASES[SINGLE].config | {"logit_scale": 2.0}, tmp_path / "config.json")
        (tmp_path / INDEX).write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        save_file({"a": np.zeros(1)}, tmp_path / "adapter_model.safetensors")
        unused, line = logged(caplog, lambda: HFCheckpoint.open(tmp_path))
        assert unused == f"{tmp_path}/config.json: keys that are not used: logit_scale"
        assert line == (
            f"{tmp_path}: weights are read from model.safetensors, not from adapter_model.safetensors, {INDEX}, "
            "pytorch_model.bin"
        )

    def test_a_single_file_of_another_name(self, tmp_path: Path):
        write_model_dir(CASES[SINGLE], tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
        refused(tmp_path, "no model.safetensors", "'consolidated.safetensors' has another name")


class TestTypes:
    @pytest.mark.parametrize("named", ["float16", "half", None])
    def test_float16_is_loaded_and_exported_as_such(self, tmp_path: Path, named: str | None):
        source = stored(tmp_path / "in", np.float16, named)
        model = load_backbone(source)
        assert model.dtype == jnp.float16
        export_backbone(model, tmp_path / "out", source=source)
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
            assert tensor.dtype == np.float16
            assert tensor.tobytes() == load_file(source / "model.safetensors")[name].tobytes()
        assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"

    def test_float16_gives_the_tokens_of_transformers(self, stories260k_dir: Path, tmp_path: Path):
        """Tokens are those of real.json: transformers gives them in float16 and in float32, and leaves them after 114
        tokens in bfloat16."""
        shutil.copytree(stories260k_dir, tmp_path / "m")
        tensors = {
            name: tensor.astype(np.float16) for name, tensor in load_file(tmp_path / "m/model.safetensors").items()
        }
        save_file(tensors, tmp_path / "m/model.safetensors")
        table = json.loads((tmp_path / "m/config.json").read_text())
        write_json(table | {"torch_dtype": "float16"}, tmp_path / "m/config.json")
        model = load_backbone(tmp_path / "m")
        assert model.dtype == jnp.float16
        golden = json.loads((GOLDENS / "real.json").read_text())["stories260k"]["tokens"]
        greedy = Sampling.of(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
        steps = Engine(model, eos_ids=()).generate([[1]], max_new_tokens=len(golden), sampling=greedy, seed=0)
        assert [int(step.ids[0]) for step in steps] == golden

    @pytest.mark.parametrize(
        ("dtype", "named", "asked", "loaded", "expected"),
        [
            (np.float32, "float32", None, "float32", None),
            (ml_dtypes.bfloat16, None, None, "bfloat16", None),
            (np.float16, "float16", "float32", "float32", None),
            (
                ml_dtypes.bfloat16,
                "float32",
                None,
                "float32",
                "config.json says float32, the weights are stored as bfloat16",
            ),
            (np.float32, "bfloat16", None, "bfloat16", "weights stored as float32 are rounded to bfloat16"),
            (np.float16, "bfloat16", None, "bfloat16", "weights stored as float16 are rounded to bfloat16"),
            (ml_dtypes.bfloat16, "bfloat16", "float16", "float16", "weights stored as bfloat16 are rounded to float16"),
            (np.float64, "float64", None, "float32", "weights stored as float64 are rounded to float32"),
            (np.float64, None, None, "float32", "weights stored as float64 are rounded to float32"),
        ],
    )
    def test_type_of_config_and_of_tensors(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        dtype: Any,
        named: Any,
        asked: Any,
        loaded: str,
        expected: Any,
    ):
        source, models = stored(tmp_path / "in", dtype, named), []
        lines = logged(caplog, lambda: models.append(load_backbone(source, asked)))
        assert models[0].dtype == jnp.dtype(loaded)
        assert len(lines) == (expected is not None)
        assert expected is None or expected in lines[0]

    def test_the_newer_key_wins(self, tmp_path: Path):
        assert load_backbone(stored(tmp_path, np.float16, "bfloat16", dtype="float16")).dtype == jnp.float16


class TestFinite:
    NAME = "model.layers.1.mlp.up_proj.weight"

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("name", [NAME, "model.norm.weight"])
    def test_a_tensor_that_is_not_finite_is_named(self, tmp_path: Path, name: str, value: float):
        write_model_dir(CASES[SINGLE], tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[name].flat[-1] = value
        save_file(tensors, tmp_path / "model.safetensors")
        refused(tmp_path, str(tmp_path), f"tensor {name} holds NaN or infinite values", "restore")

    def test_values_beyond_the_range_of_the_type(self, tmp_path: Path):
        write_model_dir(CASES[SINGLE], tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[self.NAME].flat[0] = 1e5
        save_file(tensors, tmp_path / "model.safetensors")
        assert load_backbone(tmp_path).dtype == jnp.float32
        with pytest.raises(
            UserError, match=f"{self.NAME} holds values beyond the range of float16; give --dtype float32"
        ):
            load_backbone(tmp_path, "float16")

    def test_an_export_that_is_not_finite_leaves_nothing(self, tmp_path: Path):
        model = load_backbone(stored(tmp_path / "in", np.float16, "float16"))
        model.layers.up_proj.weight[...] = jnp.full_like(model.layers.up_proj.weight[...], jnp.inf)
        with pytest.raises(UserError, match=r"up_proj.weight is not finite in float16"):
            export_backbone(model, tmp_path / "out", source=tmp_path / "in")
        assert os.listdir(tmp_path) == ["in"]


FILES = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{}", "tokenizer.model": "m", "chat_template.json": "{}",
    "chat_template.jinja": "c", "additional_chat_templates/tool_use.jinja": "t", "vocab.json": "{}", "merges.txt": "",
    "special_tokens_map.json": "{}", "added_tokens.json": "{}", "tekken.json": "{}", "qwen.tiktoken": "k",
    "generation_config.json": '{"eos_token_id": 2, "temperature": 0.6, "do_sample": true}',
}  # fmt: skip


class TestExport:
    def test_everything_but_weights_and_code_goes_along(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        """The whole config.json too, unused keys included; its Python code is left out, and a log line names it."""
        extra = {
            "use_cache": False,
            "logit_scale": 2.0,
            "transformers_version": "4.1",
            "auto_map": {"AutoModel": "m.M"},
        }
        source = stored(tmp_path / "in", np.float32, "float32", **extra)
        for name, text in FILES.items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text(text)
        for name in ("tokenizer_code.py", "optimizer.pt", "tokenizer.safetensors"):
            (source / name).write_text("no")
        model = load_backbone(source, "bfloat16")
        lines = logged(caplog, lambda: export_backbone(model, tmp_path / "out", source=source))
        out = tmp_path / "out"
        found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert found == {*FILES, "config.json", "model.safetensors"}
        assert all((out / name).read_text() == text for name, text in FILES.items())
        wanted = json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
        del wanted["auto_map"]
        assert json.loads((out / "config.json").read_text()) == wanted
        assert [line for line in lines if "auto_map" in line] == [
            f"{source}/config.json: auto_map names Python code, which is not exported; left out"
        ]

    def test_both_keys_of_the_type_are_replaced(self, tmp_path: Path):
        source = stored(tmp_path / "in", np.float32, "float32", dtype="float32")
        export_backbone(load_backbone(source, "bfloat16"), tmp_path / "out", source=source)
        table = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (table["dtype"], table["torch_dtype"]) == ("bfloat16", "bfloat16")

    def test_a_changed_model_gets_a_config_of_its_own(self, tmp_path: Path):
        source = stored(tmp_path / "in", np.float32, "float32")
        model = load_backbone(write_model_dir(CASES["llama_bias"], tmp_path / "other"))
        export_backbone(model, tmp_path / "out", source=source)
        assert load_backbone(tmp_path / "out").config == model.config


@pytest.mark.parametrize("entry", ["decode", "evaluation", "lm_eval", "export", "train"])
def test_the_model_is_read_before_its_tokenizer(tmp_path: Path, entry: str):
    """A directory of another kind of model has another tokenizer too; the message names the cause."""
    tmp_path.joinpath("config.json").write_text('{"model_type": "t5"}')
    model, out = str(tmp_path), str(tmp_path / "out")
    actions: dict[str, Callable[[], Any]] = {
        "decode": lambda: Session(DecodeConfig(model=model, prompt="Hi")),
        "evaluation": lambda: evaluate(EvaluationConfig(model=model, dataset=("none.jsonl",))),
        "lm_eval": lambda: load(model),
        "export": lambda: export(ExportConfig(model=model, adapter="none", output=out)),
        "train": lambda: train(TrainConfig(model=model, dataset=("none.jsonl",), output=out), AdapterConfig()),
    }
    with pytest.raises(UserError, match=r"config.json: model_type is 't5'; supported: llama, mistral, qwen2, qwen3"):
        actions[entry]()
    assert os.listdir(tmp_path) == ["config.json"]
