"""config.json of each family against transformers' classes: what is absent, RoPE by kind of layer, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from goldens.tiny_models import write_json
from transformers import AutoConfig

from adafuse_jax import UserError
from adafuse_jax.checkpoints.hf_config import parse_tables
from adafuse_jax.checkpoints.hf_export import config_table
from adafuse_jax.core.tables import Table
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.registry import FAMILIES

SIZES = {
    "vocab_size": 300_000, "hidden_size": 3840, "intermediate_size": 64, "num_hidden_layers": 9,
    "num_attention_heads": 480,
}  # fmt: skip
BOTH = {"full_attention": {"rope_type": "default", "rope_theta": 9.0}, "sliding_attention": {"rope_type": "default"}}
LINEAR = {"rope_type": "linear", "factor": 3.0}
LAYERED_ROPES: tuple[dict[str, Any], ...] = (
    {},
    {"rope_theta": 7.0},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_scaling": LINEAR, "rope_parameters": BOTH, "rope_theta": 7.0},
    {"rope_scaling": {"factor": 2.0}, "rope_parameters": BOTH | {"full_attention": LINEAR}},
    {"rope_parameters": BOTH | {"sliding_attention": None}, "rope_theta": 7.0},
)


def by_us(table: dict[str, Any]) -> ModelConfig:
    return parse_tables(Table(table, "config.json"), Table({}, "generation_config.json")).model


def by_transformers(table: dict[str, Any], folder: Path) -> Any:
    write_json(table, folder / "config.json")
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_the_values_of_the_class(family: str, tmp_path: Path):
    table = SIZES | {"model_type": family}
    mine, theirs = by_us(table), by_transformers(table, tmp_path)
    rope = theirs.rope_parameters
    rope = rope.get("full_attention", rope)
    eos = theirs.eos_token_id
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (mine.num_kv_heads, mine.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert mine.max_position_embeddings == theirs.max_position_embeddings
    assert mine.norm_eps == (theirs.layer_norm_eps if family == "cohere2" else theirs.rms_norm_eps)
    assert (mine.bos_token_id, mine.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert mine.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert mine.tie_word_embeddings == theirs.tie_word_embeddings
    assert (mine.rope.kind, mine.rope.theta) == (rope.get("rope_type", "default"), rope.get("rope_theta", 1e4))
    assert mine.rope.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
    assert mine.rope.query_scaling_beta == rope.get("llama_4_scaling_beta", 0.0)
    if family == "ministral3":
        assert rope.items() >= (FAMILIES[family].rope.absent | {"type": "yarn"}).items()


@pytest.mark.parametrize("keys", LAYERED_ROPES, ids=map(str, range(len(LAYERED_ROPES))))
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_rope_by_kind_of_layer(family: str, keys: dict[str, Any], tmp_path: Path):
    table = SIZES | {"model_type": family} | keys
    mine, theirs = by_us(table), by_transformers(table, tmp_path).rope_parameters
    for rope, wanted in (
        (mine.rope, theirs["full_attention"]), (mine.local_rope or mine.rope, theirs["sliding_attention"])
    ):  # fmt: skip
        factor = wanted.get("factor", 1.0) if wanted["rope_type"] == "linear" else 1.0
        assert (rope.kind, rope.theta, rope.factor) == (wanted["rope_type"], wanted["rope_theta"], factor)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo3", "cohere2", "exaone4"])
def test_a_model_without_windows_is_written_as_one_that_transformers_runs(family: str, tmp_path: Path):
    """A size of windows is needed where the class has one; in EXAONE 4 it means that these layers have no RoPE."""
    table = SIZES | {"model_type": family, "layer_types": ["full_attention"] * SIZES["num_hidden_layers"]}
    for changes in ({}, {"sliding_window": None})[: 1 + (family == "exaone4")]:
        mine = by_us(table | changes)
        written = config_table(mine, "float32")
        assert by_us(written) == mine
        assert by_transformers(written, tmp_path).sliding_window == changes.get("sliding_window", 4096)


@pytest.mark.parametrize("family", ["granite", "olmo2", "glm4", "seed_oss"])
def test_windows_of_a_family_without_are_refused(family: str):
    for changes in ({"sliding_window": 8}, {"layer_types": ["sliding_attention"] * SIZES["num_hidden_layers"]}):
        with pytest.raises(UserError, match=f"{family} has no windows"):
            by_us(SIZES | {"model_type": family} | changes)


def test_dynamic_rope_with_scaled_queries_is_refused():
    """The original length of its angles is not that of the scale."""
    rope = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}
    with pytest.raises(UserError, match="type is 'dynamic'; supported: default, linear, llama3, yarn, longrope"):
        by_us(SIZES | {"model_type": "ministral3", "rope_scaling": rope})
