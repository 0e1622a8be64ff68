"""`train.py` and `decode.py` with every method: a run, the same run resumed, and what it leaves for decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file

import decode as decode_script
import train as train_script
from adafuse_jax import AdapterConfig
from adafuse_jax.adapters.methods import make_adapter
from adafuse_jax.interop.hf_config import read_model_config
from adafuse_jax.interop.huggingface import load_backbone
from adafuse_jax.interop.peft import save_peft_lora

SETTINGS = {
    "lora": {"num_experts": None},
    "moral": {},
    "mola": {"num_experts": None, "experts_per_layer": [2, 3]},
    "pesc": {},
    "full": {"num_experts": None, "rank": None},
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


@pytest.mark.parametrize("method", SETTINGS)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(folder, capsys, method):
    """Bit for bit; and what it leaves behind answers otherwise than the backbone."""
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

    bare = answer(folder, capsys)
    assert answer(folder, capsys, **({"model": left} if method == "full" else {"adapter": left})) != bare


def test_full_trains_every_weight_and_saves_a_plain_model(folder):
    """In its own type, with the tokenizer; nothing of it is the backbone's any more."""
    summary = train(
        folder, "all", adapter="full", dtype="bfloat16", weight_decay=0.1, learning_rate=1e-2, **SETTINGS["full"]
    )
    old, new = load_backbone(folder / "model", "bfloat16"), load_backbone(folder / "all" / "model")
    leaves = [dict(nnx.to_flat_state(nnx.state(model))) for model in (old, new)]
    assert summary["trainable_parameters"] == sum(leaf[...].size for leaf in leaves[0].values())
    assert all(not np.array_equal(leaves[0][path][...], leaf[...]) for path, leaf in leaves[1].items())
    assert new.dtype == "bfloat16"
    assert (folder / "all" / "model" / "tokenizer.json").exists()
    assert not (folder / "all" / "adapter").exists()


def test_none_tells_the_numbers_of_the_backbone_and_trains_nothing(folder):
    bare = {"num_experts": None, "rank": None, "eval_examples": 4}
    none = train(folder, "none", adapter="none", **bare)
    assert (none["trainable_parameters"], none["steps"]) == (0, 0)
    assert none["before"] == none["after"] == train(folder, "lora_0", adapter="lora", **bare)["before"]
    assert sorted(path.name for path in (folder / "none").iterdir()) == [
        "metrics.jsonl", "summary.json", "train_config.json",
    ]  # fmt: skip


def test_a_run_begins_from_a_lora_of_peft(folder):
    """The first held-out loss is the LoRA's, whatever the method."""
    config = AdapterConfig(adapter="lora", rank=2, targets=("q_proj", "down_proj"))
    lora = make_adapter(config, read_model_config(folder / "model"), rngs=nnx.Rngs(0))
    for expert in lora.experts.values():
        expert.B[...] = expert.B[...] + 0.3
    save_peft_lora(lora, folder / "peft", backbone_name="tiny")
    runs = {
        "fresh": {"adapter": "lora", "num_experts": None},
        "lora_of_peft": {"adapter": "lora", "num_experts": None, "init_lora": folder / "peft", "alpha": 3.0},
        "mola_of_peft": {"adapter": "mola", "init_lora": folder / "peft", **SETTINGS["mola"]},
    }
    fresh, begun, mixed = (
        train(folder, output, eval_examples=4, **flags)["before"]["eval_loss"] for output, flags in runs.items()
    )
    assert abs(fresh - begun) > 0.01
    assert begun == pytest.approx(mixed, abs=1e-4)
