"""Checkpoints of a run: what changes (`TrainState`) and what must not (the run's identity). Written in the background.

    checkpoints/STEP/state/              the arrays, by orbax, each process its shards
    checkpoints/STEP/identity/metadata   JSON
    checkpoints/STEP/digests.json        SHA-256 and size of every file above, compared before anything is used

A directory gets its name STEP in one rename, when all of it is written, the digests too: a kill leaves a whole checkpoint
or none. Digests cost about 0.8 s a GB on one CPU core (measured, SHA instructions), in the background when saving.

Arrays are restored in the shardings of the run that reads them, whatever mesh wrote them.

The data position is the step: the order of the data is a function of seed and step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.atomic_files import DIGESTS_FILE, check_digests, new_directory, write_digests
from adafuse_jax.core.errors import UserError, quoted, shortened
from adafuse_jax.core.tables import read_json
from adafuse_jax.parallel.processes import is_first, on_first
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.step import TrainState

log = logging.getLogger(__name__)

STATE, IDENTITY = "state", "identity/metadata"
FORMAT = 2
"""Entry `format` of the identity. A checkpoint without it is of an earlier version, which wrote no digests."""
LEFTOVER = re.compile(r"\.\d+\.\w{8}\.(partial|old)")
"""Directories of a process that was killed while it wrote or removed a checkpoint."""

NOT_IDENTITY = (
    "output", "model", "dataset", "eval_dataset", "eval_examples", "eval_every", "checkpoint_every", "keep_checkpoints",
    "log_every", "resume", "steps", "epochs", "remat", "unroll", "init_lora", "template_date", "data_cache",
    "report_to", "mesh", "quantize", "quantize_head", "coordinator", "num_processes", "process_id",
)  # fmt: skip
"""Settings that a resumed run may change, or that `backbone`, `quantization`, `data`, `total_steps`, `initial` of the
identity stand for."""
USUAL = {
    field.name: field.default for field in dataclasses.fields(TrainConfig) if field.default is not dataclasses.MISSING
}
"""Values of settings that a checkpoint lacks because it is older than they are."""


def run_identity(config: TrainConfig, adapter: AdapterConfig, **more: Any) -> dict[str, Any]:
    """Everything that the continuation of a run depends on, as JSON: settings, and `more` (digests of what was read)."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IDENTITY}
    return json.loads(json.dumps({**settings, **adapter.table(), **more}))


