"""Checkpoints as files: whole ones are used, damaged ones are passed over, and nothing that is there gets lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adafuse_jax.core.errors import UserError
from adafuse_jax.training import checkpoint
from adafuse_jax.training.checkpoint import Checkpoints
from adafuse_jax.training.metrics import Report, plot_training, read_metrics
from adafuse_jax.training.step import TrainState

IDENTITY = {"rank": 2, "total_steps": 9, "padded_from": None}


def state(step: int) -> TrainState:
    """State whose arrays depend on the step."""
    return TrainState(
        step=jnp.int32(step),
        adapter={"A": jnp.full((3, 50), step, jnp.float32), "B": jnp.arange(4.0) * step},
        moments={"mu": jnp.full((7,), -step, jnp.bfloat16)},
        key=jax.random.key(step),
    )


def checkpoints(directory: Path, *, keep: int = 2, **identity: Any) -> Checkpoints:
    return Checkpoints(directory, keep=keep, identity=IDENTITY | identity)


def save(directory: Path, *steps: int, keep: int = 2) -> Path:
    with checkpoints(directory, keep=keep) as writer:
        for step in steps:
            writer.save(state(step))
    return directory


def check_restored(directory: Path, step: int) -> None:
    restored, wanted = checkpoints(directory).restore(state(0)), state(step)
    assert jax.tree.structure(restored) == jax.tree.structure(wanted)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(wanted.key))
    for a, b in zip(jax.tree.leaves(restored)[:-1], jax.tree.leaves(wanted)[:-1], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("written") / "checkpoints", 3, 6)


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoints of steps 3 and 6, to spoil."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


def files_of(checkpoint: Path) -> list[Path]:
    """All that hold a byte."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def as_earlier_version(checkpoint: Path) -> None:
    """Remove the digests, and the entry in the identity that requires them."""
    (checkpoint / "digests.json").unlink()
    path = checkpoint / "identity" / "metadata"
    table = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in table.items() if name not in ("format", "padded_from")}))


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    def test_any_file_of_the_newest_is_enough_to_use_the_one_before(
        self, directory: Path, damage: Any, caplog: pytest.LogCaptureFixture
    ):
        for path in files_of(directory / "6"):
            good = path.read_bytes()
            damage(path)
            before = tiny.snapshot(directory)
            caplog.clear()
            check_restored(directory, 3)
            (line,) = caplog.messages
            assert line.startswith("damaged: "), line
            assert line.endswith(f"going on from the checkpoint before, {directory / '3'}"), line
            assert tiny.snapshot(directory) == before
            if path.is_dir():
                path.rmdir()
            path.write_bytes(good)
        check_restored(directory, 6)

    def test_a_file_that_was_not_written(self, directory: Path):
        (directory / "6" / "state" / "more").touch()
        check_restored(directory, 3)

    def test_none_is_left(self, directory: Path):
        for step in ("3", "6"):
            flip(files_of(directory / step / "state")[-1])
        before = tiny.snapshot(directory)
        with pytest.raises(UserError) as error:
            checkpoints(directory).restore(state(0))
        assert str(error.value).startswith(f"{directory}: no checkpoint can be used ({directory}/6/state/")
        assert str(error.value).endswith("restore one, or start a new run in another directory")
        assert tiny.snapshot(directory) == before

    def test_the_run_writes_over_damaged_ones(self, directory: Path):
        flip(files_of(directory / "6" / "state")[0])
        check_restored(directory, 3)
        save(directory, 5)
        assert checkpoints(directory).steps() == [3, 5, 6]  # nobody has asked to remove 6
        check_restored(directory, 5)
        flip(files_of(directory / "5" / "state")[0])
        save(directory, 5)
        check_restored(directory, 5)
        save(directory, 6)
        assert checkpoints(directory).steps() == [5, 6]
        check_restored(directory, 6)

    def test_one_of_another_run_is_refused_though_one_before_would_do(self, directory: Path):
        with pytest.raises(
            UserError, match=r"checkpoints/6: was made with rank 2, this run has 3; resume with the same"
        ):
            checkpoints(directory, rank=3).restore(state(0))


