"""The peers of `benchmarks.decode` in torch: Hugging Face, PEFT LoRA, and a layer-wise mixture of LoRA experts.

    hf, hf-compiled                  LlamaForCausalLM, random bf16 weights made on the device
    peft-lora, peft-lora-compiled    PEFT's LoRA on its linears, not merged
    lora-moe, lora-moe-compiled      y = W x + Σ_j g_j s B[e_j] (A[e_j] x), a router for every adapted linear (MoLA's form)

Each has its best form (`peers_models`); inductor runs with and without coordinate-descent tuning (which also makes its
matrix-vector products), and the faster of the two counts.

Correct first: the mixture in each form and PEFT's LoRA against plain per-token loops in float64 on a small model; at full
size, the compiled step's logits may be at most 1.5 times as far from those of the same weights in float32 as the eager ones
are. A process runs one job:

    python -m benchmarks.peers_torch --job JOB.json --result RESULT.json     # `benchmarks.decode` does
    python -m benchmarks.peers_torch --check                                 # the small models alone
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.decode_costs import SIZES, TARGETS, Shapes
from benchmarks.peers_models import Compiled, Eager, MoELinear, build, exact_logits, relative_error, stepwise

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


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_query(decoder: Eager | Compiled, prompt: Tensor, steps: int, device: str) -> float:
    """ms per token after the first, which prefill makes."""
    decoder.prefill(prompt)
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    synchronize(device)
    return 1e3 * (time.perf_counter() - begun) / steps


def time_queries(
    decoder: Eager | Compiled, prompts: list[Tensor], steps: int, seconds: float, device: str
) -> dict[str, Any]:
    """Median and slowest less fastest of the queries, of as many as `seconds` allow."""
    begun, times = time.perf_counter(), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for prompt in prompts:
        times.append(time_query(decoder, prompt, steps, device))
        if time.perf_counter() - begun > seconds:
            break
    return {
        "ms_per_token": statistics.median(times), "spread_ms": max(times) - min(times), "queries": len(times),
        "new_tokens": steps + 1,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }  # fmt: skip


def compile_best(
    model: LlamaForCausalLM,
    slots: int,
    prompt: Tensor,
    checks: tuple[Tensor, Tensor, float],
    trial_steps: int,
    seconds: float,
    device: str,
) -> tuple[Compiled, dict[str, Any]]:
    """The fastest configuration that is right by the `checks`: tokens, their exact logits, the error allowed. None begins
    after `seconds`."""
    tokens, wanted, tolerance = checks
    begun, best = time.perf_counter(), None
    tried: dict[str, str] = {}
    for name, options in CONFIGURATIONS.items():
        if tried and time.perf_counter() - begun > seconds:
            tried[name] = "not tried: no time left"
            continue
        start = time.perf_counter()
        try:
            decoder = Compiled(model, slots, options)
            compiled = time.perf_counter() - start
            error = relative_error(stepwise(decoder, prompt, tokens), wanted)
            if error > tolerance:
                tried[name] = f"wrong: logits are off by {error:.2g}, and {tolerance:.2g} is allowed"
            else:
                ms = statistics.median(time_query(decoder, prompt, trial_steps, device) for _ in range(3))
                tried[name] = f"{ms:.3f} ms/token, logits off by {error:.2g}, {compiled:.0f} s to compile"
                if best is None or ms < best[0]:
                    best = ms, name, decoder
        except Exception as error:
            tried[name] = first_line(error)
        print(f"  {name}: {tried[name]}", flush=True)
    if best is None:
        raise RuntimeError("no configuration ran: " + "; ".join(f"{k}: {v}" for k, v in tried.items()))
    return best[2], {"configuration": best[1], "tried": tried}


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


@torch.no_grad()
def measure(job: dict[str, Any], tell: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rows of one method and its targets, eager and compiled; `tell` gets all rows so far."""
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
        tell(rows)

    print(f"  small models: {check(method)}", flush=True)
    torch._dynamo.reset()
    begun = time.perf_counter()
    torch.manual_seed(0)
    model = build(method, targets, shapes, device, torch.bfloat16)
    prompts = [torch.tensor([prompt], device=device) for prompt in job["prompts"][: job["queries"]]]
    steps = job["new_tokens"] - 1
    slots = max(prompt.shape[1] for prompt in prompts) + max(job["new_tokens"], CHECKED_STEPS) + 1
    context = statistics.mean(prompt.shape[1] for prompt in prompts) + job["new_tokens"] / 2
    synchronize(device)
    print(f"  model: {time.perf_counter() - begun:.1f} s", flush=True)
    eager = Eager(model)
    tokens = torch.arange(1, CHECKED_STEPS + 1, device=device)

    def run_eager() -> dict[str, Any]:
        time_query(eager, prompts[0], 8, device)
        fewer = min(job["new_tokens"], EAGER_TOKENS) - 1
        timing = time_queries(eager, prompts[:EAGER_QUERIES], fewer, job["row_seconds"], device)
        return timing | {"context": context}

    def run_compiled() -> dict[str, Any]:
        wanted = exact_logits(model, prompts[0], tokens)
        gc.collect()
        tolerance = ALLOWED * relative_error(stepwise(eager, prompts[0], tokens), wanted)
        print(f"  eager logits are off by {tolerance / ALLOWED:.2g}", flush=True)
        checks = tokens, wanted, tolerance
        decoder, how = compile_best(model, slots, prompts[0], checks, min(steps, 32), job["compile_seconds"], device)
        gc.collect()  # what was slower; the graph that stays must not need it
        error = relative_error(stepwise(decoder, prompts[0], tokens), wanted)
        if error > tolerance:
            raise RuntimeError(f"logits are off by {error:.2g} after the other configurations were freed")
        return time_queries(decoder, prompts, steps, job["row_seconds"], device) | how | {"context": context}

    if "eager" in job["forms"]:
        attempt(method, run_eager)
    if "compiled" in job["forms"]:
        attempt(f"{method}-compiled", run_compiled)


