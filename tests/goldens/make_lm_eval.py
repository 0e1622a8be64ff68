#!/usr/bin/env python3
"""Results of lm-evaluation-harness with its own Hugging Face backend (float32, batch size 1), written beside this file or
checked: `lm_eval.json` holds for each model of lm_eval_cases

    loglikelihood   [{context, continuation, log_likelihood, greedy}]     rolling   [{text, log_likelihood}]
    generate        [{context, settings, text}]                           tasks, chat_tasks   metrics and responses

    python make_lm_eval.py [--check] [--out DIR]           as make_goldens.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "helpers")]

import lm_eval  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from goldens.lm_eval_cases import MODELS, TASK_NAMES, task_results, write_case, write_tasks  # noqa: E402
from goldens.tiny_models import write_json  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

FILE = "lm_eval.json"
ATOL = 1e-4
NEVER = "@@never@@"
CONTEXTS = ("The cat", "A line\n\nand ", "x", " ", "<s>begun", "Grüße: ", "It is long. " * 9)
CONTINUATIONS = (" sat", "and so on, and on", "é", " ")
TEXTS = ("Short.", "Of one window and a little more, " * 2, "Several windows of text go by. " * 8, "<s>marked")


def ask(kind: str, requests: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)]


def generated(lm: HFLM, context: str, **settings: Any) -> dict[str, Any]:
    (text,) = lm.generate_until(ask("generate_until", [(context, settings)]), disable_tqdm=True)
    return {"context": context, "settings": settings, "text": text}


def generations(lm: HFLM) -> list[dict[str, Any]]:
    """Generations without stop strings; then with stops in the middle of the text, at its start, and one that never
    comes."""
    rows = []
    for context in CONTEXTS:
        free = generated(lm, context, max_gen_toks=20, until=[])
        text = free["text"]
        middle, end = text[len(text) // 2 :][:2] or NEVER, text[-1:] or NEVER
        rows += [free, generated(lm, context, max_gen_toks=20, until=[middle, NEVER])]
        rows += [generated(lm, context, max_gen_toks=20, until=end)]
        rows += [generated(lm, context, max_gen_toks=50, until=[text[:1] or NEVER])]
    lengths = [len(row["text"]) for row in rows if row["settings"]["until"] == []]
    if min(lengths) == 20 or max(lengths) < 20:
        sys.exit("lm_eval: EOS ends none of the generations, or all of them")
    return rows


def scores(lm: HFLM, free: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Continuations of all kinds, among them those of greedy decoding."""
    pairs = [(context, continuation) for context in ("", *CONTEXTS) if context != " " for continuation in CONTINUATIONS]
    pairs += [("", "<s>is first"), ("so long a context " * 5, "and as long a continuation " * 2)]
    pairs += [(row["context"], row["text"][:n]) for row in free if row["context"].strip() for n in (1, 5)]
    rows = [
        {"context": context, "continuation": continuation, "log_likelihood": value, "greedy": greedy}
        for (context, continuation), (value, greedy) in zip(
            pairs, lm.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True), strict=True
        )
    ]
    if len({row["greedy"] for row in rows}) < 2:
        sys.exit("lm_eval: no continuation is the greedy one, or each is")
    return rows


def compute(name: str, folder: Path) -> dict[str, Any]:
    directory = write_case(name, folder / name)
    lm = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1)
    rows = generations(lm)
    texts = [(text,) for text in TEXTS]
    rolling = lm.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    manager = TaskManager(include_path=str(write_tasks(folder / "tasks")), include_defaults=False)

    def tasks(chat: bool) -> dict[str, Any]:
        return task_results(
            lm_eval.simple_evaluate(
                lm, tasks=list(TASK_NAMES), task_manager=manager, apply_chat_template=chat, bootstrap_iters=0
            )
        )

    return {
        "loglikelihood": scores(lm, [row for row in rows if row["settings"]["until"] == []]),
        "rolling": [{"text": text, "log_likelihood": value} for (text,), value in zip(texts, rolling, strict=True)],
        "generate": rows,
        "tasks": tasks(chat=False),
        "chat_tasks": tasks(chat=True),
    }


def differences(where: str, old: Any, new: Any) -> list[str]:
    """Floats by more than ATOL, anything else at all."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for key in old for line in differences(f"{where}.{key}", old[key], new[key])]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i in range(len(old)) for line in differences(f"{where}[{i}]", old[i], new[i])]
    if isinstance(old, float) and isinstance(new, float):
        return [] if abs(old - new) <= ATOL * max(1, abs(old)) else [f"{where} is {old} on disk, {new} computed"]
    return [] if type(old) is type(new) and old == new else [f"{where} is {old!r} on disk, {new!r} computed"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is on disk instead of writing")
    parser.add_argument("--out", type=Path, default=HERE, help=f"folder of {FILE} (default: this one)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # progress bars
        computed = json.loads(json.dumps({name: compute(name, Path(folder)) for name in MODELS}))
    if not args.check:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(computed, args.out / FILE)
        print(f"goldens: wrote {FILE} to {args.out}")
        return 0
    found = differences(FILE, json.loads((args.out / FILE).read_text()), computed)
    for line in found:
        print(f"goldens: {line}", file=sys.stderr)
    if not found:
        print(f"goldens: {FILE} agrees with lm_eval {lm_eval.__version__}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
