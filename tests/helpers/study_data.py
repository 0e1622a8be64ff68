"""Questions of the studies in the forms of their data files, few and short, beside a tiny model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import tiny

from adafuse_jax.data.examples import MultipleChoice
from studies.questions import FILES, SCIENCEQA_TEST, SCIENCEQA_TRAINING
from studies.science_questions.methods import settings_of

FEW: dict[str, Any] = {
    "rank": 2, "alpha": 4.0, "num_experts": 4, "experts_per_layer": (2, 4), "targets": ("q_proj", "down_proj")
}  # fmt: skip
"""Numbers of every method here, and one shape of batches below, so that tests share their compiled programs."""
LENGTH, BATCH = 192, 2


def small(name: str) -> dict[str, Any]:
    settings = settings_of(name)
    return settings | {key: value for key, value in FEW.items() if key in settings}


def choices() -> list[MultipleChoice]:
    """Questions with two to four choices of several tokens."""
    return [MultipleChoice(f"Which is {i}?", ("éé", "it is so", "no", "yes!")[: 2 + i % 3], i % 2) for i in range(9)]


def write_gz(path: Path, rows: list[dict[str, Any]], *, lines: bool) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()))


def write_study(out: Path) -> Path:
    """`model/` and `data/`: the files of the three sets in their own forms, with few and short questions."""
    tiny.write_model(out / "model")
    data = out / "data"
    data.mkdir()
    for name, files in FILES.items():
        for file, count, first in zip(files, (24, 7), (0, 100), strict=True):
            rows = [
                {
                    "instruction": f"{name[0]} {i}?\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
                    "input": "",
                    "output": "",
                    "answer": f"answer{1 + i % 2}",
                }
                for i in range(first, first + count)
            ]
            write_gz(data / file, rows, lines=False)

    def science(i: int, split: str, answer: Any) -> dict[str, Any]:
        choices = ["x", "y\nz", "w"]
        return {"split": split, "question": f"S {i}?", "hint": "H" * (i % 2), "choices": choices, "answer": answer}

    sample = [science(i, "train", "ABC"[i % 3]) for i in range(12)] + [science(30, "test", "A")]
    think = [science(i, "train", i % 3) for i in range(8, 20)] + [science(40, "val", 1), science(31, "train", 0)]
    for file, rows in zip(SCIENCEQA_TRAINING, (sample, think), strict=True):
        write_gz(data / file, rows, lines=True)
    test = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": ("Context: H\n" if i % 2 else "") + f"S {i}?\nA. x\nB. y\nz\nC. w"},
                {"from": "gpt", "value": "ABC"[i % 3]},
            ],
        }
        for i in range(30, 36)
    ]
    write_gz(data / SCIENCEQA_TEST, [*test, test[0] | {"id": "99", "image": "x.png"}], lines=False)
    return out
