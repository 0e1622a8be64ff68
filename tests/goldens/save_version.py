"""Files as a version of this project writes them, for the test that later versions still take them.

    PYTHONPATH=CHECKOUT:CHECKOUT/tests/helpers:CHECKOUT/tests python tests/goldens/save_version.py CHECKOUT OUT.tar.xz

runs CHECKOUT's `train.py` and `decode.py` in the folder that `tiny.write_folder` makes, and packs

METHOD/adapter    of every method
adafuse           the whole run, with the checkpoint of step 3 of 6
answers.json      {method: [greedy token ids of each of PROMPTS]}
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import tiny

METHODS: dict[str, dict[str, Any]] = {
    "adafuse": {"tied_share": 0.3, "router_share": 0.6, "dropout": 0.1},
    "moral": {},
    "mola": {"num_experts": None, "experts_per_layer": "4"},
    "pesc": {},
    "lora": {"num_experts": None},
}
PROMPTS = ("Double 3.", "Spell 104.")


def main(checkout: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(tiny.write_folder(Path(scratch)))  # the run's config names its model and data by relative paths
        answers: dict[str, list[list[int]]] = {}
        for method in METHODS:
            run(checkout, "train", train_flags(method))
            answers[method] = [
                json.loads(run(checkout, "decode", decode_flags(method, prompt)))["token_ids"] for prompt in PROMPTS
            ]
        shutil.rmtree("adafuse/checkpoints/6")
        Path("answers.json").write_text(json.dumps(answers))
        with tarfile.open(out, "w:xz") as archive:
            for name in (
                "answers.json",
                "adafuse",
                *(f"{method}/adapter" for method in METHODS if method != "adafuse"),
            ):
                archive.add(name, filter=anonymous)


def train_flags(method: str, **changes: Any) -> list[str]:
    settings = METHODS[method] | {"adapter": method, "steps": 6, "checkpoint_every": 3, "learning_rate": 0.05}
    return tiny.train_flags(Path(), method, **settings | changes)


def decode_flags(method: str, prompt: str) -> list[str]:
    return tiny.decode_flags(Path(), adapter=f"{method}/adapter", prompt=prompt, json=True, max_new_tokens=12)


def run(checkout: Path, script: str, flags: list[str]) -> str:
    command = [sys.executable, str(checkout / f"{script}.py"), *flags]
    return subprocess.run(command, check=True, env=tiny.environment(), stdout=subprocess.PIPE, text=True).stdout


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The entry without owner and time; plots and locks are left out."""
    if info.name.endswith((".png", ".lock")):
        return None
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
