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
import threading
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.records import command_line, facts, write_json
from benchmarks.common.timing import Stopwatch, wait

SIZES = {
    "llama2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
}  # fmt: skip


def config_of(size: str) -> dict[str, Any]:
    return SIZES[size] | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def write_model(size: str, out: Path, layers_per_shard: int = 4) -> None:
    """A random bf16 model in shards, and a byte-level tokenizer without merges."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    config = config_of(size)
    d, f, v, layers = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    draw = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16), static_argnums=1)
    count = 0

    def tensor(*shape: int) -> np.ndarray:
        nonlocal count
        count += 1
        return np.asarray(draw(jax.random.key(count), shape) if len(shape) > 1 else jnp.ones(shape, jnp.bfloat16))

    def layer(i: int) -> dict[str, np.ndarray]:
        attention = {f"self_attn.{name}_proj": tensor(d, d) for name in "qkvo"}
        ffn = {"mlp.gate_proj": tensor(f, d), "mlp.up_proj": tensor(f, d), "mlp.down_proj": tensor(d, f)}
        norms = {"input_layernorm": tensor(d), "post_attention_layernorm": tensor(d)}
        return {f"model.layers.{i}.{name}.weight": value for name, value in (attention | ffn | norms).items()}

    out.mkdir(parents=True)
    groups = [range(i, min(i + layers_per_shard, layers)) for i in range(0, layers, layers_per_shard)]
    weight_map: dict[str, str] = {}
    total = 0
    for n in range(len(groups) + 1):
        if n == len(groups):
            shard = {f"{name}.weight": tensor(v, d) for name in ("model.embed_tokens", "lm_head")}
            shard["model.norm.weight"] = tensor(d)
        else:
            shard = {name: value for i in groups[n] for name, value in layer(i).items()}
        name = f"model-{n + 1:05}-of-{len(groups) + 1:05}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(value.nbytes for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config))

    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in symbols[:3]])
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


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
