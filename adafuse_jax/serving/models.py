"""The models that requests name: the backbone, and each adapter of it with its tokenizer and its ends of a turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from adafuse_jax.adapters.registry import AnyAdapter
from adafuse_jax.checkpoints.adapter_directory import load_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, load_backbone
from adafuse_jax.checkpoints.placement import Stacked
from adafuse_jax.core import runtime
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import stop_tokens
from adafuse_jax.data.tokenizer import load_tokenizer, tokenizer_files
from adafuse_jax.inference.adapter_bank import AdapterBank, Prepared
from adafuse_jax.inference.ahead import compiled_ahead
from adafuse_jax.inference.backends.registry import require_reads_quantised
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.prefill import SCORED_CHUNKS, chunks_up_to, largest_chunk
from adafuse_jax.inference.sampling import Sampling
from adafuse_jax.inference.slots import Slots
from adafuse_jax.models.config import DType
from adafuse_jax.models.quantised import linears_of
from adafuse_jax.parallel.mesh import make_mesh, shard
from adafuse_jax.serving.config import ServeConfig

log = logging.getLogger(__name__)

ALL_SETTINGS: tuple[dict[str, Any], ...] = (
    *(
        {"sampling": Sampling.of(temperature=temperature, presence_penalty=penalty), "logprobs": logprobs}
        for temperature, penalty, logprobs in product((0.0, 1.0), (0.0, 1.0), (None, 0))
    ),
    {"logprobs": 0, "prompt_logprobs": 0},
)
"""Settings of rows that programs depend on: greedy or sampled tokens, with and without penalties and log-probabilities, and
log-probabilities of the prompt."""


@dataclass(slots=True, kw_only=True, eq=False)
class ServedModel:
    """One value of `model`. `adapter` is its name in the bank, None of the backbone; `stop_ids` end a row; `is_loaded` is
    for the thread of the engine."""

    name: str
    adapter: str | None
    tokenizer: Any
    stop_ids: tuple[int, ...]
    created: int
    is_loaded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAdapter:
    """An adapter's files, read and checked, before the bank has it."""

    name: str
    weights: AnyAdapter
    tokenizer: Any
    stop_ids: tuple[int, ...]


