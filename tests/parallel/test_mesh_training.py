"""Training over meshes of eight CPU devices, in processes that have them: the numbers of one device, and no device with more
than its part."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from adafuse_jax import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import Encoded
from adafuse_jax.data.packing import pack
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.parallel import mesh as meshes
from adafuse_jax.parallel.mesh import parse_mesh, training_mesh

PROGRAM = Path(__file__).with_name("mesh_training_run.py")
MODEL = ModelConfig(
    model_type="llama", vocab_size=96, embed_dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position_embeddings=64, norm_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "mesh"),
    [
        ("adafuse", ("fsdp=4,tensor=2",)),
        pytest.param("adafuse", ("data=8", "fsdp=8"), marks=pytest.mark.slow),
        *(
            pytest.param(name, ("data=8", "fsdp=8", "fsdp=4,tensor=2"), marks=pytest.mark.slow)
            for name in ("lora", "full")
        ),
    ],
)
def test_same_losses_and_weights_as_one_device(method, mesh):
    """Metrics and weights agree to fp32 rounding, and no program holds the weights of all layers whole, not even for its
    backward pass. Adam divides by the gradient's size, so rounding of a gradient near 0 counts most."""
    found = json.loads(tiny.with_devices(8, PROGRAM, "agreement", method, *mesh))
    losses = [loss for loss, *_ in found["alone"]]
    assert losses[0] > losses[-1] + 1e-3
    for name, of_mesh in found["meshes"].items():
        assert of_mesh["metrics"] < 1e-6, name
        assert of_mesh["weights"] < 1e-3, name
        assert not of_mesh["whole"] or name == "data=8", name


@pytest.mark.slow
def test_a_model_is_loaded_into_its_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed counts no more
    found = json.loads(tiny.with_devices(8, PROGRAM, "loading"))
    assert found["samples"] > 50
    assert found["device"] <= 1 / 6
    assert found["beyond"] <= 3


@pytest.mark.slow
def test_resumed_on_other_meshes():
    """Bit-identical on the same mesh; on four devices and on one to fp32 rounding."""
    found = json.loads(tiny.with_devices(8, PROGRAM, "resumed"))
    assert found["default"] is None
    assert found["fsdp=8"] == {"loss": 0, "weights": 0}
    for mesh in ("fsdp=4", "fsdp=1"):
        assert abs(found[mesh]["loss"]) < 1e-5
        assert 0 < found[mesh]["weights"] < 1e-5


def test_rows_of_processes_make_up_the_batch():
    """Each process reads a part of the rows of every micro-batch; the last batch is partly padding."""
    rows = [pack([Encoded(np.full(4, i), np.ones(4, bool)) for i in range(n)], 4, packing=False) for n in (5, 3)]
    for weights in (None, (2.0, 1.0)):
        batches = Batches(tuple(rows), seed=3, batch_size=4, grad_accum=2, weights=weights, epochs=1.4)
        for step in range(batches.total_steps or 0):
            whole = batches.at(step)
            parts = [batches.at(step, rows) for rows in (range(1), range(1, 4))]
            for leaves in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
                np.testing.assert_array_equal(leaves[0], np.concatenate(leaves[1:], axis=1))


class TestMeshes:
    @pytest.fixture(autouse=True)
    def eight_devices(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        monkeypatch.setattr(meshes, "Mesh", lambda devices, axes: dict(zip(axes, devices.shape, strict=True)))

    @pytest.mark.parametrize(
        ("text", "sizes"),
        [
            (None, (1, 8, 1)), ("data=2,fsdp=-1", (2, 4, 1)), ("fsdp=-1,tensor=2", (1, 4, 2)), ("data=4", (4, 1, 1)),
            (" data=1 , fsdp=8", (1, 8, 1)),
        ],
    )  # fmt: skip
    def test_sizes(self, text, sizes):
        assert tuple(training_mesh(text, MODEL, 8).values()) == sizes

    def test_one_device_where_they_do_not_divide_the_batch(self, caplog: pytest.LogCaptureFixture):
        caplog.set_level("INFO", logger="adafuse_jax")
        assert training_mesh(None, MODEL, 6) is None
        (line,) = caplog.messages
        assert line.startswith("training on one of 8 devices: 8 devices cannot share --batch-size 6 evenly; ")

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("data=16", "16 devices are more than the 8 that there are"),
            ("data=3,fsdp=-1", "3 devices do not divide the 8 that there are"),
            ("data=3", "3 devices cannot share --batch-size 8 evenly"),
            ("tensor=4", "4 devices cannot share the model's 2 key-value heads evenly"),
        ],
    )
    def test_one_that_does_not_fit(self, text, fault):
        with pytest.raises(UserError, match=f"--mesh {text}: {fault}; give"):
            training_mesh(text, MODEL, 8)

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("", "has ''; give sizes of data, fsdp, tensor"), ("rows=2", "has 'rows=2'; give sizes"),
            ("data=2,data=4", "names data twice"), ("data=0", "data is '0'; give a number"), ("fsdp", "fsdp is ''"),
            ("data=-1,fsdp=-1", "-1 stands twice"), ("data=1e3", "data is '1e3'"),
        ],
    )  # fmt: skip
    def test_texts_that_are_none(self, text, fault):
        with pytest.raises(UserError, match=fault):
            parse_mesh(text)
