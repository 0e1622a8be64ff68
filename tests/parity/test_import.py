"""Import of model directories: mistakes in them, memory and dtype."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from goldens.tiny_models import CASES, read_tensors, tensor_shapes, write_json, write_model_dir, write_tensors

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.errors import UserError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def refuse(directory: Path, *named: str) -> None:
    """Assert that importing raises a `UserError` of one line with each text of `named`."""
    with pytest.raises(UserError) as caught:
        load_backbone(directory, dtype="float32")
    message = str(caught.value)
    assert "\n" not in message
    for name in named:
        assert name in message, f"{name!r} is not in {message!r}"


def model_dir(out: Path, name: str = "llama_mha", **changes: Any) -> Path:
    """The directory of a case with some keys of its `config.json` changed after the weights were written."""
    case = CASES[name]
    write_model_dir(case, out)
    write_json(case.config | changes, out / "config.json")
    return out


class TestMistakes:
    @pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", None])
    def test_unsupported_model_type_names_the_supported(self, tmp_path: Path, model_type: str | None):
        refuse(model_dir(tmp_path, model_type=model_type), "config.json", str(model_type), *SUPPORTED)

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_scaling": {"type": "su", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0}},
        ],
        ids=["su", "proportional"],
    )
    def test_unsupported_rope_type(self, tmp_path: Path, changes: dict, request: pytest.FixtureRequest):
        refuse(model_dir(tmp_path, **changes), "config.json", request.node.callspec.id, "llama3")

    @pytest.mark.parametrize(
        ("case", "changes", "said"),
        [
            ("llama_mha", {"rms_norm_eps": None}, "rms_norm_eps"),
            ("llama_mha", {"rope_theta": None, "rope_parameters": None}, "rope_theta"),
            ("llama_mha", {"rope_parameters": [1]}, "rope parameters"),
            ("llama_mha", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope parameters"),
            ("llama_mha", {"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor"),
            ("llama_mha", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
            ("qwen2_layer_types", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
            ("qwen2_layer_types", {"layer_types": ["full_attention"]}, "layer_types"),
            (
                "qwen2_layer_types",
                {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False},
                "layer_types",
            ),
        ],
    )
    def test_config_value_that_cannot_be_meant(self, tmp_path: Path, case: str, changes: dict, said: str):
        refuse(model_dir(tmp_path, case, **changes), "config.json", said)

    def test_older_rope_spelling_wins(self, tmp_path: Path):
        both = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
        assert load_backbone(model_dir(tmp_path, **both)).config.rope.factor == 2.0

    def test_tied_head_that_differs_from_the_embedding(self, tmp_path: Path):
        tensors = read_tensors(model_dir(tmp_path, tie_word_embeddings=True))
        refuse(tmp_path, "lm_head.weight", "embed")
        write_tensors(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path)
        assert load_backbone(tmp_path).lm_head is None

    def test_unsupported_activation(self, tmp_path: Path):
        refuse(model_dir(tmp_path, hidden_act="mish"), "config.json", "mish", "silu")

    def test_quantised_weights(self, tmp_path: Path):
        refuse(model_dir(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4}), "config.json", "quantised")

    @pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
    def test_config_without_a_size(self, tmp_path: Path, key: str):
        config = CASES["llama_mha"].config
        write_json({k: v for k, v in config.items() if k != key}, model_dir(tmp_path) / "config.json")
        refuse(tmp_path, "config.json", key)

    @pytest.mark.parametrize("text", ["", '{"model_type": "llama"', "[1, 2]"], ids=["empty", "cut", "list"])
    def test_corrupt_config(self, tmp_path: Path, text: str):
        (model_dir(tmp_path) / "config.json").write_text(text)
        refuse(tmp_path, "config.json")

    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_missing_file(self, tmp_path: Path, file: str):
        (model_dir(tmp_path) / file).unlink()
        refuse(tmp_path, file)

    @pytest.mark.parametrize(
        "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    )
    def test_missing_tensor(self, tmp_path: Path, name: str):
        tensors = read_tensors(model_dir(tmp_path))
        del tensors[name]
        write_tensors(tensors, tmp_path)
        refuse(tmp_path, name)

    def test_wrong_shape(self, tmp_path: Path):
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors = read_tensors(model_dir(tmp_path))
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])
        write_tensors(tensors, tmp_path)
        refuse(tmp_path, name, "47", "48")

    def test_tensor_that_the_config_does_not_describe(self, tmp_path: Path):
        """Biases beside `attention_bias: false` would be left out of the mathematics without a word."""
        refuse(model_dir(tmp_path, "llama_bias", attention_bias=False), "_proj.bias")

    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999], ids=str)
    @pytest.mark.parametrize(
        ("name", "file"),
        [("llama_mha", "model.safetensors"), ("llama_mqa_sharded", "model-00002-of-00003.safetensors")],
    )
    def test_truncated_file(self, tmp_path: Path, name: str, file: str, fraction: float):
        path = model_dir(tmp_path, name) / file
        whole = path.read_bytes()
        path.write_bytes(whole[: int(fraction * len(whole))])
        refuse(tmp_path, file)

    def test_missing_shard(self, tmp_path: Path):
        (model_dir(tmp_path, "llama_mqa_sharded") / "model-00003-of-00003.safetensors").unlink()
        refuse(tmp_path, "model-00003-of-00003.safetensors")

    def test_index_without_a_shard_of_its_own(self, tmp_path: Path):
        """An index that leaves out a file that lies there: the tensors in it are missing."""
        path = model_dir(tmp_path, "llama_mqa_sharded") / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        left_out = "model-00002-of-00003.safetensors"
        names = [name for name, file in index["weight_map"].items() if file == left_out]
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != left_out}
        write_json(index, path)
        with pytest.raises(UserError) as caught:
            load_backbone(tmp_path)
        assert any(name in str(caught.value) for name in names)

    @pytest.mark.parametrize("text", ["", "{}", '{"weight_map": []}'], ids=["empty", "no map", "list"])
    def test_corrupt_index(self, tmp_path: Path, text: str):
        path = model_dir(tmp_path, "llama_mqa_sharded") / "model.safetensors.index.json"
        path.write_text(text)
        refuse(tmp_path, path.name)


def anonymous_bytes(pid: int | str) -> int:
    """Resident anonymous memory of a process; pages of mapped files do not count."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # the process has ended and waits to be reaped


