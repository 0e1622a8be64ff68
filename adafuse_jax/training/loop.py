"""Fine-tuning from start to finish: data → backbone → adapter → steps, evaluation, checkpoints → adapter directory (or, with
all weights trained, model directory)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors import SafetensorError

from adafuse_jax.adapters.directory import save_adapter
from adafuse_jax.adapters.full import FullWeights
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.methods import in_use, num_parameters
from adafuse_jax.configs import AdapterConfig, TrainConfig
from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_json
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batch
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.interop.hf_config import read_model_config
from adafuse_jax.interop.huggingface import backbone_identity, export_backbone, load_backbone, model_directory
from adafuse_jax.model.backbone import Backbone
from adafuse_jax.training.checkpoint import Checkpoints
from adafuse_jax.training.initial import digest, initial_weights, read_initial_lora
from adafuse_jax.training.prepare import Data, prepare_data
from adafuse_jax.training.recipe import Recipe, require_recipe
from adafuse_jax.training.report import Report, plot_training, read_metrics
from adafuse_jax.training.step import TrainState, learning_rate, make_optimizer, train_step
from adafuse_jax.training.untrained import evaluate_only, require_evaluation

log = logging.getLogger(__name__)

CONFIG_FILE, METRICS_FILE, PLOT_FILE, SUMMARY_FILE = (
    "train_config.json",
    "metrics.jsonl",
    "training.png",
    "summary.json",
)
ADAPTER_DIR, MODEL_DIR, CHECKPOINT_DIR = "adapter", "model", "checkpoints"

NOT_IDENTITY = (
    "output", "model", "dataset", "eval_dataset", "eval_examples", "eval_every", "checkpoint_every", "keep_checkpoints",
    "log_every", "resume", "steps", "epochs", "remat", "init_lora",
)  # fmt: skip
"""Settings that a resumed run may change, or that `backbone`, `data`, `total_steps`, `initial` of the identity stand for."""

USUAL = {
    field.name: field.default for field in dataclasses.fields(TrainConfig) if field.default is not dataclasses.MISSING
}
"""What a run has of a setting that is newer than it."""

FINITE = ("loss", "balance", "grad_norm")
"""Metrics whose overflow ends a run."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C: the state is saved. The second argument is the signal's number."""


