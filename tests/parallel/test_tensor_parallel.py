"""Tensor parallelism on CPU devices, in processes that have several: the same tokens, and every device its share."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
import tiny
from random_models import POSITIONS

from adafuse_jax import UserError
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.parallel.mesh import make_mesh, training_mesh
from benchmarks.decode.costs import SIZES
from benchmarks.decode.models import model_config
from pallas_kernels.quantised import INT4

PROGRAM = Path(__file__).with_name("tensor_parallel_run.py")


@pytest.mark.slow
def test_other_methods_give_the_same_tokens():
    found = json.loads(tiny.with_devices(2, PROGRAM, "llama_gqa_tied", "methods", 2))
    assert found == {"lora merged": True, "mola unmerged": True, "pesc unmerged": True}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama_gqa", LINEARS),
        pytest.param("qwen2_window", LINEARS, marks=pytest.mark.slow),
        pytest.param("qwen3", POSITIONS[next(iter(POSITIONS))], marks=pytest.mark.slow),
    ],
)
def test_same_tokens_and_half_of_everything(family, targets):
    """Two rows, two devices, twice: one program, and no device holds more than half of a cut matrix."""
    found = json.loads(tiny.with_devices(2, PROGRAM, family, ",".join(targets), 2))
    assert found["together"] == [found["alone"]] * 2
    assert found["programs"] == 1
    assert set(found["linears"].values()) == {0.5}
    for name, shares in found["experts"].items():
        assert shares == ([0.5, 1.0] if name in ("o_proj", "down_proj") else [1.0, 0.5]), name


@pytest.mark.slow
def test_fused_shares_add_up():
    """Sum of the shards' outputs, with the kernel's phases in plain fp32, one device's shard at a time. The compiled
    launch requests from GPUs each other's addresses, a barrier before it, and no multicast memory. Unsupported meshes
    are refused."""
    found = json.loads(tiny.with_devices(2, PROGRAM, "-", "fused", 2))
    for name, (logits, *new) in found["errors"].items():
        assert max(logits, *new) < 1e-3, name
    (alone, _), together = found["tokens"]
    assert together == [alone] * 2, "an engine on both devices, twice"
    assert found["programs"] == [1, 1]
    assert found["unasked"] == ["fused", "unmerged", "fused"], "the default, but over more devices than it has run on"
    assert found["launched"]
    assert "golden runs on one device, and the model is on 2" in found["refused"]
    assert found["uses_xla_collective_metadata"]
    assert not found["skip_device_barrier"]
    assert not found["multicast"]
    assert ["the first devices of one process" in (reason or "") for reason in found["reasons"]] == [True, False, True]


@pytest.mark.slow
def test_decode_script(tmp_path):
    folder = tiny.write_folder(tmp_path)
    flags = [*tiny.decode_flags(folder, max_new_tokens=8, dtype="float32"), "--json"]
    script = tiny.REPOSITORY / "decode.py"
    alone, together = (
        json.loads(tiny.with_devices(2, script, *flags, *more)) for more in ((), ("--tensor-parallel", "2"))
    )
    assert together["token_ids"] == alone["token_ids"]
    assert len(alone["token_ids"]) > 0


def test_uneven_shares_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 3)
    config = ModelConfig(
        model_type="llama", vocab_size=96, embed_dim=32, hidden_dim=48, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=8, max_position_embeddings=64, norm_eps=1e-5,
    )  # fmt: skip
    with pytest.raises(UserError, match="cannot share the model's 2 key-value heads evenly"):
        make_mesh(3, config)


@pytest.mark.parametrize(("devices", "others"), [(4, "int8 or int4-g64"), (8, "int8")])
def test_groups_that_devices_cannot_share(monkeypatch, devices, others):
    """Llama-2-7B's FFN of 11008 has 86 groups of 128 inputs. 70B's of 28672 has 224."""
    monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
    small, large = (model_config(SIZES[name]) for name in ("llama2-7b", "llama2-70b"))
    with pytest.raises(UserError, match=f"the 86 groups of 128 .* FFN evenly; .*, or quantise to {others}$"):
        make_mesh(devices, small, INT4)
    with pytest.raises(UserError, match=f"--mesh tensor={devices}: .* 86 groups .*-size, or quantise to {others}$"):
        training_mesh(f"tensor={devices}", small, devices, INT4)
    assert make_mesh(devices, large, INT4).size == devices


@pytest.mark.slow
def test_blocks_of_other_families():
    """Norms over sharded heads, behind blocks and of parallel blocks give what one device gives."""
    found = json.loads(tiny.with_devices(2, Path(__file__).with_name("families_run.py")))
    assert found.keys() == {"olmo2_0", "gemma3_text_0", "cohere2_0"}
    assert max(found.values()) < 1e-5
