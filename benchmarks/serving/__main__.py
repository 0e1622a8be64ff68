"""A server under load: time to the first token, between tokens and tokens per second, beside generation without a server.

    python -m benchmarks.serving --out benchmarks/results/nvidia_h200 --conversations sharegpt.jsonl.gz

writes serving.json and serving.md. Weights are random, and the lengths of prompts and answers are those of ShareGPT's first
exchanges. Each part is a server in a process of its own and leaves serving-part-*.json; parts can run at different times:

    bare, one, eight    the backbone, one AdaFuse adapter, eight of them mixed: each first generates its requests offline,
                        then serves closed loops of --clients, Poisson arrivals of --rates requests a second for
                        --poisson-seconds, and a closed loop while long prompts arrive
    peer                transformers' continuous batching, bare, in the Python of --torch-python
    merge               measures nothing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common.jobs import Job, run_job
from benchmarks.common.records import command_line, commit, first_line, write_json
from benchmarks.decode.costs import SIZES, TARGETS
from benchmarks.serving.client import closed_loop, disturbed, poisson, summary
from benchmarks.serving.report import merge_parts
from benchmarks.serving.requests import Asked, lengths_of, make_requests

ADAPTERS = {"bare": 0, "one": 1, "eight": 8}
PARTS = (*ADAPTERS, "peer")
END_SECONDS = 60
REQUESTS_OF_A_CLIENT = 8


class ServerError(RuntimeError):
    """A server that does not start."""


@contextmanager
def host(job: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """A process of `benchmarks.serving.host`, once it serves; what it has found so far. Raises ServerError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        order, result, log = (Path(scratch) / name for name in ("job.json", "result.json", "stderr"))
        order.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.serving.host", "--job", str(order), "--result", str(result)]
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors)
        try:
            found: dict[str, Any] = {}
            begun = time.monotonic()
            while "port" not in found or "serving on" not in log.read_text():
                if process.poll() is not None or time.monotonic() - begun > seconds:
                    lines = [line for line in log.read_text().splitlines() if line.strip()] or ["no line of log"]
                    print("\n".join(lines[-30:]), flush=True)
                    raise ServerError(f"the server does not start: {lines[-1]}")
                time.sleep(0.2)
                if result.exists() and (text := result.read_text()).endswith("}"):
                    found = json.loads(text)
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure_case(case: str, arguments: argparse.Namespace, part: dict[str, Any], path: Path) -> None:
    """Offline times and every load of one case; the part is written after each."""
    shapes, lengths = SIZES[arguments.size], request_lengths(arguments)
    of_one = alike(lengths, arguments.alone)
    names = [f"adapter-{i}" for i in range(ADAPTERS[case])] or ["base"]
    numbers = iter(range(1, 10**6))

    def requests(lengths: Sequence[tuple[int, int]]) -> list[Asked]:
        """Requests that no cache has seen."""
        return make_requests(lengths, names, shapes.vocab_size, next(numbers))

    def of_loop(clients: int) -> list[Asked]:
        return requests(of_one if clients == 1 else lengths[: loop_size(clients, len(lengths))])

    job = {
        "size": arguments.size, "dtype": arguments.dtype, "targets": arguments.targets, "adapters": ADAPTERS[case],
        "slots": arguments.slots, "context": arguments.context, "tensor_parallel": arguments.tensor_parallel,
        "requests": [asked.table() for asked in requests(lengths)],
        "alone": [asked.table() for asked in make_requests(of_one, names[:1], shapes.vocab_size, next(numbers))],
    }  # fmt: skip
    with host(job, arguments.job_seconds) as found:
        port = found.pop("port")
        part |= found | {"loads": {}, "disturbed_clients": arguments.disturbed_clients}
        write_json(path, part)

        def record(name: str, served: Any) -> None:
            part["loads"][name] = summary(served)
            write_json(path, part | {"finished": time.time()})
            print(f"{case} {name}: {part['loads'][name]}", flush=True)

        first = requests(lengths[: arguments.slots])  # connections, tokenizer, caches
        asyncio.run(closed_loop(port, first, arguments.slots))
        for clients in arguments.clients:
            record(f"closed-{clients}", asyncio.run(closed_loop(port, of_loop(clients), clients)))
        for rate in arguments.rates:
            count = max(1, round(rate * arguments.poisson_seconds))
            arrivals = requests([lengths[i % len(lengths)] for i in range(count)])
            record(f"poisson-{rate:g}", asyncio.run(poisson(port, arrivals, rate)))
        if arguments.long_prompt:
            long = [(arguments.long_prompt, 1)] * arguments.long_count
            intruders, clients = make_requests(long, names, shapes.vocab_size, 0), arguments.disturbed_clients
            record("disturbed", asyncio.run(disturbed(port, of_loop(clients), clients, intruders)))


