"""Checkpoints of a run: what changes (`TrainState`) and what must not (the run's identity). Asynchronous, atomic.

The data position is the step: the order of the data is a function of seed and step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from adafuse_jax.core.errors import UserError
from adafuse_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints in `directory`, the last `keep` of them.

    `identity` describes everything the continuation depends on (backbone, adapter, data, schedule); a checkpoint of a
    different identity is refused; `usual` has what it lacks, if it is older than a setting.
    """

    def __init__(self, directory: Path, *, keep: int, identity: dict[str, Any], usual: dict[str, Any]):
        self.directory, self.identity, self.usual = directory, identity, usual
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Start writing `state`; returns once it is copied from the device. Errors of the write before are raised here."""
        step = int(state.step)
        # A copy, because the training step that follows gives the state's buffers to XLA.
        arrays = _named(jax.tree.map(jnp.copy, state))
        with self._told(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), identity=ocp.args.JsonSave(self.identity)),
            )

    def wait(self) -> None:
        """Return when everything is on disk."""
        with self._told(None):
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The latest checkpoint, in the structure of `like`.

        Raises:
          UserError: no checkpoint, one of another run, or one that cannot be read.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"{self.directory}: has no checkpoint; start without --resume in another directory")
        where = self.directory / str(step)
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))["identity"]
            if not isinstance(saved, dict):
                raise ValueError(f"its identity is {_short(saved)}")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{where}: the checkpoint cannot be read ({error}); delete it to use the one before"
            ) from error
        for key in (*self.identity, *saved):
            was, now = saved.get(key, self.usual.get(key)), self.identity.get(key)
            if was != now:
                raise UserError(
                    f"{where}: was made with {key} {_short(was)}, this run has {_short(now)}; "
                    "resume with the same, or start a new run in another directory"
                )
        wanted = _named(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
                "state"
            ]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{where}: the checkpoint cannot be read ({error}); delete it to use the one before"
            ) from error
        leaves = [restored[name] for name in wanted]
        return _with_key(jax.tree.unflatten(jax.tree.structure(_without_key(like)), leaves))

    def close(self) -> None:
        with self._told(None):
            self._manager.close()

    @contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            what = "the checkpoint" if step is None else f"the checkpoint of step {step}, or the one before,"
            last = self._manager.latest_step()
            raise UserError(
                f"{self.directory}: {what} could not be written ({_first_line(error)}); the last good checkpoint is "
                f"{'none' if last is None else self.directory / str(last)}: free space, then continue with --resume"
            ) from error


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


def _first_line(error: BaseException) -> str:
    """The first line of the message; of a long one its end, where the cause stands."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else "…" + line[-200:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
