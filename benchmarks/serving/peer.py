"""transformers' own continuous batching on the bare backbone, in torch: a closed loop of clients in one process.

A short trial of each setting in SETTINGS decides which one the loops take.

python -m benchmarks.serving.peer --job JOB.json --result RESULT.json     # `benchmarks.serving` does
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.common.jobs import Report, add_job_flags, reporter
from benchmarks.common.records import commit, first_line
from benchmarks.decode.costs import SIZES
from benchmarks.peers.models import build

RESULT_SECONDS = 60
SETTINGS: dict[str, dict[str, Any]] = {
    "its own choice": {},
    "CUDA graphs": {"use_cuda_graph": True},
    "CUDA graphs, two batches in flight": {"use_cuda_graph": True, "use_async_batching": True},
    "compiled": {"default_compile_level": 1},
}
TRIAL_TOKENS = 64
"""New tokens of a request in a trial, at most."""


def closed_loop(manager: Any, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Tokens a second while `clients` requests run at a time."""
    left = list(reversed(requests))
    begun, tokens, running = time.perf_counter(), 0, 0
    while left or running:
        while left and running < clients:
            asked = left.pop()
            manager.add_request(asked["prompt"], max_new_tokens=asked["new_tokens"], eos_token_id=-1)
            running += 1
        result = manager.get_result(timeout=RESULT_SECONDS)
        if result is None or result.error:
            raise RuntimeError(f"continuous batching: {'no result' if result is None else result.error}")
        tokens, running = tokens + len(result.generated_tokens), running - 1
    seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def rate_of(model: Any, settings: dict[str, Any], requests: list[dict[str, Any]], clients: int, warm: int) -> Any:
    """The closed loop after one of the first `warm` requests, which compiles and captures graphs, or its error."""
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        batching = ContinuousBatchingConfig(**settings)
        manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
        manager.start()
        try:
            closed_loop(manager, requests[:warm], clients)
            return closed_loop(manager, requests, clients)
        finally:
            manager.stop(block=True)
    except Exception as error:
        return {"error": first_line(error)}


def measure(job: dict[str, Any], report: Report) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build("hf", "-", SIZES[job["size"]], device, getattr(torch, job["dtype"]))
    most = max(clients for clients, _ in job["loops"])
    short = [asked | {"new_tokens": min(asked["new_tokens"], TRIAL_TOKENS)} for asked in job["requests"][:most]]
    trials: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        trials[name] = rate_of(model, settings, short, most, len(short))
        report({"trials": trials})
    best = max(SETTINGS, key=lambda name: trials[name].get("tokens_per_s", 0.0))
    found: dict[str, Any] = {}
    for clients, count in job["loops"]:
        found[str(clients)] = rate_of(model, SETTINGS[best], job["requests"][:count], clients, clients)
        report({"trials": trials, "settings": best, "closed": found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_flags(parser)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit()
    }  # fmt: skip
    measure(json.loads(arguments.job.read_text()), reporter(arguments.result, facts))
