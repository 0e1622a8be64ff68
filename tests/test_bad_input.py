"""Every mistake a user can make with the two scripts: one line that says what, where and what to do; exit code 2;
nothing on disk changed.

Most cases run the script in this process, with what it prints and its exit code captured; a few run as processes.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import backbone_identity
from adafuse_jax.checkpoints.hf_config import read_model_config
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.inference.config import Strategy
from adafuse_jax.training.config import TrainConfig

Damage = Callable[[Path], object]
WEIGHTS = "model/model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
LONG_NAME = "x" * 300


def cut_files(folder: Path, pattern: str) -> None:
    """Leave the first half of each file."""
    for path in folder.glob(pattern):
        os.truncate(path, path.stat().st_size // 2)


@dataclass(frozen=True)
class Case:
    """`flags` change those of a good call, `{}` in a text is the folder; `damage` spoils the folder; `says` is told."""

    name: str
    says: tuple[str, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    damage: Damage = lambda folder: None


def edit_json(name: str, **changes: Any) -> Damage:
    """Change keys of a JSON object; None takes a key out."""

    def damage(folder: Path) -> None:
        table = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in table.items() if v is not None}))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def pipe(name: str) -> Damage:
    """A FIFO without a writer, at which a read waits for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def loop(name: str) -> Damage:
    """A symbolic link to itself."""
    return lambda folder: (folder / name).symlink_to(name)


def folder_at(name: str) -> Damage:
    return lambda folder: (folder / name).mkdir()


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def edit_tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return damage


