"""Fine-tuning from start to finish: data → backbone → adapter → steps, evaluation, checkpoints → adapter directory (or, with
all weights trained, model directory)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from adafuse_jax.adapters.baselines.full import FullWeights
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.registry import in_use, num_parameters
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_json, write_text
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table
from adafuse_jax.data.batches import Batch
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.checkpoint import Checkpoints
from adafuse_jax.training.clock import run_date
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.initial import digest, initial_weights, read_initial_lora
from adafuse_jax.training.limits import require_memory
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
from adafuse_jax.training.prepare import Data, prepare_data
from adafuse_jax.training.recipe import Recipe, require_recipe
from adafuse_jax.training.report import Report, plot_training, read_metrics
from adafuse_jax.training.step import TrainState, learning_rate, make_optimizer, train_step
from adafuse_jax.training.untrained import evaluate_only, require_evaluation

log = logging.getLogger(__name__)

NOT_IDENTITY = (
    "output", "model", "dataset", "eval_dataset", "eval_examples", "eval_every", "checkpoint_every", "keep_checkpoints",
    "log_every", "resume", "steps", "epochs", "remat", "init_lora", "template_date",
)  # fmt: skip
"""Settings that a resumed run may change, or that `backbone`, `data`, `total_steps`, `initial` of the identity stand for."""

USUAL = {
    field.name: field.default for field in dataclasses.fields(TrainConfig) if field.default is not dataclasses.MISSING
}
"""What a run has of a setting that is newer than it."""

MAX_STEPS = 2**31 - 1
FINITE = ("loss", "balance", "grad_norm")
"""Metrics whose overflow ends a run."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the state is saved. The second argument is the signal's number."""


