"""The user's path at full size: Llama-2-7B shapes from sharded safetensors on disk through import, train.py and decode.py.

    python -m benchmarks.full_size --work /tmp/full --out benchmarks/results/nvidia_h200

The weights are random, so only time and memory count.
Import, training and decoding run in processes of their own, so that each peak is its own. `--size tiny` rehearses it
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.records import command_line, facts, write_json
from benchmarks.common.timing import Stopwatch, wait
from benchmarks.decode.costs import SIZES

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def write_model(size: str, out: Path) -> None:
    """A random bfloat16 model in shards, and a byte-level tokenizer without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from adafuse_jax import export_backbone
    from benchmarks.decode.models import model_config, random_backbone

    symbols = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL.values()])
    config = model_config(SIZES[size])
    config = replace(
        config, vocab_size=max(config.vocab_size, len(symbols)), bos_token_id=symbols.index("<s>"),
        eos_token_ids=(symbols.index("</s>"),),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(f"{scratch}/tokenizer.json")
        write_json(Path(scratch) / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL})
        export_backbone(random_backbone(config), out, source=scratch)


def write_texts(path: Path, rows: int, length: int) -> None:
    """Plain text that fills `rows` packed rows of `length` byte tokens."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    lines = [json.dumps({"text": "".join(rng.choice(letters, length - 8))}) for _ in range(rows)]
    path.write_text("\n".join(lines) + "\n")


def anonymous_gib() -> float:
    """Memory of this process that is no mapped file, in GiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 2**20


def measure_import(model: Path) -> dict[str, Any]:
    """Seconds and peaks of one import. `host_gib` is anonymous memory over that of the process before the import."""
    import jax

    from adafuse_jax import load_backbone

    wait(jax.numpy.zeros(8))
    before, peak, done = anonymous_gib(), 0.0, threading.Event()

    def track_peak() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_gib())

    watcher = threading.Thread(target=track_peak)
    watcher.start()
    watch = Stopwatch()
    backbone = wait(load_backbone(model))
    seconds = watch.seconds
    done.set()
    watcher.join()
    memory = jax.local_devices()[0].memory_stats() or {}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(backbone))
    return {
        "seconds": round(seconds, 2),
        "weights_gib": round(weights / 2**30, 3),
        "gb_per_second": round(weights / 1e9 / seconds, 2),
        "peak_host_gib": round(peak - before, 3),
        "peak_device_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 3),
    }


def run(command: list[str]) -> str:
    print("$", " ".join(command), flush=True)
    watch = Stopwatch()
    result = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    print(f"  {watch.seconds:.1f} s", flush=True)
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="llama2-7b")
    parser.add_argument(
        "--work", type=Path, required=True, help="new directory for the model and the run (60 GB for 7B)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of full_size.json")
    parser.add_argument("--batch-size", default="8")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", choices=("write", "import"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, model, data, output = (arguments.work / name for name in ("", "model", "texts.jsonl", "run"))
    if arguments.only == "write":
        write_model(arguments.size, model)
        return
    if arguments.only == "import":
        print(json.dumps(measure_import(model)))
        return

    work.mkdir(parents=True)
    write_texts(data, arguments.steps * int(arguments.batch_size), arguments.max_length)
    again = ["-m", "benchmarks.full_size", "--size", arguments.size, "--work", str(work), "--out", str(arguments.out)]
    run([*again, "--only", "write"])
    imported = json.loads(run([*again, "--only", "import"]))
    train = [
        "train.py", "--model", str(model), "--dataset", str(data), "--output", str(output), "--targets", "all",
        "--num-experts", "8", "--rank", "64", "--top-k", "2", "--steps", str(arguments.steps), "--max-length",
        str(arguments.max_length), "--batch-size", arguments.batch_size, "--eval-examples", "0",
        "--keep-checkpoints", "1", "--dtype", "bfloat16",
    ]  # fmt: skip
    trained = json.loads(run(train))
    decode = [
        "decode.py", "--model", str(model), "--prompt", "The quick brown fox " * 6, "--raw", "--max-new-tokens", "50",
    ]  # fmt: skip
    rows = {}
    for name, extra in {"backbone": [], "adafuse": ["--adapter", str(output / "adapter")]}.items():
        rows[name] = json.loads(run([*decode, *extra, "--json", "--stats"]).splitlines()[-1])
        del rows[name]["text"], rows[name]["token_ids"], rows[name]["prompt"]
    result = {
        **facts(), "command": command_line("benchmarks.full_size"), "size": arguments.size, "import": imported,
        "train": trained, "train_command": train, "decode": rows,
    }  # fmt: skip
    write_json(arguments.out / "full_size.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
