"""transformers' own continuous batching on the bare backbone, in torch: a closed loop of clients in one process.

python -m benchmarks.serving.peer --job JOB.json --result RESULT.json     # `benchmarks.serving` does
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from benchmarks.common.jobs import Report, add_job_flags, reporter
from benchmarks.common.records import commit, first_line
from benchmarks.decode.costs import SIZES
from benchmarks.peers.models import build

RESULT_SECONDS = 120


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


def measure(job: dict[str, Any], report: Report) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build("hf", "-", SIZES[job["size"]], device, getattr(torch, job["dtype"]))
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    found: dict[str, Any] = {}
    for clients, count in job["loops"]:
        try:
            manager = model.init_continuous_batching(generation_config=settings)
            manager.start()
            try:
                closed_loop(manager, job["requests"][:clients], clients)  # compiles and captures its graphs
                found[str(clients)] = closed_loop(manager, job["requests"][:count], clients)
            finally:
                manager.stop(block=True)
        except Exception as error:
            found[str(clients)] = {"error": first_line(error)}
        report({"closed": found})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_job_flags(parser)
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {
        "device": name, "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit()
    }  # fmt: skip
    measure(json.loads(arguments.job.read_text()), reporter(arguments.result, facts))