def shard(*without: str) -> Damage:
    """The model in two shards and an index; then the files of `without` are removed."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / "model")
        tiny.write_model(folder / "model", num_shards=2)
        for name in without:
            (folder / "model" / name).unlink()

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def drop_model_files(pattern: str) -> Damage:
    return lambda folder: [path.unlink() for path in (folder / "model").glob(pattern)]


def other_backbone(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    tiny.write_model(folder / "model", name="another")


FULL = {"adapter": "full", "num_experts": None, "rank": None}
MOLA = {"adapter": "mola", "num_experts": None}
LORA = {"adapter": "lora", "num_experts": None}
TRAIN = [
    # flags
    Case("unknown flag", ("--bogus", "--help"), {"bogus": 1}),
    Case("not a number", ("--steps", "'ten'", "--help"), {"steps": "ten"}),
    Case("no steps", ("--steps is 0", "an integer from 1 to"), {"steps": 0}),
    Case("negative steps", ("--steps is -3", "an integer from 1 to"), {"steps": -3}),
    Case("no model", ("--model is required",), {"model": None}),
    Case("no data set", ("--dataset is required",), {"dataset": None}),
    Case("top_k above experts", ("--top-k 5", "--num-experts 4", "choose at most"), {"top_k": 5}),
    Case("method unknown", ("--adapter", "'mixture'", "mola"), {"adapter": "mixture"}),
    Case("experts of lora", ("--num-experts is no setting of --adapter lora", "leave it out"), {"adapter": "lora"}),
    Case("targets of pesc", ("--targets is no setting of --adapter pesc",), {"adapter": "pesc", "targets": ["q_proj"]}),
    Case("rank of full", ("--rank is no setting of --adapter full", "leave it out"), FULL | {"rank": 2}),
    Case("depths of adafuse", ("--experts-per-layer is no setting", "leave it out"), {"experts_per_layer": [2]}),
    Case(
        "more depths than layers",
        ("--experts-per-layer 2 3 4", "2 layers", "give at most"),
        MOLA | {"experts_per_layer": [2, 3, 4]},
    ),
    Case("a depth below top_k", ("--experts-per-layer 1 2", "raise"), MOLA | {"experts_per_layer": [1, 2]}),
    Case("none without evaluation", ("--adapter none only evaluates", "raise it"), FULL | {"adapter": "none"}),
    Case("no init LoRA", ("{}/nowhere", "no such adapter", "give"), {"init_lora": "{}/nowhere"}),
    Case("init LoRA is none", ("--init-lora {}/adapter", "of adafuse", "give a LoRA"), {"init_lora": "{}/adapter"}),
    Case("init LoRA of another rank", ("--init-lora {}/lora", "give --rank 2"), {"init_lora": "{}/lora", "rank": 3}),
    Case(
        "init LoRA of other targets",
        ("--init-lora {}/lora", "q_proj", "--targets"),
        {"init_lora": "{}/lora", "targets": ["v_proj"]},
    ),
    Case("init LoRA of pesc", ("--init-lora {}/lora", "leave it out"), {"init_lora": "{}/lora", "adapter": "pesc"}),
    Case("rank 0", ("--rank is 0", "an integer from 1 to"), {"rank": 0}),
    Case("rank beyond every disk", ("--rank is 1000000000", "an integer from 1 to"), {"rank": 10**9}),
    Case("unknown target", ("--targets", "'x_proj'", "choose from"), {"targets": ["q_proj", "x_proj"]}),
    Case("dropout 1", ("--dropout is 1.0", "[0, 1)"), {"dropout": 1.0}),
    Case("learning rate nan", ("--learning-rate is nan", "finite"), {"learning_rate": "nan"}),
    Case("learning rate inf", ("--learning-rate is inf", "finite"), {"learning_rate": "inf"}),
    Case("router share above 1", ("--router-share is 1.5", "[0, 1]"), {"router_share": 1.5}),
    Case("tied share negative", ("--tied-share is -0.1", "[0, 1]"), {"tied_share": -0.1}),
    Case("tied mola", ("--tied-share 0.5", "mola", "leave it out"), {"tied_share": 0.5} | MOLA),
    Case("tied, gates below 1", ("--tied-share 0.5", "--no-renormalize"), {"tied_share": 0.5, "no_renormalize": True}),
    Case("router of a LoRA", ("--router-share 0.5", "no router", "leave"), {"router_share": 0.5} | LORA),
    Case("learning rate negative", ("--learning-rate is -0.1", "in (0, "), {"learning_rate": -0.1}),
    Case("epochs inf", ("--epochs is inf", "finite"), {"epochs": "inf", "steps": None}),
    Case("weight decay nan", ("--weight-decay is nan", "finite"), {"weight_decay": "nan"}),
    Case("weight decay inf", ("--weight-decay is inf", "finite"), {"weight_decay": "inf"}),
    Case("alpha inf", ("--alpha is inf", "finite"), {"alpha": "inf"}),
    Case("beta 1", ("--beta1 is 1.0", "[0, 1)"), {"beta1": 1.0}),
    Case("negative seed", ("--seed is -1", "an integer from 0 to"), {"seed": -1}),
    Case("seed too large", ("--seed is", "from 0 to 4294967295"), {"seed": 2**70}),
    Case("unknown dtype", ("--dtype", "'float16'", "bfloat16"), {"dtype": "float16"}),
    Case("max length tiny", ("--max-length is 4", "from 8 to"), {"max_length": 4}),
    *(
        Case(f"steps {text!r}", ("--steps", f"{text!r} is not an integer", "--help"), {"steps": text})
        for text in ("1_0", "١", "1e3", "1.0", "0x10", "", " ", "1 0", "nan")
    ),
    *(
        Case(f"alpha {text!r}", ("--alpha", f"{text!r} is not a number", "--help"), {"alpha": text})
        for text in ("1_0.0", "٣", "1,5", "0x1p3", "", "1e")
    ),
    Case("steps of 31 digits", ("--steps is 10000", "an integer from 1 to"), {"steps": 10**30}),
    Case("steps of 5000 digits", ("--steps", "'111", "is not an integer"), {"steps": "1" * 5000}),
    Case("a batch that no memory holds", ("--batch-size is 1000000000", "from 1 to 65536"), {"batch_size": 10**9}),
    Case(
        "a micro-batch that no memory holds",
        ("--batch-size 65536 × --max-length 65536", "lower one"),
        {"batch_size": 65536, "max_length": 65536},
    ),
    *(
        Case(f"{name} empty", (f"--{name.replace('_', '-')} is empty", "give a path"), {name: ""})
        for name in ("model", "init_lora")
    ),
    Case("config empty", ("--config is empty", "give a path"), {"config": ""}),
    Case("output not UTF-8", ("--output", "not UTF-8 text (character", "give"), {"output": "{}/caf\udce9"}),
    Case(
        "output in a chain of links", ("--output {}/loop/run", "give another"), {"output": "{}/loop/run"}, loop("loop")
    ),
    Case("output in a pipe", ("--output {}/pipe/run", "give another"), {"output": "{}/pipe/run"}, pipe("pipe")),
    Case("output is a pipe", ("--output {}/pipe", "give another"), {"output": "{}/pipe"}, pipe("pipe")),
    Case("model is a pipe", ("{}/pipe", "is a file", "give"), {"model": "{}/pipe"}, pipe("pipe")),
    Case("max length over context", ("--max-length 300", "256 positions", "lower it"), {"max_length": 300}),
    # --config
    Case("config missing", ("--config {}/c.json", "give an existing file"), {"config": "{}/c.json"}),
    Case("config of unknown kind", ("--config {}/alpha.jsonl", ".toml"), {"config": "{}/alpha.jsonl"}),
    Case(
        "config malformed JSON",
        ("--config {}/c.json", "line 2", "correct the file"),
        {"config": "{}/c.json"},
        write("c.json", '{"rank": 2,\n "top_k" 2}'),
    ),
    Case(
        "config malformed YAML",
        ("--config {}/c.yaml", "line 2", "correct the file"),
        {"config": "{}/c.yaml"},
        write("c.yaml", "rank: 2\n top_k: ]"),
    ),
    Case(
        "config malformed TOML",
        ("--config {}/c.toml", "line 2", "correct the file"),
        {"config": "{}/c.toml"},
        write("c.toml", "rank = 2\ntop_k 2"),
    ),
    Case(
        "config is no table",
        ("--config {}/c.yaml", "holds a YAML list, not an object", "correct"),
        {"config": "{}/c.yaml"},
        write("c.yaml", "- 1"),
    ),
    Case(
        "config unknown key",
        ("--config {}/c.json", "'ranc'", "--help"),
        {"config": "{}/c.json"},
        write("c.json", '{"ranc": 2}'),
    ),
    Case(
        "config bad type",
        ("--config {}/c.json", "--rank", "'two'"),
        {"config": "{}/c.json", "rank": None},
        write("c.json", '{"rank": "two"}'),
    ),
    Case(
        "config not UTF-8",
        ("--config {}/c.yaml", "not UTF-8 (byte 7)", "save it as UTF-8"),
        {"config": "{}/c.yaml"},
        write("c.yaml", b"model: \xff"),
    ),
    *(
        Case(
            f"config {name}", ("--config {}/c" + suffix, *says), {"config": "{}/c" + suffix}, write(f"c{suffix}", text)
        )
        for name, suffix, text, says in (
            ("is empty", ".json", "", ("not valid JSON", "correct the file")),
            ("is an empty YAML", ".yaml", "", ("holds a YAML NoneType", "correct the file")),
            ("steps are a list", ".json", '{"steps": [2]}', ("--steps is [2]", "an integer from 1 to")),
            ("steps are a table", ".toml", "[steps]\na = 1", ("--steps is {'a': 1}", "an integer from 1 to")),
            ("steps are true", ".json", '{"steps": true}', ("--steps is True", "an integer from 1 to")),
            ("steps are 1.5", ".json", '{"steps": 1.5}', ("--steps is 1.5", "an integer from 1 to")),
            ("steps are huge", ".json", '{"steps": 1' + "0" * 4000 + "}", ("--steps is an integer of", "from 1 to")),
            ("steps are NaN", ".json", '{"steps": NaN}', ("--steps is nan", "an integer from 1 to")),
            ("packing is a number", ".json", '{"packing": 1}', ("--packing is 1", "true or false")),
            ("adapter is a date", ".toml", "adapter = 2026-01-01", ("--adapter is datetime.date(2026", "in quotes")),
            ("model is no", ".yaml", "model: no", ("--model is False", "write it in quotes")),
            ("a list of tables", ".json", '{"targets": [{"a": []}]}', ("--targets is {'a': []}", "in quotes")),
            ("a NUL in a path", ".json", '{"init_lora": "a\\u0000b"}', ("--init-lora", "NUL")),
            ("a surrogate in a path", ".json", '{"init_lora": "\\ud800"}', ("--init-lora", "not UTF-8")),
            ("a key twice", ".json", '{"log-every": 1, "log_every": 2}', ("--log-every is given twice", "leave one")),
            ("deep", ".json", '{"a": ' + "[" * 100_000, ("nested too deeply", "correct")),
            ("deep YAML", ".yaml", "[" * 100_000, ("--config", "correct")),
            ("deep TOML", ".toml", "a = " + "[" * 100_000, ("--config", "correct")),
            ("references in YAML", ".yaml", "rank: &a [1]\ntargets: [*a, *a]", ("reference", "correct")),
            ("a broken timestamp", ".yaml", "rank: !!timestamp x", ("not valid YAML", "correct")),
            ("a broken number", ".yaml", "rank: !!int ''", ("not valid YAML", "correct")),
            ("too long", ".json", '{"output": "' + "x" * 2**21 + '"}', ("more than 1048576 bytes",)),
        )
    ),
    Case("config is a pipe", ("--config {}/c.json", "not a regular file"), {"config": "{}/c.json"}, pipe("c.json")),
    Case("config is a folder", ("--config {}/c.json", "not a regular"), {"config": "{}/c.json"}, folder_at("c.json")),
    Case("config name too long", ("--config", "too long"), {"config": f"{LONG_NAME}.json"}),
    # --output
    Case("output is a file", ("--output {}/alpha.jsonl", "another directory"), {"output": "{}/alpha.jsonl"}),
    Case("output below a file", ("--output {}/alpha.jsonl/run", "another"), {"output": "{}/alpha.jsonl/run"}),
    Case("output holds other files", ("--output {}/model", "in use", "another directory"), {"output": "{}/model"}),
    Case("output name too long", ("--output", "too long", "another"), {"output": f"{{}}/{LONG_NAME}"}),
    Case("output read-only", ("--output /proc/run", "another"), {"output": "/proc/run"}),
    Case("resume without a run", ("--output {}/run", "no run to resume", "--resume"), {"resume": True}),
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
        ("{}/model/config.json", "'gelu'", "supported: silu"),
        damage=edit_json("model/config.json", hidden_act="gelu"),
    ),
    Case(
        "quantised",
        ("{}/model/config.json", "quantised", "give"),
        damage=edit_json("model/config.json", quantization_config={"bits": 4}),
    ),
    Case(
        "rope type",
        ("{}/model/config.json", "'yarn'", "supported"),
        damage=edit_json("model/config.json", rope_scaling={"rope_type": "yarn", "factor": 2}),
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
            ("{}/model", *says),
            damage=both(drop_model_files("tokenizer*"), damage),
        )
        for name, damage, says in (
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
    # data
    Case("data missing", ("{}/none.jsonl", "no such dataset", "give"), {"dataset": "{}/none.jsonl"}),
    Case("data preset misspelt", ("slimorka", "did you mean slimorca"), {"dataset": "slimorka"}),
    Case("data on an unreachable hub", ("nobody/nothing", "hub", "check"), {"dataset": "nobody/nothing"}),
    Case("data format unknown", ("alpha.jsonl", "'tsv'", "alpaca"), {"dataset": "{}/alpha.jsonl@tsv"}),
    Case("data weight 0", ("alpha.jsonl", "weight", "above 0"), {"dataset": "{}/alpha.jsonl=0"}),
    Case("data weight nan", ("alpha.jsonl", "weight", "above 0"), {"dataset": "{}/alpha.jsonl=nan"}),
    Case("data weight of some", ("weight", "each"), {"dataset": ["{}/alpha.jsonl=2", "{}/beta.jsonl"]}),
    Case("data weight tiny", ("dataset 1", "weight", "raise"), {"dataset": ["{}/alpha.jsonl=1e-9", "{}/beta.jsonl=1"]}),
    Case(
        "data of lone surrogates",
        ("{}/alpha.jsonl", "surrogate", "row 1, line 1", "correct"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": "\\ud83d"}\n'),
    ),
    Case("data spec empty", ("dataset", "SOURCE"), {"dataset": ""}),
    Case("data of unknown type", ("{}/alpha.txt", ".jsonl"), {"dataset": "{}/alpha.txt"}, write("alpha.txt", "x")),
    Case("data folder empty", ("{}/none", "put"), {"dataset": "{}/none"}, lambda folder: (folder / "none").mkdir()),
    Case("data empty", ("{}/alpha.jsonl", "empty", "give"), damage=write("alpha.jsonl", "")),
    Case("data without rows", ("{}/e.json", "no rows", "give"), {"dataset": "{}/e.json"}, write("e.json", "[]")),
    Case(
        "data line malformed",
        ("{}/alpha.jsonl", "line 2", "fix"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a" "output"}\n'),
    ),
    Case(
        "data not UTF-8",
        ("{}/alpha.jsonl", "line 1", "UTF-8", "convert"),
        damage=write("alpha.jsonl", b'{"instruction": "caf\xe9", "output": "b"}\n'),
    ),
    Case(
        "data column missing",
        ("{}/alpha.jsonl", "output", "columns"),
        damage=write("alpha.jsonl", '{"instruction": "a"}\n'),
    ),
    Case(
        "data value missing",
        ("{}/alpha.jsonl", "row 2", "'output'"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": null}\n'),
    ),
    Case(
        "data replies empty",
        ("{}/alpha.jsonl", "no usable rows", "give"),
        damage=write("alpha.jsonl", '{"instruction": "a", "output": ""}\n'),
    ),
    Case("data parquet corrupt", ("{}/a.parquet", "check"), {"dataset": "{}/a.parquet"}, write("a.parquet", b"PAR1")),
    Case("data longer than max length", ("{}/alpha.jsonl", "--max-length 8", "raise"), {"max_length": 8}),
    Case(
        "nothing to hold out",
        ("{}/alpha.jsonl", "cannot hold out", "give"),
        {"eval_examples": 4},
        write("alpha.jsonl", '{"instruction": "a", "output": "b"}\n'),
    ),
    Case(
        "held-out data missing",
        ("{}/none.jsonl", "no such dataset", "give"),
        {"eval_dataset": "{}/none.jsonl", "eval_examples": 4},
    ),
]

ADAPTER = {"adapter": "{}/adapter"}
PROMPTS = {"prompt": None, "prompts_file": "{}/p.jsonl"}
OTHERS: dict[str, dict[str, Any]] = {
    "lora": {}, "moral": {"num_experts": 4}, "mola": {"experts_per_layer": (2, 3)}, "pesc": {"num_experts": 4},
}  # fmt: skip
DECODE = [
    # flags
    Case("unknown flag", ("--bogus", "--help"), {"bogus": 1}),
    Case("no model", ("--model is required",), {"model": None}),
    Case("no tokens", ("--max-new-tokens is 0", "an integer from 1 to"), {"max_new_tokens": 0}),
    Case("temperature negative", ("--temperature is -1.0", "in [0, "), {"temperature": -1}),
    Case("temperature nan", ("--temperature is nan", "finite"), {"temperature": "nan"}),
    Case("temperature inf", ("--temperature is inf", "finite"), {"temperature": "inf"}),
    Case("top_k negative", ("--top-k is -1", "an integer from 0 to"), {"top_k": -1}),
    Case("top_k 2**31", ("--top-k is 2147483648", "from 0 to 2147483647"), {"top_k": 2**31}),
    Case("adapter empty", ("--adapter is empty", "leave it out"), {"adapter": ""}),
    Case("prompts file empty", ("--prompts-file is empty", "leave it out"), PROMPTS | {"prompts_file": ""}),
    Case("top_p 0", ("--top-p is 0.0", "(0, 1]"), {"top_p": 0}),
    Case("top_p 1.5", ("--top-p is 1.5", "(0, 1]"), {"top_p": 1.5}),
    Case("penalty 0", ("--repetition-penalty is 0.0", "in (0, 1e+38]"), {"repetition_penalty": 0}),
    Case("penalty inf", ("--repetition-penalty is inf", "finite"), {"repetition_penalty": "inf"}),
    Case("seed too large", ("--seed is", "from 0 to 4294967295"), {"seed": 2**70}),
    Case("stop empty", ("--stop", "empty", "leave it out"), {"stop": ""}),
    Case("prompt twice", ("--prompt and --prompts-file", "give one"), {"prompts_file": "{}/p.txt"}),
    Case("prompt and chat", ("--prompt and --chat", "give one"), {"chat": True}),
    Case("chat as JSON", ("--json and --chat", "give one"), {"chat": True, "json": True, "prompt": None}),
    Case("raw chat", ("--raw and --chat", "give one"), {"chat": True, "raw": True, "prompt": None}),
    Case("raw with system", ("--raw", "--system", "write it"), {"raw": True, "system": "Be brief."}),
    Case("dtype unknown", ("--dtype", "'int8'", "bfloat16"), {"dtype": "int8"}),
    Case("strategy unknown", ("--strategy", "'fast'", "golden"), {"strategy": "fast"}),
    *(
        Case(f"{strategy} without adapter", (f"--strategy {strategy}", "give --adapter"), {"strategy": strategy})
        for strategy in ("golden", "switch", "simple", "merged")
    ),
    *(
        Case(
            f"{strategy} of {method}",
            (f"--strategy {strategy} does not fit an adapter of {method}", "unmerged"),
            {"adapter": f"{{}}/{folder}", "strategy": strategy},
        )
        for method, folder in (("adafuse", "adapter"), *((m, m) for m in OTHERS))
        for strategy in get_args(Strategy)
        if strategy not in PRESETS[method].strategies
    ),
    Case("more devices than there are", ("--tensor-parallel 64", "at most"), {"tensor_parallel": 64}),
    Case("no device", ("--tensor-parallel is 0", "an integer from 1 to"), {"tensor_parallel": 0}),
    Case(
        "merging on several devices",
        ("--strategy switch", "--tensor-parallel", "unmerged"),
        ADAPTER | {"strategy": "switch", "tensor_parallel": 2},
    ),
    Case("batch without a file", ("--batch-size", "--prompts-file", "leave"), {"batch_size": 2}),
    Case("batch of 0", ("--batch-size is 0", "an integer from 1 to"), PROMPTS | {"batch_size": 0}),
    Case(
        "merging a batch",
        ("--strategy golden", "one prompt", "--batch-size 1"),
        ADAPTER | PROMPTS | {"strategy": "golden", "batch_size": 2},
    ),
    # prompts
    Case(
        "a later prompt too long",
        ("prompt 2", "shorten"),
        PROMPTS | {"batch_size": 1},
        write("p.jsonl", '{"prompt": "Hi"}\n{"prompt": "' + "word " * 5000 + '"}\n'),
    ),
    *(
        Case(
            f"prompts line {line}",
            ("--prompts-file {}/p.jsonl, line 1", "give"),
            PROMPTS,
            write("p.jsonl", line + "\n"),
        )
        for line in ("[1]", '"hello"', "5", "null")
    ),
    Case("prompt longer than context", ("the prompt has", "context holds 256", "shorten"), {"prompt": "a" * 300}),
    Case("prompt not UTF-8", ("--prompt", "not UTF-8", "give"), {"prompt": "caf\udce9"}),
    Case(
        "prompt without a token",
        ("prompt is empty", "give"),
        {"prompt": "", "raw": True},
        edit_json("model/tokenizer_config.json", bos_token=None),
    ),
    Case("prompts missing", ("--prompts-file {}/p.jsonl", "give an existing"), PROMPTS),
    Case("prompts are a directory", ("--prompts-file {}/model", "give"), PROMPTS | {"prompts_file": "{}/model"}),
    Case("prompts empty", ("--prompts-file {}/p.jsonl", "no prompt", "write"), PROMPTS, write("p.jsonl", "\n \n")),
    Case(
        "prompts not UTF-8",
        ("--prompts-file {}/p.jsonl", "not UTF-8", "save"),
        PROMPTS,
        write("p.jsonl", b'{"prompt": "caf\xe9"}'),
    ),
    Case(
        "prompts line malformed",
        ("--prompts-file {}/p.jsonl, line 2", "give"),
        PROMPTS,
        write("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n'),
    ),
    Case(
        "prompts line is no prompt",
        ("--prompts-file {}/p.jsonl, line 1", "give"),
        PROMPTS,
        write("p.jsonl", '{"promt": "a"}\n'),
    ),
    Case(
        "prompts of lone surrogates",
        ("--prompts-file {}/p.jsonl, line 1", "not UTF-8", "give"),
        PROMPTS,
        write("p.jsonl", '{"prompt": "\\ud83d"}\n'),
    ),
    Case(
        "prompts role unknown",
        ("--prompts-file {}/p.jsonl, line 1", "turn 1: unknown role '5'", "use system, "),
        PROMPTS,
        write("p.jsonl", '{"messages": [{"role": 5, "content": "a"}]}\n'),
    ),
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

STEP_2 = "run/checkpoints/2"
RESUME = [
    Case("output in use", ("--output {}/run", "in use", "--resume"), {"resume": None}),
    Case("another method", ("{}/" + STEP_2, "adapter 'adafuse'", "'moral'", "resume with"), {"adapter": "moral"}),
    Case("another beginning", ("{}/" + STEP_2, "initial", "resume with the same"), {"init_lora": "{}/lora"}),
    Case("another rank", ("{}/" + STEP_2, "rank 2", "has 3", "resume with the same"), {"rank": 3}),
    Case("other targets", ("{}/" + STEP_2, "targets", "resume with the same"), {"targets": ["q_proj"]}),
    Case("tied experts", ("{}/" + STEP_2, "tied_share 0.0", "has 0.5", "resume with the same"), {"tied_share": 0.5}),
    Case("another seed", ("{}/" + STEP_2, "seed 0", "resume with the same"), {"seed": 1}),
    Case("another length", ("{}/" + STEP_2, "total_steps 2", "resume with the same"), {"steps": 4}),
    Case("another data set", ("{}/" + STEP_2, "data", "resume with the same"), {"dataset": "{}/beta.jsonl"}),
    Case("another weight", ("{}/" + STEP_2, "data", "resume with the same"), {"dataset": "{}/alpha.jsonl=2"}),
    Case(
        "changed data set",
        ("{}/" + STEP_2, "data", "resume with the same"),
        damage=lambda folder: shutil.copy(folder / "beta.jsonl", folder / "alpha.jsonl"),
    ),
    Case("another backbone", ("{}/" + STEP_2, "backbone", "resume with the same"), damage=other_backbone),
    Case("run lost its config", ("{}/run", "no run to resume"), damage=remove("run/train_config.json")),
    *(
        Case(f"checkpoint without {name}", ("{}/" + STEP_2, "no checkpoint can be used", "restore"), damage=damage)
        for name, damage in (
            ("state", lambda folder: shutil.rmtree(folder / STEP_2 / "state")),
            ("arrays", lambda folder: shutil.rmtree(folder / STEP_2 / "state/d")),
            ("identity", lambda folder: shutil.rmtree(folder / STEP_2 / "identity")),
            ("a whole array", lambda folder: cut_files(folder / STEP_2, "state/**/d/*")),
            ("a whole identity", lambda folder: cut_files(folder / STEP_2, "identity/metadata")),
            ("sense in its identity", write(STEP_2 + "/identity/metadata", "null")),
        )
    ),
]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything good in it: model, data, an adapter of AdaFuse in `adapter`, and one of each other method."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("template"))
    model, identity = read_model_config(folder / "model"), backbone_identity(folder / "model")
    for method, settings in {"adafuse": {"num_experts": 4}, **OTHERS}.items():
        adapter = make_adapter(AdapterConfig(adapter=method, rank=2, **settings), model, rngs=nnx.Rngs(0))
        out = folder / ("adapter" if method == "adafuse" else method)
        save_adapter(adapter, out, backbone_name="tiny", backbone_identity=identity)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "work", copy_function=shutil.copy2))


@pytest.fixture(scope="session")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder, moved, with a run of two steps in `run`."""
    folder = Path(shutil.copytree(template, tmp_path_factory.mktemp("finished") / "work"))
    done = tiny.run_script("train", tiny.train_flags(folder))
    assert done.returncode == 0, done.stderr
    return folder