def loop_size(clients: int, most: int) -> int:
    """Requests of a closed loop: few clients take longer for each."""
    return min(most, REQUESTS_OF_A_CLIENT * clients)


def alike(lengths: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """So many of the lengths whose caches have one size in `decode.py`, a power of two, so that it compiles for no other."""
    sizes = [(prompt + new - 1).bit_length() for prompt, new in lengths]
    common = Counter(sizes).most_common(1)[0][0]
    found = [pair for pair, size in zip(lengths, sizes, strict=True) if size == common]
    return [found[i % len(found)] for i in range(count)]


def request_lengths(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    most = arguments.context - arguments.new_tokens
    limits = {"max_prompt": min(arguments.max_prompt, most), "max_new": arguments.new_tokens}
    return lengths_of(arguments.conversations, arguments.requests, **limits)


def measure_peer(arguments: argparse.Namespace, part: dict[str, Any]) -> None:
    asked = make_requests(request_lengths(arguments), ["base"], SIZES[arguments.size].vocab_size, 1)
    settings = {
        "size": arguments.size, "dtype": arguments.dtype,
        "loops": [(clients, loop_size(clients, len(asked))) for clients in arguments.clients],
        "requests": [request.table() for request in asked],
    }  # fmt: skip
    job = Job(name="transformers", module="benchmarks.serving.peer", settings=settings)
    found, problem = run_job(job, {}, arguments.job_seconds, arguments.torch_python)
    part |= found | ({"error": problem} if problem else {})


def run_part(name: str, arguments: argparse.Namespace, command: str) -> None:
    part: dict[str, Any] = {"part": name, "size": arguments.size, "command": command, "commit": commit()}
    path = arguments.out / f"serving-part-{name}.json"
    if name == "peer":
        measure_peer(arguments, part)
    else:
        try:
            measure_case(name, arguments, part, path)
        except ServerError as error:
            part["error"] = first_line(error)
    write_json(path, part | {"finished": time.time()})


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the parts, serving.json and serving.md")
    parser.add_argument("--part", choices=("all", *PARTS, "merge"), default="all")
    parser.add_argument("--conversations", type=Path, help="ShareGPT's conversations, .json or .jsonl, also .gz")
    parser.add_argument("--size", choices=tuple(SIZES), default="llama2-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--targets", choices=tuple(TARGETS), default="all7")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="devices that share the model and decode together"
    )
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a slot")
    parser.add_argument("--requests", type=int, default=128, help="offline, and of a closed loop at most")
    parser.add_argument("--alone", type=int, default=8, help="of the loads of one client")
    parser.add_argument("--max-prompt", type=int, default=1024, help="longer conversations are left out")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="of the closed loops")
    parser.add_argument("--rates", type=float, nargs="*", default=[4, 8, 16], help="requests a second that arrive")
    parser.add_argument("--poisson-seconds", type=float, default=8, help="time in which they arrive")
    parser.add_argument("--long-prompt", type=int, default=2048, help="tokens; 0: no load with long prompts")
    parser.add_argument("--long-count", type=int, default=20, help="long prompts, at most")
    parser.add_argument("--disturbed-clients", type=int, default=8, help="of the load with long prompts")
    parser.add_argument("--job-seconds", type=float, default=550, help="a process is given up after these")
    parser.add_argument("--torch-python", default=sys.executable, help="the Python that has torch and transformers")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    command = command_line("benchmarks.serving", argv)
    for name in PARTS if arguments.part == "all" else () if arguments.part == "merge" else (arguments.part,):
        run_part(name, arguments, command)
    print(merge_parts(arguments.out), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