class TestEarlierVersion:
    def test_is_used_with_a_line(self, directory: Path, caplog: pytest.LogCaptureFixture):
        as_earlier_version(directory / "6")
        check_restored(directory, 6)
        assert caplog.messages == [
            f"{directory}/6: was written by an earlier version, without digests, and is used unchecked"
        ]

    @pytest.mark.parametrize("damage", ["arrays", "identity", "state"])
    def test_what_cannot_be_read_is_passed_over(self, directory: Path, damage: str, capfd: pytest.CaptureFixture[str]):
        for step in ("3", "6"):
            as_earlier_version(directory / step)
        if damage == "arrays":
            for path in files_of(directory / "6" / "state" / "d"):
                path.write_bytes(b"")
        elif damage == "identity":
            (directory / "6" / "identity" / "metadata").write_text("null")
        else:
            shutil.rmtree(directory / "6" / "state")
        check_restored(directory, 3)
        assert "Traceback" not in capfd.readouterr().err

    def test_a_new_one_without_its_digests_is_not_taken_for_one(self, directory: Path):
        (directory / "6" / "digests.json").unlink()
        check_restored(directory, 3)


class TestWriting:
    def test_the_last_ones_stay(self, tmp_path: Path):
        save(tmp_path / "c", 2, 4, 6, 8, keep=3)
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["4", "6", "8"]

    def test_what_is_saved_is_a_copy(self, tmp_path: Path):
        """The next step takes the state's buffers."""
        with checkpoints(tmp_path / "c") as writer:
            first = state(3)
            writer.save(first)
            jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)((first.adapter, first.moments))
        check_restored(tmp_path / "c", 3)

    def test_a_kill_leaves_no_checkpoint_by_that_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A kill in the last moment, when everything but the digests is written. Its files are removed later."""

        def killed(directory: Path) -> None:
            shutil.copytree(directory, directory.parent / ".6.abcdef_1.partial")
            raise OSError(28, "No space left on device")

        save(tmp_path / "c", 3)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_digests", killed)
            with pytest.raises(
                UserError, match=r"step 6 could not .* \(.*No space .* is .*c/3: free space, .* --resume$"
            ):
                save(tmp_path / "c", 6)
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".6.abcdef_1.partial", "3"]
        check_restored(tmp_path / "c", 3)
        save(tmp_path / "c", 6)
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "6"]

    def test_names_that_are_no_steps_are_let_alone(self, tmp_path: Path):
        (tmp_path / "c" / "07").mkdir(parents=True)
        (tmp_path / "c" / "best").mkdir()
        save(tmp_path / "c", 1, 2, keep=1)
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["07", "2", "best"]


GOOD = [{"step": 1, "loss": 2.5, "load": [0.5, 0.5], "pair": [[0.5, 0.0], [0.0, 0.5]]}, {"step": 2, "eval_loss": 1.0}]
BAD = [
    b"\xff\xfe\x00", b"{", b'{"step": 2, "loss": 1', b"null", b"[1]", b"7", b'{"loss": 1.0}', b'{"step": "2"}',
    b'{"step": true}', b'{"step": 1.0}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": [1.0]}', b"\0" * 80,
    b'{"step": 1, "load": 0.5}', b'{"step": 1, "load": ["a"]}', b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", b"[" * 99999,
]  # fmt: skip


class TestMetrics:
    @pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
    def test_a_damaged_line_is_left_out_and_no_other(
        self, tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
    ):
        path = tmp_path / "metrics.jsonl"
        good = [json.dumps(line).encode() for line in GOOD]
        path.write_bytes(b"\n".join([good[0], bad, good[1], b'{"step": 3}']))
        assert read_metrics(path) == ([*GOOD, {"step": 3}], 1)
        report = Report(path, start=2, steps=4, log_every=1)
        report.open()
        report.close()
        assert caplog.messages == [f"{path}: 1 damaged line(s) left out"]
        assert [json.loads(line) for line in path.read_text().splitlines()] == GOOD

    def test_a_byte_order_mark_damages_no_line(self, tmp_path: Path):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(line).encode() for line in GOOD))
        assert read_metrics(path) == (GOOD, 0)

    def test_a_pipe_in_its_place_is_refused_not_waited_for(self, tmp_path: Path):
        os.mkfifo(tmp_path / "metrics.jsonl")
        report = Report(tmp_path / "metrics.jsonl", start=2, steps=4, log_every=1)
        with pytest.raises(UserError, match=r"metrics\.jsonl: is not a regular file"):
            report.open()

    def test_nothing_is_written_before_the_run_begins(self, tmp_path: Path):
        report = Report(tmp_path / "metrics.jsonl", start=0, steps=4, log_every=1)
        report.evaluation(0, {"eval_loss": 1.0})
        assert not list(tmp_path.iterdir())
        report.open()
        report.evaluation(1, {"eval_loss": 0.5})
        report.close()
        assert [line["eval_loss"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1.0, 0.5]

    @pytest.mark.parametrize("lines", [[], GOOD, [*GOOD, {"step": 3, "loss": 1.0}], [*GOOD, GOOD[0] | {"load": [1.0]}]])
    def test_what_is_left_is_plotted(self, tmp_path: Path, lines: list[dict]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