SMALL = Shapes(
    name="small",
    num_layers=2,
    embed_dim=64,
    hidden_dim=96,
    num_heads=4,
    vocab_size=128,
    rank=4,
    num_experts=8,
    alpha=8.0,
)


class PlainLinear(nn.Module):
    """What a linear of a peer must compute, token by token in plain loops."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.stack([self._token(token) for token in row]) for row in x])

    def _token(self, x: Tensor) -> Tensor:
        m: Any = self.module
        if not isinstance(m, MoELinear):
            a, b = m.lora_A["default"].weight, m.lora_B["default"].weight
            return m.base_layer.weight @ x + m.scaling["default"] * (b @ (a @ x))
        z = [float(w @ x) for w in m.router]
        best = sorted(range(len(z)), key=lambda e: -z[e])[: m.top_k]
        total = sum(torch.tensor(z[e], dtype=torch.float64).exp() for e in best)
        y = m.base.weight @ x
        for e in best:
            y = y + torch.tensor(z[e], dtype=torch.float64).exp() / total * m.scale * (m.B[e] @ (m.A[e] @ x))
        return y


@torch.no_grad()
def check(method: str, backend: str = "eager") -> str:
    """A small model on the CPU: what the timed forms find, eager and step by step with either cache, against plain loops
    in float64. Says by how much they differ; raises RuntimeError if that is more than float32 rounding."""
    torch.manual_seed(1)
    found = []
    for targets in ("qv", "all7") if method == "lora-moe" else ("all7",) if method == "peft-lora" else ("-",):
        model = build(method, targets, SMALL, "cpu", torch.float32)
        for name, parameter in model.named_parameters():  # of a size at which a mistake shows
            if any(part in name for part in ("lora_", ".A", ".B", "router")):
                parameter.normal_(std=0.2)
        tokens = torch.randint(0, SMALL.vocab_size, (1, 12))
        steps = tokens[0, 6:]
        eager, compiled = Eager(model), Compiled(model, 16, {}, backend=backend)
        results = [stepwise(decoder, tokens[:, :6], steps) for decoder in (eager, compiled)]
        model.double()
        backbone = model(input_ids=tokens).logits
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in TARGETS[targets]:
                    if hasattr(block, name):
                        setattr(block, name, PlainLinear(getattr(block, name)))
        wanted = model(input_ids=tokens).logits
        errors = [relative_error(result, wanted[0, 6:]) for result in results]
        errors.append(relative_error(backbone, wanted))
        if not max(errors) < 1e-5:
            raise RuntimeError(
                f"{method} {targets} is wrong: relative errors {errors} of eager, static and whole logits"
            )
        found.append(f"{targets} within {max(errors):.1e}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check the methods on small models and end")
    parser.add_argument("--backend", default="eager", help="of torch.compile in --check")
    parser.add_argument("--job", type=Path)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
    if arguments.check:
        for method in METHODS:
            print(method, check(method, arguments.backend), flush=True)
        return
    import transformers

    on_gpu = torch.cuda.is_available()
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    measure(
        json.loads(arguments.job.read_text()),
        lambda rows: arguments.result.write_text(json.dumps(facts | {"rows": rows})),
    )


if __name__ == "__main__":
    main()
