"""Batches that no memory holds are refused before any of their arrays is made."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import Encoded
from adafuse_jax.data.packing import pack
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.training import limits
from adafuse_jax.training.config import TrainConfig

MODEL = ModelConfig(
    model_type="llama", vocab_size=8, embed_dim=64, hidden_dim=8, num_layers=10, num_heads=1, num_kv_heads=1, head_dim=8,
    max_position_embeddings=2**30, norm_eps=1e-5,
)  # fmt: skip
CONFIG = TrainConfig(model="m", dataset=("d",), output="o", batch_size=4, max_length=1000, dtype="float32")


def test_this_machine_has_some_memory():
    memory_bytes = limits.host_memory()
    assert memory_bytes is None or 2**28 < memory_bytes < 2**50


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 MB."""
    monkeypatch.setattr(limits, "host_memory", lambda: 16_000_000)
    monkeypatch.setattr(limits.jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])


@pytest.mark.parametrize(
    "changes", [{"batch_size": 7}, {"max_length": 2**24}, {"grad_accum": 400}, {"batch_size": 2**16, "packing": False}]
)
@pytest.mark.usefixtures("memory")
def test_a_step_that_cannot_fit_is_refused(changes: dict):
    """4 × 1000 tokens of 64 floats in 10 layers are 10 MB; the batch's arrays 13 bytes a token."""
    limits.require_memory(CONFIG, MODEL)
    with pytest.raises(UserError, match=r"--batch-size .* needs at least .* GB .* are there; lower --batch-size"):
        limits.require_memory(dataclasses.replace(CONFIG, **changes), MODEL)


@pytest.mark.usefixtures("memory")
def test_devices_of_a_mesh_share_the_rows():
    """14 × 1000 tokens of 64 floats in 10 layers are 36 MB, and 9 MB on each of four devices."""
    config = dataclasses.replace(CONFIG, batch_size=14)
    limits.require_memory(config, MODEL, SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2}))
    with pytest.raises(UserError, match=r"--batch-size .* needs at least"):
        limits.require_memory(config, MODEL, SimpleNamespace(shape={"data": 2, "fsdp": 1, "tensor": 4}))


@pytest.mark.usefixtures("memory")
def test_a_device_has_its_own_memory(monkeypatch: pytest.MonkeyPatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 5_000_000})
    monkeypatch.setattr(limits.jax, "local_devices", lambda: [device])
    with pytest.raises(UserError, match=r"0\.0102 GB of memory, 0\.005 GB are there"):
        limits.require_memory(CONFIG, MODEL)


def test_steps_of_many_rows_take_no_memory_before_their_batch():
    rows = pack([Encoded(np.arange(4, dtype=np.int32), np.ones(4, bool))] * 3, 4)
    batches = Batches((rows,), seed=0, batch_size=2**40, grad_accum=2**20, epochs=2)
    assert (batches.total_rows, batches.total_steps) == (6, 1)
