"""Metrics for TensorBoard and Weights & Biases, read back from their files; and MFU."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from training_runs import metrics_of, train_here

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.training.metrics import Report, read_metrics
from adafuse_jax.training.trackers import PACKAGES, TensorBoard, Tracker, open_tracker, require_tracker
from adafuse_jax.training.utilisation import linear_parameters, mfu_per_token

METRICS = {"loss": 1.5, "load": [0.25, 0.75], "pair": [[0.0, 1.0], [1.0, 0.0]], "lr": 1e-3, "tokens_per_second": 200.0}


def tensorboard_events(folder: Path) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of all event files: records of [length, its CRC, protobuf, its CRC]."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            if event.HasField("session_log"):
                yield event.step, "START", 0.0
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
            at += 16 + length


def wandb_records(path: Path) -> list[Any]:
    """The records of a file, which wandb's own process has ended: [CRC, length, type, protobuf] behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    records: list[Any] = []
    for _ in range(200):
        data, at, records = path.read_bytes(), 7, []
        assert len(data) < 2**15, "one block"
        while at < len(data):
            _, length, _ = struct.unpack_from("<IHB", data, at)
            records.append(Record.FromString(data[at + 7 : at + 7 + length]))
            at += 7 + length
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.05)
    return records


def wandb_history(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(run id, metrics) of all offline runs."""
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("history"):
                items = [(item.nested_key[0] if item.nested_key else item.key, item) for item in record.history.item]
                yield path.stem, {name: json.loads(item.value_json) for name, item in items}


def reported(
    output: Path, name: Any, start: int, steps: int, *, between: Callable[[int], Any] = lambda step: None
) -> None:
    """A run that begins, or goes on, behind step `start`, and ends after `steps`; `between` them something happens."""
    trackers: list[Tracker] = []

    def opened() -> Tracker | None:
        trackers.extend(
            filter(None, [open_tracker(name, output, start=start, settings={"rank": 4, "dataset": ("a",)})])
        )
        return trackers[0] if trackers else None

    report = Report(
        output / "metrics.jsonl", start=start, steps=4, log_every=1, mfu_per_token=1e-3,
        open_tracker=opened,
    )  # fmt: skip
    if start == 0:
        report.evaluation(0, {"eval_loss": 2.0})
    report.open()
    for step in range(start + 1, steps + 1):
        report.step(step, METRICS | {"loss": 1 / step})
        between(step)
    report.close()
    for tracker in trackers:
        tracker.close()


def in_own_process(code: str, output: Path) -> subprocess.CompletedProcess[str]:
    """`code`, with the names of this file, in a process without settings of W&B and with the home OUTPUT/../home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment["HOME"] = str(output.parent / "home")
    return subprocess.run(
        [sys.executable, "-c", f"from test_trackers import *\n{code}", str(output)],
        capture_output=True, text=True, timeout=120, env=environment, cwd=output.parent,
    )  # fmt: skip


class SmallDisk(io.FileIO):
    """A file that takes whole writes up to 2000 bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 2000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


EXPECTED = {"load/0": 0.25, "load/1": 0.75, "lr": 1e-3, "tokens_per_second": 200.0, "mfu": 0.2}


def test_tensorboard_has_every_line_and_a_resumed_run_goes_on(tmp_path: Path):
    reported(tmp_path, "tensorboard", 0, 3)
    reported(tmp_path, "tensorboard", 2, 4)  # killed in step 4, with a checkpoint of step 2
    events: dict[int, dict[str, float]] = {}
    for step, name, value in tensorboard_events(tmp_path / "tensorboard"):
        if name == "START":
            events = {s: values for s, values in events.items() if s < step}
        else:
            assert name not in events.setdefault(step, {})
            events[step][name] = value
    assert list(events) == [0, 1, 2, 3, 4]
    assert events[0] == {"eval_loss": 2.0}
    for step in range(1, 5):
        assert events[step] == pytest.approx(EXPECTED | {"loss": 1 / step})


def test_a_full_disk_for_tensorboard_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: io.FileIO("/dev/full", "wb"))
    reported(tmp_path, "tensorboard", 0, 40)  # more events than tensorboardX would queue
    assert len(caplog.messages) == 1
    assert re.match(r"--report-to tensorboard failed \(.*No space left.*metrics\.jsonl alone", caplog.messages[0])
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(41))


def test_a_disk_that_fills_up_during_the_run_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("adafuse_jax.training.trackers.FLUSH_SECONDS", -1)
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: SmallDisk(path, "wb"))
    reported(tmp_path, "tensorboard", 0, 40)
    assert [message[:30] for message in caplog.messages] == ["--report-to tensorboard failed"]
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(41))
    steps = [step for step, _, _ in tensorboard_events(tmp_path / "tensorboard")]
    assert 1 < max(steps) < 40


@pytest.mark.usefixtures("no_wandb_settings")
def test_wandb_has_every_line_offline_and_a_resumed_run_has_the_same_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    reported(tmp_path, "wandb", 0, 3)
    reported(tmp_path, "wandb", 2, 4)
    history = list(wandb_history(tmp_path / "wandb"))
    assert len({run for run, _ in history}) == 1
    lines = [{k: v for k, v in line.items() if not k.startswith("_")} for _, line in history]
    assert lines[0] == {"step": 0, "eval_loss": 2.0}
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4]
    assert lines[-1] == pytest.approx(EXPECTED | {"loss": 1 / 4, "step": 4})
    assert "wandb" not in capfd.readouterr().out


def kill_wandb(step: int) -> None:
    """Kill the process that wandb writes with."""
    import wandb

    if step == 2:
        process = wandb.setup()._connection._proc._process  # type: ignore[union-attr]
        process.kill()
        process.wait()


def test_the_death_of_wandbs_process_is_one_warning_and_the_run_goes_on(tmp_path: Path):
    """An offline run; it writes nothing outside its output."""
    output, home = tmp_path / "run", tmp_path / "home"
    output.mkdir()
    home.mkdir()
    done = in_own_process("reported(Path(sys.argv[1]), 'wandb', 0, 40, between=kill_wandb)", output)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"--report-to wandb failed \(.+\): metrics\.jsonl alone", done.stderr)) == 1, done.stderr
    assert [line["step"] for line in metrics_of(output)] == list(range(41))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "run"]
    assert not list(home.rglob("*"))


def test_metrics_jsonl_has_the_mfu(tmp_path: Path):
    reported(tmp_path, "none", 0, 2)
    lines, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("mfu") for line in lines] == [None, 0.2, 0.2]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_one_line_before_anything_runs(
    tmp_path: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(UserError, match=rf"--report-to {name}: .*pip install 'adafuse-jax\[{name}\]'"):
        train_here(run_folder, tmp_path / "run", report_to=name)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def no_wandb_settings(tmp_path: Path) -> Iterator[None]:
    """An environment without those of W&B, put back at the end."""
    without = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with mock.patch.dict(os.environ, without | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}, clear=True):
        yield
        import wandb

        wandb.teardown()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"WANDB_MODE": "garbage"}, r"WANDB_MODE: .*'offline'"),
        ({"WANDB_MODE": ""}, r"WANDB_MODE: .*'offline'"),
        ({"WANDB_BASE_URL": "garbage"}, r"WANDB_BASE_URL: .*valid URL"),
        ({"WANDB_PROJECT": "a/b"}, r"WANDB_PROJECT: Invalid project name 'a/b'"),
        ({"WANDB_MODE": "online"}, r"WANDB_MODE=online: no API key; log in with `wandb login`"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, r"WANDB_MODE=online: WANDB_API_KEY invalid"),
    ],
)
@pytest.mark.usefixtures("no_wandb_settings")
def test_bad_settings_of_wandb_are_one_line_before_anything_runs(
    tmp_path: Path, run_folder: Path, settings: dict[str, str], message: str
):
    os.environ.update(settings)
    with pytest.raises(UserError, match=rf"^--report-to wandb: {message}") as raised:
        train_here(run_folder, tmp_path / "run", report_to="wandb")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_wandb_settings")
def test_settings_of_wandb_are_offline_by_default_and_those_of_the_user_stay(tmp_path: Path):
    os.environ["WANDB_CACHE_DIR"] = "mine"
    require_tracker("wandb", tmp_path)
    found = {name: os.environ[f"WANDB_{name}"] for name in ("MODE", "PROJECT", "ERROR_REPORTING", "CACHE_DIR")}
    assert found == {"MODE": "offline", "PROJECT": "adafuse-jax", "ERROR_REPORTING": "false", "CACHE_DIR": "mine"}
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_reports_what_metrics_jsonl_has(tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The tracker is closed, which may take long, after the results are written."""
    run, at_close = tmp_path / "run", []
    close = TensorBoard.close
    monkeypatch.setattr(TensorBoard, "close", lambda it: (close(it), at_close.extend(p.name for p in run.iterdir())))
    train_here(run_folder, run, steps=4, checkpoint_every=2, eval_every=4, report_to="tensorboard")
    assert {"adapter", "summary.json"} <= set(at_close)
    found = {(step, name): value for step, name, value in tensorboard_events(run / "tensorboard")}
    for line in metrics_of(run):
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in line:
                assert found[line["step"], name] == pytest.approx(line[name], rel=1e-5)
    assert "mfu" not in metrics_of(run)[1], "no peak is known of a CPU"


@pytest.mark.slow
def test_the_bare_backbone_is_reported(tmp_path: Path, run_folder: Path):
    off = dict.fromkeys(("num_experts", "rank", "dropout", "tied_share", "router_share"))
    summary = train_here(run_folder, tmp_path / "run", adapter="none", report_to="tensorboard", **off)
    found = {(step, name): value for step, name, value in tensorboard_events(tmp_path / "run" / "tensorboard")}
    assert found[0, "eval_loss"] == pytest.approx(summary["before"]["eval_loss"], rel=1e-5)


def llama_2_7b() -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=32000, embed_dim=4096, hidden_dim=11008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5,
    )  # fmt: skip


def test_mfu():
    """6.607e9 parameters in linears and head: 4 of these a token, 6 if they train; on 989 TFLOP/s."""
    h200, cpu = SimpleNamespace(device_kind="NVIDIA H200"), SimpleNamespace(device_kind="cpu")
    parameters = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    assert linear_parameters(llama_2_7b()) == parameters == 6_607_077_376
    assert mfu_per_token(llama_2_7b(), [h200], dtype="bfloat16", trains_backbone=False) == pytest.approx(
        4 * parameters / 989e12
    )
    assert mfu_per_token(llama_2_7b(), [h200] * 4, dtype="bfloat16", trains_backbone=True) == pytest.approx(
        6 * parameters / (4 * 989e12)
    )
    assert mfu_per_token(llama_2_7b(), [h200, cpu], dtype="bfloat16", trains_backbone=False) is None
    assert mfu_per_token(llama_2_7b(), [h200], dtype="float32", trains_backbone=False) is None
    require_tracker("none", Path())
