"""benchmarks.decode --part devices: its jobs, what a call leaves to the next, and all of it on two CPU devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny

from benchmarks.common import jobs
from benchmarks.decode import __main__ as decode
from benchmarks.decode import devices
from benchmarks.training import __main__ as training

FLAGS = ["--size=tiny", "--part=devices", "--job-seconds=300"]


def test_each_model_strategy_and_number_of_devices_is_a_job():
    settings = [job.settings for job in devices.jobs_of_devices("tiny", 2, [])]
    places = [(row["method"], row["strategy"], row["devices"]) for row in settings]
    assert places == [(m, s, n) for m in ("backbone", "adafuse") for s in ("fused", "unmerged") for n in (1, 2)]


@pytest.mark.slow
def test_several_devices(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    names = "ceilings", "tiny-backbone-bf16-2-fused", *(f"tiny-adafuse-bf16-{n}-unmerged" for n in (1, 2))
    command = [sys.executable, "-m", "benchmarks.decode", f"--out={tmp_path}", *FLAGS, "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    result = json.loads((tmp_path / "decode.json").read_text())
    fused, one, two = result["devices"]
    assert two["correct"]
    assert f"| tiny adafuse all7 unmerged | 2 | {two['ms']:.3f} | {one['ms'] / two['ms']:.2f}× |" in done.stdout
    assert "needs a Hopper GPU" in fused["error"]
    assert result["ceilings"]["read_tbps"] > 0
    again = subprocess.run(command, capture_output=True, text=True, cwd=tiny.REPOSITORY, env=environment)
    assert again.stdout.count("measured before") == 4


def test_jobs_that_fail_or_have_no_time(tmp_path, monkeypatch):
    """A row of each: refused, out of memory, and stopped; the last is measured again, and so is what did not begin."""
    errors = "UserError: no megakernel", "JaxRuntimeError: RESOURCE_EXHAUSTED: 1 GiB", None
    names, out = [], tmp_path / "part-devices2.json"

    def answer(job, *_):
        names.append(job.name)
        if job.name == "ceilings":
            return {"ceilings": {"read": {"sum": 1.0}, "copy": {"copy": 1.0}}, "device": "x", "jax": "1"}, None
        error = errors[len(names) % 3]
        return ({"devices": [job.settings | {"error": error}]}, None) if error else ({}, "stopped after 450 s")

    monkeypatch.setattr(jobs, "run_job", answer)
    decode.main([f"--out={tmp_path}", *FLAGS])
    rows = json.loads(out.read_text())["devices"]
    assert len(rows) == 8
    first, again = names[:], [row for row in rows if row["error"] == "stopped after 450 s"]
    decode.main([f"--out={tmp_path}", *FLAGS, "--seconds=1"])
    assert names == first
    decode.main([f"--out={tmp_path}", *FLAGS])
    assert len(names) - len(first) == len(again) == 3


@pytest.mark.parametrize(("module", "part"), [(decode, "jax"), (training, "jax"), (training, "all")])
def test_only_calls_that_continue_end_in_time(tmp_path, capsys, module, part):
    """Another part begins anew: what its jobs had found, and those that did not begin, would be lost."""
    with pytest.raises(SystemExit):
        module.parse([f"--out={tmp_path}", f"--part={part}", "--seconds=100"])
    assert "of --part devices" in capsys.readouterr().err


def test_too_few_devices():
    with pytest.raises(SystemExit, match="64 devices are needed, and there"):
        devices.measure({"devices": 64}, print)


def test_jobs_of_devices():
    """70B shapes have no row of one device."""
    places = [tuple(job.settings.values()) for job in devices.jobs_of_devices("llama2-7b", 8, ["int8"])]
    assert len(places) == 2 * (2 * 2 * 2 + 2 * 2)
    assert {place[4] for place in places if place[0] == "llama2-70b"} == {8}
    assert ("llama2-7b", "adafuse", "all7", "int8", 1, "fused-int8") in places


@pytest.mark.slow
def test_weights_made_in_their_shards():
    """Each device has its part, and the whole is that of one device."""
    program = """
import jax, numpy as np
from adafuse_jax.parallel.mesh import make_mesh
from benchmarks.decode.costs import SIZES
from benchmarks.decode.models import model_config, place_on, random_backbone
config = model_config(SIZES["tiny"])
one, two = (
    random_backbone(config, quantize="int8", place=place_on(mesh)) for mesh in (None, make_mesh(2, config))
)
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)
print(max(leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(two.layers.q_proj)))
"""
    assert float(tiny.with_devices(2, "-c", program)) == 0.5
