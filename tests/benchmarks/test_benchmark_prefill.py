"""benchmarks.decode.prefill on tiny shapes: its rows, its table, and a second run that measures what is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adafuse_jax.inference.prefill import CHUNKS
from benchmarks.decode import prefill


def job(targets: str, lengths: list[int]) -> dict:
    timing = {"seconds": 1e-4, "repeats": 2, "matmul_dim": 64, "check": [], "first_token": targets == "-"}
    return {"size": "tiny", "targets": targets, "lengths": lengths, **timing}


@pytest.fixture(scope="module")
def rows():
    found: list[dict] = []
    for targets in ("-", "all7"):
        prefill.measure_method(job(targets, [24, 12]), lambda report: found.append(report["rows"][-1]))
    return found


def test_rows(rows):
    assert [(row["targets"], row["tokens"]) for row in rows] == [("-", 12), ("-", 24), ("all7", 12), ("all7", 24)]
    assert all(row["finite"] and row["ms"] > 0 for row in rows)
    assert all(row["first_token_ms"] > 0 for row in rows[:2])
    assert ["over_bare_ms" in row for row in rows] == [False, False, True, True]
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert rows[1]["tflops"] == pytest.approx(2 * 24 * weights / rows[1]["ms"] / 1e9)


def test_table(rows):
    record = {"device": "a", "jax": "b", "command": "c", "rows": [*map(dict, rows)]}
    record["rows"][3]["errors"] = {"kernels": 0.07, "xla": 0.05}
    record["rows"][3] |= {"over_bare_ms": 1.5, "over_bare_spread_ms": 0.25}
    record["rows"][0] = {key: rows[0][key] for key in prefill.KEY} | {"error": "no memory"}
    lines = prefill.report_of(record).splitlines()[-4:]
    assert "no memory" in lines[0]
    share = 100 * rows[1]["tflops"] / rows[1]["ceiling_tflops"]
    assert f"| {share:.0f}% |" in lines[1]
    assert "| +1.50 ± 0.25 |" in lines[3]
    assert "0.070 (XLA 0.050), **too large**" in lines[3]
    assert "+" not in lines[1], "it is the bare one"


def test_programs_are_timed_in_turn(monkeypatch):
    """The difference stays as a clock slows down from repeat to repeat; the first round, of 100 s, is left out."""
    now, order = 0.0, []

    def call(name, seconds):
        def run(carry):
            nonlocal now
            order.append(name)
            now += seconds + 0.01 * carry + 100 * (carry == 2)
            return carry + 1

        return run

    monkeypatch.setattr("benchmarks.common.timing.time.perf_counter", lambda: now)
    programs = {"own": call("own", 3.0), "bare": call("bare", 2.0)}
    times, carry = prefill.time_in_turn(programs, 0, seconds=1, repeats=3)
    assert order == ["own", "bare"] * 5
    assert carry == 10
    differences = [own - bare for own, bare in zip(times["own"].repeats, times["bare"].repeats, strict=True)]
    assert differences == pytest.approx([0.99] * 3)


def test_errors_are_those_from_float32(monkeypatch):
    """Here both forms are XLA ops, so that their errors are one number, of bfloat16's size."""
    model = prefill.random_backbone(prefill.model_config(prefill.SIZES["tiny"]))
    real, asked = prefill.prompt_programs, []

    def programs(model, adapter, prompt, *, by_kernels):
        asked.append((model.dtype, by_kernels))
        return real(model, adapter, prompt, by_kernels=False)

    monkeypatch.setattr(prefill, "prompt_programs", programs)
    found = prefill.errors(model, None, np.arange(3, 15, dtype=np.int32))
    assert [(np.dtype(dtype).name, by) for dtype, by in asked] == [
        ("bfloat16", True), ("bfloat16", False), ("float32", False),
    ]  # fmt: skip
    assert found["kernels"] == found["xla"]
    assert 1e-4 < found["xla"] < 0.1


def test_a_second_run_measures_what_is_missing(rows, monkeypatch, tmp_path):
    asked = []

    def run_job(job, common, timeout, python):
        asked.append((job.name, job.settings["lengths"]))
        of_job = [row for row in rows if row["targets"] == job.settings["targets"]]
        facts = {"device": "a", "jax": "b"}
        done = [row for row in of_job if row["tokens"] in job.settings["lengths"]]
        if len(asked) == 2:
            return facts | {"rows": done[:1]}, "stopped after 1 s"
        return facts | {"rows": done}, None

    monkeypatch.setattr(prefill, "run_job", run_job)
    flags = ["--out", str(tmp_path), "--sizes", "tiny", "--lengths", "12", "24"]
    prefill.main(flags)
    first = json.loads((tmp_path / "prefill.json").read_text())["rows"]
    assert [row.get("error") for row in first] == [None, None, None, "stopped after 1 s"]
    prefill.main(flags)
    assert asked == [("tiny -", [12, 24]), ("tiny all7", [12, 24]), ("tiny all7", [24])]

    assert not any("error" in row for row in json.loads((tmp_path / "prefill.json").read_text())["rows"])


def test_programs_are_those_of_the_slots():
    """A prompt of more than one chunk gets the logits that the engine has after it."""
    shapes = prefill.SIZES["tiny"]
    config = prefill.model_config(shapes)
    model = prefill.random_backbone(config)
    prompt = np.arange(3, 3 + CHUNKS[0] + 5, dtype=np.int32)
    _, logits = prefill.prompt_programs(model, None, prompt, by_kernels=False)(prefill.empty(model, len(prompt)))
    (step,) = prefill.Engine(model, eos_ids=()).generate([prompt.tolist()], max_new_tokens=1)
    assert int(np.argmax(logits)) == step.ids[0]
