#!/usr/bin/env python3
"""Results of PEFT with the LoRAs of tiny_loras.py, on CPU in float32, written beside this file or checked.

`peft/<name>/` holds the two files that PEFT saves, and `outputs.npz` with, for B=2, T=16:

    tokens [B, T]    logits [B, T, V] of the PEFT model    merged [B, T, V] after merge_and_unload()

    python make_peft.py                   write                   (Python 3.11, requirements.txt; check.sh sets that up)
    python make_peft.py --check           compute again and compare; exit 1 with a line per difference
    python make_peft.py --exports DIR     load what export_loras.py wrote into DIR with PEFT and transformers; compare
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from make_goldens import ATOL, HERE, Golden, differences, forward, load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from tiny_loras import EXPORTED, LORAS, WITH_ARGUMENTS, Variant, drawn
from tiny_models import CASES, write_model_dir

sys.path.insert(0, str(HERE.parent))  # the tests import these models by the same name
from goldens import family_models

BATCH, LENGTH = 2, 16
MODELS = {name: (case, write_model_dir) for name, case in CASES.items()}
MODELS |= {name: (case, family_models.write_model_dir) for name, case in family_models.CASES.items()}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_model(name: str, out: Path) -> Path:
    """The directory of a tiny model, of either set."""
    case, write = MODELS[name]
    return write(case, out)


def make(name: str, out: Path) -> Golden:
    """Save the LoRA to `out` as PEFT does; returns the outputs."""
    case = LORAS[name] if name in LORAS else WITH_ARGUMENTS[name]
    rng = np.random.default_rng(zlib.crc32(f"{name}/inputs".encode()))
    tokens = rng.integers(3, MODELS[case.model][0].config["vocab_size"], (BATCH, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        model = load(write_model(case.model, Path(folder)))
    if isinstance(case, Variant):
        arguments = case.arguments
    else:
        arguments = {
            "r": case.rank, "lora_alpha": case.alpha, "target_modules": list(case.targets), "use_rslora": case.rslora,
        }  # fmt: skip
    model.name_or_path = case.model
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.1, task_type="CAUSAL_LM", **arguments)).eval()
    for path, parameter in adapted.named_parameters():
        if ".lora_" in path or ".modules_to_save." in path:
            key = path.removeprefix("base_model.model.").replace(".default", "")
            value = torch.from_numpy(drawn(name, key, tuple(parameter.shape)))
            parameter.data = parameter.data * (1 + value) if "magnitude" in path else value
    adapted.save_pretrained(out)
    logits = forward(adapted, tokens)
    merged = forward(adapted.merge_and_unload(), tokens)
    return {"tokens": tokens.astype(np.int32), "logits": logits, "merged": merged}


def check(name: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        outputs, found = make(name, Path(folder)), []
        for file in (CONFIG, WEIGHTS, "outputs.npz"):
            if not (HERE / "peft" / name / file).is_file():
                return [f"peft/{name}/{file}: missing"]
        with np.load(HERE / "peft" / name / "outputs.npz") as committed:
            found += differences(f"peft/{name}", dict(committed), outputs)
        found += differences(
            f"peft/{name}", load_file(HERE / "peft" / name / WEIGHTS), load_file(Path(folder) / WEIGHTS)
        )
        old, new = (json.loads((where / CONFIG).read_text()) for where in (HERE / "peft" / name, Path(folder)))
        for value in (table[key] for table in (old, new) for key in ("target_modules", "exclude_modules")):
            if isinstance(value, list):
                value.sort()  # of sets
        found += [f"peft/{name}: {CONFIG} differs in {k}" for k in old.keys() | new.keys() if old.get(k) != new.get(k)]
    return found


def check_export(name: str, exports: Path) -> list[str]:
    """Compare this project's PEFT directory (loaded by PEFT) and merged model (loaded by transformers) with the golden."""
    with np.load(HERE / "peft" / name / "outputs.npz") as committed, tempfile.TemporaryDirectory() as folder:
        wanted = dict(committed)
        backbone = load(write_model((LORAS | WITH_ARGUMENTS)[name].model, Path(folder)))
        found = {
            "tokens": wanted["tokens"],
            "merged": forward(load(exports / name / "huggingface"), wanted["tokens"]),
            "logits": forward(PeftModel.from_pretrained(backbone, exports / name / "peft").eval(), wanted["tokens"]),
        }
    return differences(f"export of {name}", wanted, found)


def check_trained(trained: Path) -> list[str]:
    """Compare the logits of a LoRA that this project trained with those that PEFT computes from its export."""
    with np.load(trained / "outputs.npz") as ours:
        wanted = dict(ours)
    adapted = PeftModel.from_pretrained(load(trained / "model"), trained / "peft").eval()
    bare, found = (forward(model, wanted["tokens"]) for model in (load(trained / "model"), adapted))
    if np.abs(bare - found).max() < 100 * ATOL * found.std():
        return ["the trained LoRA changes nothing, so that it compares nothing"]
    return differences("a LoRA trained over eight devices", wanted, {"tokens": wanted["tokens"], "logits": found})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is on disk instead of writing")
    parser.add_argument("--exports", type=Path, help="folder that export_loras.py wrote; check that instead")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # that the backbone has no config.json at its name
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    if args.exports or args.check:
        if args.exports:
            found = [line for name in EXPORTED for line in check_export(name, args.exports)]
            found += check_trained(args.exports / "trained")
        else:
            found = [line for name in (*LORAS, *WITH_ARGUMENTS) for line in check(name)]
        for line in found:
            print(f"goldens: {line}", file=sys.stderr)
        if not found:
            what = "agree with PEFT"
            if args.exports:
                what = "exports, and one of a run over eight devices, answer the same in PEFT and transformers"
            count = len(EXPORTED) if args.exports else len(LORAS | WITH_ARGUMENTS)
            print(f"goldens: {count} LoRAs: {what}")
        return 1 if found else 0
    for name in (*LORAS, *WITH_ARGUMENTS):
        out = HERE / "peft" / name
        outputs = make(name, out)
        (out / "README.md").unlink(missing_ok=True)
        np.savez_compressed(out / "outputs.npz", **outputs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
