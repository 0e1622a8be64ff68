"""The benchmark of training speed: rows at tiny sizes, kinds of kernels, and the report of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from adafuse_jax.training.utilisation import linear_parameters
from benchmarks.common import jobs
from benchmarks.common.records import write_json
from benchmarks.training import __main__ as training
from benchmarks.training import devices as mesh_rows
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
    found = [job for part in ("jax", "devices", "peers") for job in jobs_of(part, arguments)]
    assert len({job.name for job in found}) == len(found)
    assert [row["method"] for row in found[-1].rows] == ["peft-lora", "peft-lora-compiled"]


def meshes_of(*flags: str) -> list[tuple[Any, ...]]:
    found = jobs_of("devices", parse(["--out", "x", "--part", "devices", *flags]))
    assert all(job.settings["steps"] == 10 for job in found if job.settings["accum"] > 1)
    assert len({job.name for job in found}) == len(found)
    return [tuple(job.settings[key] for key in ("size", "mesh", "devices", "batch", "accum")) for job in found]


def test_rows_of_meshes():
    of_two, of_four, of_eight = (meshes_of("--devices", count) for count in "248")
    assert of_two[:5] == [
        ("llama2-7b", "fsdp=1", 1, 4, 1), ("llama2-7b", "data=2", 2, 8, 1), ("llama2-7b", "fsdp=2", 2, 8, 1),
        ("llama2-7b", "fsdp=1", 1, 4, 2), ("llama2-7b", "fsdp=1", 1, 2, 4),
    ]  # fmt: skip
    assert of_two[-2:] == [("llama2-13b", "fsdp=1", 1, 8, 1), ("llama2-13b", "fsdp=2", 2, 8, 1)]
    assert of_four[-2:] == 2 * [("llama2-70b", "fsdp=4", 4, 16, 1)]
    meshes = ["fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2"]
    assert [mesh for size, mesh, *_ in of_eight if size == "llama2-70b"] == ["fsdp=8", *meshes]
    assert [mesh for size, mesh, devices, *_ in of_eight[:6] if devices == 8] == meshes
    assert meshes_of("--devices", "8", "--models", "llama2-70b", "--meshes", "fsdp=4,tensor=2") == 2 * [
        ("llama2-70b", "fsdp=4,tensor=2", 8, 32, 1)
    ]
    of_tiny = meshes_of("--devices", "8", "--size", "tiny")
    assert [place[1:3] for place in of_tiny] == [place[1:3] for place in of_eight]
    assert {(devices, batch * accum) for _, _, devices, batch, accum in of_tiny} == {(1, 2), (1, 16), (8, 16)}


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call of `--part devices`, whose jobs have the given answers in turn; it returns the names of those that began."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # which it would set
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setattr(training, "merge_parts", lambda out: "")

    def run(answers: list[Any], *flags: str) -> list[str]:
        names: list[str] = []

        def answer(job: Any, *_: Any) -> Any:
            names.append(job.name)
            return answers[(len(names) - 1) % len(answers)]

        monkeypatch.setattr(jobs, "run_job", answer)
        monkeypatch.setattr(mesh_rows, "run_job", answer)
        training.main(["--out", str(tmp_path), "--part", "devices", "--size", "tiny", *flags])
        return names

    return run


def rows_in(folder: Path, devices: int = 2) -> list[dict[str, Any]]:
    return json.loads((folder / f"training-part-devices{devices}.json").read_text())["rows"]


def test_a_stopped_call_continues(tmp_path: Path, call: Any):
    """Rows with a result, that of too little memory included, are not measured again; one that failed is."""
    answers = [({"ms": 2.0}, None), ({"error": "RESOURCE_EXHAUSTED: 1 GiB", "planned_gib": 9.0}, None), ({}, "killed")]
    first = call(answers)
    assert len(first) == 12
    assert [row["planned_gib"] for row in rows_in(tmp_path) if "planned_gib" in row] == [9.0] * 4
    assert call(answers) == first[2::3]


def test_a_call_ends_in_time(tmp_path: Path, call: Any):
    """A row that a call stops as its time is over is left to the next one; one that takes too long itself is recorded."""
    stopped = [({"planned_gib": 9.0}, "stopped after 40 s")]
    assert call(stopped, "--seconds", "20") == []
    assert len(call(stopped, "--seconds", "100")) == 12
    assert not (tmp_path / "training-part-devices2.json").exists()
    call(stopped, "--seconds", "100", "--job-seconds", "40")
    assert {row["error"] for row in rows_in(tmp_path)} == {"stopped after 40 s"}


def test_losses_of_one_device_come_from_another_part(call: Any):
    """Speeds are compared on one machine; losses may come from any."""
    ok = [({"ms": 2.0}, None)]
    of_one = [f"{method}-products-scanned-tiny-fsdp=1" for method in ("adafuse", "lora")]
    first = call(ok, "--devices", "8", "--only", *of_one)
    assert [name.rpartition("batch")[2] for name in first] == 2 * ["2", "2x8", "1x16"]
    rest = call(ok, "--devices", "8")
    assert {name for name in rest if "fsdp=1" in name} == {f"{name}-batch2" for name in of_one}
    assert len(rest) == 2 * (1 + 3) + 4


def test_plan_of_a_warm_up(tmp_path: Path, call: Any):
    """Memory of each row by the compiler's plan, or the reason why it does not compile."""
    answers = [
        ({"compile_seconds": 3.0, "planned_gib": 9.0, "device": "x"}, None),
        ({}, "UserError: 8 devices are needed"),
    ]
    names = call(answers, "--devices", "8", "--warm-up", "1", "--only", "adafuse-full")
    record = json.loads((tmp_path / "training-plan8.json").read_text())
    assert len(names) == 3
    assert [row.get("planned_gib", row.get("error")) for row in record["rows"]] == [
        9.0,
        "UserError: 8 devices are needed",
        9.0,
    ]
    assert {row["mesh"] for row in record["rows"]} == {"fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2"}