def run_here(script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The script's exit code, run in this process as `python SCRIPT.py FLAGS` would."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tiny.REPOSITORY / f"{script}.py"), run_name="__main__")
    return end.value.code


def flags_of(case: Case, script: str, folder: Path) -> list[str]:
    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(v) for v in value]
        return value.replace("{}", str(folder)) if isinstance(value, str) else value

    build = tiny.train_flags if script == "train" else tiny.decode_flags
    return build(folder, **{name: placed(value) for name, value in case.flags.items()})


def check_told(stderr: str, says: tuple[str, ...], folder: Path) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    for text in says:
        assert text.replace("{}", str(folder)) in line, line


def parametrize(*tables: tuple[str, list[Case]]) -> pytest.MarkDecorator:
    cases = [(script, case) for script, table in tables for case in table]
    ids = [f"{script}-{case.name.replace(' ', '_')}" for script, case in cases]
    return pytest.mark.parametrize(("script", "case"), cases, ids=ids)


def check_refused(
    script: str, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line that says what the case wants, exit code 2, and the folder as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    case.damage(folder)
    before = tiny.snapshot(folder)
    code = run_here(script, flags_of(case, script, folder), monkeypatch)
    out, err = capfd.readouterr()
    check_told(err, case.says, folder)
    assert (code, out) == (2, "")
    assert tiny.snapshot(folder) == before


@parametrize(("train", TRAIN), ("decode", DECODE))
def test_one_line_and_nothing_changed(
    script: str, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    check_refused(script, case, folder, monkeypatch, capfd)


@parametrize(("train", RESUME))
def test_resume_told_and_nothing_changed(
    script: str,
    case: Case,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    folder = Path(shutil.copytree(finished, tmp_path / "work"))
    check_refused(script, replace(case, flags={"resume": True} | case.flags), folder, monkeypatch, capfd)


@pytest.fixture
def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str, Case], None]:
    return lambda script, case: check_refused(script, case, folder, monkeypatch, capfd)


def test_read_only_output(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused("train", Case("read-only", ("--output {}/run", "{} is not a writable directory", "give another")))


def test_full_disk(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(
        "train",
        Case("full disk", ("--output {}/run", "2 checkpoints", "GB are free", "free space"), {"checkpoint_every": 1}),
    )


def test_space_is_asked_for_as_many_checkpoints_as_the_run_writes(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    """--keep-checkpoints 1000000000 means all of them."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    flags = {"keep_checkpoints": 10**9, "steps": 9, "checkpoint_every": 4}
    refused("train", Case("all checkpoints", ("--output {}/run: 3 checkpoints", "GB are free"), flags))


def test_too_little_memory(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    def load(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nAnd more.")

    monkeypatch.setattr("adafuse_jax.training.trainer.load_backbone", load)
    refused("train", Case("memory", ("too little memory", "allocating 5 bytes", "lower --batch-size")))


@pytest.mark.parametrize("chat", [True, None])
def test_stdin_not_utf8(refused: Callable, monkeypatch: pytest.MonkeyPatch, chat: bool | None):
    # As in a C locale, where Python lets the bytes through.
    broken = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", broken)
    refused("decode", Case("stdin", ("stdin: not UTF-8", "give UTF-8"), {"prompt": None, "chat": chat}))


def test_a_run_can_be_repeated_from_its_own_config(finished: Path, tmp_path: Path):
    """Every value that train_config.json holds is accepted by --config."""
    again = [f"--config={finished}/run/train_config.json", f"--output={tmp_path}/again"]
    configs = parse_flags("", (TrainConfig, AdapterConfig), again)
    first = parse_flags("", (TrainConfig, AdapterConfig), tiny.train_flags(finished))
    assert [replace(configs[0], output=first[0].output), configs[1]] == first


PROCESSES = [
    ("train", Case("flag", ("--top-k 5", "--num-experts 4", "choose at most"), {"top_k": 5})),
    ("train", Case("data", ("{}/alpha.jsonl", "line 1", "fix"), damage=write("alpha.jsonl", "{"))),
    ("train", Case("weights", ("{}/" + WEIGHTS, "truncated", "restore"), damage=truncate(WEIGHTS))),
    ("train", Case("hub", ("nobody/nothing", "hub", "check the id"), {"model": "nobody/nothing"})),
    ("train", Case("output", ("--output {}/model", "in use", "give another"), {"output": "{}/model"})),
    ("decode", Case("adapter", ("{}/" + ADAPTER_CONFIG, "restore"), ADAPTER, truncate(ADAPTER_CONFIG))),
    ("decode", Case("prompt", ("the prompt has", "context holds 256", "shorten"), {"prompt": "a" * 300})),
    ("decode", Case("stdin", ("stdin: not UTF-8", "give UTF-8"), {"prompt": None})),
]


@pytest.mark.parametrize(("script", "case"), PROCESSES, ids=[f"{s}-{c.name}" for s, c in PROCESSES])
def test_process(script: str, case: Case, folder: Path):
    case.damage(folder)
    before = tiny.snapshot(folder)
    done = tiny.run_script(script, flags_of(case, script, folder), input=b"caf\xe9\n")
    check_told(done.stderr, case.says, folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert tiny.snapshot(folder) == before


def test_answers_print_in_any_locale(folder: Path):
    edit_tensors(WEIGHTS, lambda t: t["model.embed_tokens.weight"].__setitem__(slice(0, 140), 0))(folder)
    done = tiny.run_script("decode", tiny.decode_flags(folder), env=tiny.environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout
