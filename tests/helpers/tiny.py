"""Tiny folders to run the scripts on: a random model with a byte tokenizer and data sets. The scripts as processes.

A folder made by `write_folder` holds `model/`, and `alpha.jsonl`, `beta.jsonl` (instructions), `choices.jsonl` (multiple
choice).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_fixtures import CHATML, write_tokenizer
from goldens.tiny_models import Case, write_model_dir

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDENS = REPOSITORY / "tests" / "goldens"
VOCAB_SIZE = 260  # 256 bytes and four special tokens
EOS_ID = 257
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": EOS_ID,
    "torch_dtype": "float32",
}


def write_model(out: Path, *, name: str = "tiny", num_shards: int = 1, **changes: Any) -> Path:
    """A complete Hugging Face directory; another `name` draws other weights."""
    write_model_dir(Case(name=name, config=CONFIG | changes, num_shards=num_shards), out)
    special = {"bos_token_id": 256, "eos_token_id": EOS_ID}
    (out / "generation_config.json").write_text(json.dumps(special))
    return write_tokenizer(out, template=CHATML)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_folder(out: Path) -> Path:
    """The model and the data sets of the module's docstring."""
    write_model(out / "model")
    write_jsonl(
        out / "alpha.jsonl",
        [{"instruction": f"Double {i}.", "output": f"{2 * i} is the answer."} for i in range(40)],
    )
    write_jsonl(
        out / "beta.jsonl",
        [{"instruction": f"Spell {i}.", "output": " ".join(str(i))} for i in range(100, 124)],
    )
    write_jsonl(
        out / "choices.jsonl",
        [
            {"question": f"Which is {i}?", "choices": [str(i), str(i + 1), str(i + 2)], "answer": i % 3}
            for i in range(12)
        ],
    )
    return out


def train_flags(folder: Path, output: str = "run", **changes: Any) -> list[str]:
    """Flags of a short training run in `folder`; a change of None leaves a flag out."""
    return as_flags(
        {
            "model": folder / "model",
            "dataset": folder / "alpha.jsonl",
            "output": folder / output,
            "steps": 2,
            "batch_size": 2,
            "max_length": 64,
            "rank": 2,
            "num_experts": 4,
            "eval_examples": 0,
            "dtype": "float32",
        }
        | changes
    )


def decode_flags(folder: Path, **changes: Any) -> list[str]:
    """Flags that decode four tokens after a short prompt."""
    return as_flags({"model": folder / "model", "prompt": "Hi", "max_new_tokens": 4} | changes)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """`{"top_k": 2, "resume": True}` → `--top-k=2 --resume`; a list gives a flag several values."""
    flags: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags.append(flag if value is True else f"{flag}={value}")
    return flags


def snapshot(folder: Path) -> dict[str, tuple]:
    """Name → (size, modification time, SHA-256) of everything below `folder`."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_size,
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def environment(**more: str) -> dict[str, str]:
    """Environment of a script's process: on the CPU, without the network."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", **more}


def command(script: str, flags: Sequence[str]) -> list[str]:
    return [sys.executable, str(REPOSITORY / f"{script}.py"), *flags]


def run_script(script: str, flags: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT.py FLAGS`, its output captured; `input` is the bytes on its stdin."""
    options = {"env": environment(), "input": b"", "timeout": 300} | options
    done = subprocess.run(command(script, flags), capture_output=True, **options)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def with_devices(count: int, *command: object) -> str:
    """The last line that a Python program prints with `count` CPU devices; it may import what tests may."""
    more = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment(**more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1]
