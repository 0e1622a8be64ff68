"""Mistakes in flags, in a --config file and in --output: one line, exit code 2, nothing on disk changed."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from mistakes import ADAPTER, LONG_NAME, OTHERS, PROMPTS, Case, check_refused, folder_at, loop, parametrize, pipe, write

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.inference.backends.registry import strategies_of
from adafuse_jax.inference.config import Strategy

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
    Case("a flag that was", ("--no-remat: give --remat none instead",), {"no_remat": True}),
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
    Case("mesh of unknown axes", ("--mesh 'rows=2'", "give sizes of data, fsdp, tensor"), {"mesh": "rows=2"}),
    Case("mesh of too many", ("--mesh fsdp=64: 64 devices are more than", "give other sizes"), {"mesh": "fsdp=64"}),
    Case("coordinator alone", ("--coordinator, --num-processes", "give all three"), {"coordinator": "h:1"}),
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
            f"config {name}",
            ("--config {}/c" + suffix, *expected),
            {"config": "{}/c" + suffix},
            write(f"c{suffix}", text),
        )
        for name, suffix, text, expected in (
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
]
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
    Case("strategy moved", ("--strategy", "'simple'", "benchmarks/simple_merging.py"), {"strategy": "simple"}),
    *(
        Case(f"{strategy} without adapter", (f"--strategy {strategy}", "give --adapter"), {"strategy": strategy})
        for strategy in ("golden", "switch", "merged")
    ),
    *(
        Case(
            f"{strategy} of {method}",
            (f"--strategy {strategy} does not fit an adapter of {method}", "unmerged"),
            {"adapter": f"{{}}/{folder}", "strategy": strategy},
        )
        for method, folder in (("adafuse", "adapter"), *((m, m) for m in OTHERS))
        for strategy in get_args(Strategy)
        if strategy not in strategies_of(AdapterConfig(adapter=method))
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
]


@parametrize(("train", TRAIN), ("decode", DECODE))
def test_one_line_and_nothing_changed(
    script: str, case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    check_refused(script, case, folder, monkeypatch, capfd)
