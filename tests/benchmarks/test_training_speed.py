"""The benchmark of training speed: rows at tiny sizes, kinds of kernels, and the report of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from adafuse_jax.training.utilisation import linear_parameters
from benchmarks.common.records import write_json
from benchmarks.training import __main__ as training
from benchmarks.training import experts
from benchmarks.training.__main__ import jobs_of, parse, rows_of
from benchmarks.training.profile import kind_of
from benchmarks.training.report import merge_parts
from benchmarks.training.rows import measure, model_config, random_batch
from benchmarks.training.shapes import SHAPES


def test_rows_of_segments():
    batch = random_batch(100, 2, 12, 3, seed=0)
    np.testing.assert_array_equal(batch.segment_ids[0, 1], [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    np.testing.assert_array_equal(batch.positions[0, 0], [0, 1, 2, 3] * 3)
    np.testing.assert_array_equal(batch.loss_mask[0, 0], [False, True, True, True] * 3)
    assert batch.tokens.shape == (1, 2, 12)


def test_parameters_of_llama2_7b():
    """6.48 billion in the linears, 131 million in the head."""
    assert linear_parameters(model_config(SHAPES["llama2-7b"])) == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("gemm_fusion_dot_242", "products"),
        ("grouped_expand", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("memcpy128", "copies"),
        ("loop_dynamic_update_slice_fusion_19", "copies"),
        ("input_reduce_fusion_9", "other"),
    ],
)
def test_kinds(kernel: str, kind: str):
    assert kind_of(kernel) == kind


def test_a_row():
    found: list[dict] = []
    settings = rows_of("tiny")[1] | {"steps": 1, "repeats": 2, "profile": False}
    assert settings["segments"] == 8
    measure(settings, found.append)
    *_, row = found
    tokens = settings["batch"] * settings["length"]
    assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["ms"])
    assert len(row["losses"]) == 3  # one repeat before those that count
    assert row["losses"] == pytest.approx([np.log(256)] * 3, rel=0.01)


def test_jobs_name_every_row():
    arguments = parse(["--out", "x", "--size", "full", "--devices", "4"])
    jobs = [job for part in ("jax", "devices", "peers") for job in jobs_of(part, arguments)]
    assert len({job.name for job in jobs}) == len(jobs)
    assert [row["method"] for row in jobs[-1].rows] == ["peft-lora", "peft-lora-compiled"]


def meshes_of(*flags: str) -> list[tuple[Any, ...]]:
    jobs = jobs_of("devices", parse(["--out", "x", "--part", "devices", *flags]))
    assert all(job.settings["steps"] == 10 for job in jobs if job.settings["accum"] > 1)
    return [tuple(job.settings[key] for key in ("size", "mesh", "devices", "batch", "accum")) for job in jobs]


def test_rows_of_meshes():
    of_two, of_four, of_eight = (meshes_of("--devices", count) for count in "248")
    assert of_two[:4] == [
        ("llama2-7b", "fsdp=1", 1, 4, 1), ("llama2-7b", "fsdp=1", 1, 4, 2),
        ("llama2-7b", "data=2", 2, 8, 1), ("llama2-7b", "fsdp=2", 2, 8, 1),
    ]  # fmt: skip
    assert of_two[-2:] == [("llama2-13b", "fsdp=1", 1, 8, 1), ("llama2-13b", "fsdp=2", 2, 8, 1)]
    assert of_four[-1] == ("llama2-70b", "fsdp=4", 4, 16, 1)
    assert {"data=2,fsdp=4", "fsdp=4,tensor=2", "fsdp=8"} <= {mesh for _, mesh, *_ in of_eight}
    assert meshes_of("--devices", "8", "--models", "llama2-70b", "--meshes", "fsdp=4,tensor=2") == 2 * [
        ("llama2-70b", "fsdp=4,tensor=2", 8, 32, 1)
    ]


def test_a_stopped_call_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows with a result, that of too little memory included, are not measured again; one that failed is."""
    flags = ["--out", str(tmp_path), "--part", "devices", "--size", "tiny"]
    answers = [({"ms": 2.0}, None), ({"error": "RESOURCE_EXHAUSTED: 1 GiB", "planned_gib": 9.0}, None), ({}, "killed")]
    measured: list[str] = []

    def answer(job: Any, *_: Any) -> Any:
        measured.append(job.name)
        return answers[(len(measured) - 1) % 3]

    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # which it would set
    monkeypatch.setattr(training, "run_job", answer)
    monkeypatch.setattr(training, "merge_parts", lambda out: "")
    training.main(flags)
    first = [*measured]
    training.main(flags)
    assert len(first) == 8
    assert measured[8:] == first[2::3]
    rows = json.loads((tmp_path / "training-part-devices2.json").read_text())["rows"]
    assert [row["planned_gib"] for row in rows if "planned_gib" in row] == [9.0] * 3