def train(config: TrainConfig, adapter_config: AdapterConfig) -> dict[str, Any]:
    """Fine-tune an adapter as `config` says and leave in `config.output`:

    `adapter/` (for decode.py; `model/` if all weights train), `checkpoints/`, `metrics.jsonl`, `training.png`,
    `summary.json` and `train_config.json`; with nothing to train only metrics, summary and config. Returns the summary.

    Raises:
      UserError: bad input (nothing is written), a full disk, or a loss that is not finite.
      Stopped: SIGTERM or Ctrl-C; a checkpoint has been written.
    """
    output = Path(config.output)
    _check_output(output, resume=config.resume)
    if adapter_config.adapter == "none":
        require_evaluation(config)
    require_recipe(config, adapter_config)
    directory = model_directory(config.model)
    model_config = read_model_config(directory)
    if config.max_length > model_config.max_position_embeddings:
        raise UserError(
            f"--max-length {config.max_length} exceeds the {model_config.max_position_embeddings} positions of "
            f"{config.model}; lower it"
        )
    if adapter_config.top_k == 1 and adapter_config.renormalize:
        log.warning("--top-k 1: the gate is always 1, so only the balance loss trains the router; see --no-renormalize")
    data = prepare_data(config, load_tokenizer(directory))
    if data.largest_token >= model_config.vocab_size:
        raise UserError(
            f"{directory}: the data has token {data.largest_token} and the model {model_config.vocab_size} tokens: the "
            "tokenizer is of another model; restore the files of one"
        )
    backbone, lora = backbone_identity(directory), None
    if config.init_lora is not None:
        lora = read_initial_lora(config.init_lora, adapter_config, model_config, backbone_identity=backbone)
    if config.dtype == "float32":
        runtime.exact_float32()
    if adapter_config.adapter == "none":
        model = load_backbone(directory, config.dtype)
        _create_output(output, config, adapter_config)
        with _disk_errors_told(output):
            return evaluate_only(config, model, data, metrics=output / METRICS_FILE, summary=output / SUMMARY_FILE)
    steps = config.steps or max(1, math.ceil(config.epochs * data.batches.steps_per_epoch))
    optimizer = make_optimizer(config, steps)
    recipe = Recipe.of(config.tied_share, config.router_share, steps)

    def initial_state(model: Backbone, lora: LoRA | None) -> TrainState:
        init_key, state_key = jax.random.split(jax.random.key(config.seed))
        trained = recipe.start(initial_weights(adapter_config, model, lora, init_key))
        return TrainState(step=jnp.int32(0), adapter=trained, moments=optimizer.init(trained), key=state_key)

    abstract = jax.eval_shape(lambda: Backbone(model_config, dtype=config.dtype, rngs=nnx.Rngs(0)))
    _check_space(output, jax.eval_shape(initial_state, abstract, lora), keep=config.keep_checkpoints)
    model = load_backbone(directory, config.dtype)
    identity = _identity(
        config, adapter_config, backbone=backbone, data=data.fingerprint, total_steps=steps, initial=digest(lora)
    )
    state = jax.block_until_ready(
        jax.jit(initial_state)(model, lora)
    )  # too little memory shows before anything is written

    if not config.resume:
        _create_output(output, config, adapter_config)
    with _disk_errors_told(output):
        checkpoints = Checkpoints(output / CHECKPOINT_DIR, keep=config.keep_checkpoints, identity=identity, usual=USUAL)
        try:
            if checkpoints.latest_step() is not None:
                state = checkpoints.restore(state)
            elif config.resume:  # killed before its first checkpoint
                _create_output(output, config, adapter_config)
            report = Report(output / METRICS_FILE, start=int(state.step), steps=steps, log_every=config.log_every)
            if config.resume:
                report.say(f"resuming {output} at step {int(state.step)}")
            try:
                state, seconds = _run(config, state, model, data, optimizer, recipe, steps, checkpoints, report)
            finally:
                report.close()
        finally:
            checkpoints.close()

        if isinstance(state.adapter, FullWeights):
            trained = state.adapter.as_backbone(model.dtype)
            export_backbone(trained, output / MODEL_DIR, source=directory, replace=True)
        else:
            names = {"backbone_name": config.model, "backbone_identity": backbone}
            save_adapter(state.adapter, output / ADAPTER_DIR, **names, replace=True)
        plot_training(output / METRICS_FILE, output / PLOT_FILE)
        summary = _summary(output, state, seconds)
        write_json(output / SUMMARY_FILE, summary)
    return summary


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
) -> tuple[TrainState, float]:
    """All remaining steps. Returns the last state and the seconds spent in steps (evaluation and saving excluded)."""
    schedule = learning_rate(config, steps)
    step, seconds = int(state.step), 0.0

    def evaluate() -> None:
        result = data.held_out.evaluate(*in_use(state.adapter, model), batch_size=config.batch_size)
        if result:
            report.evaluation(step, result)

    if step == 0:
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
    last = checkpoints.latest_step()
    good = (
        "there is no checkpoint yet"
        if last is None
        else f"the last good checkpoint is {checkpoints.directory / str(last)}"
    )
    return f"step {step}: {bad} is not finite; {good}: lower --learning-rate or look at the data of that step"


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Within, SIGTERM and the first Ctrl-C only set what the yielded function returns: the signal's number, or 0."""
    asked = 0

    def handler(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = signum
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


def _check_output(output: Path, *, resume: bool) -> None:
    try:
        output.exists()
    except OSError as error:  # a name that no file can have
        raise UserError(f"--output {str(output)[:60]}…: {error.strerror}; give another directory") from error
    if resume and not (output / CONFIG_FILE).exists():
        raise UserError(f"--output {output}: holds no run to resume; leave out --resume to start one")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        hint = "continue that run with --resume, or " if (output / CONFIG_FILE).exists() else ""
        raise UserError(f"--output {output}: is in use; {hint}give another directory")
    existing = _nearest_existing(output)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {output}: {existing} is not a writable directory; give another one")


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _check_space(output: Path, state: TrainState, *, keep: int) -> None:
    """The checkpoints (one more than are kept exists while one is written) and the final adapter must fit in the free
    space and that of the checkpoints which are there already. `state` may be abstract."""
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    need = (keep + 1) * size((state.adapter, state.moments)) + size(state.adapter)
    present = sum(f.stat().st_size for f in (output / CHECKPOINT_DIR).rglob("*") if f.is_file())
    free = shutil.disk_usage(_nearest_existing(output)).free + present
    if free < need:
        raise UserError(
            f"--output {output}: {keep} checkpoints and the adapter need {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free space, lower --keep-checkpoints or give another disk"
        )


@contextmanager
def _disk_errors_told(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--output {output}: cannot be written ({reason}); free space, then continue with --resume"
        ) from error


def _create_output(output: Path, config: TrainConfig, adapter: AdapterConfig) -> None:
    table = {**dataclasses.asdict(config), **adapter.table(), "resume": False}
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / CONFIG_FILE, table)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); give another directory") from error


def _summary(output: Path, state: TrainState, seconds: float) -> dict[str, Any]:
    lines = read_metrics(output / METRICS_FILE)
    held_out = [line for line in lines if "eval_loss" in line]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "steps": int(state.step),
        "trainable_parameters": num_parameters(state.adapter),
        "before": held_out[0] if held_out else None,
        "after": held_out[-1] if held_out else None,
        "median_tokens_per_second": float(np.median(speeds)),
        "seconds_in_steps": round(seconds, 2),
        "peak_device_gib": runtime.peak_device_gib(),
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }
