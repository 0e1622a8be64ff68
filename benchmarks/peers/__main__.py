"""The peers of `benchmarks.decode` in torch: Hugging Face, PEFT LoRA, and a layer-wise mixture of LoRA experts.

    hf, hf-compiled                  LlamaForCausalLM, random bf16 weights made on the device
    peft-lora, peft-lora-compiled    PEFT's LoRA on its linears, not merged
    lora-moe, lora-moe-compiled      y = W x + Σ_j g_j s B[e_j] (A[e_j] x), a router for every adapted linear (MoLA's form)

Each has its best form (`benchmarks.peers.models`); inductor runs with and without coordinate-descent tuning (which also
makes its matrix-vector products), and the faster of the two counts.

Correct first: the mixture in each form and PEFT's LoRA against plain per-token loops in float64 on a small model; at full
size, the compiled step's logits may be at most 1.5 times as far from those of the same weights in float32 as the eager ones
are. A process runs one job:

    python -m benchmarks.peers --job JOB.json --result RESULT.json     # `benchmarks.decode` does
    python -m benchmarks.peers --check                                 # the small models alone
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.common.jobs import Report, add_job_flags, reporter
from benchmarks.common.records import commit, first_line
from benchmarks.common.timing import Stopwatch, Timing, time_calls
from benchmarks.decode.costs import SIZES
from benchmarks.peers.check import check
from benchmarks.peers.models import Compiled, Eager, build, exact_logits, relative_error, stepwise

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "inductor": {},
    "inductor, coordinate descent": {"coordinate_descent_tuning": True},
}
EAGER_QUERIES, EAGER_TOKENS = 3, 50
CHECKED_STEPS = 4
METHODS = "hf", "peft-lora", "lora-moe"
ALLOWED = 1.5
"""Times the error of the eager logits: how far the compiled ones may be from float32. In a mixture, rounding also turns near
ties of a router around, in either form."""


def synchronize(state: Any = None) -> Any:
    """Return `state` once the GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return state


def time_query(decoder: Eager | Compiled, prompt: Tensor, steps: int, repeats: int = 1) -> Timing:
    """Seconds per token after the first, which prefill makes."""
    return time_calls(
        lambda _: decoder.step(), None, calls=steps, repeats=repeats, restart=lambda _: decoder.prefill(prompt),
        wait=synchronize, warm_up=False,
    )[0]  # fmt: skip


def time_queries(decoder: Eager | Compiled, prompts: list[Tensor], steps: int, seconds: float) -> dict[str, Any]:
    """Median and slowest less fastest of the queries, of as many as `seconds` allow."""
    on_gpu, watch = torch.cuda.is_available(), Stopwatch()
    times: list[float] = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for prompt in prompts:
        times += time_query(decoder, prompt, steps).repeats
        if watch.seconds > seconds:
            break
    timing = Timing(repeats=tuple(times))
    return {
        "ms_per_token": timing.ms, "spread_ms": timing.spread_ms, "queries": len(times), "new_tokens": steps + 1,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }  # fmt: skip


def compile_best(
    model: LlamaForCausalLM,
    slots: int,
    prompt: Tensor,
    checks: tuple[Tensor, Tensor, float],
    trial_steps: int,
    seconds: float,
) -> tuple[Compiled, dict[str, Any]]:
    """The fastest configuration that is right by the `checks`: tokens, their exact logits, the error allowed. None begins
    after `seconds`."""
    tokens, wanted, tolerance = checks
    watch, best = Stopwatch(), None
    tried: dict[str, str] = {}
    for name, options in CONFIGURATIONS.items():
        if tried and watch.seconds > seconds:
            tried[name] = "not tried: no time left"
            continue
        compiling = Stopwatch()
        try:
            decoder = Compiled(model, slots, options)
            compile_seconds = compiling.seconds
            error = relative_error(stepwise(decoder, prompt, tokens), wanted)
            if error > tolerance:
                tried[name] = f"wrong: logits are off by {error:.2g}, and {tolerance:.2g} is allowed"
            else:
                ms = time_query(decoder, prompt, trial_steps, repeats=3).ms
                tried[name] = f"{ms:.3f} ms/token, logits off by {error:.2g}, {compile_seconds:.0f} s to compile"
                if best is None or ms < best[0]:
                    best = ms, name, decoder
        except Exception as error:
            tried[name] = first_line(error)
        print(f"  {name}: {tried[name]}", flush=True)
    if best is None:
        raise RuntimeError("no configuration ran: " + "; ".join(f"{k}: {v}" for k, v in tried.items()))
    return best[2], {"configuration": best[1], "tried": tried}