IMPORT_ALONE = textwrap.dedent("""
    import sys, jax, jax.numpy as jnp
    from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
    jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
    print("ready", flush=True)
    sys.stdin.readline()
    checkpoint = HFCheckpoint.open(sys.argv[1]).quantised(sys.argv[3] if len(sys.argv) > 3 else None)
    model = load_backbone(checkpoint, dtype=sys.argv[2])
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(model)), flush=True)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "asked", "quantize"),
    [
        ("bfloat16", "float32", ()),
        ("bfloat16", "bfloat16", ("int4",)),
        pytest.param("float32", "float32", (), marks=pytest.mark.slow),
        pytest.param("float32", "bfloat16", (), marks=pytest.mark.slow),
    ],
)
def test_import_streams(tmp_path: Path, stored: str, asked: str, quantize: tuple[str, ...]):
    """Memory never holds two copies of the model: anonymous memory grows by at most 1.35 times its bytes. Quantised, it
    never holds the plain one: it grows by less than that, a few tensors in float32 and compilation included."""
    layers = 6 if asked == "float32" else 12  # about 330 MB in memory, of which no tensor is more than 5 %
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "vocab_size": 4096}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = CASES["llama_mqa_sharded"].config | sizes
    pool = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02
    dtype = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    tensors = {name: np.resize(pool, shape).astype(dtype) for name, shape in tensor_shapes(config).items()}
    write_json(config | {"torch_dtype": stored}, tmp_path / "config.json")
    write_tensors(tensors, tmp_path, num_shards=2)
    del tensors

    with subprocess.Popen(
        [sys.executable, "-c", IMPORT_ALONE, tmp_path, asked, *quantize],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.001)
        assert process.returncode == 0
        model_bytes = int(process.stdout.read())
    grown = (peak - before) / model_bytes
    if quantize:
        assert model_bytes < 110e6
        assert peak - before < 300e6, "beside the plain model it would be 420 MB"
        return
    assert model_bytes > 300e6
    assert 0.9 < grown < 1.35, f"the import took {grown:.2f} times the model's bytes"


def test_dtype_follows_the_stored_one(tmp_path: Path):
    case = CASES["llama_bfloat16"]
    write_model_dir(case, tmp_path)
    assert load_backbone(tmp_path).dtype == jnp.bfloat16
    assert load_backbone(tmp_path, dtype="float32").dtype == jnp.float32
    new_style = {key: value for key, value in case.config.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    write_model_dir(replace(case, config=new_style), tmp_path)
    assert load_backbone(tmp_path).dtype == jnp.bfloat16
