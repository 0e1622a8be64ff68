"""`--quantize` from training to export, by the commands."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import decode as decode_script
import train as train_script
from adafuse_jax import export as export_script
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core.errors import UserError
from adafuse_jax.evaluation.__main__ import run as evaluate
from adafuse_jax.evaluation.config import EvaluationConfig
from adafuse_jax.evaluation.lm_eval import AdaFuseLM
from adafuse_jax.models.quantised import head_quantisation_of, quantisation_of
from adafuse_jax.serving.config import ServeConfig
from adafuse_jax.serving.models import load_models
from pallas_kernels.quantised import INT8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_folder(tmp_path_factory.mktemp("quantised"))
    tiny.write_model(folder / "model", hidden_size=64, intermediate_size=128)
    return folder


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    """A LoRA trained on a backbone of 4 bits."""
    flags = tiny.train_flags(
        folder,
        "run",
        adapter="lora",
        num_experts=None,
        quantize="int4-g64",
        steps=4,
        checkpoint_every=2,
        learning_rate=0.03,
    )
    assert train_script.main(flags) == 0
    return folder / "run" / "adapter"


def answer(folder: Path, capsys: pytest.CaptureFixture[str], **changes) -> list[int]:
    capsys.readouterr()
    decode_script.main(tiny.decode_flags(folder, json=True, **changes))
    return json.loads(capsys.readouterr().out)["token_ids"]


def export(*flags: str) -> None:
    export_script.main(["--model", *flags])


def test_the_adapter_names_its_quantisation(folder: Path, lora: Path, caplog, capsys):
    config = json.loads((lora / "adapter_config.json").read_text())
    assert config["backbone"]["quantization"] == "int4-g64"
    caplog.set_level(logging.INFO)
    quantised = answer(folder, capsys, adapter=lora, quantize="int4-g64")
    assert "was trained on" not in caplog.text
    assert "the linears' weights are quantised to int4-g64" in caplog.text
    answer(folder, capsys, adapter=lora)
    assert "was trained on a backbone of 'int4-g64', this one has plain weights" in caplog.text
    assert quantised != answer(folder, capsys, quantize="int4-g64")


def test_a_run_resumes_in_its_quantisation_only(folder: Path, lora: Path):
    flags = tiny.train_flags(
        folder, "run", adapter="lora", num_experts=None, steps=4, checkpoint_every=2, learning_rate=0.03, resume=True
    )
    with pytest.raises(UserError, match="was made with quantization 'int4-g64', this run has None"):
        train_script.main(flags)


def test_export(folder: Path, lora: Path, capsys):
    """Written codes take the adapter of the model they were made of, and give the tokens of those made while loading; the
    LoRA merges onto the plain model."""
    model, small = str(folder / "model"), folder / "int4"
    export(model, "--quantize", "int4-g64", "--output", str(small))
    assert HFCheckpoint.open(small).identity() == HFCheckpoint.open(model).identity()
    for adapter in (None, lora):
        wanted = answer(folder, capsys, adapter=adapter, quantize="int4-g64")
        assert answer(folder, capsys, model=small, adapter=adapter) == wanted
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (small, folder / "model")]
    assert sizes[0] < 0.7 * sizes[1]  # embeddings are as large as the linears here
    export(model, "--adapter", str(lora), "--output", str(folder / "merged"))
    before, after = (load_file(d / "model.safetensors") for d in (folder / "model", folder / "merged"))
    tensors, name = load_file(lora / "adapter_model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    a, b = (tensors[f"experts.q_proj.{x}"][1, 0] for x in "AB")
    scale = json.loads((lora / "adapter_config.json").read_text())["alpha"] / 2
    np.testing.assert_allclose(after[name], before[name] + scale * b @ a, atol=1e-4)
    assert abs(after[name] - before[name]).max() > 0.01
    with pytest.raises(UserError, match="the weights are int4-g64, whose codes cannot hold what is merged into them"):
        export(str(small), "--adapter", str(lora), "--output", str(folder / "no"))
    export(str(small), "--adapter", str(lora), "--output", str(folder / "peft"), "--format", "peft")
    shutil.copytree(lora, folder / "outer" / "named")  # found from the folder around it, as PEFT's are
    export(model, "--adapter", str(folder / "outer"), "--output", str(folder / "again"), "--format", "adafuse-jax")
    assert json.loads((folder / "again" / "adapter_config.json").read_text())["backbone"]["quantization"] == "int4-g64"


def test_head(folder: Path, capsys, caplog):
    """A head of 8 bits from training to an export that decodes as the flags do; the embedding it was tied to stays."""
    model, flags = str(folder / "model"), {"quantize": "int4-g64", "quantize_head": True}
    run = {"adapter": "lora", "num_experts": None, "steps": 2, "learning_rate": 0.03, "checkpoint_every": 1}
    assert train_script.main(tiny.train_flags(folder, "head", **run, **flags)) == 0
    adapter = folder / "head" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["backbone"]["quantization"] == "int4-g64 and head int8"
    with pytest.raises(UserError, match=r"made with quantization 'int4-g64 and head int8', this run has 'int4-g64'"):
        train_script.main(tiny.train_flags(folder, "head", **run, quantize="int4-g64", resume=True))
    caplog.set_level(logging.INFO)
    wanted = answer(folder, capsys, adapter=adapter, **flags)
    assert "the head's weights are quantised to int8" in caplog.text
    assert "was trained on" not in caplog.text
    export(model, "--quantize", "int4-g64", "--quantize-head", "--output", str(folder / "small"))
    assert answer(folder, capsys, model=folder / "small", adapter=adapter) == wanted
    tensors = load_file(folder / "small" / "model.safetensors")
    before = load_file(folder / "model" / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert len(tensors["lm_head.weight_scale"]) == len(before["model.embed_tokens.weight"])
    export(model, "--quantize", "int4-g64", "--output", str(folder / "linears"))
    export(str(folder / "linears"), "--quantize-head", "--output", str(folder / "later"))  # of the codes that it has
    assert load_file(folder / "later" / "model.safetensors").keys() == tensors.keys()
    assert answer(folder, capsys, model=folder / "later", adapter=adapter) == wanted
    out = str(folder / "none")
    for command in (
        lambda: answer(folder, capsys, quantize_head=True),
        lambda: export(model, "--quantize-head", "--adapter", str(adapter), "--output", out),
    ):
        with pytest.raises(UserError, match=r"--quantize-head: the linears .* plain.*; give --quantize with it"):
            command()


def test_evaluation(folder: Path, lora: Path, caplog):
    caplog.set_level(logging.INFO)
    config = EvaluationConfig(
        model=str(folder / "model"), adapter=str(lora), dataset=(str(folder / "choices.jsonl"),), limit=2, split="train",
        quantize="int8", quantize_head=True, generate=False,
    )  # fmt: skip
    assert evaluate(config)["settings"]["quantize"] == "int8"
    assert "the linears' weights are quantised to int8" in caplog.text
    harness = AdaFuseLM(str(folder / "model"), quantize="int8", quantize_head=True).loaded.model
    assert quantisation_of(harness) == head_quantisation_of(harness) == INT8


def test_serving(folder: Path, lora: Path):
    quantize = {"quantize": "int8", "quantize_head": True}
    config = ServeConfig(model=str(folder / "model"), adapters=(f"a={lora}",), max_slots=2, **quantize)
    models, _ = load_models(config, now=0)
    assert quantisation_of(models._engine.model) == head_quantisation_of(models._engine.model) == INT8
    with pytest.raises(UserError, match="strategy fused cannot run: it reads a plain head, and this one is int8"):
        load_models(replace(config, strategy="fused"), now=0)


def test_refusals(folder: Path, tmp_path: Path):
    full = {"adapter": "full", "num_experts": None, "rank": None}
    with pytest.raises(UserError, match="--quantize int8: --adapter full trains every weight, and codes do not train"):
        train_script.main(tiny.train_flags(folder, "no", quantize="int8", **full))
    export(str(folder / "model"), "--quantize", "int8", "--output", str(tmp_path / "int8"))
    with pytest.raises(UserError, match="the weights are int8, and --adapter full trains every weight"):
        train_script.main([*tiny.train_flags(folder, "no", **full), f"--model={tmp_path / 'int8'}"])
    with pytest.raises(UserError, match="q_proj has 64 inputs, no multiple of 128; give --quantize int8 or"):
        decode_script.main(tiny.decode_flags(folder, quantize="int4"))
    with pytest.raises(UserError, match="strategy golden cannot run: it would merge experts into int8 weights"):
        decode_script.main(tiny.decode_flags(folder, quantize="int8", strategy="golden", adapter=folder / "none"))
    for flags, fault in (
        ((), "there is nothing to export; give --adapter, or --quantize"),
        (("--adapter", "x", "--quantize", "int8", "--format", "peft"), "--quantize is for --format huggingface"),
        (("--adapter", "x", "--quantize-head", "--format", "peft"), "--quantize-head is for --format huggingface"),
    ):
        with pytest.raises(UserError, match=fault):
            export(str(folder / "model"), "--output", str(tmp_path / "out"), *flags)
