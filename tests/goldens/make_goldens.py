#!/usr/bin/env python3
"""Reference outputs of transformers + torch on CPU in float32 ("goldens"), written beside this file or checked.

For each tiny model (tiny_models.CASES) `tiny/<case>.npz` holds, with B=2, T=24, V=96:

    tokens [B, T]         logits [B, T, V]                      no mask
    left_mask [B, T]      left_logits [B, T, V]                 padded before the text; zero where the mask is
    right_mask [B, T]     right_logits [B, T, V]                padded after it
    segments [9 + 11]     segment_0 [9, V], segment_1 [11, V]   each run alone
    prompt [12]           greedy [32]                           generate(do_sample=False) with its KV cache

`real.json` holds greedy answers of SmolLM2-135M-Instruct through its chat template and stories260K's text
from BOS alone; both models are built by ../shared/tools, so without ../shared they are left out.

    python make_goldens.py            write          (Python 3.11, requirements.txt; check.sh sets that up)
    python make_goldens.py --check    compute again and compare; exit 1 with a line per difference
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
from tiny_models import CASES, Case, write_json, write_model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[2] / "shared"
CACHE = Path.home() / ".cache" / "adafuse-jax-tests"

BATCH, LENGTH, SEGMENTS, PROMPT, NEW_TOKENS = 2, 24, (9, 11), 12, 32
PADDING = (5, 11)  # padding tokens in each row of the padded batches
MIN_MARGIN = 1e-3  # top-1 minus top-2 logit at every greedy step, over the std of the logits: far above rounding
MIN_DISTINCT = 8  # tokens in a greedy continuation: a short loop would hide mistakes in the cache
ATOL = 1e-5  # of logits computed again, over their std
QUESTIONS = ("What is the capital of France?", "Give me three tips for staying healthy.")
ANSWER_TOKENS, STORY_TOKENS = 48, 256

Golden = dict[str, np.ndarray]


def load(path: Path) -> transformers.PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def forward(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T]; under a mask, positions count its real tokens and padding gives zeros."""
    inputs = {"input_ids": torch.from_numpy(tokens)}
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clip(0)
        inputs |= {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions)}
    logits = model(**inputs).logits.numpy()
    return logits if mask is None else np.where(mask[..., None] == 1, logits, np.float32(0))


def greedy(model: transformers.PreTrainedModel, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
    """The [<= new_tokens] tokens that follow prompt [T], always the most likely one, through the KV cache."""
    ids = torch.from_numpy(prompt[None])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, use_cache=True
    )
    return out[0, len(prompt) :].numpy()


