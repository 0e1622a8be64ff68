"""Weights under other names than a plain model's: every form gives the arrays of the plain one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from goldens import family_models
from goldens.tiny_models import CASES, read_tensors, write_json, write_model_dir, write_tensors

from adafuse_jax import Backbone, UserError, export_backbone, load_backbone
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.checkpoints.hf_config import parse_tables
from adafuse_jax.core.tables import Table

VISION = {
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32),
    "vision_tower.vision_model.post_layernorm.weight": np.ones(4, np.float32),
    "multi_modal_projector.mm_input_projection_weight": np.ones((4, 64), np.float32),
}
OUTER = {"model_type": "llava", "vision_config": {"hidden_size": 4}, "architectures": ["LlavaForConditionalGeneration"]}


def changed(out: Path, name: str, rename: Callable[[str], str], extra: dict[str, Any], **config: Any) -> Path:
    """A case's directory with other tensor names, and other keys of config.json."""
    case = CASES[name]
    tensors = {rename(old): value for old, value in read_tensors(write_model_dir(case, out / "plain")).items()}
    (out / "model").mkdir()
    shutil.copyfile(out / "plain" / "generation_config.json", out / "model" / "generation_config.json")
    write_json(config or case.config, out / "model" / "config.json")
    write_tensors(tensors | extra, out / "model", case.num_shards)
    return out / "model"


def composite(name: str, **outer: Any) -> dict[str, Any]:
    return OUTER | {"text_config": {k: v for k, v in CASES[name].config.items() if k != "architectures"}} | outer


def assert_equal(mine: Backbone, theirs: Backbone) -> None:
    assert mine.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(mine), nnx.state(theirs))


