"""Damaged model and adapter directories: one line, exit code 2, nothing on disk changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mistakes import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LONG_NAME,
    WEIGHTS,
    Case,
    both,
    check_refused,
    drop_model_files,
    edit_json,
    edit_tensors,
    other_backbone,
    parametrize,
    pipe,
    remove,
    shard,
    truncate,
    write,
)

TRAIN = [
    # --model
    Case("model missing", ("{}/nowhere", "no such model directory", "give"), {"model": "{}/nowhere"}),
    Case("model is a file", ("{}/alpha.jsonl", "is a file", "give"), {"model": "{}/alpha.jsonl"}),
    Case("model name too long", ("--model /xxx", "300 bytes", "too long", "give"), {"model": f"/{LONG_NAME}"}),
    Case("hub id unreachable", ("nobody/nothing", "hub", "check the id"), {"model": "nobody/nothing"}),
    Case("hub id malformed", ("no body", "hub", "check the id"), {"model": "no body"}),
    Case("config.json missing", ("{}/model/config.json", "complete"), damage=remove("model/config.json")),
    Case("config.json corrupt", ("{}/model/config.json", "restore"), damage=truncate("model/config.json")),
    Case(
        "config.json lacks a key",
        ("{}/model/config.json", "hidden_size is missing", "restore"),
        damage=edit_json("model/config.json", hidden_size=None),
    ),
    Case(
        "model type",
        ("{}/model/config.json", "'mamba'", "supported: llama"),
        damage=edit_json("model/config.json", model_type="mamba"),
    ),
    Case(
        "activation",
        ("{}/model/config.json", "'mish'", "supported: silu"),
        damage=edit_json("model/config.json", hidden_act="mish"),
    ),
    Case(
        "quantised",
        ("{}/model/config.json", "quantised", "give"),
        damage=edit_json("model/config.json", quantization_config={"bits": 4}),
    ),
    Case(
        "rope type",
        ("{}/model/config.json", "'proportional'", "supported"),
        damage=edit_json("model/config.json", rope_scaling={"rope_type": "proportional", "factor": 2}),
    ),
    Case(
        "rope is no table",
        ("{}/model/config.json", "rope parameters", "give one table"),
        damage=edit_json("model/config.json", rope_scaling=["linear", 2]),
    ),
    Case(
        "rope factor is text",
        ("{}/model/config.json", "factor", "number"),
        damage=edit_json("model/config.json", rope_scaling={"rope_type": "linear", "factor": "two"}),
    ),
    Case(
        "norm eps is text",
        ("{}/model/config.json", "rms_norm_eps", "number"),
        damage=edit_json("model/config.json", rms_norm_eps="small"),
    ),
    Case(
        "kv heads do not divide",
        ("{}/model/config.json", "num_key_value_heads 3", "multiple"),
        damage=edit_json("model/config.json", num_key_value_heads=3),
    ),
    Case(
        "eos is text",
        ("{}/model/config.json", "eos_token_id", "integer"),
        damage=both(remove("model/generation_config.json"), edit_json("model/config.json", eos_token_id="</s>")),
    ),
    Case("weights missing", ("{}/model", "no model.safetensors", "check"), damage=remove(WEIGHTS)),
    Case(
        "weights as .bin",
        ("{}/model", "convert the .bin"),
        damage=both(remove(WEIGHTS), write("model/pytorch_model.bin", b"")),
    ),
    Case("weights truncated", ("{}/" + WEIGHTS, "truncated", "restore"), damage=truncate(WEIGHTS)),
    Case("weights empty", ("{}/" + WEIGHTS, "truncated", "restore"), damage=write(WEIGHTS, b"")),
    Case(
        "shard missing",
        ("{}/model/model-00002-of-00002.safetensors", "missing", "complete"),
        damage=shard("model-00002-of-00002.safetensors"),
    ),
    Case(
        "index without map",
        ("{}/model/model.safetensors.index.json", "weight_map", "restore"),
        damage=both(shard(), edit_json("model/model.safetensors.index.json", weight_map=None)),
    ),
    Case(
        "index malformed",
        ("{}/model/model.safetensors.index.json", "weight_map", "restore"),
        damage=both(shard(), edit_json("model/model.safetensors.index.json", weight_map={"a": 1})),
    ),
    Case(
        "tensor missing",
        ("{}/model", "model.norm.weight", "missing", "restore"),
        damage=edit_tensors(WEIGHTS, lambda t: t.pop("model.norm.weight")),
    ),
    Case(
        "tensor of wrong shape",
        ("{}/model", "model.norm.weight", "[31]", "[32]"),
        damage=edit_tensors(WEIGHTS, lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)})),
    ),
    Case(
        "tensor that is no part",
        ("{}/model", "model.extra", "check config.json"),
        damage=edit_tensors(WEIGHTS, lambda t: t.update({"model.extra": np.ones(3, np.float32)})),
    ),
    Case(
        "weights are integers",
        ("{}/model", "model.norm.weight", "I8", "give"),
        damage=edit_tensors(WEIGHTS, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)})),
    ),
    Case(
        "weights hold NaN",
        ("{}/model", "model.norm.weight holds NaN", "restore"),
        damage=edit_tensors(WEIGHTS, lambda t: t["model.norm.weight"].fill(np.nan)),
    ),
    Case("weights are a pipe", ("{}/" + WEIGHTS, "not a regular file", "restore"), damage=pipe(WEIGHTS)),
    Case("config.json is a pipe", ("{}/model/config.json", "not a regular file"), damage=pipe("model/config.json")),
    Case(
        "layers without end",
        ("{}/model/config.json", "num_hidden_layers is 1000000000000", "from 1 to"),
        damage=edit_json("model/config.json", num_hidden_layers=10**12),
    ),
    Case(
        "a shard outside of the directory",
        ("{}/model/model.safetensors.index.json", "outside of the directory", "restore"),
        damage=both(
            shard(), edit_json("model/model.safetensors.index.json", weight_map={"lm_head.weight": "../a.safetensors"})
        ),
    ),
    # the model's config comes before its tokenizer
    *(
        Case(
            f"{name} and no tokenizer",
            ("{}/model", *expected),
            damage=both(drop_model_files("tokenizer*"), damage),
        )
        for name, damage, expected in (
            (
                "another model",
                edit_json("model/config.json", model_type="bert"),
                ("config.json", "'bert'", "supported"),
            ),
            ("no weights", lambda folder: (folder / WEIGHTS).unlink(), ("no model.safetensors",)),
        )
    ),
    # tokenizer
    Case("tokenizer missing", ("{}/model", "tokenizer", "needs tokenizer.json"), damage=drop_model_files("tokenizer*")),
    Case("tokenizer corrupt", ("{}/model", "tokenizer", "tokenizer.json"), damage=truncate("model/tokenizer.json")),
    Case(
        "tokenizer without EOS",
        ("{}/model", "no EOS", "set eos_token"),
        damage=edit_json("model/tokenizer_config.json", eos_token=None),
    ),
    Case(
        "tokenizer of another model",
        ("{}/model", "200 tokens", "tokenizer", "restore"),
        damage=both(
            edit_json("model/config.json", vocab_size=200),
            edit_tensors(
                WEIGHTS,
                lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:200].copy()}),
            ),
        ),
    ),
]
DECODE = [
    # model
    Case("model missing", ("{}/nowhere", "no such model directory", "give"), {"model": "{}/nowhere"}),
    Case("weights truncated", ("{}/" + WEIGHTS, "truncated", "restore"), damage=truncate(WEIGHTS)),
    Case("tokenizer missing", ("{}/model", "needs tokenizer.json"), damage=drop_model_files("tokenizer*")),
    Case(
        "another model and no tokenizer",
        ("{}/model/config.json", "'bert'", "supported"),
        damage=both(drop_model_files("tokenizer*"), edit_json("model/config.json", model_type="bert")),
    ),
    Case(
        "weights hold NaN",
        ("{}/model", "model.layers.1.mlp.up_proj.weight holds NaN", "restore"),
        damage=edit_tensors(WEIGHTS, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill(np.nan)),
    ),
    *(
        Case(f"{name} is a pipe", ("{}/" + name, "not a regular file"), ADAPTER, pipe(name))
        for name in (
            "model/config.json",
            "model/generation_config.json",
            "model/tokenizer.json",
            "model/tokenizer_config.json",
            WEIGHTS,
            ADAPTER_CONFIG,
            ADAPTER_WEIGHTS,
        )
    ),
    # adapter
    Case("adapter missing", ("{}/none", "no such adapter", "give"), {"adapter": "{}/none"}),
    Case("adapter is a model", ("{}/model", "is a whole model", "--model"), {"adapter": "{}/model"}),
    Case("adapter is a file", ("{}/alpha.jsonl", "no such adapter", "give"), {"adapter": "{}/alpha.jsonl"}),
    Case("adapter config missing", ("{}/" + ADAPTER_CONFIG, "complete"), ADAPTER, remove(ADAPTER_CONFIG)),
    Case("adapter config corrupt", ("{}/" + ADAPTER_CONFIG, "restore"), ADAPTER, truncate(ADAPTER_CONFIG)),
    Case(
        "adapter names no backbone",
        ("{}/" + ADAPTER_CONFIG, "backbone"),
        ADAPTER,
        edit_json(ADAPTER_CONFIG, backbone=1),
    ),
    Case(
        "adapter identity is no text",
        ("{}/" + ADAPTER_CONFIG, "backbone", "give"),
        ADAPTER,
        edit_json(ADAPTER_CONFIG, backbone={"name": "a", "identity": 5}),
    ),
    Case("adapter key unknown", ("{}/" + ADAPTER_CONFIG, "'rnk'", "give"), ADAPTER, edit_json(ADAPTER_CONFIG, rnk=2)),
    Case(
        "adapter key missing", ("{}/" + ADAPTER_CONFIG, "'rank'", "give"), ADAPTER, edit_json(ADAPTER_CONFIG, rank=None)
    ),
    Case("adapter rank 0", ("{}/" + ADAPTER_CONFIG, "--rank is 0"), ADAPTER, edit_json(ADAPTER_CONFIG, rank=0)),
    Case("adapter rank 2.5", ("{}/" + ADAPTER_CONFIG, "rank", "2.5"), ADAPTER, edit_json(ADAPTER_CONFIG, rank=2.5)),
    Case("adapter rank text", ("{}/" + ADAPTER_CONFIG, "rank", "'2'"), ADAPTER, edit_json(ADAPTER_CONFIG, rank="2")),
    Case(
        "adapter method unknown",
        ("{}/" + ADAPTER_CONFIG, "'mixture'", "give"),
        ADAPTER,
        edit_json(ADAPTER_CONFIG, adapter="mixture"),
    ),
    Case(
        "adapter of another method",
        ("{}/" + ADAPTER_CONFIG, "unknown keys ['num_experts']", "missing keys ['experts_per_layer']", "give"),
        ADAPTER,
        edit_json(ADAPTER_CONFIG, adapter="mola"),
    ),
    Case(
        "adapter top_k above experts",
        ("{}/" + ADAPTER_CONFIG, "--top-k 9", "--num-experts 4"),
        ADAPTER,
        edit_json(ADAPTER_CONFIG, top_k=9),
    ),
    Case("adapter weights missing", ("{}/" + ADAPTER_WEIGHTS, "complete"), ADAPTER, remove(ADAPTER_WEIGHTS)),
    Case("adapter weights truncated", ("{}/" + ADAPTER_WEIGHTS, "restore"), ADAPTER, truncate(ADAPTER_WEIGHTS)),
    Case(
        "adapter of other shapes",
        ("{}/" + ADAPTER_WEIGHTS, "shape", "adapter_config.json"),
        ADAPTER,
        edit_json(ADAPTER_CONFIG, rank=3),
    ),
    Case(
        "adapter lacks a tensor",
        ("{}/" + ADAPTER_WEIGHTS, "router.weight", "adapter_config.json"),
        ADAPTER,
        edit_tensors(ADAPTER_WEIGHTS, lambda t: t.pop("router.weight")),
    ),
    Case(
        "adapter holds NaN",
        ("{}/" + ADAPTER_WEIGHTS, "experts.up_proj.B holds NaN", "restore"),
        ADAPTER,
        edit_tensors(ADAPTER_WEIGHTS, lambda t: t["experts.up_proj.B"].fill(np.nan)),
    ),
    Case(
        "adapter of another backbone",
        ("{}/adapter", "another backbone", "give --model"),
        ADAPTER,
        other_backbone,
    ),
]


@parametrize(("train", TRAIN), ("decode", DECODE))
def test_one_line_and_nothing_changed(
    script: str, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    check_refused(script, case, folder, monkeypatch, capfd)