@pytest.mark.slow
def test_rows_of_several_devices():
    """Fully sharded, two devices have the losses of one with the same batch in two micro-batches."""
    program = """
import json
from benchmarks.training.devices import rows_of_devices
from benchmarks.training.rows import measure
found = []
for row in rows_of_devices("tiny", 2, None, None)[1:4:2]:
    values = {}
    measure(row | {"steps": 2, "repeats": 1, "profile": False}, values.update)
    found.append([row["mesh"], values["losses"]])
print(json.dumps(found))
"""
    (one, alone), (two, together) = json.loads(tiny.with_devices(2, "-c", program))
    assert (one, two) == ("fsdp=1", "fsdp=2")
    assert together == pytest.approx(alone, rel=1e-3)


def part(**changes) -> dict:
    row = rows_of("full")[3] | {
        "devices": 1, "ms": 500.0, "spread_ms": 5.0, "tokens_per_second": 16384.0, "flops_4n": 2e14, "peak_gib": 58.3,
        "compile_seconds": 90.0, "losses": [10.0], "profile": [{"products": 400.0, "other": 50.0}, {}],
    }  # fmt: skip
    base = {
        "part": "jax",
        "command": "python -m benchmarks.training --out x",
        "commit": "abc",
        "device": "NVIDIA H200",
        "finished": 1,
    }
    return base | {"versions": {"jax": "0.11.2"}, "rows": [row]} | changes


def test_report(tmp_path: Path):
    write_json(tmp_path / "training-part-jax.json", part())
    broken = part(rows=[rows_of("full")[6] | {"devices": 1, "error": "out of memory"}], finished=2)
    write_json(tmp_path / "training-part-jax-lora.json", broken)
    text = merge_parts(tmp_path)
    assert (
        "| adafuse | llama2-7b | 4 × 2048 | 1 | products | unrolled |  | 16,384 | 164 | 51% | 58.3 | 90 s |  |" in text
    )
    assert "out of memory" in text
    assert "| adafuse llama2-7b B4 T2048 products unrolled | 50 | 400 |" in text
    assert "not compared" in text
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["rows"][0]["mfu_4n_pct"] == pytest.approx(100 * 2e14 / 0.5 / 790e12)
    assert record["rows"][0]["spread"] == pytest.approx(163.84)
    assert (tmp_path / "training.png").stat().st_size > 1000


@pytest.mark.parametrize(("difference", "verdict"), [(1e-6, "agree with PEFT's"), (1e-2, "DIFFER FROM PEFT's")])
def test_curve_in_the_report(tmp_path: Path, difference: float, verdict: str):
    curve = {
        "peft": {"losses": [1.0] * 20},
        "ours": {"differences": {"none, scanned": 0.0, "full, scanned": difference}},
    }
    write_json(tmp_path / "training-part-curve.json", part(rows=[], curve=curve))
    text = merge_parts(tmp_path)
    assert verdict in text
    assert "20 steps" in text


def test_bad_flags(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(["--out", "x", "--repeats", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_chosen_experts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both forms of the experts' products, checked against each other before they are timed, and the report."""
    monkeypatch.setattr(experts, "CASES", {"tiny": experts.CASES["tiny"][:1]})
    experts.main(["--out", str(tmp_path), "--size", "tiny", "--repeats", "1"])
    (row,) = json.loads((tmp_path / "experts.json").read_text())["rows"]
    assert row["dense_ms"] > 0
    assert row["grouped_ms"] > 0
    assert "| 64 | 4 | 16 | 2 |" in (tmp_path / "experts.md").read_text()


@pytest.mark.parametrize(("off", "verdict"), [(1e-3, "agree with one device's"), (1e-1, "DIFFER FROM one device's")])
def test_losses_of_a_mesh_are_compared(tmp_path: Path, off: float, verdict: str):
    one, both = (part()["rows"][0] | {"mesh": f"fsdp={count}", "devices": count} for count in (1, 2))
    other = part()["rows"][0] | {"mesh": "fsdp=2", "devices": 2, "batch": 64}
    one |= {"batch": 2, "accum": 2}  # `both` has 4 at once
    rows = [one, both | {"losses": [10.0 + off]}, other]
    write_json(tmp_path / "training-part-devices.json", part(rows=rows))
    text = merge_parts(tmp_path)
    assert verdict in text
    assert "not compared, one device has not run the same batch" in text
