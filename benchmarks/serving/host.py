"""A process of the benchmark: random weights, generation without a server, then a server over the same engine.

    python -m benchmarks.serving.host --job JOB.json --result RESULT.json

writes the offline times, then the port; SIGTERM ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched
from typing import Any

import jax.numpy as jnp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from adafuse_jax.core import runtime
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.ahead import compiled_ahead
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.slots import Slots
from adafuse_jax.parallel.mesh import make_mesh, mesh_of
from adafuse_jax.serving.config import ServeConfig
from adafuse_jax.serving.models import ALL_SETTINGS, Models, ReadAdapter, ServedModel
from adafuse_jax.serving.server import Server, bound_socket
from benchmarks.common.jobs import Report, run_as_job
from benchmarks.common.records import facts
from benchmarks.common.timing import Stopwatch
from benchmarks.decode.costs import SIZES
from benchmarks.decode.models import adapter_config, model_config, place_on, random_adapter, random_backbone
from benchmarks.serving.client import percentiles
from benchmarks.serving.requests import Asked

BASE = "base"


def adapter_names(count: int) -> list[str]:
    return [f"adapter-{i}" for i in range(count)]


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each id and no special tokens, so that text costs about what it does with a real tokenizer."""
    words = {f"w{i}": i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def make_models(job: dict[str, Any]) -> tuple[Models, Any, Any]:
    """(models, backbone, the first adapter or None); no token ends a row."""
    shapes, dtype = SIZES[job["size"]], jnp.dtype(job["dtype"])
    backbone, place = model_config(shapes), None
    if job["tensor_parallel"] > 1:
        place = place_on(make_mesh(job["tensor_parallel"], backbone))
    model = random_backbone(backbone, dtype, place=place)
    config = adapter_config(shapes, job["targets"])
    names = adapter_names(job["adapters"])
    bank = AdapterBank(model, max_experts=shapes.num_experts * len(names)) if names else None
    tokenizer = tokenizer_of(shapes.vocab_size)
    base = ServedModel(name=BASE, adapter=None, tokenizer=tokenizer, stop_ids=(), created=0)
    engine = Engine(model, bank, eos_ids=())
    models = Models(engine, bank, base, num_slots=job["slots"], context_length=job["context"])
    first = None
    for number, name in enumerate(names):
        adapter = random_adapter(config, model.config, dtype, seed=number + 3, place=place)
        first = adapter if first is None else first
        models.add(ReadAdapter(name=name, weights=adapter, tokenizer=tokenizer, stop_ids=()), now=0)
    return models, model, first


def in_batches(slots: Slots, requests: Sequence[Asked]) -> dict[str, Any]:
    """Generation of all requests, as many together as there are slots; a batch ends with its longest answer."""
    watch = Stopwatch()
    tokens = 0
    for batch in batched(requests, slots.num_slots):
        for asked in batch:
            adapter = None if asked.model == BASE else asked.model
            slots.insert(asked.prompt, max_new_tokens=asked.new_tokens, adapter=adapter)
        while slots.step() is not None:
            pass
        tokens += sum(len(slots.evict(slot).token_ids) for slot in [*slots.rows])
    return {"tokens": tokens, "seconds": watch.seconds, "tokens_per_s": tokens / watch.seconds}


def alone(model: Any, adapter: Any, requests: Sequence[Asked]) -> dict[str, float]:
    """Milliseconds between tokens of `decode.py`: one prompt at a time, without the bank."""
    engine = Engine(model, adapter, eos_ids=())
    times: list[float] = []

    def trace() -> None:
        for asked in requests:
            slots = engine.slots(1)
            slots.insert(asked.prompt, max_new_tokens=asked.new_tokens)
            slots.compile()

    with compiled_ahead(trace if mesh_of(model) is None else None):
        pass
    for asked in requests:
        steps = [step.seconds for step in engine.generate([asked.prompt], max_new_tokens=asked.new_tokens)]
        times += [1e3 * seconds for seconds in steps[1:]]
    return percentiles(times)


def measure(job: dict[str, Any], report: Report) -> None:
    runtime.set_up()
    if job["dtype"] == "float32":
        runtime.exact_float32()
    watch = Stopwatch()
    models, model, adapter = make_models(job)
    found: dict[str, Any] = {"seconds": {"model": watch.seconds}}
    slots = models.slots()
    models.warm_up(slots, ALL_SETTINGS[:1])  # greedy
    found["seconds"]["warm_up"] = watch.seconds
    found["offline"] = in_batches(slots, [Asked(**table) for table in job["requests"]])
    slots.close()
    del slots
    found["alone"] = alone(model, adapter, [Asked(**table) for table in job["alone"]])
    found["seconds"]["offline"] = watch.seconds
    report(found)
    settings: dict[str, Any] = {"max_slots": job["slots"], "max_model_len": job["context"], "max_queue": 10**6}
    config = ServeConfig(model=BASE, warm_up=False, **settings)
    with bound_socket("127.0.0.1", 0) as listener:
        server = Server(config, models, None, listener, None)
        report(found | {"port": listener.getsockname()[1]})
        server.run(sockets=[listener])


if __name__ == "__main__":
    run_as_job(__doc__, measure, facts)
