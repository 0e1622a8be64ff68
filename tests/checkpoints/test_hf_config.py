"""config.json and generation_config.json: read as transformers reads them, or refused in one line; ignored keys are named.

The reference is transformers' own `AutoConfig`, which needs no torch; the goldens of test_parity.py show that its reading
gives these logits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from goldens.tiny_models import CASES, LLAMA3, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from adafuse_jax.checkpoints.hf_config import generation_remark, parse_hf_config
from adafuse_jax.core.errors import MAX_MESSAGE, UserError
from adafuse_jax.models.config import ModelConfig

ABSENT = object()
NO_LENGTH = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
ROPE_READ = {
    "default": ("rope_type", "rope_theta"),
    "linear": ("rope_type", "rope_theta", "factor"),
    "llama3": (
        "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
"""Keys that transformers' functions of each kind of RoPE read."""


def write_config(folder: Path, base: str, **changes: Any) -> Path:
    """`config.json` of a golden's case with some keys changed; `ABSENT` takes a key out."""
    folder.mkdir(exist_ok=True)
    table = CASES[base].config | changes
    write_json({key: value for key, value in table.items() if value is not ABSENT}, folder / "config.json")
    return folder


def by_transformers(folder: Path) -> dict[str, Any]:
    """The values that decide the function, as transformers' models take them from its configuration."""
    config = AutoConfig.from_pretrained(folder)
    config.standardize_rope_params()  # as its rotary embedding does before it reads them
    kinds = getattr(config, "layer_types", None)
    window = None if config.model_type == "llama" else config.sliding_window
    layers = config.num_hidden_layers
    rope = {key: config.rope_parameters[key] for key in ROPE_READ[config.rope_parameters["rope_type"]]}
    return {
        "vocab_size": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_layers": layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "windows": [window] * layers if kinds is None else [window if "sliding" in kind else None for kind in kinds],
        "rope": rope,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def by_us(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {name: getattr(config.rope, name) for name in names}
    names = (
        "vocab_size", "embed_dim", "hidden_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "norm_eps",
        "max_position_embeddings", "tie_word_embeddings", "bos_token_id",
    )  # fmt: skip
    eos = config.eos_token_ids
    return {name: getattr(config, name) for name in names} | {
        "windows": list(config.sliding_windows),
        "rope": rope,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
    }


SAME: list[tuple[str, dict[str, Any]]] = [
    ("llama_mha", {}),
    ("llama_mha", {"eos_token_id": ABSENT, "bos_token_id": ABSENT}),  # Llama's defaults are 1 and 2
    ("llama_mha", {"eos_token_id": None}),
    ("llama_mha", {"eos_token_id": [2, 5]}),
    ("qwen2_tied", {"eos_token_id": ABSENT, "bos_token_id": ABSENT}),
    ("llama_mha", {"max_position_embeddings": ABSENT}),
    ("mistral_window", {"max_position_embeddings": ABSENT, "sliding_window": ABSENT}),
    ("qwen2_tied", {"max_position_embeddings": ABSENT, "rms_norm_eps": ABSENT, "tie_word_embeddings": ABSENT}),
    ("llama_mha", {"head_dim": None, "num_key_value_heads": None}),
    ("mistral_window", {"num_key_value_heads": ABSENT, "num_attention_heads": 8}),
    ("qwen2_tied", {"num_key_value_heads": ABSENT, "num_attention_heads": 32}),
    ("qwen3_tied", {"head_dim": ABSENT, "num_key_value_heads": None}),
    ("llama_mha", {"rope_theta": ABSENT}),
    ("llama_mha", {"rope_scaling": {"type": "default", "factor": 8.0}}),
    ("llama_linear_old", {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 77.0}}),
    ("llama_linear_old", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}),
    ("llama_linear_old", {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}),
    ("llama_default_new", {"rope_theta": 5.0}),
    ("llama_default_new", {"rope_scaling": {}}),
    ("llama_llama3_old", {"original_max_position_embeddings": 32}),
    ("llama_llama3_new", {"original_max_position_embeddings": 32}),
    ("llama_llama3_old", {"rope_scaling": NO_LENGTH}),
    ("llama_llama3_old", {"rope_scaling": NO_LENGTH, "original_max_position_embeddings": 16}),
    ("mistral_layer_types", {"layer_types": None}),
    ("mistral_layer_types", {"layer_types": ["attention"] * 4}),
    ("mistral_layer_types", {"layer_types": ["sliding_attention"] * 4, "sliding_window": ABSENT}),
    ("mistral_layer_types", {"layer_types": ["full_attention"] * 4, "sliding_window": None}),
    ("qwen2_layer_types", {"layer_types": ABSENT, "max_window_layers": 2}),
    ("qwen2_window", {"max_window_layers": ABSENT}),
    ("qwen2_window", {"max_window_layers": -1}),
    ("qwen2_window", {"sliding_window": ABSENT}),
    ("qwen2_window", {"sliding_window": None}),
    ("qwen2_window", {"use_sliding_window": False, "sliding_window": 0}),
    ("qwen3_window", {"use_sliding_window": ABSENT}),
]