@pytest.mark.slow
def test_rows_of_several_devices():
    """Fully sharded, two devices have the losses of one with the same batch in two micro-batches, and the memory that was
    planned without arrays."""
    program = """
import json
from benchmarks.training.devices import rows_of_devices
from benchmarks.training.rows import measure
found = []
for row in rows_of_devices("tiny", 2, None, None)[2:4]:
    values = {}
    measure(row | {"steps": 2, "repeats": 1, "profile": False}, values.update)
    found.append([row["mesh"], values["losses"]])
    if row["mesh"] == "fsdp=2":
        plan = {}
        measure(row | {"only_compile": True}, plan.update)
        assert plan["planned_gib"] == values["planned_gib"] > 0 and "ms" not in plan
print(json.dumps(found))
"""
    (two, together), (one, alone) = json.loads(tiny.with_devices(2, "-c", program))
    assert (two, one) == ("fsdp=2", "fsdp=1")
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


@pytest.mark.parametrize(
    ("off", "rounding", "verdict"),
    [(1e-3, 0.0, "agree with"), (1e-1, 0.0, "DIFFER FROM"), (1e-1, 0.06, "agree with"), (1e-1, 0.04, "DIFFER FROM")],
)
def test_losses_of_a_mesh_are_compared(tmp_path: Path, off: float, rounding: float, verdict: str):
    """Twice what rounding alone does is no difference."""
    one, both = (part()["rows"][0] | {"mesh": f"fsdp={count}", "devices": count} for count in (1, 2))
    other = part()["rows"][0] | {"mesh": "fsdp=2", "devices": 2, "batch": 64}
    halves = one | {"batch": 1, "accum": 4, "losses": [10.0 + rounding]}
    one |= {"batch": 2, "accum": 2}  # `both` has 4 at once
    rows = [halves, one, both | {"losses": [10.0 + off]}, other]
    write_json(tmp_path / "training-part-devices.json", part(rows=rows))
    text = merge_parts(tmp_path)
    assert f"{verdict} one device's: at most {off:.1e} nats apart, and its own with smaller" in text
    assert "not compared, one device has not run the same batch" in text
    assert "8,192 tokens/s per device, 200 TFLOP/s per device by 4N" in text