class Models:
    """The backbone and its adapters by their names, over one engine.

    Args:
      engine: over a backbone and, if given, the bank.
      base: the backbone's name and tokenizer.
      num_slots, context_length: of the slots.
    """

    def __init__(
        self, engine: Engine, bank: AdapterBank | None, base: ServedModel, *, num_slots: int, context_length: int
    ):
        self.bank, self.base, self.context_length = bank, base, context_length
        self.vocab_size = engine.config.vocab_size
        self.adapters: dict[str, ServedModel] = {}
        self._engine, self._num_slots = engine, num_slots

    def slots(self) -> Slots:
        return self._engine.slots(self._num_slots, context_length=self.context_length)

    def warm_up(self, slots: Slots, settings: Sequence[dict[str, Any]] = ALL_SETTINGS) -> None:
        """Compile what rows of `settings` need, several programs at a time, then run it once: prompts of every length of a
        chunk, alone and, where all slots are prefilled together, as many as these, with the stop ids of each model."""
        if slots.can_compile_ahead:
            with compiled_ahead(partial(self._compile, settings)):
                pass
        for rows in self._warm_up_rows(slots, settings):
            while slots.step() is not None:
                pass
            for slot in rows:
                slots.evict(slot)

    def _compile(self, settings: Sequence[dict[str, Any]]) -> None:
        slots = self.slots()
        for rows in self._warm_up_rows(slots, settings):
            slots.compile()
            for slot in rows:
                slots.evict(slot)

    def _warm_up_rows(self, slots: Slots, settings: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
        """The slots of the rows that one step after the other is to compile, inserted; they are evicted in between."""
        widths = {len(model.stop_ids): model.stop_ids for model in self.all()}  # programs depend on no more of them
        numbers = {1} if self.bank is not None else {1, slots.num_slots}
        prompts: list[tuple[int, int, dict[str, Any]]] = []
        for number in numbers:
            most = largest_chunk(number, beside_rows=False, by_kernels=slots.by_kernels)
            for i, more in enumerate(settings):
                is_scored = "prompt_logprobs" in more
                chunks = chunks_up_to(most, SCORED_CHUNKS if is_scored else None)
                lengths = sorted({max(1, min(size, self.context_length - WARM_UP_TOKENS)) for size in chunks})
                prompts += [(number, length, more) for length in (lengths if is_scored or i == 0 else lengths[:1])]
        is_first = True
        for stop_ids, (number, length, more) in product(widths.values(), prompts):
            # Later prompts would find theirs in the cache, and need no chunks.
            options: Any = {"max_new_tokens": WARM_UP_TOKENS, "stop_ids": stop_ids, "reuse_cache": is_first, **more}
            is_first = False
            yield [slots.insert([0] * length, **options) for _ in range(number)]

    def prepare(self, read: ReadAdapter) -> Prepared:
        """The adapter checked and on the device: the slow part of `add`, for any thread. Raises as `AdapterBank.prepare`."""
        return self._room().prepare(read.name, read.weights)

    def add(self, read: ReadAdapter, *, now: int, prepared: Prepared | None = None) -> None:
        """Put an adapter into the bank, in the thread of the engine. Raises as `AdapterBank.load`."""
        name = read.name
        loaded = self._room().load(name, prepared or read.weights)
        self.adapters[name] = ServedModel(
            name=name, adapter=name, tokenizer=read.tokenizer, stop_ids=read.stop_ids, created=now
        )
        log.info("adapter %s: %s, %d experts, version %d", name, loaded.method, loaded.num_experts, loaded.version)

    def _room(self) -> AdapterBank:
        if self.bank is None:
            raise UserError("the server was started without room for adapters; give --max-experts")
        return self.bank

    def remove(self, name: str) -> None:
        """Take an adapter out of the bank, in the thread of the engine; rows that run go on. Raises `UserError`."""
        if self.bank is None or name not in self.adapters:
            raise UserError(f"no adapter {name} is loaded")
        self.adapters.pop(name).is_loaded = False
        self.bank.unload(name)
        log.info("adapter %s: unloaded", name)

    def find(self, name: str) -> ServedModel | None:
        return self.base if name == self.base.name else self.adapters.get(name)

    def all(self) -> list[ServedModel]:
        return [self.base, *self.adapters.values()]


class AdapterReader:
    """Reads adapters of one backbone from their directories."""

    def __init__(self, checkpoint: HFCheckpoint, dtype: DType, mesh: Mesh | None):
        """Raises `UserError` for what `load_tokenizer` refuses."""
        self._checkpoint, self._dtype, self._mesh = checkpoint, dtype, mesh
        self._directory = Path(checkpoint.directory)
        self._files = tokenizer_files(self._directory)
        self.tokenizer = load_tokenizer(self._directory)
        self.stop_ids = self._stop_ids(self.tokenizer)

    def read(self, name: str, directory: str) -> ReadAdapter:
        """The adapter in a directory; the engine is not touched. Raises `UserError` for what `load_adapter` and
        `load_tokenizer` refuse."""
        checkpoint, path = self._checkpoint, Path(directory).expanduser()
        weights = load_adapter(
            path, checkpoint.config, backbone_identity=checkpoint.identity(), dtype=jnp.dtype(self._dtype),
            quantization=checkpoint.quantisation,
        )  # fmt: skip
        if self._mesh is not None:
            weights = shard(weights, self._mesh)
        tokenizer, stop_ids = self.tokenizer, self.stop_ids
        if tokenizer_files(self._directory, path) != self._files:
            tokenizer = load_tokenizer(self._directory, path)
            stop_ids = self._stop_ids(tokenizer)
        return ReadAdapter(name=name, weights=weights, tokenizer=tokenizer, stop_ids=stop_ids)

    def _stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The model's own end tokens, and those of the template, that the vocabulary has."""
        config = self._checkpoint.config
        both = {*config.eos_token_ids, *stop_tokens(tokenizer)}
        return tuple(sorted(i for i in both if 0 <= i < config.vocab_size))


def load_models(config: ServeConfig, *, now: int) -> tuple[Models, AdapterReader]:
    """Load what the flags name; the backbone's large files are read last. Raises `UserError` for what opening the model, its
    tokenizer or an adapter refuses."""
    checkpoint = HFCheckpoint.open(config.model, config.quantize, config.quantize_head)
    dtype = config.dtype or checkpoint.dtype
    if dtype == "float32":
        runtime.exact_float32()
    context = checkpoint.config.context_length
    if (config.max_model_len or 0) > context:
        raise UserError(
            f"--max-model-len {config.max_model_len} exceeds the {context} positions of {config.model}; lower it"
        )
    layout = linears_of(checkpoint.quantisation)
    if config.strategy is not None:
        require_reads_quantised(config.strategy, layout)
    mesh = None if config.tensor_parallel == 1 else make_mesh(config.tensor_parallel, checkpoint.config, layout)
    reader = AdapterReader(checkpoint, dtype, mesh)
    read = [reader.read(name, directory) for name, directory in config.adapter_directories().items()]
    given = sum(adapter.weights.config.max_experts or 1 for adapter in read)
    if given > (config.max_experts or given):
        raise UserError(
            f"--max-experts {config.max_experts}: the --adapters have {given} experts; give at least so many"
        )
    model = load_backbone(checkpoint, dtype, place=Stacked(mesh))
    room = config.max_experts or max(given, DEFAULT_EXPERTS if config.adapter_folders else 0)
    bank = AdapterBank(model, max_experts=room) if room else None
    name, ids = config.model_name, reader.stop_ids
    models = Models(
        Engine(model, bank, strategy=config.strategy, eos_ids=ids),
        bank,
        ServedModel(name=name, adapter=None, tokenizer=reader.tokenizer, stop_ids=ids, created=now),
        num_slots=config.max_slots,
        context_length=config.max_model_len or context,
    )
    for adapter in read:
        models.add(adapter, now=now)
    return models, reader


WARM_UP_TOKENS = 2
"""The prompt's first token and one of a step."""
DEFAULT_EXPERTS = 64
"""Experts that the bank has room for where adapters may be loaded later and `--max-experts` is not given."""
