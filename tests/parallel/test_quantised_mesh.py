"""A quantised backbone over two CPU devices: each its part of codes and scales, and the results of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from adafuse_jax.models.config import LINEARS

PROGRAM = Path(__file__).with_name("quantised_run.py")


@pytest.mark.slow
def test_codes_and_scales_are_sharded():
    found = json.loads(tiny.with_devices(2, PROGRAM))
    for quantize in ("int4-g64", "int8"):
        run = found[f"decode {quantize}"]
        assert run["same"]
        assert run["imported"]
        assert run["tokens"][0] == run["tokens"][1]
        for name in LINEARS:
            whole = quantize == "int8" and name in ("o_proj", "down_proj")  # a scale for each output, on every device
            assert run["shares"][name] == run["stored"][name] == [0.5, 1.0 if whole else 0.5], name
        assert run["shares"]["lm_head"] == run["stored"]["lm_head"] == [0.5, 0.5]
    for mesh in ("fsdp=2", "tensor=2"):
        run = found[f"train {mesh}"]
        np.testing.assert_allclose(*run["losses"], rtol=1e-5)
        assert run["losses"][0][1] < run["losses"][0][0]
        of_head = run["shares"].pop("lm_head")  # over fsdp its columns, and the scales whole
        assert of_head == [0.5, 1.0 if mesh == "fsdp=2" else 0.5]
        assert all(part == [0.5, 0.5] for part in run["shares"].values())