def train(config: TrainConfig, adapter_config: AdapterConfig) -> dict[str, Any]:
    """Fine-tune an adapter as `config` says and leave in `config.output`:

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
    if adapter_config.adapter == "none":
        require_evaluation(config)
    require_recipe(config, adapter_config)
    with ExitStack() as held:
        recorded = held.enter_context(held_run(output)) if config.resume else None
        return _train(config, adapter_config, output, recorded, held)


def _train(
    config: TrainConfig, adapter_config: AdapterConfig, output: Path, recorded: Table | None, held: ExitStack
) -> dict[str, Any]:
    """With the run's directory in `held` and its config `recorded`, if it is resumed."""
    checkpoint = HFCheckpoint.open(config.model)
    directory, model_config = checkpoint.directory, checkpoint.config
    if config.max_length > model_config.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length} exceeds the {model_config.max_position_embeddings} positions of "
            f"{config.model}; lower it"
        )
    require_memory(config, model_config)
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
    settings = {**dataclasses.asdict(config), **adapter_config.table(), "template_date": date, "resume": False}
    if adapter_config.adapter == "none":
        model = load_backbone(checkpoint, config.dtype)
        line, summary = evaluate_only(config, model, data)
        held.enter_context(new_run(output, settings))
        with disk_errors(output):
            write_text(output / METRICS_FILE, json.dumps(line) + "\n")
            write_json(output / SUMMARY_FILE, summary)
        return summary
    steps = _steps(config, data)
    optimizer = make_optimizer(config, steps)
    recipe = Recipe.of(config.tied_share, config.router_share, steps)

    def initial_state(model: Backbone, lora: LoRA | None) -> TrainState:
        init_key, state_key = jax.random.split(jax.random.key(config.seed))
        trained = recipe.start(initial_weights(adapter_config, model, lora, init_key))
        return TrainState(step=jnp.int32(0), adapter=trained, moments=optimizer.init(trained), key=state_key)

    abstract = jax.eval_shape(lambda: Backbone(model_config, dtype=config.dtype, rngs=nnx.Rngs(0)))
    like = jax.eval_shape(initial_state, abstract, lora)
    check_space(
        output, like.adapter, like.moments, keep=min(config.keep_checkpoints, -(-steps // config.checkpoint_every))
    )
    model = load_backbone(checkpoint, config.dtype)
    identity = _identity(
        config, adapter_config, backbone=backbone, data=data.fingerprint, total_steps=steps, initial=digest(lora),
        padded_from=_padded_from(data),
    )  # fmt: skip
    state = jax.jit(initial_state)(model, lora)

    checkpoints = Checkpoints(output / CHECKPOINT_DIR, keep=config.keep_checkpoints, identity=identity, usual=USUAL)
    if checkpoints.steps():
        state = checkpoints.restore(state)
    elif recorded is not None:
        require_no_checkpoint_lost(output, recorded)
    start = int(state.step)
    report = Report(output / METRICS_FILE, start=start, steps=steps, log_every=config.log_every)

    def open_output() -> None:
        """Nothing of the run is on disk before."""
        if recorded is None:
            held.enter_context(new_run(output, settings))
        elif start == 0:  # killed before its first checkpoint
            write_config(output, settings)
        report.open()

    with disk_errors(output), checkpoints, contextlib.closing(report):
        if recorded is not None:
            report.say(f"resuming {output} at step {start}")
        state, seconds = _run(config, state, model, data, optimizer, recipe, steps, checkpoints, report, open_output)
    with disk_errors(output):
        if isinstance(state.adapter, FullWeights):
            trained = state.adapter.as_backbone(model.dtype)
            export_backbone(trained, output / MODEL_DIR, source=checkpoint, replace=True)
        else:
            names = {"backbone_name": config.model, "backbone_identity": backbone}
            save_adapter(state.adapter, output / ADAPTER_DIR, **names, replace=True)
        plot_training(output / METRICS_FILE, output / PLOT_FILE)
        summary = _summary(output, state, seconds)
        write_json(output / SUMMARY_FILE, summary)
        remove_leftovers(output)
    return summary


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


def _padded_from(data: Data) -> int | None:
    """The rows of the run if the last batch is filled up with padding, for its identity; None without padding, and in runs
    of earlier versions, in which rows of the next epoch filled it."""
    total = data.batches.total_rows
    return None if total is None or total % data.batches.rows_per_step == 0 else total


def _run(
    config: TrainConfig,
    state: TrainState,
    model: Backbone,
    data: Data,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    steps: int,
    checkpoints: Checkpoints,
    report: Report,
    open_output: Callable[[], None],
) -> tuple[TrainState, float]:
    """All remaining steps. `open_output` is called once, after the first step of a run that begins, otherwise at once.
    Returns the last state and the seconds spent in steps (evaluation and saving excluded)."""
    schedule = learning_rate(config, steps)
    step, seconds = int(state.step), 0.0

    def evaluate() -> None:
        result = data.held_out.evaluate(*in_use(state.adapter, model), batch_size=config.batch_size)
        if result:
            report.evaluation(step, result)

    is_open = step > 0
    if is_open:
        open_output()
    else:
        evaluate()  # B = 0, so this is the bare backbone, or that with --init-lora
    batch = data.batches.at(step)
    with _stop_signals() as stop_asked:
        while step < steps:
            begun = time.perf_counter()
            state, device_metrics = train_step(
                state, model, batch, optimizer=optimizer, remat=config.remat, recipe=recipe
            )
            next_batch = data.batches.at(step + 1)  # made while the device works
            metrics = jax.device_get(device_metrics)
            step += 1
            elapsed = time.perf_counter() - begun
            seconds += elapsed
            if not all(np.isfinite(metrics[name]).all() for name in FINITE if name in metrics):
                checkpoints.wait()
                raise UserError(_diverged(step, metrics, checkpoints))
            if not is_open:
                open_output()
                is_open = True
            report.step(step, _as_line(metrics, float(schedule(step - 1)), batch, elapsed))
            last = step == steps
            if step % config.eval_every == 0 or last:
                evaluate()
            if step % config.checkpoint_every == 0 or last or stop_asked():
                checkpoints.save(state)
            if stop_asked() and not last:
                checkpoints.wait()
                raise Stopped(
                    f"stopped at step {step} of {steps}, which is saved; continue with --resume", stop_asked()
                )
            batch = next_batch
        checkpoints.wait()
    return state, seconds


def _as_line(metrics: dict[str, Any], lr: float, batch: Batch, seconds: float) -> dict[str, Any]:
    tokens = int((batch.segment_ids > 0).sum())
    rounded = {name: np.round(np.asarray(value, np.float64), 6).tolist() for name, value in metrics.items()}
    return {**rounded, "lr": lr, "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def _diverged(step: int, metrics: dict[str, Any], checkpoints: Checkpoints) -> str:
    bad = next(name for name in FINITE if name in metrics and not np.isfinite(metrics[name]).all())
    last = [saved for saved in checkpoints.steps() if saved < step][-1:]  # later ones are damaged
    good = (
        f"the last good checkpoint is {checkpoints.directory / str(last[0])}" if last else "there is no checkpoint yet"
    )
    return f"step {step}: {bad} is not finite; {good}: lower --learning-rate or look at the data of that step"


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Within, SIGTERM and the first Ctrl-C only set what the yielded function returns: the signal's number, or 0. After one
    of them Ctrl-C does what it did outside: it ends a process in which `run_cli` runs, and else is a `KeyboardInterrupt`."""
    asked = 0

    def handler(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = asked or signum
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _identity(config: TrainConfig, adapter: AdapterConfig, **more: Any) -> dict[str, Any]:
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IDENTITY}
    return json.loads(json.dumps({**settings, **adapter.table(), **more}))


def _summary(output: Path, state: TrainState, seconds: float) -> dict[str, Any]:
    lines, _ = read_metrics(output / METRICS_FILE)
    held_out = [line for line in lines if "eval_loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "steps": int(state.step),
        "trainable_parameters": num_parameters(state.adapter),
        "before": held_out[0] if held_out else None,
        "after": held_out[-1] if held_out else None,
        "median_tokens_per_second": float(np.median(speeds)) if speeds else None,
        "seconds_in_steps": round(seconds, 2),
        "peak_device_gib": runtime.peak_device_gib(),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }
