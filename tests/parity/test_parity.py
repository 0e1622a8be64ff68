"""The backbone against transformers: logits, greedy tokens, and weights that go in and out unchanged.

The references are `goldens/` (made by goldens/make_goldens.py with transformers + torch in float32); the tiny models
they belong to are made here again from `goldens/tiny_models.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx
from goldens.tiny_models import CASES, Case, tensor_shapes, write_json, write_model_dir, write_tensors
from safetensors import safe_open
from transformers import AutoConfig

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core.errors import UserError

GOLDENS = tiny.GOLDENS / "tiny"
TOLERANCE = 1e-4  # largest logit difference over the standard deviation of the logits, float32
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


class Loaded(NamedTuple):
    """A tiny model with its reference outputs; `forward(tokens, positions, segment_ids)` gives logits as NumPy."""

    case: Case
    directory: Path
    forward: Callable[..., np.ndarray]
    golden: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    case = request.param
    directory = write_model_dir(case, tmp_path_factory.mktemp(case.name))
    model = load_backbone(directory, dtype="float32")

    @nnx.jit
    def forward(model, tokens, positions=None, segment_ids=None):
        return model(tokens, positions=positions, segment_ids=segment_ids).logits

    def logits(*inputs: np.ndarray) -> np.ndarray:
        out = forward(model, *(jnp.asarray(x, jnp.int32) for x in inputs))
        assert out.dtype == jnp.float32
        return np.asarray(out)

    with np.load(GOLDENS / f"{case.name}.npz") as golden:
        return Loaded(case, directory, logits, dict(golden))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / expected.std()
    assert error <= TOLERANCE, f"logits differ by {error:.1e} of their standard deviation"


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a model directory, from however many files."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name


class TestLogits:
    def test_every_case_has_a_golden(self):
        assert {path.stem for path in GOLDENS.glob("*.npz")} == CASES.keys()

    def test_plain(self, loaded: Loaded):
        assert_close(loaded.forward(loaded.golden["tokens"]), loaded.golden["logits"])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded(self, loaded: Loaded, side: str):
        mask = loaded.golden[f"{side}_mask"]
        positions = (mask.cumsum(-1) - 1).clip(0)
        logits = loaded.forward(loaded.golden["tokens"], positions, mask)
        assert np.isfinite(logits).all()
        assert_close(logits[mask == 1], loaded.golden[f"{side}_logits"][mask == 1])

    def test_packed_segments_equal_each_alone(self, loaded: Loaded):
        """Two segments in a row, in both orders, then padding: [[A B 0], [B A 0]]."""
        golden = loaded.golden
        alone = golden["segment_0"], golden["segment_1"]
        sizes = [len(part) for part in alone]
        parts = np.split(golden["segments"], sizes[:1])
        rows = [[0, 1], [1, 0]]
        tail = np.zeros(golden["tokens"].shape[1] - sum(sizes), np.int32)

        def row(order: list[int], values: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([*(values[i] for i in order), tail])

        tokens = np.stack([row(order, parts) for order in rows])
        positions = np.stack([row(order, [np.arange(n) for n in sizes]) for order in rows])
        ids = np.repeat([1, 2], [sizes[0], sizes[1]]), np.repeat([1, 2], [sizes[1], sizes[0]])
        segment_ids = np.stack([np.concatenate([i, tail]) for i in ids])
        logits = loaded.forward(tokens, positions, segment_ids)
        for out, order in zip(logits, rows, strict=True):
            first, second, _ = np.split(out, np.cumsum([sizes[i] for i in order]))
            assert_close(first, alone[order[0]])
            assert_close(second, alone[order[1]])

    def test_greedy_tokens(self, loaded: Loaded):
        """The continuation that generate() gives from its cache, by a full forward pass for each token."""
        prompt, expected = loaded.golden["prompt"], loaded.golden["greedy"]
        tokens = np.zeros((1, len(prompt) + len(expected)), np.int32)
        tokens[0, : len(prompt)] = prompt
        for at in range(len(prompt), tokens.shape[1]):
            tokens[0, at] = loaded.forward(tokens)[0, at - 1].argmax()
        assert tokens[0, len(prompt) :].tolist() == expected.tolist()


class TestExport:
    def test_tensors_and_config_survive(self, loaded: Loaded, tmp_path: Path):
        model = load_backbone(loaded.directory)
        assert model.dtype == jnp.dtype(loaded.case.dtype)
        export_backbone(model, tmp_path / "out", source=loaded.directory)
        assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(loaded.directory))
        again = load_backbone(tmp_path / "out")
        assert again.config == model.config
        for mine, theirs in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(model)), strict=True):
            assert mine.dtype == theirs.dtype
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()

    def test_transformers_reads_the_same_config(self, loaded: Loaded, tmp_path: Path):
        """transformers' own defaults fill both config.json files; what it then makes of them must agree: in every key with
        the source at hand, in all that matter without it."""
        model = load_backbone(loaded.directory)
        export_backbone(model, tmp_path / "with", source=loaded.directory)
        export_backbone(model, tmp_path / "without")
        source, copied, exported = (
            AutoConfig.from_pretrained(path) for path in (loaded.directory, tmp_path / "with", tmp_path / "without")
        )
        own_path = {"_name_or_path": ""}
        assert copied.to_dict() | own_path == source.to_dict() | own_path
        names = [
            "model_type", "architectures", "hidden_act", "vocab_size", "hidden_size", "intermediate_size",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype",
        ]  # fmt: skip
        by_family = {
            "llama": ["head_dim", "attention_bias", "mlp_bias"],
            "mistral": ["head_dim", "sliding_window"],
            "ministral": ["head_dim", "sliding_window", "layer_types"],
            "qwen2": ["layer_types"],
            "qwen3": ["head_dim", "attention_bias", "layer_types"],
        }
        names += by_family[source.model_type]
        if "sliding_attention" in (getattr(source, "layer_types", None) or ()):
            names.append("sliding_window")
        source.standardize_rope_params()  # as its rotary embedding does before it reads them
        source.rope_parameters.pop("type", None)  # the old spelling of rope_type, which transformers keeps beside it
        assert {name: getattr(exported, name) for name in names} == {name: getattr(source, name) for name in names}

    def test_existing_output_is_left_alone(self, tmp_path: Path):
        source = write_model_dir(CASES["llama_mha"], tmp_path / "model")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="out"):
            export_backbone(load_backbone(source), tmp_path / "out", source=source)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_smollm2_bfloat16_bit_for_bit(self, smollm2_dir: Path, tmp_path: Path):
        model = load_backbone(smollm2_dir)
        assert model.dtype == jnp.bfloat16
        export_backbone(model, tmp_path / "out", source=smollm2_dir)
        assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(smollm2_dir))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (smollm2_dir / name).read_bytes()

    def test_stories260k_float32_bit_for_bit(self, stories260k_dir: Path, tmp_path: Path):
        model = load_backbone(stories260k_dir)
        assert model.dtype == jnp.float32
        export_backbone(model, tmp_path / "out", source=stories260k_dir)
        assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(stories260k_dir))


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
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}},
        ],
        ids=["yarn", "dynamic", "longrope"],
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
        refuse(model_dir(tmp_path, hidden_act="gelu"), "config.json", "gelu")

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
    from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
    jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
    print("ready", flush=True)
    sys.stdin.readline()
    model = load_backbone(sys.argv[1], dtype=sys.argv[2])
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(model)), flush=True)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_import_streams(tmp_path: Path, stored: str, asked: str):
    """Memory never holds two copies of the model: anonymous memory grows by at most 1.35 times its bytes."""
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
        [sys.executable, "-c", IMPORT_ALONE, tmp_path, asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
    assert model_bytes > 300e6
    grown = (peak - before) / model_bytes
    assert 0.9 < grown < 1.35, f"the import took {grown:.2f} times the model's bytes"


def test_dtype_follows_the_stored_one(tmp_path: Path):
    case = CASES["llama_bfloat16"]
    write_model_dir(case, tmp_path)
    assert load_backbone(tmp_path).dtype == jnp.bfloat16
    assert load_backbone(tmp_path, dtype="float32").dtype == jnp.float32
    new_style = {key: value for key, value in case.config.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    write_model_dir(replace(case, config=new_style), tmp_path)
    assert load_backbone(tmp_path).dtype == jnp.bfloat16
