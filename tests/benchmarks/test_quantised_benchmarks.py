"""Benchmarks of quantised backbones: the roofline's points, accuracy after fine-tuning, and perplexity with its error."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from benchmarks import quantised_quality
from benchmarks.decode import roofline
from benchmarks.training import openbookqa, quantised

BARE = {
    "method": "backbone",
    "targets": "-",
    "strategy": "-",
    "batch": 1,
    "ms_per_token": 4.0,
    "bytes_gb": 8.0,
    "flops_g": 8.0,
}
ROWS = [
    BARE,
    BARE | {"method": "adafuse", "targets": "all7", "strategy": "fused-int4", "batch": 400, "bytes_gb": 2.0},
    BARE | {"method": "adafuse", "targets": "qv", "strategy": "fused"},
    BARE | {"strategy": "unmerged-int8", "ms_per_token": None},
    BARE | {"method": "lora", "targets": "all7", "strategy": "unmerged"},
]


def test_roofline(tmp_path: Path):
    """Two of the rows are points: one is limited by what is read, the other by products."""
    record = {"device": "NVIDIA H200", "size": "llama2-7b", "ceilings": {"read_tbps": 4.0}, "rows": ROWS}
    bare, four = roofline.points(record)
    assert (bare.strategy, bare.weights, bare.bound, bare.intensity, bare.roof_tflops) == (
        "fused",
        "bf16",
        "reads",
        1,
        4,
    )
    assert bare.tflops == pytest.approx(2)  # 8 GFLOP in 4 ms
    assert (four.strategy, four.weights, four.bound, four.roof_tflops) == ("fused", "int4", "products", 989)
    assert four.tflops == pytest.approx(800)
    (tmp_path / "decode.json").write_text(json.dumps(record))
    roofline.main(["--out", str(tmp_path)])
    assert "| backbone | fused | bf16 | 1 | 1.0 | 2.0 | 50% | reads |" in (tmp_path / "roofline.md").read_text()
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="the device's peak is not known"):
        roofline.points(record | {"device": "a CPU"})


def test_accuracy_of_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each backbone has its seeds; a run that is done is not done again."""
    done: list[str] = []
    run_process = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "train.py" not in command:  # git, for the record
            return run_process(command, **options)
        output, seed = Path(command[command.index("--output") + 1]), int(command[command.index("--seed") + 1])
        after = 0.4 + 0.1 * seed - (0.02 if "--quantize" in command else 0)
        summary = {"before": {"accuracy": 0.2}, "after": {"accuracy": after}}
        output.mkdir(parents=True)
        for name in ("summary.json", "metrics.jsonl"):
            (output / name).write_text(json.dumps(summary))
        done.append(output.name)
        return type("Done", (), {"stdout": json.dumps(summary)})

    monkeypatch.setattr(subprocess, "run", run)
    flags = ["--model", "M", "--train", "A", "--test", "B", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    flags += ["--learning-rates", "1e-3", "--seeds", "0", "1", "--quantize", "none", "int8", "--together"]
    for _ in range(2):
        openbookqa.main(flags)
    with pytest.raises(SystemExit, match=r"final-.* has begun with other flags, see .*; give another --work"):
        openbookqa.main([*flags, "--learning-rates", "2e-3"])
    assert sorted(done) == ["final-0", "final-1", "final-int8-0", "final-int8-1"]
    record = json.loads((tmp_path / "openbookqa_quantised.json").read_text())
    assert record["test_accuracy_adafuse"] == {"none": [0.4, 0.5], "int8": [0.38, 0.48]}
    assert record["mean_and_deviation"]["int8"] == pytest.approx([0.43, 0.1 / math.sqrt(2)], abs=1e-4)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "quantised_training.json").read_text())["rows"]


