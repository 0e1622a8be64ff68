"""Settings of `train.py` as a frozen dataclass; its flags are made from these fields."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.core.errors import UserError, quoted
from adafuse_jax.core.fields import MAX_COUNT, MAX_ROWS, MAX_SEED, MAX_TOKENS, check, flag, require
from adafuse_jax.models.config import QUANTIZE_HEAD_HELP, QUANTIZE_HELP, Quantize, Remat
from adafuse_jax.parallel.mesh import parse_mesh
from adafuse_jax.training.trackers import TrackerName

TrainDType = Literal["float32", "bfloat16"]
"""Types to train in; float16 is none, as gradients vanish or overflow in it."""


def _require_date(name: str, text: str | None) -> None:
    try:
        datetime.fromisoformat(text or "2026-01-01")
    except ValueError:
        raise UserError(f"{name} is {quoted(text)}: it must be a date or time in ISO format, as 2026-03-01") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Configuration of `python train.py`: data, schedule, optimiser, checkpoints."""

    model: str = flag("Hugging Face model directory or hub id", metavar="DIR|ID", text="path")
    dataset: tuple[str, ...] = flag(
        "data sets: SOURCE[:SUBSET][#SPLIT][@FORMAT][=WEIGHT], SOURCE a preset, hub id, file, directory or pipe",
        metavar="SPEC",
        text="spec",
    )
    output: str = flag("directory for checkpoints, metrics, plots and the final adapter", metavar="DIR", text="path")
    init_lora: str | None = flag(
        "LoRA to begin from, written by train.py or PEFT: it is every expert's initial value", None, "DIR", text="path"
    )
    eval_dataset: tuple[str, ...] = flag(
        "held-out data sets, as --dataset without a weight; default: the sets' own validation or test split",
        (),
        "SPEC",
        text="spec",
    )
    skip_bad_rows: bool = flag("leave out rows that cannot be read or used, and log how many and the first", False)
    eval_fraction: float = flag(
        "share of the training data held out when there is no other held-out split", 0.02, low=0, below=1
    )
    eval_examples: int = flag(
        "held-out examples scored at each evaluation, at most (0: no evaluation)", 200, low=0, high=MAX_COUNT
    )
    eval_every: int = flag("steps between evaluations; the last step is always evaluated", 200, low=1, high=MAX_COUNT)
    steps: int | None = flag("optimiser steps; default: from --epochs", None, low=1, high=MAX_COUNT)
    epochs: float = flag(
        "passes over the data, when --steps is not given: each row is drawn so many times, and the last batch is filled up "
        "with padding; of data sets with weights, as many rows in all",
        1.0,
        above=0,
        high=1e6,
    )
    mesh: str | None = flag(
        "devices to train on, as data=2,fsdp=-1: sizes of data (rows), fsdp (rows; weights in parts), tensor (heads and "
        "hidden units), one of them -1 for all that are left; default: all as fsdp if they divide --batch-size, else one",
        None,
        "SIZES",
    )
    coordinator: str | None = flag(
        "address and port of process 0, for several processes that train together; under SLURM, Open MPI and Kubernetes "
        "this and the next two are found",
        None,
        "HOST:PORT",
    )
    num_processes: int | None = flag("processes that train together", None, low=1, high=MAX_COUNT)
    process_id: int | None = flag("number of this process, from 0", None, low=0, high=MAX_COUNT)
    batch_size: int = flag("sequences per micro-batch, over all devices", 8, low=1, high=MAX_ROWS)
    grad_accum: int = flag("micro-batches per optimiser step", 1, low=1, high=MAX_ROWS)
    max_length: int = flag("tokens per sequence; longer examples are cut", 1024, low=8, high=MAX_TOKENS)
    packing: bool = flag("pack several examples into a sequence, masked from each other", True)
    learning_rate: float = flag("peak learning rate of AdamW", 2e-4, above=0, high=1e30)
    tied_share: float = flag(
        "expert weight tying: share of the steps, from the first, in which AdaFuse's experts learn as one LoRA",
        0.0,
        low=0,
        high=1,
    )
    router_share: float = flag(
        "router freezing: share of the steps, from the first, in which routers learn; then they stay as they are",
        1.0,
        low=0,
        high=1,
    )
    min_lr_ratio: float = flag("final learning rate of the cosine, as a share of the peak", 0.1, low=0, below=1)
    warmup_ratio: float = flag("share of the steps spent warming up", 0.03, low=0, below=1)
    weight_decay: float = flag("AdamW weight decay on the experts' matrices", 0.0, low=0, high=1e3)
    clip_norm: float = flag("global gradient norm above which gradients are scaled down", 1.0, above=0, high=1e30)
    beta1: float = flag("AdamW first-moment decay", 0.9, low=0, below=1)
    beta2: float = flag("AdamW second-moment decay", 0.999, low=0, below=1)
    dtype: TrainDType = flag("type of the backbone and of the activations; adapters train in float32", "bfloat16")
    quantize: Quantize | None = flag(QUANTIZE_HELP, None)
    quantize_head: bool = flag(QUANTIZE_HEAD_HELP, False)
    remat: Remat = flag(
        "what the backward pass computes again to save memory: nothing, all but the linears' products, also the "
        "feed-forward block, or the whole layer",
        "full",
        formerly={True: "full", False: "none"},
    )
    unroll: bool = flag(
        "compile the layers one by one instead of a loop over them: steps are faster, compiling takes several times as long",
        False,
    )
    seed: int = flag("seed of the adapters' initial values and of the data order", 0, low=0, high=MAX_SEED)
    checkpoint_every: int = flag("steps between checkpoints", 100, low=1, high=MAX_COUNT)
    keep_checkpoints: int = flag("checkpoints kept", 2, low=1, high=MAX_COUNT)
    log_every: int = flag("steps between lines of metrics.jsonl", 1, low=1, high=MAX_COUNT)
    report_to: TrackerName = flag(
        "where metrics go beside metrics.jsonl: event files in OUTPUT/tensorboard, or a run in OUTPUT/wandb, offline unless "
        "WANDB_MODE is set",
        "none",
    )
    data_cache: str | None = flag(
        "directory in which prepared data is kept for later starts; default: ~/.cache/adafuse-jax/data, or the same in "
        "XDG_CACHE_HOME",
        None,
        "DIR",
        text="path",
    )
    resume: bool = flag("continue the run in --output from its last checkpoint", False)
    template_date: str | None = flag(
        "time that chat templates write if they ask for the present one, in ISO format; default: the start of the run",
        None,
        "DATE",
    )

    def __post_init__(self) -> None:
        check(self)
        require(
            self.batch_size * self.max_length < 2**31,
            f"--batch-size {self.batch_size} × --max-length {self.max_length}: a micro-batch has at most 2**31 - 1 tokens; "
            "lower one of them",
        )
        require(len(self.dataset) > 0, "--dataset is empty; name at least one data set")
        _require_date("--template-date", self.template_date)
        if self.mesh is not None:
            parse_mesh(self.mesh)
        _require_process(self.coordinator, self.num_processes, self.process_id)


