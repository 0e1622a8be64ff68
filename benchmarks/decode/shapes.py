"""The decode step over models that people use: rows decoded together × backend × bare and with AdaFuse on all 7 linears.

    python -m benchmarks.decode.shapes --out benchmarks/results/nvidia_h200 --seconds 530

writes shapes.json and shapes.md. Each model is a process. --together of them compile side by side; while one is timed, none
compiles or uses the device. After --seconds no more is measured, and the same command at the same commit goes on with what
is missing. Random bfloat16 weights, rows with experts of their own, 128 tokens in a cache of 512 slots. A step is routing,
layers, head and sampling; steps are chained, and none of their tokens goes to the host. A model that a backend refuses has
its reason in the place of the time.

    megakernel    all layers and the head in one launch
    kernels       five launches a layer, as on GPUs without a megakernel
    xla           separate XLA ops

Adapters have the experts of `popular.POPULAR`, or those of --experts: 16x8/4 are 16 experts of rank 8, 4 of them per token.

First correct: for each number of rows of --check, the logits of the model's first layers must be about as close to those in
float32 as XLA's are. The share of the read bandwidth, which the same process measures, is the bytes that a step must read
over its time.
"""

from __future__ import annotations

import argparse
import fcntl
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adafuse_jax.core import runtime
from adafuse_jax.inference.backends import portable
from adafuse_jax.inference.backends.base import Backend
from adafuse_jax.inference.backends.megakernel import Megakernel
from adafuse_jax.inference.backends.unfused import LayerKernels, Unfused
from adafuse_jax.models.config import ModelConfig
from benchmarks.common.ceilings import measure_ceilings
from benchmarks.common.jobs import Job, Report, run_as_job, run_job
from benchmarks.common.records import command_line, facts, first_line, write_json
from benchmarks.common.reports import number, table
from benchmarks.common.timing import Stopwatch
from benchmarks.decode.costs import costs
from benchmarks.decode.devices import TOLERANCE, logits_of, text_step
from benchmarks.decode.merged_step import PROMPT, SLOTS, lower, time_steps
from benchmarks.decode.models import adapter_config, in_float32, random_adapter, random_backbone
from benchmarks.decode.popular import POPULAR, ModelShapes
from benchmarks.decode.prefill import record_of_commit
from benchmarks.decode.rows import running_state

MODULE = "benchmarks.decode.shapes"
BACKENDS: dict[str, type[Backend]] = {"megakernel": Megakernel, "kernels": LayerKernels, "xla": Unfused}
BARE, ADAPTED = "-", "all7"
EXPERTS = re.compile(r"(\d+)x(\d+)/(\d+)")
"""Number, rank and top-k of --experts; in a case they follow its targets and a colon."""
KEY = ("model", "rows", "backend", "targets")
CHECKED_LAYERS = 2
THREADS = 8
"""Programs compiled at a time."""
LEAST_SECONDS = 60
"""Time that a model needs to begin at all."""

Case = dict[str, Any]


def with_experts(shapes: ModelShapes, targets: str) -> tuple[ModelShapes, str]:
    """(shapes with the experts that a case's targets name, the targets without them)."""
    name, _, experts = targets.partition(":")
    if found := EXPERTS.fullmatch(experts):
        num_experts, rank, top_k = map(int, found.groups())
        shapes = replace(shapes, num_experts=num_experts, rank=rank, top_k=top_k)
    return shapes, name


class Made:
    """A random model with and without adapters, and the backends over them."""

    def __init__(self, shapes: ModelShapes, config: ModelConfig, targets: Iterable[str]):
        self.config, self._backends = config, dict[tuple[str, str], Backend]()
        self.model = random_backbone(config)
        self.adapters = {
            name: None if name == BARE else random_adapter(adapter_config(*with_experts(shapes, name)), config)
            for name in dict.fromkeys(targets)
        }

    def reason(self, case: Case) -> str | None:
        """The reason why the case's backend cannot decode so many rows, or None."""
        adapter, batch = self.adapters[case["targets"]], case["rows"]
        if case["backend"] == "kernels":
            return portable.unsupported_reason(self.model, adapter, batch)
        return BACKENDS[case["backend"]].unsupported_reason(self.model, adapter, batch)

    def backend(self, name: str, targets: str) -> Backend:
        key = name, targets
        if key not in self._backends:
            self._backends[key] = BACKENDS[name](self.model, self.adapters[targets])
        return self._backends[key]


