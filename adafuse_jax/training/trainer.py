"""Fine-tuning from start to finish: data → backbone → adapter → steps, evaluation, checkpoints → adapter directory (or, with
all weights trained, model directory)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from adafuse_jax.adapters.adafuse import Products, choose_products
from adafuse_jax.adapters.baselines.full import FullWeights
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.registry import num_parameters
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.core import runtime
from adafuse_jax.core.atomic_files import write_json, write_text
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.tables import Table
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.models.attention import Visibility, implementation_of
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.layout import ONE_DEVICE, Layout
from adafuse_jax.models.quantised import linears_of
from adafuse_jax.parallel.layout import MeshLayout
from adafuse_jax.parallel.mesh import shard, training_mesh
from adafuse_jax.parallel.processes import is_first, on_first
from adafuse_jax.training.checkpoint import Checkpoints, run_identity
from adafuse_jax.training.config import TrainConfig, require_compatible
from adafuse_jax.training.data import Data, prepare_data, run_date
from adafuse_jax.training.initial import digest, initial_state, read_initial_lora
from adafuse_jax.training.limits import require_context, require_memory
from adafuse_jax.training.loop import Run, run_steps
from adafuse_jax.training.metrics import NoReport, Report, plot_training, summarize
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
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import forward_with
from adafuse_jax.training.trackers import Tracker, open_tracker, require_tracker
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
    require_tracker(config.report_to, output)
    with ExitStack() as held:
        recorded = held.enter_context(held_run(output)) if config.resume else None
        return _train(config, adapter_config, output, recorded, held)


def _train(
    config: TrainConfig, adapter_config: AdapterConfig, output: Path, recorded: Table | None, held: ExitStack
) -> dict[str, Any]:
    """`train`, with the run's directory in `held` and its config `recorded`, if it is resumed."""
    # Everything that a run reads, the large files last
    checkpoint = HFCheckpoint.open(config.model, config.quantize, config.quantize_head)
    directory, model_config = checkpoint.directory, checkpoint.config
    require_context(config, model_config)
    quantization = checkpoint.quantisation
    if quantization is not None and adapter_config.adapter == "full":
        raise UserError(
            f"{directory}: the weights are {quantization.name}, and --adapter full trains every weight, but codes do not "
            "train; give the unquantised model, or another --adapter"
        )
    mesh = training_mesh(config.mesh, model_config, config.batch_size, linears_of(quantization))
    layout = ONE_DEVICE if mesh is None else MeshLayout(mesh)
    require_memory(config, model_config, mesh)
    if adapter_config.top_k == 1 and adapter_config.renormalize:
        log.warning("--top-k 1: the gate is always 1, so only the balance loss trains the router; see --no-renormalize")
    tokenizer = load_tokenizer(directory)
    with run_date(config, tokenizer, recorded) as date:
        data = prepare_data(config, tokenizer)
    if on_first(lambda: data.fingerprint) != data.fingerprint:
        raise UserError(
            "the processes have read different data; give all of them the same files, and no pipe, which one would empty"
        )
    if data.largest_token >= model_config.vocab_size:
        raise UserError(
            f"{directory}: the data has token {data.largest_token} and the model {model_config.vocab_size} tokens: the "
            "tokenizer is of another model; restore the files of one"
        )
    backbone, lora = checkpoint.identity(), None
    if config.init_lora is not None:
        lora = read_initial_lora(
            config.init_lora, adapter_config, model_config, backbone_identity=backbone, quantization=quantization
        )
    if config.dtype == "float32":
        runtime.exact_float32()
    settings = {
        **dataclasses.asdict(config), **adapter_config.table(), "template_date": date, "resume": False,
        "coordinator": None, "num_processes": None, "process_id": None,
    }  # fmt: skip

    def tracker_from(start: int) -> Tracker | None:
        """The tracker, closed after the results are written and before the run's lock is released."""
        tracker = open_tracker(config.report_to, output, start=start, settings=settings)
        return tracker and held.enter_context(contextlib.closing(tracker))

    if adapter_config.adapter == "none":
        model = load_backbone(checkpoint, config.dtype, place=Stacked(mesh))
        held_out = _evaluate_backbone(config, model, data, layout)
        held.enter_context(new_run(output, settings))

        def write_held_out() -> dict[str, Any]:
            write_text(output / METRICS_FILE, json.dumps(held_out) + "\n")
            if (tracker := tracker_from(0)) is not None:
                tracker.log(0, held_out)
            summary = summarize(output / METRICS_FILE, steps=0, parameters=0, seconds=0)
            write_json(output / SUMMARY_FILE, summary)
            return summary

        with disk_errors(output):
            return on_first(write_held_out)

    log.info("attention: %s", _attention(config, model_config, data))
    products = _products(config, adapter_config, model_config, data.batches.length, mesh)

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
        padded_from=data.padded_from, quantization=quantization and quantization.name,
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
            open_tracker=partial(tracker_from, start),
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
        max_segments=data.batches.max_segments, forward=forward_with(products),
    )  # fmt: skip
    with disk_errors(output), checkpoints, contextlib.closing(report):
        if recorded is not None:
            report.message(f"resuming {output} at step {start}")
        state, seconds = run_steps(run, state)

    # Results
    with disk_errors(output):
        if isinstance(state.adapter, FullWeights):
            trained = state.adapter.as_backbone(model.dtype)
            export_backbone(trained, output / MODEL_DIR, source=checkpoint, replace=True, layout=layout)
        else:
            names = {"backbone_name": config.model, "backbone_identity": backbone}
            save_adapter(
                state.adapter, output / ADAPTER_DIR, **names, replace=True, layout=layout, quantization=quantization
            )
        return on_first(
            lambda: _write_summary(
                output, steps=int(state.step), parameters=num_parameters(state.adapter), seconds=seconds
            )
        )


def _attention(config: TrainConfig, model: ModelConfig, data: Data) -> str:
    """Implementations of attention that the steps use, of one or several windows, and what they depend on."""
    length, segments = data.batches.length, data.batches.max_segments
    visibility = Visibility.of_sequence(length, jnp.ones((1, length), jnp.int32), segments)
    q, k = (
        jax.ShapeDtypeStruct((config.batch_size, length, heads, model.head_dim), jnp.dtype(config.dtype))
        for heads in (model.num_heads, model.num_kv_heads)
    )
    windows = dict.fromkeys(w if w and w < length else None for w in model.sliding_windows or (None,))
    names = dict.fromkeys(implementation_of(q, k, visibility, window) for window in windows)
    return f"{', '.join(names)} ({config.dtype}, rows of {length} tokens, at most {segments} segments)"


def _products(
    config: TrainConfig, adapter: AdapterConfig, model: ModelConfig, length: int, mesh: Mesh | None
) -> Products:
    """The products of AdaFuse's experts that the steps compute; logged."""
    if adapter.adapter != "adafuse":
        return "dense"
    products, reason = choose_products(adapter, model, config.batch_size * length, config.dtype)
    if mesh is not None:
        products, reason = "dense", "several devices"
    what = "all experts" if products == "dense" else "the chosen experts"
    log.info("products of %s (%s)", what, reason)
    return products


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
