"""Decoding with a quantised backbone: the layer kernels against the modules, and the strategies that refuse it."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import quick
from flax import nnx
from fused_cases import Case, by_modules, in_fp32, make
from generation import generate, prompt_of
from test_adapter_bank import CONTEXT, Traffic, adapters_of, bank_of, check

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends import portable
from adafuse_jax.inference.backends.portable import portable_step
from adafuse_jax.inference.backends.registry import choose_backend
from adafuse_jax.inference.backends.unfused import LayerKernels
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import head_quantisation_of, quantised
from pallas_kernels.quantised import INT4_G64, INT8, QuantLayout

SMALL = Case(
    num_layers=2, slots=64, position=40, embed_dim=96, hidden_dim=160, heads=(4, 2, 32), vocab_size=250, rank=8
)
CASES = {
    "int8": (replace(SMALL, num_layers=1, targets=("q_proj", "up_proj")), INT8),
    "int4, rows": (replace(SMALL, num_layers=1, targets=LINEARS, batch=3, bias=True), QuantLayout(4, 32)),
}


def dequantised(model: Backbone) -> Backbone:
    """The plain model with its weights, in float32."""
    plain = jax.tree.map(lambda leaf: leaf, model)
    for name in LINEARS:
        linear = getattr(plain.layers, name)
        linear.weight = nnx.Param(linear.weight[...].dequantised("float32"))
    if head_quantisation_of(model) is not None:
        plain.lm_head = nnx.Param(model.head.dequantised("float32"))
    return plain


@pytest.mark.parametrize("name", quick.first(CASES))
def test_layer_kernels(name: str):
    case, layout = CASES[name]
    model, adapter, cache, tokens, positions = in_fp32(make(case))
    model = quantised(model, layout, head=layout == INT8)
    wanted, routing, wanted_cache = jax.jit(by_modules)(model, adapter, cache, tokens, positions)
    step = jax.jit(partial(portable_step, interpret=True))
    logits, experts, found = step(model, adapter, tokens, positions, cache)
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * abs(wanted).max(), rtol=0)
    np.testing.assert_array_equal(experts.experts, routing.experts[:, 0])
    for x, y in ((found.k, wanted_cache.k), (found.v, wanted_cache.v)):
        np.testing.assert_allclose(x, y, atol=1e-5 * abs(np.asarray(y)).max(), rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("layout", [INT8, INT4_G64], ids=lambda layout: layout.name)
def test_layer_kernels_compiled(batch: int, layout: QuantLayout):
    """In bfloat16, with a head of 8 bits, against the dequantised model in float32."""
    case = Case(num_layers=2, embed_dim=256, hidden_dim=512, vocab_size=1000, rank=16, targets=LINEARS, batch=batch)
    model, adapter, cache, tokens, positions = make(case)
    model = quantised(model, layout, head=True)
    plain, *others = (dequantised(in_fp32(model)), in_fp32(adapter), in_fp32(cache), tokens, positions)
    with jax.default_matmul_precision("highest"):
        wanted, *_ = jax.jit(by_modules)(plain, *others)
        logits, *_ = jax.jit(portable_step)(model, adapter, tokens, positions, cache)
    np.testing.assert_allclose(logits, wanted, atol=2e-2 * abs(np.asarray(wanted)).max(), rtol=0)


def test_tokens_are_those_of_the_dequantised_weights(caplog):
    """By the default strategy, which is unmerged, with the reason in the log."""
    model, adapter, *_ = in_fp32(make(replace(SMALL, num_layers=1, targets=("q_proj", "down_proj"))))
    model = quantised(model, INT8, head=True)
    plain = dequantised(model)
    caplog.set_level(logging.DEBUG, "adafuse_jax.inference.backends.registry")
    engine = Engine(model, adapter, eos_ids=())
    assert engine.strategy == "unmerged"
    assert "fused is not used, as it reads a plain head, and this one is int8" in caplog.text
    prompt = prompt_of(model, 9)
    assert generate(engine, prompt, n=8) == generate(Engine(plain, adapter, eos_ids=()), prompt, n=8)


@pytest.mark.slow
def test_rows_with_adapters_of_their_own(models):
    """A bank over the quantised backbone; each row against a full forward pass of the dequantised one."""
    model = quantised(models("llama_gqa"), INT8)
    adapters = {name: adapter for name, adapter in adapters_of(model).items() if name in ("all", "lora", None)}
    slots = Engine(model, bank_of(model, adapters, 12), eos_ids=()).slots(3, context_length=CONTEXT)
    traffic, plain = Traffic(model, slots, [*adapters]), dequantised(model)
    traffic.run(6)
    assert {name for name, _ in traffic.left} == {*adapters}
    for name, row in traffic.left:
        check(plain, adapters[name], row)


def test_strategies_that_need_whole_weights(monkeypatch):
    model, adapter, *_ = make(replace(SMALL, num_layers=1, targets=("q_proj",)))
    model = quantised(model, INT8)
    lora = LoRA(AdapterConfig(adapter="lora", rank=2, targets=("q_proj",)), model.config, rngs=nnx.Rngs(0))
    for strategy, of, reason in (
        ("golden", adapter, "it would merge experts into int8 weights, whose codes cannot hold them"),
        ("switch", adapter, "it would merge experts into int8 weights"),
        ("merged", lora, "it would merge experts into int8 weights"),
    ):
        with pytest.raises(
            UserError, match=f"strategy {strategy} cannot run: {reason}.*; decode unmerged, or with plain weights"
        ):
            choose_backend(strategy, model, of)
    monkeypatch.setattr(portable, "device_unsupported_reason", lambda model: None)
    assert isinstance(choose_backend("unmerged", model, adapter).for_batch(4), LayerKernels)