class Checkpoints:
    """The checkpoints in `directory`, the last `keep` of them. The caller holds a lock on the run.

    A checkpoint of an `identity` (`run_identity`) other than this run's is refused.

    As a context manager: the end of the block waits for what is being written, but for `KeyboardInterrupt`.
    """

    def __init__(self, directory: Path, *, keep: int, identity: dict[str, Any]):
        self.directory, self.keep, self.identity = directory, keep, identity
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._step = 0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._writer is not None and not issubclass(kind, KeyboardInterrupt):
            self._writer.join()

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the directory, damaged ones included, in ascending order."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,17}", name))

    def before(self, step: int) -> Path | None:
        """The last checkpoint of an earlier step."""
        earlier = [found for found in self.steps() if found < step]
        return self.directory / str(earlier[-1]) if earlier else None

    def save(self, state: TrainState) -> None:
        """Start writing `state`, every process its own shards; returns once they are copied from the devices. Errors of the
        write before are raised here."""
        self.wait()
        self._step = int(state.step)
        arrays = _named(state)
        if jax.default_backend() == "cpu":  # orbax would look into the buffers that the next training step gives to XLA
            arrays = jax.tree.map(jnp.copy, arrays)
        written = ExitStack()
        try:
            directory = Path(on_first(lambda: str(self._new_directory(written))))
            orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
            orbax.save(directory.absolute() / STATE, args=ocp.args.StandardSave(arrays))
        except Exception as error:  # orbax raises anything on a full disk
            self._fail(written, error)
            return
        # A daemon: at a second Ctrl-C the process ends without waiting for it.
        self._writer = threading.Thread(target=self._finish, args=(directory, orbax, written), daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Return when everything is on disk. Raises `UserError` if the disk refused."""
        if self._writer is not None:
            self._writer.join()
        error, self._writer, self._error = self._error, None, None
        if error is not None:
            raise UserError(
                f"{self.directory}: the checkpoint of step {self._step} could not be written ({_reason(error)}); the one "
                f"before is {self.before(self._step) or 'none'}: free space, then continue with --resume"
            ) from error

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint that is whole, in the structure of `like`. Damaged ones are passed over, with one line; they
        stay until the run writes a checkpoint of their step or a later one.

        Raises:
          UserError: no whole checkpoint, or one of another run.
        """
        faults = []
        for step in reversed(on_first(self.steps)):
            where = self.directory / str(step)
            try:
                saved = on_first(partial(_identity_of, where))
            except UserError as error:
                faults.append(str(error))
                continue
            self._require_same(saved, where)
            try:
                state = _arrays_of(where, like)
            except UserError as error:
                faults.append(str(error))
                continue
            if faults:
                more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
                log.warning(
                    "damaged%s: %s; going on from the checkpoint before, %s", more, shortened(faults[0], 240), where
                )
            if "format" not in saved:
                log.warning("%s: was written by an earlier version, without digests, and is used unchecked", where)
            return state
        fault = shortened(faults[0], 230) if faults else "there is none"
        raise UserError(
            f"{self.directory}: no checkpoint can be used ({fault}); restore one, or start a new run in another directory"
        )

    def _require_same(self, saved: dict[str, Any], where: Path) -> None:
        for key in (*self.identity, *saved):
            was, now = saved.get(key, USUAL.get(key)), self.identity.get(key)
            if key == "format" or was == now:
                continue
            remedy = "resume with the same, or start a new run in another directory"
            if key in ("total_steps", "padded_from") and saved.get("padded_from") is None:
                # Of --steps, or of an earlier version, which counted the steps of --epochs in another way.
                remedy = (
                    f"resume with the same, that is --steps {saved.get('total_steps')}, or start a new run elsewhere"
                )
            raise UserError(f"{where}: was made with {key} {quoted(was)}, this run has {quoted(now)}; {remedy}")

    def _new_directory(self, written: ExitStack) -> Path:
        """A directory to fill; the end of `written` makes it the checkpoint."""
        self.directory.mkdir(exist_ok=True)
        for path in self.directory.iterdir():
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        return written.enter_context(new_directory(self.directory / str(self._step), replace=True))

    def _finish(self, directory: Path, orbax: ocp.AsyncCheckpointer, written: ExitStack) -> None:
        """Wait for the shards of all processes; then the first one writes identity and digests, and removes old ones."""
        try:
            orbax.close()
            if not is_first():
                return
            (directory / IDENTITY).parent.mkdir()
            (directory / IDENTITY).write_text(json.dumps({"format": FORMAT, **self.identity}), encoding="utf-8")
            write_digests(directory)
            written.close()
            present = self.steps()
            for old in present:
                if old in [s for s in present if s <= self._step][: -self.keep]:
                    self._remove(old)
        except Exception as error:  # orbax raises anything on a full disk
            self._fail(written, error)

    def _fail(self, written: ExitStack, error: Exception) -> None:
        """Remember the error for `wait`, and remove what has been written."""
        self._error = error
        with contextlib.suppress(Exception):
            written.__exit__(type(error), error, error.__traceback__)

    def _remove(self, step: int) -> None:
        """Rename the checkpoint before deleting it, so that its name never stands for half a checkpoint."""
        aside = tempfile.mkdtemp(dir=self.directory, prefix=f".{step}.", suffix=".old")
        os.rename(self.directory / str(step), aside)
        shutil.rmtree(aside, ignore_errors=True)


def _identity_of(where: Path) -> dict[str, Any]:
    """The identity in a checkpoint whose files are those that were written. Raises `UserError` for damage."""
    if (where / DIGESTS_FILE).exists():
        check_digests(where)
        return read_json(where / IDENTITY)
    saved = read_json(where / IDENTITY)
    if "format" in saved:
        raise UserError(f"{where / DIGESTS_FILE}: is missing; restore the directory")
    return saved


def _arrays_of(where: Path, like: TrainState) -> TrainState:
    """Raises `UserError` for arrays that cannot be read, or are not those of `like`."""
    wanted = _named(like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            restored = orbax.restore(where.absolute() / STATE, args=ocp.args.StandardRestore(abstract))
        leaves = [restored[name] for name in wanted]
    except Exception as error:  # orbax and tensorstore raise anything for damaged files
        raise UserError(f"{where / STATE}: cannot be read ({_reason(error)}); restore the directory") from error
    return _with_key(jax.tree.unflatten(jax.tree.structure(_without_key(like)), leaves))


def _without_key(state: TrainState) -> TrainState:
    """Typed PRNG keys are no arrays to a file: keep their data."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)


def _with_key(state: TrainState) -> TrainState:
    return TrainState(
        step=state.step, adapter=state.adapter, moments=state.moments, key=jax.random.wrap_key_data(state.key)
    )


def _named(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by their path, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(_without_key(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _reason(error: BaseException) -> str:
    """The first line of the message; of a long one its beginning and its end."""
    return shortened((str(error).splitlines() or [type(error).__name__])[0], 160)
