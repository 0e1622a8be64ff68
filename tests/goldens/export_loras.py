#!/usr/bin/env python3
"""Export the LoRAs that PEFT saved in peft/ with this project, for make_peft.py --exports: `export_loras.py DIR`.

DIR/<name>/peft is a PEFT directory again, DIR/<name>/huggingface the merged model. DIR/trained has a LoRA that was trained
fully sharded over eight devices of the CPU: model, peft, and this project's logits in outputs.npz.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE.parent), str(HERE), str(HERE.parents[1])]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX begins

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from goldens import family_models  # noqa: E402
from tiny_loras import EXPORTED, LORAS, VARIANTS  # noqa: E402
from tiny_models import CASES, write_model_dir  # noqa: E402
from training_runs import train_here  # noqa: E402

from adafuse_jax.checkpoints.adapter_directory import load_adapter  # noqa: E402
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone  # noqa: E402
from adafuse_jax.export import ExportConfig, export  # noqa: E402


def main(out: Path) -> None:
    for name in EXPORTED:
        case = (LORAS | VARIANTS)[name]
        if case.model in CASES:
            model = write_model_dir(CASES[case.model], out / name / "model")
        else:
            model = family_models.write_model_dir(family_models.CASES[case.model], out / name / "model")
        for form in ("peft", "huggingface"):
            export(
                ExportConfig(
                    model=str(model), adapter=str(HERE / "peft" / name), output=str(out / name / form), format=form
                )
            )
    train_over_eight_devices(out / "trained")


def train_over_eight_devices(out: Path) -> None:
    """Train and export a LoRA, and write its logits."""
    folder = tiny.write_folder(out)
    settings = {
        "steps": 6,
        "batch_size": 8,
        "max_length": 32,
        "learning_rate": 1e-2,
        "eval_examples": 0,
        "eval_every": None,
    }
    lora = {"adapter": "lora", "targets": ["q_proj", "down_proj"], "num_experts": None}
    untied = {"tied_share": None, "router_share": None}
    train_here(folder, out / "run", mesh="fsdp=8", **settings, **lora, **untied)
    paths = {"model": str(out / "model"), "adapter": str(out / "run" / "adapter")}
    export(ExportConfig(**paths, output=str(out / "peft"), format="peft"))

    checkpoint = HFCheckpoint.open(paths["model"])
    model = load_backbone(checkpoint, "float32")
    adapter = load_adapter(
        paths["adapter"], checkpoint.config, backbone_identity=checkpoint.identity(), dtype=jnp.dtype("float32")
    )
    assert all(abs(expert.B[...]).max() > 1e-3 for expert in adapter.experts.values()), "it has not trained"
    tokens = np.random.default_rng(0).integers(3, tiny.VOCAB_SIZE, (2, 16), np.int32)
    with jax.default_matmul_precision("highest"):
        logits = model(jnp.asarray(tokens), adapter=adapter).logits
    np.savez(out / "outputs.npz", tokens=tokens, logits=np.asarray(logits))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