def check(shapes: ModelShapes, cases: Sequence[Case]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Key of each case → errors of its logits and of XLA's, in norms of the exact ones, over the first layers."""
    config = replace(shapes.config(), num_layers=min(CHECKED_LAYERS, shapes.num_layers))
    made = Made(shapes, config, [case["targets"] for case in cases])
    places = {(case["targets"], case["rows"]): None for case in cases}
    backends: dict[tuple[str, str], Backend] = {}
    for name in ("float32", "xla", *{case["backend"]: None for case in cases}):
        for targets in made.adapters:
            adapter = made.adapters[targets]
            if name == "float32":
                backends[name, targets] = Unfused(*in_float32((made.model, adapter)))
            else:
                backends[name, targets] = made.backend(name, targets)
    logits = logits_of_all(backends, places)
    found = {}
    for case in cases:
        place = case["targets"], case["rows"]
        right = logits["float32", *place]
        off, of_xla = (
            float(np.linalg.norm(logits[name, *place] - right) / np.linalg.norm(right))
            for name in (case["backend"], "xla")
        )
        found[key_of(case)] = {"logits_off": off, "logits_off_xla": of_xla, "correct": off <= TOLERANCE * of_xla}
    return found


def logits_of_all(
    backends: dict[tuple[str, str], Backend], places: Iterable[tuple[str, int]]
) -> dict[tuple[str, str, int], np.ndarray]:
    """(name, targets, rows) → logits. The programs are compiled side by side."""
    compiling = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for targets, rows in places:
            for name in [name for name, of in backends if of == targets]:
                backend, token = backends[name, targets], jnp.zeros(rows, jnp.int32)
                step, cache = text_step(backend, rows)
                with jax.default_matmul_precision("highest" if name == "float32" else None):
                    lowered = step.lower(backend.reads, token, token, cache)
                compiling[name, targets, rows] = pool.submit(lowered.compile)
    return {key: logits_of(backends[key[:2]], key[2], step.result()) for key, step in compiling.items()}


@contextmanager
def turn(lock: str, *, alone: bool) -> Iterator[None]:
    """Processes share their turn, or one has it `alone`."""
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def measure(job: dict[str, Any], report: Report) -> None:
    """`job`: model, cases, check, steps, repeats, the size of the array that measures the read bandwidth, and the file whose
    lock keeps models that are compiled and timed apart."""
    runtime.set_up()
    rows, watch = list[Case](), Stopwatch()
    with turn(job["lock"], alone=False):
        made, compiling, errors = prepare(job, rows, watch)
    report({"rows": rows})
    with turn(job["lock"], alone=True):
        read = measure_ceilings(job["elements"], 64, seconds=job["seconds"], repeats=3)["best_read"]
        for case, step in compiling:
            row = case | errors.get(key_of(case), {})
            try:
                row |= _time(made, case, step, job) | {"read_tb_s": read}
                row |= {"bytes_gb": _bytes(POPULAR[job["model"]], case, job["steps"])}
                text = f"{row['ms']:.3f} ± {row['spread_ms']:.3f} ms"
            except Exception as error:
                text = row["error"] = first_line(error)
            rows.append(row)
            print(f"  {case['model']} {case['targets']}:{case['rows']} {case['backend']}: {text}", flush=True)
            report({"rows": rows})


def prepare(
    job: dict[str, Any], rows: list[Case], watch: Stopwatch
) -> tuple[Made, list[tuple[Case, Any]], dict[tuple[Any, ...], dict[str, Any]]]:
    """(the model, its programs by case, errors of logits by key). Cases that cannot be timed are added to `rows`."""
    shapes, cases = POPULAR[job["model"]], job["cases"]
    made = Made(shapes, shapes.config(), [case["targets"] for case in cases])
    print(f"  {job['model']}: model made in {watch.seconds:.0f} s", flush=True)
    reasons = {key_of(case): made.reason(case) for case in cases}
    rows += [case | {"refused": reason} for case in cases if (reason := reasons[key_of(case)])]
    cases = [case for case in cases if reasons[key_of(case)] is None]
    try:
        errors = check(shapes, [case for case in cases if case["rows"] in job["check"]])
    except Exception as error:  # of a kernel: the times of the others are still of use
        print(f"  {job['model']}: the logits cannot be compared: {first_line(error)}", flush=True)
        errors = {}
    print(f"  {job['model']}: logits compared after {watch.seconds:.0f} s", flush=True)
    with ThreadPoolExecutor(THREADS) as pool:  # compiled before any is timed: compilation delays the steps
        compiling = [(case, pool.submit(_lower(made, case).compile)) for case in cases]
    programs = []
    for case, program in compiling:
        try:
            programs.append((case, program.result()))
        except Exception as error:
            rows.append(case | {"error": first_line(error)})
    print(f"  {job['model']}: {len(programs)} programs compiled after {watch.seconds:.0f} s", flush=True)
    return made, programs, errors


def _state(made: Made, case: Case) -> Any:
    return running_state(made.config, made.model.dtype, case["rows"], SLOTS, PROMPT)


def _lower(made: Made, case: Case) -> Any:
    return lower(made.backend(case["backend"], case["targets"]), None, _state(made, case))


def _time(made: Made, case: Case, step: Any, job: dict[str, Any]) -> dict[str, Any]:
    backend = made.backend(case["backend"], case["targets"])
    timing, *_ = time_steps(backend, step, _state(made, case), job["steps"], job["repeats"])
    return {"ms": timing.ms, "spread_ms": timing.spread_ms}


def _bytes(shapes: ModelShapes, case: Case, steps: int) -> float:
    method = "backbone" if case["targets"] == BARE else "adafuse"
    shapes, targets = with_experts(shapes, case["targets"])
    return costs(shapes, method, targets, "unmerged", case["rows"], PROMPT + steps / 2).bytes_gb


def key_of(row: Case) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def is_done(row: Case) -> bool:
    return "ms" in row or "refused" in row


def merged(rows: Iterable[Case]) -> list[Case]:
    """Rows by their key, the last of each, in the order of the models."""
    by_key = {key_of(row): row for row in rows}
    places = [*POPULAR], [*BACKENDS]
    return sorted(by_key.values(), key=lambda r: (places[0].index(r["model"]), r["rows"], places[1].index(r["backend"]),
                                                  r["targets"]))  # fmt: skip


def report_of(record: dict[str, Any]) -> str:
    """The table: a line for a model, its rows, backend and experts, bare and adapted side by side."""
    lines = [f"# The decode step by model: {record['device']}, JAX {record['jax']}", "", f"    {record['command']}", ""]
    lines += ["ms are of a step, which decodes a token of every row; % is the share of the read bandwidth.", ""]
    head = (
        "model",
        "rows",
        "backend",
        "bare, ms",
        "%",
        "experts",
        "all 7, ms",
        "%",
        "over bare",
        "logits off, of XLA's",
    )
    by_key, cells = {key_of(row): row for row in record["rows"]}, []
    for key in by_key:
        place, targets = key[:3], key[3]
        if targets == BARE and any(other[:3] == place and other[3] != BARE for other in by_key):
            continue  # beside each of them
        bare, adapted = by_key.get((*place, BARE), {}), {} if targets == BARE else by_key[key]
        over = experts = ""
        if adapted:
            shapes, _ = with_experts(POPULAR[place[0]], targets)
            experts = f"{shapes.num_experts} of rank {shapes.rank}, top {shapes.top_k}"
        if "ms" in bare and "ms" in adapted:
            over = f"{adapted['ms'] - bare['ms']:+.2f} ms, {100 * (adapted['ms'] / bare['ms'] - 1):+.1f}%"
        off = [row["logits_off"] / row["logits_off_xla"] for row in (bare, adapted) if "logits_off" in row]
        text = number(max(off, default=None), ".2f", "×")
        if any(row.get("correct") is False for row in (bare, adapted)):
            text = f"**{text}: wrong**"
        cells.append([*place, *_cells(bare), experts, *_cells(adapted), over, text])
    return "\n".join([*lines, *table(head, cells)])


def _cells(row: Case) -> tuple[str, str]:
    """(milliseconds or the reason why there are none, share of the read bandwidth)."""
    if "ms" not in row:
        return row.get("refused") or row.get("error") or "", ""
    share = row["bytes_gb"] / row["ms"] / row["read_tb_s"]
    return f"{row['ms']:.3f} ± {row['spread_ms']:.3f}", f"{100 * share:.0f}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in POPULAR if name not in ("tiny", "Qwen3-32B")]
    parser.add_argument("--out", type=Path, required=True, help="directory of shapes.json and shapes.md")
    parser.add_argument("--models", nargs="+", choices=POPULAR, default=usual)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32], help="decoded together")
    parser.add_argument("--experts", nargs="+", default=[], metavar="ExR/k", help="number, rank and top-k")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["megakernel", "kernels"])
    parser.add_argument("--check", nargs="*", type=int, default=[1, 32], help="rows whose logits are compared")
    parser.add_argument("--steps", type=int, default=40, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0, help="nothing is measured after these")
    parser.add_argument("--together", type=int, default=1, help="models in memory at a time")
    arguments = parser.parse_args(argv)
    if min(*arguments.rows, arguments.steps, arguments.repeats, arguments.together) < 1:
        parser.error("--rows, --steps, --repeats and --together must be at least 1")
    for text in arguments.experts:
        found = EXPERTS.fullmatch(text)
        if found is None or not 1 <= int(found[3]) <= int(found[1]) or int(found[2]) < 1:
            parser.error(f"--experts {text}: give number x rank / top-k, such as 16x8/4")
    return arguments


