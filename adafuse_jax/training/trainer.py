"""Fine-tuning from start to finish: data → backbone → adapter → steps, evaluation, checkpoints → adapter directory (or, with
all weights trained, model directory)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from adafuse_jax.adapters.baselines.full import FullWeights
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import num_parameters, resolve_forward
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_json, write_text
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.parallel.layout import MeshLayout
from adafuse_jax.parallel.mesh import shard, training_mesh
from adafuse_jax.parallel.processes import Agreement, is_first, on_first, wait_for_all
from adafuse_jax.training.checkpoint import Checkpoints, run_identity
from adafuse_jax.training.config import TrainConfig, require_compatible
from adafuse_jax.training.data import Data, prepare_data, run_date
from adafuse_jax.training.initial import digest, initial_state, read_initial_lora
from adafuse_jax.training.limits import require_context, require_memory
from adafuse_jax.training.metrics import NoReport, Report, not_finite, plot_training, step_line, summarize
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.output import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    METRICS_FILE,
    MODEL_DIR,
    PLOT_FILE,
    SUMMARY_FILE,
    check_output,
    check_space,
    disk_errors,
    held_run,
    new_run,
    remove_leftovers,
    require_no_checkpoint_lost,
    write_config,
)
from adafuse_jax.training.schedules import Phases, learning_rate
from adafuse_jax.training.signals import Stopped, stop_signals
from adafuse_jax.training.step import TrainState, train_step
from adafuse_jax.training.trackers import open_tracker, require_tracker
from adafuse_jax.training.utilisation import mfu_per_token

log = logging.getLogger(__name__)

MAX_STEPS = 2**31 - 1


def train(config: TrainConfig, adapter_config: AdapterConfig) -> dict[str, Any]:
    """Fine-tune an adapter by `config` and write to `config.output`, from the first of several processes:

    `adapter/` (for decode.py; `model/` if all weights train), `checkpoints/`, `metrics.jsonl`, `training.png`,
    `summary.json` and `train_config.json`; with nothing to train only metrics, summary and config. Returns the summary.
    The directory is made after the first step, when everything that the run reads has been read and has fitted in memory.

    Raises:
      UserError: bad input (nothing is written), another process in `config.output`, a full disk, or a loss that is not
        finite.
      Stopped: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    output = Path(config.output)
    check_output(output, resume=config.resume)
    require_compatible(config, adapter_config)
    require_tracker(config.report_to)
    with ExitStack() as held:
        recorded = held.enter_context(held_run(output)) if config.resume else None
        return _train(config, adapter_config, output, recorded, held)


