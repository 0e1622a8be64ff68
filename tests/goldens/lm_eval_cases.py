"""Models and tasks on which lm-evaluation-harness runs twice: with its Hugging Face backend, and with this project's.

Two tiny models of 64 positions whose tokens are bytes, so that prompts of a few words are too long already. The rows of the
embedding (and so of the head) are zero for bytes that are not printable: the models' output is ASCII.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_fixtures import CHATML, write_tokenizer
from safetensors.numpy import load_file, save_file
from tiny import VOCAB_SIZE, write_model

MAX_LENGTH = 64
MODELS = {"plain": {"adds_bos": False}, "bos": {"adds_bos": True}}
PRINTABLE = 94  # the first ids are the bytes ! to ~

TASK_NAMES = ("tiny_choices", "tiny_answers", "tiny_text")
COLOURS = ("red", "green", "dark blue", "ultraviolet")


def write_case(name: str, out: Path) -> Path:
    """The directory of one of MODELS."""
    write_model(out, name=f"lm_eval_{name}", max_position_embeddings=MAX_LENGTH)
    write_tokenizer(out, template=CHATML, **MODELS[name])
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    printable = {*range(PRINTABLE), vocabulary["Ġ"], vocabulary["Ċ"], *range(256, VOCAB_SIZE)}
    tensors = load_file(out / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[[i for i in range(len(embedding)) if i not in printable]] = 0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_tasks(out: Path) -> Path:
    """A folder for the harness's `include_path`: three tasks of its three kinds of request, over local questions."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": f"What is the colour of thing {i}" + " by the light of the moon" * (i % 3) + "?",
            "choices": list(COLOURS[: 2 + i % 3]),
            "answer": i % 2,
        }
        for i in range(9)
    ]
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(out / "questions.jsonl")}, "cache_dir": str(out / "cache")},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    tasks: dict[str, dict[str, Any]] = {
        "tiny_choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
        },
        "tiny_answers": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
        "tiny_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, table in tasks.items():  # JSON is YAML
        (out / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **table}, indent=2))
    return out


def task_results(evaluated: dict[str, Any]) -> dict[str, Any]:
    """Results from `simple_evaluate`: per task its metrics without their errors, and per document the model's
    responses."""
    return {
        name: {
            "metrics": {
                key: value
                for key, value in sorted(evaluated["results"][name].items())
                if isinstance(value, float) and "stderr" not in key
            },
            "responses": [
                [list(response) if isinstance(response, tuple) else response for response in sample["filtered_resps"]]
                for sample in sorted(evaluated["samples"][name], key=lambda sample: sample["doc_id"])
            ],
        }
        for name in TASK_NAMES
    }
