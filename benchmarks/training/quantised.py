"""Training on a quantised backbone: tokens/s and peak memory beside bfloat16, each row in a process of its own.

    python -m benchmarks.training.quantised --quantize none int8 int4 --method adafuse --batch 4 --length 2048
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.05 python -m benchmarks.training.quantised --quantize int4 --method lora --rank 16 \\
        --batch 1 --length 512      # under a limit of the allocator

Shapes of Llama-2-7B by default, all 7 linears adapted, random weights and tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adafuse_jax.models.quantised import LAYOUTS
from benchmarks.common.jobs import Job, run_job
from benchmarks.training.shapes import SHAPES


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", nargs="+", choices=("none", *LAYOUTS), default=["none", "int8", "int4"])
    parser.add_argument("--size", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--method", choices=("adafuse", "lora"), default="adafuse")
    parser.add_argument("--rank", type=int, help="default: that of the shapes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--steps", type=int, default=5, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    common = {
        "size": arguments.size, "method": arguments.method, "targets": "all7", "batch": arguments.batch,
        "length": arguments.length, "remat": arguments.remat, "unroll": False, "segments": 1, "steps": arguments.steps,
        "repeats": arguments.repeats, "profile": False, "rank": arguments.rank,
    }  # fmt: skip
    plain = None
    for name in arguments.quantize:
        job = Job(name=name, module="benchmarks.training.rows", settings={"quantize": None if name == "none" else name})
        found, problem = run_job(job, common, 600, sys.executable)
        if "ms" not in found:
            print(f"{name:8} {problem or 'no result'}", flush=True)
            continue
        plain = found["tokens_per_second"] if name == "none" else plain
        over = "" if plain is None else f", {found['tokens_per_second'] / plain:.3f} of bfloat16's"
        speed = f"{found['tokens_per_second']:,.0f} tokens/s{over}, {found['ms']:.0f} ± {found['spread_ms']:.0f} ms"
        print(f"{name:8} {speed}, peak {found['peak_gib']} GiB, first loss {found['losses'][0]:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
