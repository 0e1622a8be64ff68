"""benchmarks.decode.shapes: the models' sizes, rows on tiny shapes, the table, and a call that goes on after another."""

from __future__ import annotations

import json
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adafuse_jax.inference.backends.megakernel import shape_of
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.decoder import Backbone
from benchmarks.common.records import commit
from benchmarks.decode import shapes
from benchmarks.decode.popular import POPULAR
from pallas_kernels.megakernel import unsupported_reason

PARAMETERS = {
    "Llama-2-7B": 6_738_415_616, "SmolLM2-135M": 134_515_008, "Qwen2.5-0.5B": 494_032_768, "Llama-3.2-1B": 1_235_814_400,
    "Qwen3-4B": 4_022_468_096, "Mistral-7B": 7_248_023_552, "Llama-3-8B": 8_030_261_248, "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200, "Qwen3-32B": 32_762_123_264,
}  # fmt: skip
"""Numbers of their model cards and of the headers of their files."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_models(name: str):
    config = POPULAR[name].config()
    model = jax.eval_shape(lambda: Backbone(config, dtype="bfloat16", rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == PARAMETERS[name]
    assert [POPULAR[name].linear_shape(linear) for linear in LINEARS] == [config.linear_shape(n) for n in LINEARS]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_megakernel_takes_them_with_32_rows(name: str):
    """All linears adapted, all 8 experts in use; the docs say so."""
    shape, rank = shape_of(POPULAR[name].config()), -(-POPULAR[name].rank // 64) * 64
    assert unsupported_reason(shape, jnp.bfloat16, 32, LINEARS, rank=rank, max_experts_used=8) is None


def row(backend: str, targets: str, **found: Any) -> dict[str, Any]:
    found = {"spread_ms": 0.0, "bytes_gb": 8.0, "read_tb_s": 4.0, **found} if "ms" in found else found
    return {"model": "tiny", "rows": 32, "backend": backend, "targets": targets, **found}


def test_table():
    rows = [
        row("megakernel", "-", ms=2.5, logits_off=0.02, logits_off_xla=0.01, correct=False), row("kernels", "-", ms=4.0),
        row("megakernel", "all7", refused="its FFN"), row("kernels", "all7", ms=5.0),
        row("xla", "-", error="no memory"), row("kernels", "all7:16x8/4", ms=4.5),
    ]  # fmt: skip
    lines = shapes.report_of({"device": "a", "jax": "b", "command": "c", "rows": shapes.merged(rows)}).splitlines()
    assert lines[-4:] == [
        "| tiny | 32 | megakernel | 2.500 ± 0.000 | 80 | 8 of rank 8, top 2 | its FFN |  |  | **2.00×: wrong** |",
        "| tiny | 32 | kernels | 4.000 ± 0.000 | 50 | 8 of rank 8, top 2 | 5.000 ± 0.000 | 40 | +1.00 ms, +25.0% |  |",
        "| tiny | 32 | kernels | 4.000 ± 0.000 | 50 | 16 of rank 8, top 4 | 4.500 ± 0.000 | 44 | +0.50 ms, +12.5% |  |",
        "| tiny | 32 | xla | no memory |  |  |  |  |  |  |",
    ]


@pytest.mark.parametrize("experts", ["16", "4x8/5", "4x0/1", "4x8/0", "ax8/1"])
def test_experts_that_cannot_be(experts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        shapes.main(["--out", str(tmp_path), "--experts", experts])
    assert f"--experts {experts}: give number x rank / top-k" in capsys.readouterr().err


def test_another_call_measures_what_is_missing(tmp_path):
    """The first process is stopped after a row, the second breaks, the third finishes."""
    asked: list[list[tuple[str, str]]] = []

    def run(job: Any, common: Any, timeout: float, python: str) -> tuple[dict[str, Any], str | None]:
        cases = job.settings["cases"]
        asked.append([(case["backend"], case["targets"]) for case in cases])
        first = cases[0] | {"refused": "too wide"} if len(asked) == 1 else row("megakernel", "all7", ms=1.0)
        problem = (None, "stopped after 9 s", "CUDA error", None)[len(asked)]
        rest = [row(case["backend"], case["targets"], ms=2.0) for case in cases] if problem is None else [first]
        return {"device": "a", "jax": "b", "rows": rest}, problem

    flags = ["--out", str(tmp_path), "--models", "tiny", "--rows", "32"]
    for _ in range(4):
        shapes.main(flags, run)
        record = json.loads((tmp_path / "shapes.json").read_text())
    cases = [(backend, targets) for backend in ("megakernel", "kernels") for targets in ("-", "all7")]
    assert asked == [cases, cases[1:], cases[2:]], "a fourth call has nothing to do"
    assert [(r.get("ms"), r.get("refused")) for r in record["rows"]] == [
        (None, "too wide"), (1.0, None), (2.0, None), (2.0, None)
    ]  # fmt: skip
    assert record["commit"] == commit()
    shapes.main([*flags, "--models", "Qwen3-14B", "--seconds", "1"], run)
    assert len(asked) == 3, "too little time for a model"


def test_models_together(tmp_path):
    """Two processes run at the same time, and the rows of both are kept."""
    both = threading.Barrier(2, timeout=30)

    def run(job: Any, *_: Any) -> tuple[dict[str, Any], str | None]:
        both.wait()
        rows = [
            case | {"ms": 1.0, "spread_ms": 0.0, "bytes_gb": 1.0, "read_tb_s": 1.0} for case in job.settings["cases"]
        ]
        return {"device": "a", "jax": "b", "rows": rows}, None

    flags = ["--out", str(tmp_path), "--models", "Qwen3-4B", "Llama-2-7B", "--rows", "1", "--backends", "kernels"]
    shapes.main([*flags, "--together", "2"], run)
    record = json.loads((tmp_path / "shapes.json").read_text())
    assert [r["model"] for r in record["rows"]] == ["Llama-2-7B"] * 2 + ["Qwen3-4B"] * 2


def test_who_is_timed_is_alone(tmp_path):
    lock, order = tmp_path / "lock", []
    lock.touch()

    def time_one() -> None:
        with shapes.turn(str(lock), alone=True):
            order.append("timed")

    with shapes.turn(str(lock), alone=False), shapes.turn(str(lock), alone=False):
        timed = threading.Thread(target=time_one)
        timed.start()
        timed.join(0.2)
        order.append("compiled")
    timed.join(10)
    assert order == ["compiled", "timed"]


@pytest.mark.slow
def test_rows(tmp_path):
    """On a CPU the megakernel has its reason; XLA's logits are those of float32 but for bfloat16's rounding."""
    cases = [
        dict(zip(shapes.KEY, ("tiny", 2, backend, t), strict=True))
        for backend in ("megakernel", "xla")
        for t in ("-", "all7", "all7:6x2/3")
    ]
    found: dict[str, Any] = {}
    (tmp_path / "lock").touch()
    job = {
        "model": "tiny", "cases": cases, "check": [2], "steps": 2, "repeats": 2, "elements": 2**12, "seconds": 1e-4,
        "lock": str(tmp_path / "lock"),
    }  # fmt: skip
    shapes.measure(job, found.update)
    refused, measured = found["rows"][:3], found["rows"][3:]
    assert all("Hopper" in r["refused"] for r in refused)
    assert [(r["backend"], r["targets"]) for r in measured] == [("xla", t) for t in ("-", "all7", "all7:6x2/3")]
    assert all(r["ms"] > 0 and r["correct"] and 1e-4 < r["logits_off"] < 0.05 for r in measured)
    assert measured[1]["bytes_gb"] > measured[0]["bytes_gb"]


def test_rows_of_a_backend_that_rounds_more_are_wrong(monkeypatch):
    """XLA is off by 0.01, the kernels by 0.02."""
    case = dict(zip(shapes.KEY, ("tiny", 2, "kernels", "-"), strict=True))
    right = np.full((1, 2, 4), 1.0)
    off = {"float32": 0.0, "xla": 0.01, "kernels": 0.02}
    monkeypatch.setattr(
        shapes, "logits_of_all", lambda backends, places: {(n, *p): right + off[n] for n, _ in backends for p in places}
    )
    (found,) = shapes.check(POPULAR["tiny"], [case]).values()
    assert found["logits_off"] == pytest.approx(0.02)
    assert found["logits_off_xla"] == pytest.approx(0.01)
    assert not found["correct"]