def _train(
    config: TrainConfig, adapter_config: AdapterConfig, output: Path, recorded: Table | None, held: ExitStack
) -> dict[str, Any]:
    """`train`, with the run's directory in `held` and its config `recorded`, if it is resumed."""
    # Everything that a run reads, the large files last
    checkpoint = HFCheckpoint.open(config.model)
    directory, model_config = checkpoint.directory, checkpoint.config
    require_context(config, model_config)
    mesh = training_mesh(config.mesh, model_config, config.batch_size)
    layout = ONE_DEVICE if mesh is None else MeshLayout(mesh)
    require_memory(config, model_config, mesh)
    if adapter_config.top_k == 1 and adapter_config.renormalize:
        log.warning("--top-k 1: the gate is always 1, so only the balance loss trains the router; see --no-renormalize")
    tokenizer = load_tokenizer(directory)
    with run_date(config, tokenizer, recorded) as date:
        data = prepare_data(config, tokenizer)
    if data.largest_token >= model_config.vocab_size:
        raise UserError(
            f"{directory}: the data has token {data.largest_token} and the model {model_config.vocab_size} tokens: the "
            "tokenizer is of another model; restore the files of one"
        )
    backbone, lora = checkpoint.identity(), None
    if config.init_lora is not None:
        lora = read_initial_lora(config.init_lora, adapter_config, model_config, backbone_identity=backbone)
    if config.dtype == "float32":
        runtime.exact_float32()
    settings = {
        **dataclasses.asdict(config), **adapter_config.table(), "template_date": date, "resume": False,
        "coordinator": None, "num_processes": None, "process_id": None,
    }  # fmt: skip
    if adapter_config.adapter == "none":
        held_out = _evaluate_backbone(
            config, load_backbone(checkpoint, config.dtype, place=Stacked(mesh)), data, layout
        )
        held.enter_context(new_run(output, settings))

        def write_held_out() -> dict[str, Any]:
            write_text(output / METRICS_FILE, json.dumps(held_out) + "\n")
            tracker = open_tracker(config.report_to, output, start=0, settings=settings)
            if tracker is not None:
                tracker.log(0, held_out)
                tracker.close()
            summary = summarize(output / METRICS_FILE, steps=0, parameters=0, seconds=0)
            write_json(output / SUMMARY_FILE, summary)
            return summary

        with disk_errors(output):
            return on_first(write_held_out)

    # State: abstract first, to ask for disk space before the backbone is loaded
    steps = _steps(config, data)
    optimizer, phases = make_optimizer(config, steps), Phases.of(config.tied_share, config.router_share, steps)
    initial = partial(
        initial_state, adapter_config, optimizer=optimizer, phases=phases, key=jax.random.key(config.seed)
    )
    abstract = jax.eval_shape(lambda: Backbone(model_config, dtype=config.dtype, rngs=nnx.Rngs(0)))
    like = jax.eval_shape(initial, abstract, lora)
    num_checkpoints = min(config.keep_checkpoints, -(-steps // config.checkpoint_every))
    check_space(output, like.adapter, like.moments, keep=num_checkpoints)
    model = load_backbone(checkpoint, config.dtype, place=Stacked(mesh))
    identity = run_identity(
        config, adapter_config, backbone=backbone, data=data.fingerprint, total_steps=steps, initial=digest(lora),
        padded_from=data.padded_from,
    )  # fmt: skip
    begin_with = lora if lora is None or mesh is None else shard(lora, mesh)
    state = jax.jit(lambda model, lora: layout.state(initial(model, lora)))(model, begin_with)
    checkpoints = Checkpoints(output / CHECKPOINT_DIR, keep=config.keep_checkpoints, identity=identity)
    if checkpoints.steps():
        state = checkpoints.restore(state)
    elif recorded is not None:
        require_no_checkpoint_lost(output, recorded)

    # Steps
    start = int(state.step)
    report: Report = NoReport()
    if is_first():
        full = isinstance(state.adapter, FullWeights)
        devices = jax.local_devices()[:1] if mesh is None else mesh.devices.ravel().tolist()
        report = Report(
            output / METRICS_FILE, start=start, steps=steps, log_every=config.log_every,
            mfu_per_token=mfu_per_token(model_config, devices, dtype=config.dtype, trains_backbone=full),
            open_tracker=partial(open_tracker, config.report_to, output, start=start, settings=settings),
        )  # fmt: skip

    def open_output() -> None:
        """Nothing of the run is on disk before."""
        if recorded is None:
            held.enter_context(new_run(output, settings))
        elif start == 0:  # killed before its first checkpoint
            on_first(partial(write_config, output, settings))
        report.open()

    run = Run(
        config=config, model=model, data=data, optimizer=optimizer, phases=phases, steps=steps, checkpoints=checkpoints,
        report=report, open_output=open_output, layout=layout,
    )  # fmt: skip
    with disk_errors(output), checkpoints, contextlib.closing(report):
        if recorded is not None:
            report.message(f"resuming {output} at step {start}")
        state, seconds = _run_steps(run, state)

    # Results
    with disk_errors(output):
        if isinstance(state.adapter, FullWeights):
            trained = state.adapter.as_backbone(model.dtype)
            export_backbone(trained, output / MODEL_DIR, source=checkpoint, replace=True, layout=layout)
        else:
            names = {"backbone_name": config.model, "backbone_identity": backbone}
            save_adapter(state.adapter, output / ADAPTER_DIR, **names, replace=True, layout=layout)
        return on_first(
            lambda: _write_summary(
                output, steps=int(state.step), parameters=num_parameters(state.adapter), seconds=seconds
            )
        )


def _write_summary(output: Path, **numbers: Any) -> dict[str, Any]:
    """Plot and summary of the run, whose temporary files are then removed."""
    plot_training(output / METRICS_FILE, output / PLOT_FILE)
    summary = summarize(output / METRICS_FILE, **numbers)
    write_json(output / SUMMARY_FILE, summary)
    remove_leftovers(output)
    return summary


def _evaluate_backbone(config: TrainConfig, model: Backbone, data: Data, layout: Layout) -> dict[str, Any]:
    """The held-out numbers of the bare backbone, as a line of metrics."""
    log.info("--adapter none: no training; these are the held-out numbers of the bare backbone")
    result = data.held_out.evaluate(model, None, batch_size=config.batch_size, layout=layout)
    if not result:
        raise UserError(
            "--adapter none only evaluates, and no held-out example is left; give other data in --eval-dataset"
        )
    return {"step": 0, **result}


def _steps(config: TrainConfig, data: Data) -> int:
    """`--steps`, or those that `--epochs` take."""
    steps = config.steps or data.batches.total_steps or 1
    if steps > MAX_STEPS:
        name, value = ("steps", config.steps) if config.steps else ("epochs", config.epochs)
        raise UserError(f"--{name} {quoted(value)}: that is more than {MAX_STEPS} steps; lower it")
    rows, total = data.batches.rows_per_epoch, data.batches.total_rows
    if total is not None:
        padding = steps * data.batches.rows_per_step - total
        end = f", {padding} rows of the last step are padding" if padding else ""
        log.info("--epochs %g of %d rows: %d rows in %d steps%s", config.epochs, rows, total, steps, end)
    return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that the steps of a run need and do not change."""

    config: TrainConfig
    model: Backbone
    data: Data
    optimizer: optax.GradientTransformation
    phases: Phases
    steps: int
    checkpoints: Checkpoints
    report: Report
    layout: Layout
    open_output: Callable[[], None]
    """Called once: after the first step of a run that begins, otherwise at once."""

    def batch(self, step: int) -> Any:
        """The batch of a step, on its devices if there are several; this process reads its own rows."""
        size = self.config.batch_size
        return self.layout.batch(self.data.batches.at(step, self.layout.rows(size)), size, axis=1)

    def evaluate(self, state: TrainState, step: int) -> None:
        backbone, adapter = resolve_forward(state.adapter, self.model)
        result = self.data.held_out.evaluate(backbone, adapter, batch_size=self.config.batch_size, layout=self.layout)
        if result:
            self.report.evaluation(step, result)


def _run_steps(run: Run, state: TrainState) -> tuple[TrainState, float]:
    """All remaining steps. Returns the last state and the seconds spent in steps (evaluation and saving excluded)."""
    config, checkpoints, schedule = run.config, run.checkpoints, learning_rate(run.config, run.steps)
    step, seconds = int(state.step), 0.0
    is_open = step > 0
    if is_open:
        run.open_output()
    else:
        run.evaluate(state, step)  # B = 0, so this is the bare backbone, or that with --init-lora
    batch, agreement = run.batch(step), Agreement()
    with stop_signals() as stop_requested:
        while step < run.steps:
            begun = time.perf_counter()
            state, device_metrics = train_step(
                state,
                run.model,
                batch,
                optimizer=run.optimizer,
                remat=config.remat,
                phases=run.phases,
                layout=run.layout,
            )
            stop = agreement(stop_requested)
            next_batch = run.batch(step + 1)  # made while the device works
            metrics = jax.device_get(device_metrics)
            step += 1
            elapsed = time.perf_counter() - begun
            seconds += elapsed
            _require_finite(step, metrics, checkpoints)
            if not is_open:
                run.open_output()
                is_open = True
            run.report.step(step, step_line(metrics, float(schedule(step - 1)), elapsed))
            last = step == run.steps
            if step % config.eval_every == 0 or last:
                run.evaluate(state, step)
            if step % config.checkpoint_every == 0 or last or stop():
                checkpoints.save(state)
            if stop() and not last:
                checkpoints.wait()
                wait_for_all()
                raise Stopped(f"stopped at step {step} of {run.steps}, which is saved; continue with --resume", stop())
            batch = next_batch
        checkpoints.wait()
    return state, seconds


def _require_finite(step: int, metrics: dict[str, Any], checkpoints: Checkpoints) -> None:
    bad = not_finite(metrics)
    if bad is None:
        return
    checkpoints.wait()
    last = checkpoints.before(step)  # later ones are damaged
    good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    raise UserError(f"step {step}: {bad} is not finite; {good}: lower --learning-rate or look at the data of that step")
