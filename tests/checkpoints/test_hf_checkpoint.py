"""Model directories: opened once by each entry point, and their tensors placed over a mesh or where the caller requests."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from goldens.tiny_models import CASES, weights, write_model_dir

from adafuse_jax import AdapterConfig, DecodeConfig, TrainConfig, make_adapter
from adafuse_jax.checkpoints import safetensors_files
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.peft import save_peft_lora
from adafuse_jax.evaluation.__main__ import run as evaluate
from adafuse_jax.evaluation.config import EvaluationConfig
from adafuse_jax.export import ExportConfig, export
from adafuse_jax.inference.session import Session
from adafuse_jax.models.registry import FAMILIES
from adafuse_jax.training.trainer import train

FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_READERS = ("transformers.", "adafuse_jax.data.direct_tokenizer")
opened: Counter[str] | None = None


def _count(event: str, arguments: tuple) -> None:
    """An audit hook: opened files of the model, but for those that are opened to read its tokenizer."""
    if opened is None or event != "open" or not isinstance(arguments[0], str | Path):
        return
    path, frame = Path(arguments[0]), sys._getframe(1)
    if path.parent.name == "model" and path.name in FILES:
        while frame is not None and not frame.f_globals.get("__name__", "").startswith(TOKENIZER_READERS):
            frame = frame.f_back
        if frame is None:
            opened[path.name] += 1


sys.addaudithook(_count)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Name of a file of the directory `model` → how often it is opened."""
    global opened
    opened, original = Counter(), safetensors_files.safe_open

    def counting(path: Path, **options: Any) -> Any:
        opened.update([Path(path).name] if Path(path).parent.name == "model" else [])
        return original(path, **options)

    monkeypatch.setattr(safetensors_files, "safe_open", counting)
    yield opened
    opened = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny.write_folder`'s, the model in three shards, and a LoRA of it."""
    folder = tiny.write_folder(tmp_path_factory.mktemp("folder"))
    for path in (folder / "model").glob("*.safetensors"):
        path.unlink()
    tiny.write_model(folder / "model", num_shards=3)
    config = HFCheckpoint.open(folder / "model").config
    lora = make_adapter(AdapterConfig(adapter="lora", rank=2), config, rngs=nnx.Rngs(0))
    save_peft_lora(lora, folder / "lora", config, backbone_name="tiny")
    return folder


def fine_tune(folder: Path, out: Path) -> None:
    """All weights, which an export then leaves in `out`."""
    config = TrainConfig(
        model=str(folder / "model"), dataset=(str(folder / "beta.jsonl"),), output=str(out), steps=1, batch_size=1,
        max_length=64, eval_examples=0, dtype="float32",
    )  # fmt: skip
    train(config, AdapterConfig(adapter="full"))


ENTRY_POINTS: dict[str, Callable[[Path, Path], Any]] = {
    "train": fine_tune,
    "decode": lambda folder, out: Session(
        DecodeConfig(model=str(folder / "model"), adapter=str(folder / "lora"), prompt="Hi")
    ),
    "evaluation": lambda folder, out: evaluate(
        EvaluationConfig(model=str(folder / "model"), dataset=(str(folder / "choices.jsonl"),), limit=2, split="train")
    ),
    "export": lambda folder, out: export(
        ExportConfig(model=str(folder / "model"), adapter=str(folder / "lora"), output=str(out))
    ),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_each_file_is_opened_once(folder: Path, tmp_path: Path, counted: Counter[str], name: str):
    ENTRY_POINTS[name](folder, tmp_path / "out")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    config_files = Counter({"config.json": 1, "generation_config.json": 1, "model.safetensors.index.json": 1})
    copied = Counter({"generation_config.json": 1} if name in ("train", "export") else {})
    assert counted == config_files + copied + Counter(shards)


def test_a_file_that_replaces_an_opened_one_is_not_mixed_with_it(tmp_path: Path):
    checkpoint = HFCheckpoint.open(tiny.write_model(tmp_path / "model"))
    first = load_backbone(checkpoint)
    other = tiny.write_model(tmp_path / "other", name="other")
    checkpoint = HFCheckpoint.open(tmp_path / "model")
    (other / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    for one, again in zip(jax.tree.leaves(first), jax.tree.leaves(load_backbone(checkpoint)), strict=True):
        np.testing.assert_array_equal(one, again)


class TestPlacement:
    def test_receives_every_leaf_with_its_axes_and_tensors(self, tmp_path: Path):
        """A placement that adds up each leaf: what it returns is the leaf."""
        case, found = CASES["qwen3_bias"], []
        family = FAMILIES["qwen3"]

        class Sums:
            num_threads = 1

            def empty(self, leaves: Sequence[tuple[tuple, jax.ShapeDtypeStruct]]) -> list:
                return [np.zeros(leaf.shape) for _, leaf in leaves]

            def fill(self, leaf: np.ndarray, axes: tuple, tensors: Iterator[np.ndarray]) -> tuple:
                parts = [tensor.sum() for tensor in tensors]
                found.append((axes, leaf.shape))
                return np.float32(sum(parts)), np.ones(len(parts), bool)

        model = load_backbone(write_model_dir(case, tmp_path), "float32", place=Sums())
        expected: Counter[str] = Counter()
        for name, tensor in weights(case).items():
            parts = name.split(".")
            at = parts.index("layers") + 1 if "layers" in parts else None
            expected[name if at is None else ".".join([*parts[:at], "{}", *parts[at + 1 :]])] += tensor.sum()
        made = {family.tensor_name(path): float(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
        assert made == pytest.approx({name: float(total) for name, total in expected.items()}, rel=1e-4)
        assert (("layers", "heads", "embed"), (3, 80, 64)) in found
        assert (("layers", "head_dim"), (3, 20)) in found
        assert (("vocab", "embed"), (96, 64)) in found
        assert all(len(axes) == len(shape) for axes, shape in found)

    def test_over_a_mesh_equals_load_then_shard(self):
        found = json.loads(tiny.with_devices(2, __file__))
        assert found["shares"] == [0.5, 1.0], "of a sharded tensor a device gets its half, and never the whole"
        assert "model.layers.1.mlp.down_proj.weight holds NaN" in found["error"]


def run_on_mesh() -> dict[str, Any]:
    """Compare leaves and shardings of both ways, in a process with two devices; see the test above."""
    import tempfile

    from safetensors.numpy import load_file, save_file

    from adafuse_jax import UserError
    from adafuse_jax.checkpoints import placement
    from adafuse_jax.parallel.axes import logical_axes, partition_spec
    from adafuse_jax.parallel.mesh import make_mesh, mesh_of, shard

    original, shares = placement._set_layer, set()

    def watched(stack: jax.Array, finite: jax.Array, layer: int, tensor: jax.Array) -> Any:
        for array in (stack, tensor):
            shares.add((array.sharding.is_fully_replicated, array.addressable_shards[0].data.size / array.size))
        return original(stack, finite, layer, tensor)

    placement._set_layer = watched
    folder = write_model_dir(CASES["qwen3_bias"], Path(tempfile.mkdtemp()))
    checkpoint = HFCheckpoint.open(folder)
    mesh = make_mesh(2, checkpoint.config)
    wanted = shard(load_backbone(checkpoint, "bfloat16"), mesh)
    shares.clear()
    model = load_backbone(checkpoint, "bfloat16", place=placement.Stacked(mesh))
    assert mesh_of(model) is mesh_of(wanted)
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(model), jax.tree.leaves(wanted), strict=True):
        assert mine.sharding == theirs.sharding, path
        assert mine.sharding.spec == partition_spec(logical_axes(path)), path
        assert mine.dtype == theirs.dtype, path
        for x, y in zip(mine.addressable_shards, theirs.addressable_shards, strict=True):
            assert x.device == y.device, path
            assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes(), path
    assert all(share == (1.0 if replicated else 0.5) for replicated, share in shares)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, -1] = np.nan  # in the half of the second device
    save_file(tensors, folder / "model.safetensors")
    try:
        error = str(load_backbone(folder, "bfloat16", place=placement.Stacked(mesh)))
    except UserError as refused:
        error = str(refused)
    return {"shares": sorted({share for _, share in shares}), "error": error}


if __name__ == "__main__":
    print(json.dumps(run_on_mesh()))