@pytest.mark.parametrize(("base", "changes"), SAME, ids=[f"{i}-{base}" for i, (base, _) in enumerate(SAME)])
def test_read_as_transformers_does(tmp_path: Path, base: str, changes: dict[str, Any]):
    folder = write_config(tmp_path, base, **changes)
    assert by_us(parse_hf_config(folder).model) == by_transformers(folder)


def some(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


ROPES = some(
    ABSENT, None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "llama3", **NO_LENGTH}, dict(LLAMA3),
    {"rope_type": "default", "rope_theta": 50.0}, {"type": "default"}, {"factor": 3.0}, {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": None}, {"rope_type": "yarn", "factor": 2.0}, [1], "linear",
)  # fmt: skip
KEYS: dict[str, st.SearchStrategy] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": some(ABSENT, 1e4, 7, None, "9", -1.0),
    "original_max_position_embeddings": some(ABSENT, 16, None, 0),
    "max_position_embeddings": some(ABSENT, 64, 128, 0, 10**12),
    "sliding_window": some(ABSENT, None, 1, 8, 0, -3, "8"),
    "use_sliding_window": some(ABSENT, True, False, 1),
    "max_window_layers": some(ABSENT, 0, 1, 99, None),
    "layer_types": some(
        ABSENT, None, [], ["full_attention"] * 2, ["sliding_attention", "full_attention"], ["attention"] * 2,
        ["full_attention"], ["chunked_attention"] * 2, [1, 2], "full_attention",
    ),
    "num_key_value_heads": some(ABSENT, None, 1, 4, 3, 0),
    "head_dim": some(ABSENT, None, 16, 8, 7, 0),
    "num_hidden_layers": some(2, 2, 2, 10**12, 0, True),
    "rms_norm_eps": some(ABSENT, 1e-5, 0.5, None, "1e-5", float("nan"), float("inf")),
    "tie_word_embeddings": some(ABSENT, True, False, None, 1),
    "attention_bias": some(ABSENT, True, False, None),
    "eos_token_id": some(ABSENT, None, 2, [2, 3], [], "2", [2, "3"], 1.5),
    "hidden_act": some(ABSENT, "silu", "swish", "gelu", None),
}  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=st.sampled_from(["llama_gqa_tied", "mistral_window", "qwen2_tied", "qwen3_tied"]), data=st.data())
def test_any_values_are_read_as_transformers_does_or_refused_in_one_line(
    tmp_path: Path, family: str, data: st.DataObject
):
    names = data.draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=5, unique=True))
    changes = {name: data.draw(KEYS[name]) for name in names}
    folder = write_config(tmp_path, family, **{"num_attention_heads": 4, "num_key_value_heads": 2} | changes)
    try:
        mine = by_us(parse_hf_config(folder).model)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(folder / "config.json"))
        assert len(message) <= MAX_MESSAGE
        assert "\n" not in message
        return
    try:
        theirs = by_transformers(folder)
    except Exception:  # it refuses more: a head size that no sum of heads gives, text for a norm, ...
        return
    theirs["eos_token_id"] = theirs["eos_token_id"] or None
    if isinstance(theirs["eos_token_id"], list) and len(theirs["eos_token_id"]) == 1:
        theirs["eos_token_id"] = theirs["eos_token_id"][0]
    assert mine == theirs


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "partial rotary": ("llama_mha", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5", "supported: 1")),
    "partial rotary in rope_parameters": (
        "llama_default_new",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 0.5}},
        ("rope_parameters: partial_rotary_factor is 0.5",),
    ),
    "partial rotary in rope_scaling": (
        "llama_linear_old",
        {"rope_scaling": {"type": "linear", "factor": 4.0, "partial_rotary_factor": 0.25}},
        ("rope_scaling: partial_rotary_factor is 0.25",),
    ),
    "not causal": ("qwen2_tied", {"is_causal": False}, ("is_causal is False", "supported: True")),
    "chunks": ("llama_mha", {"attention_chunk_size": 8}, ("attention_chunk_size",)),
    "values by layer": ("llama_mha", {"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, ("per_layer_config",)),
    "another file": ("llama_mha", {"configuration_files": ["config.4.0.json"]}, ("configuration_files",)),
    "window of llama": ("llama_mha", {"sliding_window": 8}, ("sliding_window is 8", "llama has no windows")),
    "windows of llama's layers": (
        "llama_mha",
        {"layer_types": ["sliding_attention", "full_attention"]},
        ("layer_types", "llama has no windows"),
    ),
    "window 0": ("mistral_window", {"sliding_window": 0}, ("sliding_window is 0", "from 1")),
    "layer types without window": (
        "mistral_layer_types",
        {"sliding_window": None},
        ("layer_types has sliding_attention", "no sliding_window"),
    ),
    "layers without end": ("llama_mha", {"num_hidden_layers": 10**12}, ("num_hidden_layers", "from 1 to 10000")),
    "huge number": ("llama_mha", {"hidden_size": 10**400}, ("hidden_size is an integer of 1329 bits",)),
    "infinite number": ("llama_mha", {"rms_norm_eps": float("inf")}, ("rms_norm_eps is inf", "finite")),
    "true for a size": ("llama_mha", {"hidden_size": True}, ("hidden_size is True", "integer")),
    "1 for true": ("llama_mha", {"tie_word_embeddings": 1}, ("tie_word_embeddings is 1", "true or false")),
    "null norm": ("llama_mha", {"rms_norm_eps": None}, ("rms_norm_eps is None", "left out")),
    "odd heads": ("llama_mha", {"head_dim": 13}, ("13 dimensions", "even")),
    "no heads": ("llama_mha", {"hidden_size": 2}, ("0 dimensions", "even")),
    "rope factor 0": (
        "llama_linear_old",
        {"rope_scaling": {"type": "linear", "factor": 0}},
        ("rope_scaling: factor is 0", "greater than 0"),
    ),
    "rope bands that cross": (
        "llama_llama3_old",
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        ("high_freq_factor is 1.0", "greater than low_freq_factor"),
    ),
    "MLX quantisation": (
        "llama_mha",
        {"quantization": {"bits": 4}},
        ("quantization: quant_method is None; supported: compressed-tensors",),
    ),
    "type of the weights": ("llama_mha", {"torch_dtype": "float8_e4m3fn"}, ("torch_dtype is 'float8_e4m3fn'",)),
    "eos in a list of lists": ("llama_mha", {"eos_token_id": [[2]]}, ("eos_token_id is [[2]]", "integer")),
    "several bos": ("llama_mha", {"bos_token_id": [1, 2]}, ("bos_token_id is [1, 2]", "integer")),
    "pad is text": ("llama_mha", {"pad_token_id": "<pad>"}, ("pad_token_id is '<pad>'", "integer")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path: Path, name: str):
    base, changes, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        parse_hf_config(write_config(tmp_path, base, **changes))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "config.json"))
    assert all(text in message for text in expected), message
    assert len(message) <= MAX_MESSAGE
    assert "\n" not in message