def test_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each setting is a row, out of memory too; one that was measured at this commit is not measured again."""
    jobs: list[str] = []

    def run_job(job: Any, common: dict[str, Any], timeout: float, python: str) -> tuple[dict[str, Any], str | None]:
        limit = job.settings["limit_gib"]
        jobs.append(f"{job.name}: {os.environ[quantised.FRACTION] if limit else 'whole'}")
        if limit == 6:
            return {"planned_gib": 6.5, "error": "JaxRuntimeError: RESOURCE_EXHAUSTED"}, None
        speed = 900.0 if job.settings["quantize"] else 1000.0
        timing = {"ms": 8.0, "spread_ms": 0.1, "tokens_per_second": speed, "peak_gib": 5.0, "losses": [2.0, 1.0]}
        return {"device": "cpu", "planned_gib": 5.0, "allocator_gib": limit} | timing, None

    monkeypatch.setattr(quantised, "run_job", run_job)
    monkeypatch.setattr(quantised, "device_gib", lambda: 140.0)
    monkeypatch.setattr(quantised, "commit", lambda: "abc")
    monkeypatch.setenv(quantised.FRACTION, "")
    limits = ["--out", str(tmp_path), "--quantize", "int4", "--limit-gib", "7", "6"]
    quantised.main(["--out", str(tmp_path), "--quantize", "none", "int8"])
    for _ in range(2):
        quantised.main(limits)
    assert jobs == ["bfloat16: whole", "int8: whole", "int4, 7 GiB: 0.050000", *["int4, 6 GiB: 0.042857"] * 2]
    rows = rows_of(tmp_path)
    assert [(row["quantize"], row["limit_gib"], "ms" in row) for row in rows] == [
        (None, None, True), ("int8", None, True), ("int4", 7, True), ("int4", 6, False),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "int8: 900 tokens/s, 0.900 of bfloat16's" in out
    assert "int4 in 6 GiB (allocator: None): JaxRuntimeError: RESOURCE_EXHAUSTED, planned 6.5 GiB" in out
    assert "peak 5.0 GiB, planned 5.0 GiB, loss 2.0000 to 1.0000 (measured before)" in out
    monkeypatch.setattr(quantised, "commit", lambda: "def")
    with monkeypatch.context() as stopped:
        stopped.setattr(quantised, "run_job", lambda *_: ({}, "stopped after 1 s"))
        quantised.main(["--out", str(tmp_path), "--quantize", "int8"])
    kept = [row for row in rows_of(tmp_path) if row["quantize"] == "int8"]
    assert [(row["commit"], row.get("error")) for row in kept] == [("abc", None), ("def", "stopped after 1 s")]
    quantised.main(["--out", str(tmp_path), "--quantize", "int8"])
    assert jobs[-1] == "int8: whole"
    assert [row["commit"] for row in rows_of(tmp_path)] == ["abc"] * 3 + ["def"]


def test_perplexity(tmp_path: Path):
    """The record has the change of each form and its error; the plain model's loss is that of a forward pass."""
    tiny.write_model(tmp_path / "model", hidden_size=64, intermediate_size=64)
    (tmp_path / "text").write_text("The tide comes in twice a day. " * 20)
    record, rows = tmp_path / "quality.json", tmp_path / "rows.json"
    flags = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--tokens", "96", "--length", "32"]
    quantised_quality.main([*flags, "--record", str(record), "--rows", str(rows)])
    found = json.loads(record.read_text())["model"]
    assert np.shape(json.loads(rows.read_text())) == (3, 32)
    assert found["tokens"] == 96
    assert found["int4"] == {"refused": "q_proj has 64 inputs, no multiple of 128"}
    for name in ("int8", "int4-g64"):
        ratio = found[name]["perplexity"] / found["plain"]["perplexity"]
        assert 100 * (ratio - 1) == pytest.approx(found[name]["change_pct"], abs=0.01)
        assert found[name]["error_pct"] > 0
    assert found["int8"]["error_pct"] < found["int4-g64"]["error_pct"] / 4
    more = "--record", str(record), "--quantize", "int8"
    quantised_quality.main([*flags, *more, "--quantize-head"])
    both = json.loads(record.read_text())["model"]
    assert both["int8"] == found["int8"] != both["int8 and head int8"]
    quantised_quality.main([*flags, *more, "--tokens", "64"])
    assert json.loads(record.read_text())["model"].keys() == found.keys() - {"int4", "int4-g64"}
