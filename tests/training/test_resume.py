"""Resumed runs, their output directories, and signals."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file
from training_runs import checkpoints_of, flags, metrics_of, saved_state, train_here

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.atomic_files import write_digests
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.flags import parse_flags
from adafuse_jax.core.tables import Table
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.training import loop, trainer
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.data import prepare_data
from adafuse_jax.training.output import check_output, new_run, remove_leftovers, require_no_checkpoint_lost
from adafuse_jax.training.signals import stop_signals


def short_run(run_folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return train_here(run_folder, output, **({"steps": 4, "checkpoint_every": 1, "eval_examples": 0} | changes))


def edit_identity(run: Path, change: Callable[[dict[str, Any]], Any], *, digests: bool = True) -> None:
    """Edit the identity of the newest checkpoint; without `digests` it then is as an earlier version wrote it."""
    where = run / "checkpoints" / str(checkpoints_of(run)[-1])
    table = json.loads((where / "identity" / "metadata").read_text())
    change(table)
    (where / "identity" / "metadata").write_text(json.dumps(table))
    if digests:
        write_digests(where)
    else:
        (where / "digests.json").unlink()


@pytest.mark.slow
def test_a_run_with_tied_experts_is_a_loras(run_folder: Path, tmp_path: Path):
    """Experts of the saved adapter are all equal, and have learned. The router has, too, in its half of the steps."""
    run = tmp_path / "run"
    short_run(run_folder, run, tied_share=1.0, router_share=0.5, keep_checkpoints=4)
    leaves = load_file(run / "adapter" / "adapter_model.safetensors")
    (router,) = [name for name in saved_state(run, 4) if name.startswith("adapter.") and "router" in name]
    routers = [saved_state(run, step)[router] for step in (1, 2, 3, 4)]
    assert [np.array_equal(a, b) for a, b in itertools.pairwise(routers)] == [False, True, True]
    factors = {name: leaf for name, leaf in leaves.items() if name.endswith((".A", ".B"))}
    assert factors
    for name, leaf in factors.items():  # [L, E, …]
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1], leaf.shape), err_msg=name)
        assert np.abs(leaf).max() > 0, name


@pytest.mark.slow
def test_a_run_older_than_a_setting_had_its_default(run_folder: Path, tmp_path: Path):
    """Checkpoints without the setting are resumed with its default, and refused with another value."""
    run, plain = tmp_path / "run", {"tied_share": None, "router_share": None}
    short_run(run_folder, run, **plain)
    edit_identity(run, lambda table: [table.pop(name) for name in plain])
    with pytest.raises(UserError, match=r"was made with router_share 1\.0, this run has 0\.5"):
        short_run(run_folder, run, **plain | {"router_share": 0.5}, resume=True)
    short_run(run_folder, run, **plain, resume=True)


def test_a_run_with_a_setting_that_is_no_more_is_refused(run_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    short_run(run_folder, run)
    edit_identity(run, lambda table: table.update(router_rate=0.1))
    with pytest.raises(UserError, match=r"was made with router_rate 0\.1, this run has None; resume with the same"):
        short_run(run_folder, run, resume=True)


def test_divergence_names_the_step_and_the_last_good_checkpoint(run_folder: Path, tmp_path: Path):
    """The checkpoint can be resumed from, and the run diverges again at the same step."""
    messages = []
    for resume in (None, True):
        with pytest.raises(UserError) as error:
            short_run(run_folder, tmp_path / "run", learning_rate=1e30, resume=resume)
        messages.append(str(error.value))
    last = checkpoints_of(tmp_path / "run")[-1]
    assert messages[0].startswith(f"step {last + 1}: ")
    assert (
        f"is not finite; the last good checkpoint is {tmp_path}/run/checkpoints/{last}: lower --learning-rate"
        in messages[0]
    )
    assert messages[1] == messages[0]
    assert all(np.isfinite(array).all() for array in saved_state(tmp_path / "run", last).values())


def test_nan_in_the_backbone_is_found_before_a_run_directory_is_made(run_folder: Path, tmp_path: Path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"(is not finite; there is no checkpoint|up_proj.* holds NaN)"):
        short_run(run_folder, tmp_path / "run", model=tmp_path / "model")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["memory", "not finite"])
def test_a_failing_first_step_leaves_no_run_directory(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    def step(state: Any, *_: Any, **__: Any) -> Any:
        if fault == "memory":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return state, {"loss": np.float32(np.inf)}

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises((UserError, jax.errors.JaxRuntimeError), match=r"^step 1: loss|RESOURCE"):
        short_run(run_folder, tmp_path / "run", eval_examples=4)
    assert not (tmp_path / "run").exists()


class TestOneRunADirectory:
    def test_the_loser_of_two_starts_changes_nothing(
        self, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Both processes find the directory free; the other creates it while this one loads its model."""
        run = tmp_path / "run"
        with ExitStack() as other:

            def load(*args: Any, **options: Any) -> Any:
                other.enter_context(new_run(run, {"seed": 5}))
                before.update(tiny.snapshot(tmp_path))
                return load_backbone(*args, **options)

            before: dict[str, tuple] = {}
            monkeypatch.setattr(trainer, "load_backbone", load)
            monkeypatch.setattr(loop, "train_step", lambda state, *_, **__: (state, {"loss": np.float32(1)}))
            with pytest.raises(UserError, match=f"--output {run}: another process is using it"):
                short_run(run_folder, run)
            assert tiny.snapshot(tmp_path) == before

    def test_a_run_that_goes_on_is_not_resumed(self, run_folder: Path, tmp_path: Path):
        run = tmp_path / "run"
        with new_run(run, {"seed": 5}):
            before = tiny.snapshot(tmp_path)
            with pytest.raises(UserError, match=f"--output {run}: another process is using it"):
                short_run(run_folder, run, resume=True)
            assert tiny.snapshot(tmp_path) == before

    def test_a_lock_alone_is_no_run(self, tmp_path: Path):
        (tmp_path / ".lock").touch()
        check_output(tmp_path, resume=False)
        (tmp_path / "x").touch()
        with pytest.raises(UserError, match="is in use"):
            check_output(tmp_path, resume=False)

    def test_a_run_that_lost_its_checkpoints_does_not_begin_anew(self, run_folder: Path, tmp_path: Path):
        run = tmp_path / "run"
        with new_run(run, {"checkpoint_every": 2}):
            (run / "metrics.jsonl").write_text('{"step": 4}\n')
            require_no_checkpoint_lost(run, Table.read(run / "train_config.json"))  # killed while it wrote the first
            (run / "metrics.jsonl").write_text('{"step": 5}\n')
        before = tiny.snapshot(tmp_path)
        with pytest.raises(UserError, match="checkpoints of this run are gone; restore them"):
            short_run(run_folder, run, resume=True)
        assert tiny.snapshot(tmp_path) == before

    def test_a_run_killed_before_its_first_checkpoint_begins_anew(self, run_folder: Path, tmp_path: Path):
        with new_run(tmp_path / "run", {"seed": 5}):
            (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
        assert short_run(run_folder, tmp_path / "run", resume=True)["steps"] == 4
        assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
        assert json.loads((tmp_path / "run" / "train_config.json").read_text())["seed"] == 0

    def test_what_a_killed_run_left_half_written_is_removed_at_the_end(self, run_folder: Path, tmp_path: Path):
        """Nothing else is removed."""
        run, names = (
            tmp_path / "run",
            (".adapter.ab_defg1.old", ".summary.json.abcdefg2.partial", ".adapter.of_mine", ".x"),
        )
        with new_run(run, {"seed": 5}):
            (run / names[0]).mkdir()
            for name in names[1:]:
                (run / name).touch()
        remove_leftovers(run)
        assert sorted(os.listdir(run)) == [".adapter.of_mine", ".lock", ".x", "train_config.json"]

    def test_a_damaged_config_is_one_line(self, run_folder: Path, tmp_path: Path):
        with new_run(tmp_path / "run", {"seed": 5}):
            (tmp_path / "run" / "train_config.json").write_bytes(b'{"seed": 5')
        with pytest.raises(UserError, match=r"train_config\.json: not valid JSON .*; restore the file"):
            short_run(run_folder, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_epochs_of_an_earlier_version_are_resumed_by_their_steps(run_folder: Path, tmp_path: Path):
    """The earlier version counted 6 steps for 3 passes over 14 rows in batches of 8, and filled the last one with rows
    of a fourth."""
    run = tmp_path / "run"
    data = tiny.write_jsonl(tmp_path / "few.jsonl", [{"instruction": f"Say {i}.", "output": str(i)} for i in range(14)])
    plain: dict[str, Any] = {
        "grad_accum": None, "batch_size": 8, "no_packing": True, "checkpoint_every": 6, "dataset": data,
    }  # fmt: skip
    short_run(run_folder, run, **plain, steps=6)
    edit_identity(run, lambda table: [table.pop(name) for name in ("format", "padded_from")], digests=False)
    with pytest.raises(UserError, match=r"resume with the same, that is --steps 6, or start a new run"):
        short_run(run_folder, run, **plain, steps=None, epochs=3, resume=True)
    short_run(run_folder, run, **plain, steps=6, resume=True)


@pytest.mark.slow
def test_epochs_see_every_example_so_many_times(run_folder: Path, tmp_path: Path):
    """Count by the tokens in the metrics; a resumed run gives the same, bit for bit."""
    run = tmp_path / "run"
    data = tiny.write_jsonl(
        tmp_path / "few.jsonl", [{"instruction": f"Say {i}.", "output": "a" * i} for i in range(1, 10)]
    )
    plain: dict[str, Any] = {
        "grad_accum": 2, "batch_size": 4, "no_packing": True, "checkpoint_every": 2, "dataset": data, "steps": None,
        "epochs": 3,
    }  # fmt: skip
    assert short_run(run_folder, run, **plain)["steps"] == 4  # 27 rows, 8 a step
    config, _ = parse_flags("", (TrainConfig, AdapterConfig), flags(run_folder, str(run), **plain, eval_examples=0))
    (packed,) = prepare_data(config, load_tokenizer(run_folder / "model")).batches.rows  # type: ignore[arg-type]
    assert sum(line["tokens"] for line in metrics_of(run)) == 3 * (packed.rows().segment_ids > 0).sum()
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "4")
    short_run(run_folder, run, **plain, resume=True)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_the_first_signal_asks_and_a_second_interrupt_interrupts():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt_twice(first: int) -> None:
        with stop_signals() as asked:
            assert asked() == 0
            signal.raise_signal(first)
            assert asked() == first
            signal.raise_signal(signal.SIGTERM)
            assert asked() == first
            signal.raise_signal(signal.SIGINT)

    for first in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            interrupt_twice(first)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_only_the_adapter_trains(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The backbone that was trained with is the one in the file, and no array of the optimiser has its shape."""
    used = []
    monkeypatch.setattr(
        trainer, "load_backbone", lambda *args, **options: used.append(load_backbone(*args, **options)) or used[0]
    )
    short_run(run_folder, tmp_path / "run")
    before = load_backbone(run_folder / "model", "float32")
    for leaf, fresh in zip(jax.tree.leaves(nnx.state(used[0])), jax.tree.leaves(nnx.state(before)), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(fresh).tobytes()

    state = saved_state(tmp_path / "run", 4)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    saved = {name.removeprefix("adapter."): array for name, array in state.items() if name.startswith("adapter.")}
    assert {name.removesuffix(".value") for name in saved} == set(adapter)
    for name, array in saved.items():
        assert np.asarray(array).tobytes() == adapter[name.removesuffix(".value")].tobytes()
    moments = [array.shape for name, array in state.items() if name.startswith("moments.") and array.ndim]
    assert sorted(moments) == sorted([array.shape for array in adapter.values()] * 2)


@pytest.mark.slow
def test_the_adapter_directory_decodes(run_folder: Path, tmp_path: Path):
    short_run(run_folder, tmp_path / "run", learning_rate=0.05)
    answers = []
    for adapter in (None, tmp_path / "run" / "adapter"):
        done = tiny.run_script("decode", tiny.decode_flags(run_folder, json=True, adapter=adapter, max_new_tokens=8))
        assert (done.returncode, done.stderr) == (0, "")
        answers.append(json.loads(done.stdout))
    assert answers[0]["token_ids"] != answers[1]["token_ids"]
    assert sum(answers[1]["experts_used"]) > 0


def test_data_order_is_a_function_of_seed_and_step(run_folder: Path):
    def tokens(seed: int, step: int) -> bytes:
        config, _ = parse_flags("", (TrainConfig, AdapterConfig), flags(run_folder, "unused", seed=seed))
        return prepare_data(config, load_tokenizer(run_folder / "model")).batches.at(step).tokens.tobytes()  # type: ignore[arg-type]

    assert tokens(0, 7) == tokens(0, 7)
    assert len({tokens(0, 7), tokens(0, 8), tokens(1, 7)}) == 3