def _require_process(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = coordinator, num_processes, process_id
    if given == (None, None, None):
        return
    require(None not in given, "--coordinator, --num-processes and --process-id belong together; give all three")
    require(
        re.fullmatch(r"\S+:[0-9]{1,5}", str(coordinator)) is not None,
        f"--coordinator {quoted(coordinator)}: give host and port of process 0, as 10.0.0.1:1234",
    )
    require(
        (process_id or 0) < (num_processes or 0),
        f"--process-id {process_id}: of {num_processes} processes the last is {(num_processes or 0) - 1}; correct it",
    )


def require_compatible(config: TrainConfig, adapter: AdapterConfig) -> None:
    """Raise `UserError` for settings that the adapter has no use for."""
    if adapter.adapter == "none" and config.resume:
        raise UserError("--adapter none trains nothing that --resume could continue; leave one of them out")
    if adapter.adapter == "none" and config.eval_examples == 0:
        raise UserError("--adapter none only evaluates, and --eval-examples 0 leaves nothing to do; raise it")
    if config.quantize is not None and adapter.adapter == "full":
        raise UserError(
            f"--quantize {config.quantize}: --adapter full trains every weight, and codes do not train; leave one out"
        )
    if config.tied_share > 0 and adapter.adapter != "adafuse":
        raise UserError(
            f"--tied-share {config.tied_share}: is for --adapter adafuse, this is {adapter.adapter}; leave it out"
        )
    if config.tied_share > 0 and not adapter.renormalize:
        raise UserError(
            f"--tied-share {config.tied_share}: tied experts are one LoRA only if the gates sum to 1; leave out "
            "--no-renormalize, or this"
        )
    if config.router_share < 1 and adapter.adapter in ("lora", "full", "none"):
        raise UserError(f"--router-share {config.router_share}: {adapter.adapter} has no router; leave it out")