def decisive_greedy(
    name: str, model: transformers.PreTrainedModel, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random prompt and its greedy continuation, drawn again while it is a matter of rounding or a short loop."""
    for _ in range(100):
        prompt = rng.integers(3, model.config.vocab_size, PROMPT)
        continuation = greedy(model, prompt, NEW_TOKENS)
        logits = forward(model, np.concatenate([prompt, continuation])[None, :-1])[0, PROMPT - 1 :]
        second, first = np.sort(logits, axis=-1)[:, -2:].T
        if (first - second).min() > MIN_MARGIN * logits.std() and len(set(continuation)) >= MIN_DISTINCT:
            if not np.array_equal(logits.argmax(-1), continuation):
                sys.exit(f"{name}: generate() and a full forward pass disagree on the greedy continuation")
            return prompt, continuation
    sys.exit(f"{name}: every prompt tried leads into a near tie or a short loop")


def tiny_golden(case: Case) -> Golden:
    rng = np.random.default_rng(zlib.crc32(f"{case.name}/inputs".encode()))
    with tempfile.TemporaryDirectory() as folder:
        model = load(write_model_dir(case, Path(folder)))
    model.generation_config.eos_token_id = None  # the continuation is NEW_TOKENS long, with any tokens
    vocab = case.config["vocab_size"]
    tokens = rng.integers(3, vocab, (BATCH, LENGTH))
    segments = rng.integers(3, vocab, sum(SEGMENTS))
    at, padding = np.arange(LENGTH), np.array(PADDING)[:, None]
    left_mask, right_mask = (at >= padding).astype(np.int64), (at < LENGTH - padding).astype(np.int64)
    alone = [forward(model, part[None])[0] for part in np.split(segments, np.cumsum(SEGMENTS)[:-1])]
    prompt, continuation = decisive_greedy(case.name, model, rng)
    golden = {
        "tokens": tokens,
        "logits": forward(model, tokens),
        "left_mask": left_mask,
        "left_logits": forward(model, tokens, left_mask),
        "right_mask": right_mask,
        "right_logits": forward(model, tokens, right_mask),
        "segments": segments,
        "segment_0": alone[0],
        "segment_1": alone[1],
        "prompt": prompt,
        "greedy": continuation,
    }
    return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in golden.items()}


def real_model(name: str, tool: str) -> Path:
    """The cached directory of a model that ../shared/tools builds, built now if it is not there."""
    out = CACHE / name
    if not (out / "model.safetensors").is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / name
            built = subprocess.run([sys.executable, SHARED / "tools" / tool, made], capture_output=True, check=False)
            if built.returncode != 0:
                sys.exit(f"goldens: ../shared/tools/{tool} failed; run it by hand to see why")
            if not out.exists():  # another process may have been quicker
                made.rename(out)
    return out


def real_goldens() -> dict:
    path = real_model("smollm2", "smollm2_hf.py")
    tokenizer, model = AutoTokenizer.from_pretrained(path), load(path)
    chats = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = greedy(model, np.array(prompt), ANSWER_TOKENS)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        chats.append({"question": question, "prompt": list(prompt), "answer": answer.tolist(), "text": text})

    path = real_model("stories260k", "stories260k_hf.py")
    tokenizer, model = AutoTokenizer.from_pretrained(path), load(path)
    story = greedy(model, np.array([tokenizer.bos_token_id]), STORY_TOKENS)
    text = tokenizer.decode(story, skip_special_tokens=True)
    page = (SHARED / "assets" / "models" / "stories260K.md").read_text()
    committed = page.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]
    if text.split() != committed.split():
        sys.exit("stories260K: the greedy text differs from ../shared/assets/models/stories260K.md")
    return {"smollm2": chats, "stories260k": {"tokens": story.tolist(), "text": text}}


def differences(name: str, committed: Golden, computed: Golden) -> list[str]:
    """Differences between two goldens: keys, shapes, dtypes, integers at all, floats by more than ATOL over their
    std."""
    if committed.keys() != computed.keys():
        return [f"{name}: keys differ: {sorted(committed.keys() ^ computed.keys())}"]
    found = []
    for key, new in computed.items():
        old = committed[key]
        if old.shape != new.shape or old.dtype != new.dtype:
            found.append(f"{name}: {key} is {old.dtype}{old.shape} on disk, {new.dtype}{new.shape} computed")
        elif np.issubdtype(new.dtype, np.integer):
            if not np.array_equal(old, new):
                found.append(f"{name}: {key} differs at {np.flatnonzero(old != new).size} of {new.size} places")
        else:
            error = float(np.abs(old - new).max() / new.std())
            if not error <= ATOL:
                found.append(f"{name}: {key} differs by {error:.1e} of its standard deviation (allowed {ATOL:.0e})")
    return found


def check_tiny(out: Path, goldens: dict[str, Golden]) -> list[str]:
    on_disk = {path.stem for path in (out / "tiny").glob("*.npz")}
    found = [f"tiny/{name}.npz: belongs to no case" for name in sorted(on_disk - goldens.keys())]
    for name, computed in goldens.items():
        if name not in on_disk:
            found.append(f"tiny/{name}.npz: missing")
            continue
        with np.load(out / "tiny" / f"{name}.npz") as committed:
            found += differences(name, dict(committed), computed)
    return found


def check_real(out: Path, computed: dict) -> list[str]:
    if not (out / "real.json").is_file():
        return ["real.json: missing"]
    committed = json.loads((out / "real.json").read_text())
    if committed.keys() != computed.keys():
        return [f"real.json: keys differ: {sorted(committed.keys() ^ computed.keys())}"]
    return [f"real.json: {name} differs" for name in computed if committed[name] != computed[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is on disk instead of writing")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of tiny/ and real.json (default: this one)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)

    tiny = {name: tiny_golden(case) for name, case in CASES.items()}
    real = real_goldens() if SHARED.is_dir() else None
    if real is None:
        print("goldens: ../shared is absent, so the real models (SmolLM2, stories260K) are skipped")
    what = f"{len(tiny)} tiny models" + (", SmolLM2 and stories260K" if real else "")

    if args.check:
        found = check_tiny(args.out, tiny) + (check_real(args.out, real) if real else [])
        for line in found:
            print(f"goldens: {line}", file=sys.stderr)
        if not found:
            print(f"goldens: {what} agree with transformers {transformers.__version__}")
        return 1 if found else 0

    (args.out / "tiny").mkdir(parents=True, exist_ok=True)
    for name, golden in tiny.items():
        np.savez_compressed(args.out / "tiny" / f"{name}.npz", **golden)
    if real:
        write_json(real, args.out / "real.json")
    print(f"goldens: wrote {what} to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
