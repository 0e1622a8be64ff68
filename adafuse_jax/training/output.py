"""The output directory of a run: its lock, its free space and its file names."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError

from adafuse_jax.core.atomic_files import LOCK_FILE, locked, write_json
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.parallel.processes import on_first
from adafuse_jax.training.metrics import read_metrics

CONFIG_FILE, METRICS_FILE, PLOT_FILE, SUMMARY_FILE = (
    "train_config.json",
    "metrics.jsonl",
    "training.png",
    "summary.json",
)
ADAPTER_DIR, MODEL_DIR, CHECKPOINT_DIR = "adapter", "model", "checkpoints"
_WRITTEN = (CONFIG_FILE, METRICS_FILE, PLOT_FILE, SUMMARY_FILE, ADAPTER_DIR, MODEL_DIR)
_LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, _WRITTEN))})\.\w{{8}}\.(partial|old)")


def check_output(output: Path, *, resume: bool) -> None:
    """Raise `UserError` unless `output` holds a run to resume, or is free for a new one. Writes nothing."""
    try:
        output.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {str(output)[:60]}…: {reason}; give another directory") from error
    if resume and not (output / CONFIG_FILE).exists():
        raise UserError(f"--output {output}: holds no run to resume; leave out --resume to start one")
    if not resume:
        _require_free(output)
    existing = _nearest_existing(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {output}: {existing} is not a writable directory; give another one")


def _require_free(output: Path) -> None:
    """A lock of a run that never began is no hindrance."""
    if output.exists() and (not output.is_dir() or any(path.name != LOCK_FILE for path in output.iterdir())):
        hint = "continue that run with --resume, or " if (output / CONFIG_FILE).exists() else ""
        raise UserError(f"--output {output}: is in use; {hint}give another directory")


@contextmanager
def held_run(output: Path) -> Iterator[Table]:
    """Lock the run in `output` for this process, or the first of several, and yield its train_config.json.

    Raises:
      UserError: another process has it, or its config is damaged.
    """
    with ExitStack() as held:
        on_first(lambda: held.enter_context(_locked(output)))
        yield Table.read(output / CONFIG_FILE)


@contextmanager
def new_run(output: Path, config: dict[str, Any]) -> Iterator[None]:
    """Lock `output` for this process, or the first of several, and write train_config.json into it.

    Raises:
      UserError: another run was first, or the disk refuses.
    """
    with ExitStack() as held:
        on_first(lambda: _begin(output, config, held))
        yield


def _begin(output: Path, config: dict[str, Any], held: ExitStack) -> None:
    with disk_errors(output, "give another directory"):
        output.mkdir(parents=True, exist_ok=True)
    held.enter_context(_locked(output))
    _require_free(output)
    write_config(output, config)


def require_no_checkpoint_lost(output: Path, recorded: Table) -> None:
    """Raise `UserError` if the run, which has no checkpoint, must have had one: from step 0 it would overwrite its files."""
    every = recorded.integer("checkpoint_every", 1, low=1)
    lines = read_metrics(output / METRICS_FILE)[0] if (output / METRICS_FILE).is_file() else []
    # A checkpoint is whole before the next one is begun.
    if (output / SUMMARY_FILE).exists() or any(line["step"] > 2 * every for line in lines):
        raise UserError(
            f"{output / CHECKPOINT_DIR}: the checkpoints of this run are gone; restore them, or start a new run in another "
            "directory"
        )


def write_config(output: Path, config: dict[str, Any]) -> None:
    with disk_errors(output, "give another directory"):
        write_json(output / CONFIG_FILE, config)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    lock = locked(output, what=f"--output {output}")
    with disk_errors(output, "give another directory"):
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextmanager
def disk_errors(output: Path, advice: str = "free space, then continue with --resume") -> Iterator[None]:
    """Context in which an error of the disk raises a `UserError` with this advice."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {output}: cannot be written ({reason}); {advice}") from error


def remove_leftovers(output: Path) -> None:
    """Delete the temporary files that `atomic_files` left when the run was killed. The caller holds the run's lock, so no
    other process is writing them."""
    for path in output.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def check_space(output: Path, trained: Any, moments: Any, *, keep: int) -> None:
    """Raise `UserError` unless the checkpoints (`keep`, and one more while it is written) and the final adapter
    fit in the free space and that of the checkpoints which are there already. The trees may be abstract."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    need = (keep + 1) * size((trained, moments)) + size(trained)
    present = sum(f.stat().st_size for f in (output / CHECKPOINT_DIR).rglob("*") if f.is_file())
    free = shutil.disk_usage(_nearest_existing(output)).free + present
    if free < need:
        raise UserError(
            f"--output {output}: {keep} checkpoints and the adapter need {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "free space, lower --keep-checkpoints or give another disk"
        )


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
