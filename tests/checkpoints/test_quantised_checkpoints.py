"""Quantised weights: made while loading, written and read as compressed-tensors, imported from GPTQ; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from goldens import family_models
from goldens.tiny_models import CASES, Case, write_model_dir
from safetensors.numpy import load_file, save_file

from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.quantised import LAYOUTS, Quantize, quantisation_of, quantised
from pallas_kernels.quantised import QuantArray, QuantLayout
from pallas_kernels.quantised.reference import dequantise_np

WIDE = replace(
    CASES["llama_mqa_sharded"], name="wide", num_shards=1,
    config=CASES["llama_mqa_sharded"].config | {"hidden_size": 128, "intermediate_size": 256},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(WIDE, tmp_path_factory.mktemp("model") / "model")


def weights(model: Any) -> dict[str, QuantArray]:
    return {name: getattr(model.layers, name).weight[...] for name in LINEARS}


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loading_equals_quantising_the_loaded(folder: Path, name: Quantize):
    found = load_backbone(HFCheckpoint.open(folder).quantised(name), "bfloat16")
    assert quantisation_of(found) == LAYOUTS[name]
    wanted = quantised(load_backbone(folder, "float32"), LAYOUTS[name], jnp.bfloat16)  # the file's values, not rounded
    for linear, weight in weights(found).items():
        assert_same(weight, weights(wanted)[linear])
    for leaf in (found.embed_tokens[...], found.norm.weight[...], found.layers.input_layernorm.weight[...]):
        assert leaf.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_export_and_import(folder: Path, tmp_path: Path, name: Quantize):
    """The same codes and scales; the words of the file, read by their documented layout, are the same weights."""
    model = load_backbone(HFCheckpoint.open(folder).quantised(name), "bfloat16")
    export_backbone(model, tmp_path / "out", source=folder)
    assert_same(load_backbone(tmp_path / "out"), model)
    assert_same(load_backbone(HFCheckpoint.open(tmp_path / "out").quantised(name)), model)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    bits = LAYOUTS[name].bits
    prefix = "model.layers.1.mlp.down_proj."
    words, scales = tensors[f"{prefix}weight_packed"].view(np.uint32), tensors[f"{prefix}weight_scale"]
    integers = np.stack([words >> at & (2**bits - 1) for at in range(0, 32, bits)], axis=-1).reshape(128, 256)
    exact = (integers.astype(int) - 2 ** (bits - 1)) * np.repeat(
        scales.astype(np.float64), 256 // scales.shape[1], axis=1
    )
    assert tensors[f"{prefix}weight_shape"].tolist() == [128, 256]
    assert tensors[f"{prefix}weight_shape"].dtype == np.int64
    weight = weights(model)["down_proj"][1]
    np.testing.assert_array_equal(
        exact, dequantise_np(np.asarray(weight.codes), np.asarray(weight.scales), weight.layout)
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == bits


def test_tensors_of_several_linears(tmp_path: Path):
    """q, k and v in one tensor, gate and up in another: rows of codes and scales, read and written."""
    directory = family_models.write_model_dir(family_models.CASES["phi3_1"], tmp_path / "model")
    model = load_backbone(HFCheckpoint.open(directory).quantised("int8"), "float32")
    wanted = quantised(load_backbone(directory, "float32"), LAYOUTS["int8"])
    assert_same(model, wanted)
    export_backbone(model, tmp_path / "out", source=directory)
    assert_same(load_backbone(tmp_path / "out", "float32"), model)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0.self_attn.qkv_proj."
    rows = sum(getattr(model.layers, f"{linear}_proj").weight.shape[1] for linear in "qkv")
    assert tensors[f"{prefix}weight_shape"].tolist() == [rows, model.config.embed_dim]
    assert len(tensors[f"{prefix}weight_packed"]) == len(tensors[f"{prefix}weight_scale"]) == rows


def write_gptq(source: Path, out: Path, *, zero: int = 7, spread: bool = False, **config: Any) -> Path:
    """A checkpoint of GPTQ with random codes, made of the unquantised one. `spread`: columns are in groups by importance."""
    rng, tensors = np.random.default_rng(0), {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor.astype(np.float16)
            continue
        (rows, columns), prefix = tensor.shape, name.removesuffix("weight")
        codes = rng.integers(0, 16, (columns, rows)).astype(np.uint32)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        tensors[f"{prefix}qweight"] = (codes.reshape(-1, 8, rows) << shifts).sum(axis=1, dtype=np.uint32).view(np.int32)
        tensors[f"{prefix}scales"] = rng.uniform(0.01, 0.02, (columns // 64, rows)).astype(np.float16)
        word = np.uint32(int(f"{zero:x}" * 8, 16))
        tensors[f"{prefix}qzeros"] = np.full((columns // 64, rows // 8), word).view(np.int32)
        groups = np.arange(columns, dtype=np.int32) // 64
        tensors[f"{prefix}bias"] = np.zeros(rows, np.float16)
        tensors[f"{prefix}g_idx"] = rng.permutation(groups) if spread else groups
        tensors[f"codes {prefix}"] = codes
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True} | config
    out.mkdir()
    table = json.loads((source / "config.json").read_text()) | {
        "quantization_config": settings,
        "torch_dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(table))
    save_file({n: t for n, t in tensors.items() if not n.startswith("codes")}, out / "model.safetensors")
    np.savez(out / "codes.npz", **{n.removeprefix("codes "): t for n, t in tensors.items() if n.startswith("codes")})
    return out


@pytest.mark.parametrize(("zero", "version"), [(7, {}), (8, {"checkpoint_format": "gptq_v2"})])
def test_gptq(folder: Path, tmp_path: Path, caplog, zero: int, version: dict[str, str]):
    directory = write_gptq(folder, tmp_path / "gptq", zero=zero, **version)
    caplog.set_level("INFO")
    model, tensors = load_backbone(directory, "bfloat16"), load_file(directory / "model.safetensors")
    assert "down_proj.bias is a bias of 0, and not used (21 such)" in caplog.text
    codes = np.load(directory / "codes.npz")
    assert quantisation_of(model) == QuantLayout(4, 64)
    for linear, block in (("k_proj", "self_attn"), ("down_proj", "mlp")):
        weight, prefix = weights(model)[linear][1], f"model.layers.1.{block}.{linear}."
        assert weight.scales.dtype == jnp.float16
        np.testing.assert_array_equal(weight.scales, tensors[f"{prefix}scales"].T)
        np.testing.assert_array_equal(weight.layout.unpack(weight.codes), codes[prefix].T)


def test_scales_of_several_types(exported: Path, tmp_path: Path):
    """One linear's are in another type: all are kept exactly. An order in which columns were rounded changes nothing."""
    tensors, up = load_file(exported / "model.safetensors"), "model.layers.1.mlp.up_proj.weight_scale"
    tensors[up] = tensors[up].astype(np.float32) * np.float32(1 + 2**-20)
    table = json.loads((exported / "config.json").read_text())
    table["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "static"
    (tmp_path / "config.json").write_text(json.dumps(table))
    save_file(tensors, tmp_path / "model.safetensors")
    found, before = weights(load_backbone(tmp_path)), weights(load_backbone(exported))
    np.testing.assert_array_equal(found["up_proj"][1].scales, tensors[up])
    for linear, weight in found.items():
        assert weight.scales.dtype == np.float32
        np.testing.assert_array_equal(weight[0].scales, before[linear][0].scales.astype(np.float32))


def test_a_bias_that_is_not_zero(folder: Path, tmp_path: Path):
    directory = write_gptq(folder, tmp_path / "gptq")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj.bias is no part of the llama model"):
        load_backbone(directory)


def refusal(change: Callable[[Path], Any], folder: Path, tmp_path: Path) -> str:
    directory = change(tmp_path) or tmp_path
    with pytest.raises(UserError) as refused:
        load_backbone(directory)
    assert len(str(refused.value)) <= 400
    return str(refused.value)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_backbone(load_backbone(HFCheckpoint.open(folder).quantised("int4"), "bfloat16"), out, source=folder)
    return out


class TestRefusals:
    @pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fp8", "hqq", "torchao", "mxfp4"])
    def test_methods(self, folder: Path, tmp_path: Path, method: str):
        def change(out: Path) -> None:
            table = WIDE.config | {"quantization_config": {"quant_method": method, "bits": 4}}
            write_model_dir(replace(WIDE, config=table), out)

        text = refusal(change, folder, tmp_path)
        assert f"quant_method is '{method}'; supported: compressed-tensors" in text

    def test_act_order(self, folder: Path, tmp_path: Path):
        text = refusal(lambda out: write_gptq(folder, out / "gptq", desc_act=True), folder, tmp_path)
        assert "act-order: the columns of a group are spread over the row" in text
        text = refusal(lambda out: write_gptq(folder, out / "spread", spread=True), folder, tmp_path)
        assert "g_idx: act-order" in text

    @pytest.mark.parametrize(
        ("config", "fault"),
        [({"sym": False}, "zero points"), ({"bits": 3}, "3 bits in groups of 64 is not supported"),
         ({"group_size": 16}, "4 bits in groups of 16 is not supported"), ({"lm_head": True}, "the head is quantised")],
    )  # fmt: skip
    def test_settings_of_gptq(self, folder: Path, tmp_path: Path, config: dict[str, Any], fault: str):
        assert fault in refusal(lambda out: write_gptq(folder, out / "gptq", **config), folder, tmp_path)

    def test_zero_points_in_the_tensors(self, folder: Path, tmp_path: Path):
        text = refusal(lambda out: write_gptq(folder, out / "gptq", zero=5), folder, tmp_path)
        assert "qzeros: zero points: give a symmetric checkpoint" in text

    @pytest.mark.parametrize(
        ("path", "value", "fault"),
        [
            (("format",), "float-quantized", "format is 'float-quantized'; supported: pack-quantized"),
            (("config_groups", "group_0", "weights", "symmetric"), False, "zero points"),
            (("config_groups", "group_0", "weights", "actorder"), "group", "act-order"),
            (("config_groups", "group_0", "weights", "actorder"), "dynamic", "act-order"),
            (("config_groups", "group_0", "weights", "actorder"), "random", "actorder is 'random'; supported: weight"),
            (("config_groups", "group_0", "format"), "nvfp4-pack-quantized", "format is 'nvfp4-pack-quantized'"),
            (("config_groups", "group_0", "weights", "group_size"), 100, "4 bits in groups of 100"),
            (("config_groups", "group_0", "weights", "type"), "float", "type is 'float'; supported: int"),
            (("config_groups", "group_0", "targets"), ["re:.*mlp.*"], "targets is"),
            (("config_groups", "group_0", "input_activations"), {"num_bits": 8}, "input_activations is quantised"),
            (("config_groups",), {}, "config_groups is"),
            (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme is quantised"),
            (("sparsity_config",), {"format": "sparse-24-bitmask"}, "it is not supported"),
            (("sparsity_config",), "dense", "it must be an object"),
            (("transform_config",), {"config_groups": {"u": {}}}, "it is not supported"),
            (("ignore",), [], "the head is int4; supported: all linears, the head plain or int8"),
            (("ignore",), ["lm_head", "model.layers.0.mlp.up_proj"], "'model.layers.0.mlp.up_proj' is not quantised"),
            (("config_groups", "group_0", "weights", "group_size"), 32, "has shape"),
        ],
    )
    def test_settings_of_compressed_tensors(self, exported: Path, tmp_path: Path, path: tuple, value: Any, fault: str):
        def change(out: Path) -> None:
            (out / "model.safetensors").symlink_to(exported / "model.safetensors")
            table = json.loads((exported / "config.json").read_text())
            inner = table["quantization_config"]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (out / "config.json").write_text(json.dumps(table))

        assert fault in refusal(change, exported, tmp_path)

    def test_tensors(self, exported: Path, tmp_path: Path):
        """One that is missing, or of another type; scales that are not finite."""

        def write(**changes: np.ndarray | None) -> Callable[[Path], None]:
            def change(out: Path) -> None:
                tensors = load_file(exported / "model.safetensors")
                tensors |= {f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in changes.items()}
                (out / "config.json").write_bytes((exported / "config.json").read_bytes())
                save_file({n: t for n, t in tensors.items() if t is not None}, out / "model.safetensors")

            return change

        scales = np.full((256, 1), np.inf, ml_dtypes.bfloat16)
        assert "weight_packed is missing" in refusal(write(weight_packed=None), exported, tmp_path)
        text = refusal(write(weight_packed=np.zeros((256, 16), np.int64)), exported, tmp_path)
        assert "is of type I64, config.json says I32" in text
        text = refusal(write(weight_scale=scales), exported, tmp_path)
        assert "model.layers.0.mlp.up_proj.weight_scale holds NaN or infinite values" in text
        text = refusal(write(weight_g_idx=np.zeros(128, np.int32)), exported, tmp_path)
        assert "weight_g_idx: act-order" in text
        text = refusal(write(weight_shape=np.array([256, 64])), exported, tmp_path)
        assert "up_proj.weight_shape is [256, 64], config.json says [256, 128]; one of them is wrong" in text

    def test_beyond_the_range_of_float16(self, folder: Path, tmp_path: Path):
        """Weights, and scales of a file, that would be infinite in the model's type."""
        model = load_backbone(folder, "float32")
        model.layers.up_proj.weight = nnx.Param(model.layers.up_proj.weight[...].at[1, 3, 4].set(1e5))
        export_backbone(model, tmp_path / "large", source=folder)
        fault = "model.layers.1.mlp.up_proj.weight holds values beyond the range of float16; give --dtype float32"
        for quantize in (None, "int8", "int4"):
            with pytest.raises(UserError, match=fault):
                load_backbone(HFCheckpoint.open(tmp_path / "large").quantised(quantize), "float16")
        export_backbone(
            load_backbone(HFCheckpoint.open(tmp_path / "large").quantised("int4")), tmp_path / "int4", source=folder
        )
        with pytest.raises(UserError, match=r"up_proj\.weight_scale holds values beyond the range of float16"):
            load_backbone(tmp_path / "int4", "float16")

    def test_without_its_description(self, exported: Path, tmp_path: Path):
        def change(out: Path) -> None:
            (out / "model.safetensors").symlink_to(exported / "model.safetensors")
            table = json.loads((exported / "config.json").read_text())
            (out / "config.json").write_text(json.dumps(table | {"quantization_config": None}))

        text = refusal(change, exported, tmp_path)
        assert "weight_packed is quantised, and config.json has no quantization_config" in text

    def test_rows_that_are_no_words(self, tmp_path: Path):
        narrow = replace(WIDE, config=WIDE.config | {"hidden_size": 66, "head_dim": 32})
        model = load_backbone(HFCheckpoint.open(write_model_dir(narrow, tmp_path / "model")).quantised("int8"))
        with pytest.raises(UserError, match="q_proj has 66 inputs of int8, no whole words of 32 bits"):
            export_backbone(model, tmp_path / "out", source=tmp_path / "model")
        assert not (tmp_path / "out").exists()

    def test_another_quantisation(self, exported: Path, tmp_path: Path):
        with pytest.raises(UserError, match=r"--quantize int8: the weights in .* are int4 already"):
            load_backbone(HFCheckpoint.open(exported).quantised("int8"))
        narrow: Case = CASES["llama_mqa_sharded"]
        with pytest.raises(UserError, match="has 64 inputs, no multiple of 128; give --quantize int8"):
            load_backbone(HFCheckpoint.open(write_model_dir(narrow, tmp_path)).quantised("int4"))

    def test_weights_that_are_not_finite(self, folder: Path, tmp_path: Path):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.self_attn.o_proj.weight"][3, -1] = np.nan
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"layers.1.self_attn.o_proj.weight holds NaN or infinite values"):
            load_backbone(HFCheckpoint.open(tmp_path).quantised("int8"))