FORMS: dict[str, tuple[Callable[[str], str], dict[str, Any], bool, str]] = {
    "without model.": (lambda name: name.removeprefix("model."), {}, False, "begin with '', not with 'model.'"),
    "compiled": (lambda name: f"_orig_mod.{name}", {}, False, "begin with '_orig_mod.model.', not"),
    "text part": (
        lambda name: f"language_model.{name}", VISION, True,
        "3 tensors are left out, of multi_modal_projector, vision_tower",
    ),
    "text part, as transformers 5 has it": (
        lambda name: name.replace("model.", "model.language_model.", 1), {f"model.{k}": v for k, v in VISION.items()}, True,
        "3 tensors are left out, of multi_modal_projector, vision_tower",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama_mqa_sharded", "llama_gqa_tied"])
def test_other_names_give_the_same_model(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, name: str):
    rename, extra, is_part, wanted = FORMS[form]
    config = composite(name) if is_part else {}
    with caplog.at_level("INFO"):
        directory = changed(tmp_path, name, rename, extra, **config)
        model = load_backbone(directory)
    assert wanted in caplog.text
    assert_equal(model, load_backbone(tmp_path / "plain"))
    assert HFCheckpoint.open(directory).identity() == HFCheckpoint.open(tmp_path / "plain").identity()
    export_backbone(model, tmp_path / "out", source=directory)  # a plain model
    assert read_tensors(tmp_path / "out").keys() == read_tensors(tmp_path / "plain").keys()
    assert_equal(load_backbone(tmp_path / "out"), model)


@pytest.mark.parametrize("rename", [str, lambda name: name.removeprefix("model.")], ids=["plain", "without model."])
def test_a_tied_model_with_its_head_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rename: Callable[[str], str]
):
    def of_head(name: str) -> str:
        return "lm_head.weight" if name == "model.embed_tokens.weight" else rename(name)

    with caplog.at_level("INFO"):
        model = load_backbone(changed(tmp_path, "llama_gqa_tied", of_head, {}))
    assert "the embedding is read from lm_head.weight, to which it is tied" in caplog.text
    assert_equal(model, load_backbone(tmp_path / "plain"))


def test_the_whole_model_s_keys_count(tmp_path: Path):
    plain = CASES["llama_gqa_tied"].config
    inner = {k: v for k, v in plain.items() if k not in ("tie_word_embeddings", "eos_token_id", "architectures")}
    config = OUTER | {"text_config": inner, "tie_word_embeddings": True, "eos_token_id": [2, 7]}
    directory = changed(tmp_path, "llama_gqa_tied", lambda name: f"language_model.{name}", VISION, **config)
    (directory / "generation_config.json").unlink()
    found = load_backbone(directory).config
    assert found.tie_word_embeddings
    assert found.eos_token_ids == (2, 7)
    write_json(config | {"quantization_config": {"bits": 4}}, directory / "config.json")
    with pytest.raises(UserError, match="quantization_config: quant_method is None; supported"):
        load_backbone(directory)


def test_gemma_3_with_images(tmp_path: Path):
    """The text part of Gemma 3 is the text model, and has its class's sizes where `text_config` leaves them out."""
    case = family_models.CASES["gemma3_text_0"]
    plain = load_backbone(family_models.write_model_dir(case, tmp_path / "plain"))
    (tmp_path / "whole").mkdir()
    write_json(OUTER | {"model_type": "gemma3", "text_config": case.config}, tmp_path / "whole" / "config.json")
    tensors = {f"language_model.{name}": value for name, value in read_tensors(tmp_path / "plain").items()}
    write_tensors(tensors | VISION, tmp_path / "whole")
    assert_equal(load_backbone(tmp_path / "whole"), plain)
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    found = parse_tables(Table({"model_type": "gemma3", "text_config": text}, "config.json"), Table({}, "")).model
    assert (found.vocab_size, found.num_heads, found.num_kv_heads, found.head_dim) == (262208, 8, 4, 256)
    assert found.sliding_windows[4:7] == (1024, None, 1024)


def test_several_types_in_one_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    case = CASES["llama_mha"]
    tensors = read_tensors(write_model_dir(case, tmp_path))
    types = {name: ml_dtypes.bfloat16 if "proj" in name else np.float32 for name in tensors}
    mixed = {name: value.astype(types[name]) for name, value in tensors.items()}
    write_tensors(mixed, tmp_path, 1)
    with caplog.at_level("INFO"):
        model = load_backbone(tmp_path)
    assert "rounded" not in caplog.text, "the model is float32"
    np.testing.assert_array_equal(model.embed_tokens[...], tensors["model.embed_tokens.weight"])
    wanted = mixed["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.layers.q_proj.weight[0], wanted)
    with caplog.at_level("INFO"):
        load_backbone(tmp_path, "bfloat16")
    assert "weights stored as float32 are rounded to bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("config", "extra", "named"),
    [
        (composite("llama_mha", text_config={"hidden_size": 4}), {}, "is of a model of several parts ('llava')"),
        (composite("llama_mha", text_config=[1]), {}, "text_config"),
        (composite("llama_mha", text_config={"model_type": "t5"}), {}, "text_config: model_type is 't5'"),
        ({}, VISION, "is no part of the llama model"),
        (
            {},
            {f"{part}.layers.0.mlp.up_proj.weight": np.ones(2, np.float32) for part in ("encoder", "decoder")}
            | {f"{part}.embed_tokens.weight": np.ones(2, np.float32) for part in ("encoder", "decoder")},
            "has layers under 'decoder.' and 'encoder.'",
        ),
    ],
    ids=["no model_type", "a list", "another family", "vision without a text_config", "several"],
)
def test_what_is_not_clear_is_refused(tmp_path: Path, config: dict, extra: dict, named: str):
    is_several = "has layers" in named
    directory = changed(tmp_path, "llama_mha", lambda name: f"x.{name}" if is_several else name, extra, **config)
    if is_several:
        kept = {name: value for name, value in read_tensors(directory).items() if not name.startswith("x.")}
        write_tensors(kept, directory, 1)
    with pytest.raises(UserError) as caught:
        load_backbone(directory)
    assert named in str(caught.value)
