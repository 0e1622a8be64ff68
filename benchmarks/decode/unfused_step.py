"""The unfused decode step by itself, also on a GPU that has the megakernel: by the layer kernels, and in XLA ops.

    python -m benchmarks.decode.unfused_step --sizes llama2-7b smollm2-135m
    python -m benchmarks.decode.unfused_step --cases bare all7:32 --forms kernels --quantize none int8 int4

Random bfloat16 weights, 8 experts, 2 of them per token, rows with experts of their own, 128 tokens in a cache of 512 slots.
A step is routing, layers and sampling; steps are chained without waiting for their tokens. Correct first: logits are
compared with those of the same weights in float32, and kernels that round more than XLA does end the run. The overhead is
over `bare` of as many rows in the same form, if that is among the cases before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from adafuse_jax.core import runtime
from adafuse_jax.inference.backends import portable
from adafuse_jax.inference.backends.unfused import LayerKernels, Unfused
from adafuse_jax.models.config import ModelConfig, Quantize
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common.timing import Stopwatch
from benchmarks.decode.merged_step import PROMPT, SLOTS, lower, time_steps
from benchmarks.decode.models import adapter_config, in_float32, model_config, random_adapter, random_backbone
from benchmarks.decode.rows import running_state
from benchmarks.decode.token_step import case_of
from benchmarks.training.shapes import SHAPES, TrainingShapes

FORMS = {"kernels": LayerKernels, "xla": Unfused}
TOLERANCE = 1.25
"""Largest error of the kernels' logits over that of XLA's: they round to bfloat16 at other places, no more often."""


def config_of(shapes: TrainingShapes) -> ModelConfig:
    return replace(model_config(shapes), tie_word_embeddings=shapes.tied)


def logits(backend: Unfused, batch: int) -> jax.Array:
    """[B, V] of a step."""
    model = backend.model
    state = running_state(model.config, model.dtype, batch, SLOTS, PROMPT)
    step = jax.jit(lambda reads, *state: backend.step(reads, None, *state)[0])
    return step(backend.reads, state.token, state.position, state.cache, state.done)


def exact_logits(model: Backbone, adapter: Any, batch: int) -> np.ndarray:
    """[B, V] of a step in float32."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(Unfused(*in_float32((model, adapter))), batch))


def check(backends: dict[str, Unfused], batch: int) -> dict[str, float]:
    """Form → its logits' error, in norms of the exact ones. Raises `SystemExit` if the kernels round more than XLA."""
    exact = exact_logits(backends["xla"].model, backends["xla"].adapter, batch)
    errors = {
        form: float(np.linalg.norm(np.asarray(logits(backend, batch)) - exact) / np.linalg.norm(exact))
        for form, backend in backends.items()
    }
    if not errors["kernels"] <= TOLERANCE * errors["xla"]:
        raise SystemExit(
            f"the logits of {batch} rows are off by {errors['kernels']:.1e}, those of XLA {errors['xla']:.1e}"
        )
    return errors


def run(
    size: str,
    cases: Sequence[tuple[str, int]],
    forms: Sequence[str],
    steps: int,
    repeats: int,
    quantize: Quantize | None = None,
) -> dict[tuple[str, int, str], float]:
    """(targets, rows, form) → ms of a step; a line for each."""
    shapes, found = SHAPES[size], {}
    config = config_of(shapes)
    model, made, name = random_backbone(config, quantize=quantize), {}, " ".join(filter(None, (size, quantize)))
    for targets, batch in cases:
        if targets not in made:
            adapter = None if targets == "bare" else random_adapter(adapter_config(shapes, targets), config)
            made[targets] = {form: FORMS[form](model, adapter) for form in forms}
        backends = dict(made[targets])
        reason = portable.unsupported_reason(model, backends[forms[0]].adapter, batch)
        if reason is not None and "kernels" in backends:
            print(f"{name} {targets}:{batch} kernels: they cannot run, as {reason}", flush=True)
            del backends["kernels"]
        errors = check(backends, batch) if len(backends) == 2 else {}
        for form, backend in backends.items():  # not while another is compiled: that delays the steps
            state, watch = running_state(config, model.dtype, batch, SLOTS, PROMPT), Stopwatch()
            step = lower(backend, None, state).compile()
            seconds = watch.seconds
            timing, *_ = time_steps(backend, step, state, steps, repeats)
            found[targets, batch, form] = timing.ms
            bare = found.get(("bare", batch, form))
            over = "" if bare is None or targets == "bare" else f", {100 * (timing.ms / bare - 1):+.1f}% over bare"
            off = f", logits off by {errors[form]:.1e}" if errors else ""
            print(f"{name} {targets}:{batch} {form}: {timing}{over}{off}, compiled in {seconds:.0f} s", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [(targets, batch) for batch in (1, 8, 32) for targets in ("bare", "qv", "all7")]
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["llama2-7b"])
    parser.add_argument(
        "--cases", nargs="+", type=case_of, default=usual, metavar="CASE", help="targets, or targets:rows"
    )
    parser.add_argument(
        "--quantize",
        nargs="+",
        choices=("none", *LAYOUTS),
        default=["none"],
        help="the linears' weights",
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    parser.add_argument("--steps", type=int, default=60, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.repeats) < 1:
        parser.error("--steps and --repeats must be at least 1")
    runtime.set_up()
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    for size in arguments.sizes:
        for name in arguments.quantize:
            quantize = None if name == "none" else name
            run(size, arguments.cases, arguments.forms, arguments.steps, arguments.repeats, quantize)


if __name__ == "__main__":
    main()