def main(argv: Sequence[str] | None = None, run: Callable[..., Any] = run_job) -> None:
    arguments, watch = parse(argv), Stopwatch()
    path = arguments.out / "shapes.json"
    record = record_of_commit(path) | {"command": command_line(MODULE, argv)}
    is_tiny = arguments.models == ["tiny"]
    common = {
        "check": arguments.check, "steps": arguments.steps, "repeats": arguments.repeats,
        "elements": 2**12 if is_tiny else 2**30, "seconds": 2e-4 if is_tiny else 0.05,
    }  # fmt: skip
    done = {key_of(row) for row in record["rows"] if is_done(row)}
    targets = BARE, *([f"{ADAPTED}:{experts}" for experts in arguments.experts] or [ADAPTED])

    def measure_model(model: str, lock: str) -> tuple[list[Case], dict[str, Any]]:
        """(rows of what is missing, what else the process says)."""
        places = product(arguments.rows, arguments.backends, targets)
        cases = [dict(zip(KEY, (model, *place), strict=True)) for place in places]
        cases = [case for case in cases if key_of(case) not in done]
        left = arguments.seconds - watch.seconds
        if not cases or left < LEAST_SECONDS:
            return [], {}
        job = Job(name=model, module=MODULE, settings={"model": model, "cases": cases, "lock": lock}, rows=cases)
        result, problem = run(job, common, left, sys.executable)
        rows = result.get("rows", [])
        if problem and not problem.startswith("stopped"):
            found = {key_of(row) for row in rows}
            rows += [case | {"error": problem} for case in cases if key_of(case) not in found]
        return rows, result

    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(arguments.together) as pool:
        for model in as_completed([pool.submit(measure_model, model, lock.name) for model in arguments.models]):
            rows, result = model.result()
            record |= {key: result[key] for key in ("device", "jax") if key in result}
            record["rows"] = merged([*record["rows"], *rows])
            if "device" in record and rows:
                write_json(path, record)
                (arguments.out / "shapes.md").write_text(report_of(record) + "\n", encoding="utf-8")
    if "device" in record:
        print(report_of(record), flush=True)


if __name__ == "__main__":
    if "--job" in sys.argv:
        run_as_job(__doc__, measure, facts)
    else:
        main()
