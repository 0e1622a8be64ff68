"""A bank of adapters: mixtures of them in one step against each row alone, loaded and unloaded while rows run."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation import by_full_forward, prompt_of
from random_models import POSITIONS, random_adapter, random_method

from adafuse_jax import UserError
from adafuse_jax.inference.adapter_bank import AdapterBank
from adafuse_jax.inference.engine import Engine
from adafuse_jax.inference.rows import Row
from adafuse_jax.inference.slots import Slots

CONTEXT = 100


def adapters_of(model) -> dict[str | None, Any]:
    """AdaFuse with routers at three positions, ranks and top-k of their own; a LoRA; none."""
    config = model.config
    return {
        "all": random_adapter(config, 0),
        "after attention": random_adapter(
            config, 1, targets=POSITIONS["after_attention"], num_experts=3, rank=4, top_k=1
        ),
        "ffn": random_adapter(config, 2, targets=POSITIONS["ffn"], num_experts=2, rank=2, renormalize=False),
        "lora": random_method("lora", config, 3, targets=("q_proj", "down_proj")),
        None: None,
    }


def bank_of(model, adapters: dict[str | None, Any], max_experts: int = 12) -> AdapterBank:
    bank = AdapterBank(model, max_experts=max_experts)
    for name, adapter in adapters.items():
        if name is not None:
            bank.load(name, adapter)
    return bank


def check(model, adapter, row: Row) -> None:
    """The row's tokens, experts and gates are those of one full forward pass with its adapter."""
    assert by_full_forward(model, adapter, row.prompt, row.token_ids) == row.token_ids
    if row.adapter is None or row.adapter.method == "lora" or len(row.token_ids) < 2:
        return
    tokens = (
        jnp.zeros((1, 128), jnp.int32)
        .at[0, : len(row.prompt) + len(row.token_ids)]
        .set(jnp.array([*row.prompt, *row.token_ids]))
    )
    routing = model(tokens, adapter=adapter, unroll=True).routing
    read = slice(len(row.prompt), len(row.prompt) + len(row.experts))
    np.testing.assert_array_equal(row.experts, routing.experts[0, read])
    np.testing.assert_allclose(row.gates, routing.gates[0, read], atol=1e-5)


class Traffic:
    """Rows of random adapters and lengths that join and leave at random steps; those that have left, with the name of their
    adapter."""

    def __init__(self, model, slots: Slots, names: list[str | None], seed: int = 0):
        self.model, self.slots, self.names = model, slots, names
        self.rng, self.left, self.joined = np.random.default_rng(seed), list[tuple[str | None, Row]](), 0

    def join(self, name: str | None) -> int:
        prompt = prompt_of(self.model, int(self.rng.integers(1, 17)), seed=self.joined)
        self.joined += 1
        return self.slots.insert(prompt, max_new_tokens=int(self.rng.integers(3, 9)), adapter=name)

    def run(self, rows: int) -> None:
        """Until so many rows more have joined, and all have left."""
        until = self.joined + rows
        while self.slots.rows or self.joined < until:
            while self.joined < until and self.slots.free and self.rng.random() < 0.5:
                self.join(self.names[self.joined % len(self.names)])
            self.step()

    def step(self) -> None:
        self.slots.step()
        for slot, row in self.slots.rows.items():
            if row.finish_reason is not None or self.rng.random() < 0.02:
                self.left.append((row.adapter and row.adapter.name, self.slots.evict(slot)))


@pytest.fixture
def model(models):
    return models("llama_gqa")


class TestMixtures:
    def test_rows_decode_what_they_would_alone_and_loading_compiles_nothing(self, model, caplog):
        adapters = adapters_of(model)
        bank = bank_of(model, adapters)
        slots = Engine(model, bank, eos_ids=()).slots(3, context_length=CONTEXT)
        traffic = Traffic(model, slots, [*adapters])
        traffic.run(len(adapters))  # compile
        traffic.join("ffn")
        traffic.step()
        adapters["new"] = random_adapter(model.config, 7, targets=("k_proj",), num_experts=2, rank=1, top_k=1)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            bank.unload("ffn")
            with pytest.raises(
                UserError, match="no adapter 'ffn' is loaded; there are 'after attention', 'all', 'lora'"
            ):
                traffic.join("ffn")
            assert bank.free_experts == 2
            bank.load("new", adapters["new"])
            traffic.names = [name for name in adapters if name != "ffn"]
            traffic.run(12)
            assert bank.free_experts == 2
            assert not [r.message for r in caplog.records if "Compiling" in r.message]
        assert {name for name, _ in traffic.left} == {*adapters}
        for name, row in traffic.left:
            check(model, adapters[name], row)
        assert any(len(row.token_ids) < row.budget for _, row in traffic.left)
