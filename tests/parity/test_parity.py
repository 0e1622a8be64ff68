"""The backbone against transformers: logits, greedy tokens, and weights that go in and out unchanged.

The references are `goldens/` (made by goldens/make_goldens.py with transformers + torch in float32); the tiny models
they belong to are made here again from `goldens/tiny_models.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from goldens.tiny_models import CASES, Case, read_tensors, write_model_dir
from transformers import AutoConfig

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core.errors import UserError

GOLDENS = tiny.GOLDENS / "tiny"
TOLERANCE = 1e-4  # largest logit difference over the standard deviation of the logits, float32


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
