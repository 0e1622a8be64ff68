"""`train.py` and `decode.py` with every method: a run, the same run resumed, and what it leaves for decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import quick
import tiny
from flax import nnx
from safetensors.numpy import load_file

import decode as decode_script
import train as train_script
from adafuse_jax import AdapterConfig
from adafuse_jax.adapters.registry import make_adapter
from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.checkpoints.hf_config import parse_hf_config
from adafuse_jax.checkpoints.peft import save_peft_lora

FEW = {"targets": ["q_proj", "down_proj"]}
SETTINGS: dict[str, dict] = {
    "lora": {"num_experts": None, **FEW},
    "mola": {"num_experts": None, "experts_per_layer": [2, 3], **FEW},
    "pesc": {},
    "full": {"num_experts": None, "rank": None, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("methods"))


def train(folder: Path, output: str, **changes) -> dict:
    """Run train.py in this process; the summary that it writes."""
    assert train_script.main(tiny.train_flags(folder, output, **changes)) == 0
    return json.loads((folder / output / "summary.json").read_text())


def answer(folder: Path, capsys, **changes) -> list[int]:
    capsys.readouterr()
    decode_script.main(tiny.decode_flags(folder, json=True, max_new_tokens=8, **changes))
    return json.loads(capsys.readouterr().out)["token_ids"]


@pytest.fixture
def bare(folder, capsys) -> list[int]:
    return answer(folder, capsys)


@pytest.mark.parametrize("method", quick.first(SETTINGS))
def test_a_resumed_run_ends_as_one_that_was_not_stopped(folder, capsys, bare, method):
    """Equality bit for bit; and the adapter's answers differ from the backbone's."""
    flags = {
        "adapter": method, "steps": 4, "checkpoint_every": 2, "learning_rate": 3e-2, "eval_examples": 4, **SETTINGS[method],
    }  # fmt: skip
    summary = train(folder, method, **flags)
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    kind, weights = ("model", "model.safetensors") if method == "full" else ("adapter", "adapter_model.safetensors")
    left = folder / method / kind
    before = load_file(left / weights)
    shutil.rmtree(folder / method / "checkpoints" / "4")
    shutil.rmtree(left)
    again = train(folder, method, **flags, resume=True)
    assert again["trainable_parameters"] == summary["trainable_parameters"] > 0
    after = load_file(left / weights)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert ("load" in (folder / method / "metrics.jsonl").read_text()) == (method not in ("lora", "full"))
    assert answer(folder, capsys, **({"model": left} if method == "full" else {"adapter": left})) != bare


def test_full_leaves_a_plain_model_of_which_nothing_is_the_backbone(folder):
    """Model in the dtype of its training, with the tokenizer."""
    if not (folder / "full").exists():
        train(folder, "full", adapter="full", steps=4, learning_rate=3e-2, **SETTINGS["full"])
    summary = json.loads((folder / "full" / "summary.json").read_text())
    old, new = load_backbone(folder / "model", "bfloat16"), load_backbone(folder / "full" / "model")
    leaves = [dict(nnx.to_flat_state(nnx.state(model))) for model in (old, new)]
    assert summary["trainable_parameters"] == sum(leaf[...].size for leaf in leaves[0].values())
    assert all(not np.array_equal(leaves[0][path][...], leaf[...]) for path, leaf in leaves[1].items())
    assert new.dtype == "bfloat16"
    assert (folder / "full" / "model" / "tokenizer.json").exists()
    assert not (folder / "full" / "adapter").exists()


@pytest.mark.slow
def test_none_is_the_backbone_and_a_run_may_begin_from_a_lora_of_peft(folder):
    """Comparison of first held-out losses: that of a new LoRA is the backbone's, with --init-lora it is the LoRA's,
    whatever the method."""
    config = AdapterConfig(adapter="lora", rank=2, targets=("q_proj", "down_proj"))
    model = parse_hf_config(folder / "model").model
    lora = make_adapter(config, model, rngs=nnx.Rngs(0))
    for expert in lora.experts.values():
        expert.B[...] = expert.B[...] + 0.3
    save_peft_lora(lora, folder / "peft", model, backbone_name="tiny")
    runs = {
        "none": {"adapter": "none", "num_experts": None, "rank": None},
        "new": {"adapter": "lora", **SETTINGS["lora"]},
        "lora_of_peft": {"adapter": "lora", "init_lora": folder / "peft", "alpha": 3.0, **SETTINGS["lora"]},
        "mola_of_peft": {"adapter": "mola", "init_lora": folder / "peft", **SETTINGS["mola"]},
    }
    none, new, begun, mixed = (
        train(folder, output, eval_examples=4, steps=1, **flags) for output, flags in runs.items()
    )
    assert (none["trainable_parameters"], none["steps"]) == (0, 0)
    assert none["before"] == none["after"]
    assert sorted(path.name for path in (folder / "none").iterdir()) == [
        ".lock", "metrics.jsonl", "summary.json", "train_config.json",
    ]  # fmt: skip
    first = [summary["before"]["eval_loss"] for summary in (none, new, begun, mixed)]
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert abs(first[1] - first[2]) > 0.01
    assert first[2] == pytest.approx(first[3], abs=1e-4)