def test_a_pipe_is_refused_at_once(tmp_path: Path):
    for name in ("config.json", "generation_config.json"):
        write_config(tmp_path, "llama_mha")
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is not a regular file"):
            parse_hf_config(tmp_path)
        (tmp_path / name).unlink()


def remarks(folder: Path) -> list[str]:
    return list(parse_hf_config(folder).remarks)


class TestRemarks:
    def test_keys_that_nothing_reads_are_named_in_one_line(self, tmp_path: Path):
        """The keys are also ignored by transformers in a Llama; in their own families they change the function."""
        others = {
            "logit_scale": 0.5, "attention_multiplier": 0.1, "final_logit_softcapping": 30.0,
            "auto_map": {"AutoModel": "m.M"}, "residual_multiplier": 0.2, "query_pre_attn_scalar": 7,
            "attention_dropout": 0.1,
        }  # fmt: skip
        (line,) = remarks(write_config(tmp_path, "llama_mha", **others))
        assert line == f"{tmp_path}/config.json: keys that are not used: {', '.join(others)}"

    def test_rope_keys_that_its_kind_does_not_have_are_named(self, tmp_path: Path):
        rope = {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}
        changes = {"rope_scaling": rope, "rope_parameters": {"rope_type": "default"}}
        (line,) = remarks(write_config(tmp_path, "llama_mha", **changes))
        assert line.endswith("keys that are not used: rope_scaling.mscale, rope_parameters")

    def test_nothing_is_said_of_usual_files(self, tmp_path: Path):
        usual = {
            "pretraining_tp": 1, "use_cache": True, "transformers_version": "5.24.0", "initializer_range": 0.02,
            "attention_dropout": 0.0, "attention_bias": False, "_name_or_path": "x", "temperature": 0.6,
            "rope_scaling": None,
        }  # fmt: skip
        for base in ("llama_mha", "mistral_window", "qwen2_window", "qwen3_tied"):
            assert remarks(write_config(tmp_path, base, **usual)) == []

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize(
        ("name", "value", "left"),
        [
            ("pad_token_id", -1, None),
            ("pad_token_id", 96, None),
            ("bos_token_id", 10**30, None),
            ("eos_token_id", [2, 96], (2,)),
        ],
    )
    def test_ids_that_are_no_token_are_left_out(self, tmp_path: Path, file: str, name: str, value: Any, left: Any):
        write_config(tmp_path, "llama_mha", **({name: value} if file == "config.json" else {}))
        if file != "config.json":
            write_json({name: value}, tmp_path / file)
        (line,) = remarks(tmp_path)
        assert line.startswith(f"{tmp_path}/{file}: {name} ")
        assert "no token of the model, which has 96" in line
        config = parse_hf_config(tmp_path).model
        assert {"eos_token_id": config.eos_token_ids}.get(name, getattr(config, name, None)) == left

    def test_generation_config_wins(self, tmp_path: Path):
        write_config(tmp_path, "llama_mha")
        write_json({"eos_token_id": [7, 8], "bos_token_id": None}, tmp_path / "generation_config.json")
        config = parse_hf_config(tmp_path).model
        assert (config.eos_token_ids, config.bos_token_id) == ((7, 8), None)

    def test_settings_of_generation_that_the_flags_replace(self, tmp_path: Path):
        def remark(*files: dict[str, Any]) -> str | None:
            write_config(tmp_path, "llama_mha")
            for table in files:
                write_json(table, tmp_path / "generation_config.json")
            return generation_remark(parse_hf_config(tmp_path).generation)

        assert remark() is None
        greedy = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "transformers_version": "5"}
        assert remark(greedy) is None
        line = remark(greedy | {"do_sample": True, "repetition_penalty": 1.05})
        assert line is not None
        assert line.startswith(f"{tmp_path}/generation_config.json: ")
        assert line.endswith("as the flags decide: do_sample, temperature, top_p, repetition_penalty")


def test_json_is_what_the_file_says(tmp_path: Path):
    """NaN and a repeated key are JSON to Python; neither reaches the model."""
    write_config(tmp_path, "llama_mha", rms_norm_eps=float("nan"))
    assert "NaN" in (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match="rms_norm_eps is nan"):
        parse_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"})[:-3])
    with pytest.raises(UserError, match="not valid JSON"):
        parse_hf_config(tmp_path)
