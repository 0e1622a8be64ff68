"""A head of 8 bits: its codes, the logits, loss and gradients of the model, its files, and who refuses it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.tiny_models import CASES, write_model_dir
from random_models import tokens_of
from safetensors.numpy import load_file, save_file

from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.megakernel import fused_unsupported_reason
from adafuse_jax.models import layers
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.loss import token_losses
from adafuse_jax.models.quantised import (
    Quantisation,
    head_quantisation_of,
    quantisation_of,
    quantised,
    with_quantised_head,
)
from pallas_kernels.quantised import INT4, INT4_G64, INT8, quantise
from pallas_kernels.quantised.reference import dequantise_np, errors_np, scales_np

TIED, UNTIED = "llama_gqa_tied", "llama_mqa_sharded"


@pytest.fixture(scope="module", params=[TIED, UNTIED])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CASES[request.param].config | {"hidden_size": 64, "intermediate_size": 128}
    return write_model_dir(replace(CASES[request.param], config=config), tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Backbone:
    return load_backbone(HFCheckpoint.open(folder).quantised("int8", quantize_head=True), "float32")


def assert_same(found: Backbone, wanted: Backbone) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def with_plain_head(model: Backbone) -> Backbone:
    """The model with its head dequantised by NumPy."""
    plain, head = jax.tree.map(lambda leaf: leaf, model), model.head
    plain.lm_head = nnx.Param(jnp.asarray(dequantise_np(np.asarray(head.codes), np.asarray(head.scales), INT8)))
    return plain


def test_codes_and_scales(folder: Path, model: Backbone):
    """Nearest integers, of a head that is tied no more; the embedding is as it was."""
    plain = load_backbone(folder, "float32")
    weight, head = np.asarray(plain.head, np.float64), model.head
    np.testing.assert_allclose(head.scales, scales_np(weight, INT8), rtol=1e-6)
    off = dequantise_np(np.asarray(head.codes), np.asarray(head.scales), INT8) - weight
    least = errors_np(weight, np.asarray(head.scales), INT8)[:, 0]
    np.testing.assert_allclose((off**2).sum(axis=1), least, rtol=1e-4)
    np.testing.assert_array_equal(model.embed_tokens[...], plain.embed_tokens[...])
    assert (quantisation_of(model), head_quantisation_of(model), head_quantisation_of(plain)) == (INT8, INT8, None)
    assert not model.config.tie_word_embeddings
    assert_same(model, quantised(plain, INT8, head=True))


def test_loss_and_its_gradient(model: Backbone):
    """Equality with the dequantised head; what trains gets its gradient through it."""
    tokens = tokens_of(model)
    hidden = jax.random.normal(jax.random.key(0), (*tokens.shape, model.config.embed_dim))

    def loss(hidden: jax.Array, model: Backbone) -> jax.Array:
        return token_losses(model, hidden, tokens, jnp.ones(tokens.shape, bool)).sum()

    found, wanted = (jax.jit(jax.value_and_grad(loss))(hidden, m) for m in (model, with_plain_head(model)))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-6 * float(jnp.abs(wanted[1]).max()))


def test_logits_by_rows(monkeypatch):
    """Eight rows of the head at a time, and the last five, against float64."""
    monkeypatch.setattr(layers, "VALUES_AT_A_TIME", 8 * 24)
    head = quantise(jax.random.normal(jax.random.key(0), (37, 24)), INT8, jnp.float32)
    hidden = jax.random.normal(jax.random.key(1), (2, 3, 24))
    wanted = np.asarray(hidden, np.float64) @ dequantise_np(np.asarray(head.codes), np.asarray(head.scales), INT8).T
    np.testing.assert_allclose(layers.logit_product(hidden, head), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4-g64"])
def test_files(folder: Path, tmp_path: Path, name):
    """Written, read again and quantised again on request; the words are the codes in their documented order."""
    model = load_backbone(HFCheckpoint.open(folder).quantised(name, quantize_head=True), "bfloat16")
    export_backbone(model, tmp_path / "out", source=folder)
    checkpoint = HFCheckpoint.open(tmp_path / "out")
    assert checkpoint.quantisation == Quantisation(quantisation_of(model), has_head=True)
    assert_same(load_backbone(checkpoint), model)
    plain_head = load_backbone(HFCheckpoint.open(folder).quantised(name), "bfloat16")
    export_backbone(plain_head, tmp_path / "plain", source=folder)
    later = load_backbone(
        HFCheckpoint.open(tmp_path / "plain").quantised(None, quantize_head=True)
    )  # of the bfloat16 one
    assert_same(later, with_quantised_head(load_backbone(tmp_path / "plain")))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    words, head = tensors["lm_head.weight_packed"], model.head
    np.testing.assert_array_equal(words.view(np.uint8).reshape(head.shape), head.codes)
    assert tensors["lm_head.weight_shape"].tolist() == [*head.shape]
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    assert table["tie_word_embeddings"] is False
    assert table["quantization_config"]["ignore"] == []
    assert table["quantization_config"]["config_groups"]["group_1"]["targets"] == ["lm_head"]


def test_names():
    for found in (Quantisation(INT8), Quantisation(INT4_G64), Quantisation(INT4, has_head=True)):
        assert Quantisation.of_name(found.name) == found
    assert Quantisation(INT4, has_head=True).name == "int4 and head int8"
    for text in ("int4 and head int4", "int4 and head ", "int3", "int8 and", ""):
        assert Quantisation.of_name(text) is None


def test_refusals(folder: Path, model: Backbone, tmp_path: Path):
    with pytest.raises(UserError, match="--quantize-head: the linears have plain weights; give --quantize with it"):
        HFCheckpoint.open(folder).quantised(None, quantize_head=True)
    assert fused_unsupported_reason(model) == "it reads a plain head, and this one is int8"
    export_backbone(model, tmp_path / "out", source=folder)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    table = json.loads((tmp_path / "out" / "config.json").read_text())

    def refused(text: str, **changes) -> None:
        (tmp_path / "out" / "config.json").write_text(json.dumps(table | changes))
        with pytest.raises(UserError, match=text):
            load_backbone(tmp_path / "out")

    refused("the head is quantised and tied to the embedding, which is not", tie_word_embeddings=True)
    groups = table["quantization_config"]["config_groups"]
    four = json.loads(json.dumps(groups["group_1"]))
    four["weights"] |= {"num_bits": 4, "strategy": "group", "group_size": 64}
    quantization = table["quantization_config"] | {"config_groups": groups | {"group_1": four}}
    refused("the head is int4-g64; supported: all linears, the head plain or int8", quantization_config=quantization)
    tensors["lm_head.weight_scale"][3] = np.inf
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    refused("tensor lm_head.weight_scale holds NaN or infinite values")