@torch.no_grad()
def measure(job: dict[str, Any], report: Report) -> None:
    """Rows of one method and its targets, eager and compiled; `report` gets all rows so far."""
    shapes, method, targets = SIZES[job["size"]], job["method"], job["targets"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []

    def attempt(name: str, run: Callable[[], dict[str, Any]]) -> None:
        row = {"method": name, "targets": targets, "strategy": "-", "batch": 1}
        try:
            row |= run()
        except Exception as error:
            row["error"] = first_line(error)
        rows.append(row)
        print(f"  {name} {targets}: {row.get('error') or '{ms_per_token:.3f} ms/token'.format(**row)}", flush=True)
        report({"rows": rows})

    print(f"  small models: {check(method)}", flush=True)
    torch._dynamo.reset()
    watch = Stopwatch()
    torch.manual_seed(0)
    model = build(method, targets, shapes, device, torch.bfloat16)
    prompts = [torch.tensor([prompt], device=device) for prompt in job["prompts"][: job["queries"]]]
    steps = job["new_tokens"] - 1
    slots = max(prompt.shape[1] for prompt in prompts) + max(job["new_tokens"], CHECKED_STEPS) + 1
    context = statistics.mean(prompt.shape[1] for prompt in prompts) + job["new_tokens"] / 2
    synchronize()
    print(f"  model: {watch.seconds:.1f} s", flush=True)
    eager = Eager(model)
    tokens = torch.arange(1, CHECKED_STEPS + 1, device=device)

    def run_eager() -> dict[str, Any]:
        time_query(eager, prompts[0], 8)
        fewer = min(job["new_tokens"], EAGER_TOKENS) - 1
        timing = time_queries(eager, prompts[:EAGER_QUERIES], fewer, job["row_seconds"])
        return timing | {"context": context}

    def run_compiled() -> dict[str, Any]:
        wanted = exact_logits(model, prompts[0], tokens)
        gc.collect()
        tolerance = ALLOWED * relative_error(stepwise(eager, prompts[0], tokens), wanted)
        print(f"  eager logits are off by {tolerance / ALLOWED:.2g}", flush=True)
        checks = tokens, wanted, tolerance
        decoder, how = compile_best(model, slots, prompts[0], checks, min(steps, 32), job["compile_seconds"])
        gc.collect()  # what was slower; the graph that stays must not need it
        error = relative_error(stepwise(decoder, prompts[0], tokens), wanted)
        if error > tolerance:
            raise RuntimeError(f"logits are off by {error:.2g} after the other configurations were freed")
        return time_queries(decoder, prompts, steps, job["row_seconds"]) | how | {"context": context}

    if "eager" in job["forms"]:
        attempt(method, run_eager)
    if "compiled" in job["forms"]:
        attempt(f"{method}-compiled", run_compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the methods on small models and end")
    parser.add_argument("--backend", default="eager", help="of torch.compile in --check")
    add_job_flags(parser, required=False)
    arguments = parser.parse_args()
    if arguments.check:
        for method in METHODS:
            print(method, check(method, arguments.backend), flush=True)
        return
    import transformers

    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "commit": commit(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    measure(json.loads(arguments.job.read_text()), reporter(arguments.result, facts))


if __name__ == "__main__":
    main()
