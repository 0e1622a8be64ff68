"""The decode step in five launches a layer, against the model's own modules in fp32: interpreted here, compiled with
`-m gpu`."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from fused_cases import Case, by_modules, in_fp32, make

from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.adapters.lora import LoRA
from adafuse_jax.adapters.stacked import NO_ADAPTER, of_rows
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.adapter_bank import AdapterBank, Bucket
from adafuse_jax.inference.backends import portable
from adafuse_jax.inference.backends.portable import portable_step, shape_unsupported_reason, unsupported_reason
from adafuse_jax.inference.backends.unfused import LayerKernels, Unfused
from adafuse_jax.models.config import LINEARS, RopeConfig
from adafuse_jax.models.kv_cache import KVCache
from pallas_kernels.devices import triton_unsupported_reason

SMALL = Case(
    num_layers=2, slots=64, position=40, embed_dim=96, hidden_dim=160, heads=(4, 2, 32), vocab_size=250, rank=8
)
CASES = {
    "all 7": replace(SMALL, targets=LINEARS),
    "biases, norms of q and k, a window": replace(
        SMALL, num_layers=1, targets=("o_proj", "up_proj"), batch=2, bias=True, qk_norm=True, window=8
    ),
    "first position": replace(SMALL, targets=("k_proj",), position=0),
    "rows": replace(SMALL, targets=LINEARS, batch=3),
    "bare, tied": replace(SMALL, tied=True, bias=True),
}
GEMMA = (
    ("norm", "rms_1p"), ("norm_placement", "both"), ("activation", "gelu_pytorch_tanh"), ("embedding_multiplier", 1.5),
    ("sliding_windows", (8, None)), ("local_rope", RopeConfig(theta=50.0)), ("attention_multiplier", 0.4),
    ("attention_softcap", 2.0), ("logit_softcap", 1.5),
)  # fmt: skip
OLMO = (("norm_placement", "post"), ("qk_norm_full", True))
COHERE = (
    ("norm", "layer"), ("parallel_block", True), ("nope_layers", (1,)), ("residual_multiplier", 0.7),
    ("logit_multiplier", 0.3), ("activation", "relu"),
)  # fmt: skip
FEATURES = {
    "Gemma's": replace(SMALL, targets=("q_proj", "down_proj"), qk_norm=True, features=GEMMA),
    "OLMo's, rows": replace(SMALL, num_layers=1, targets=("o_proj", "gate_proj"), batch=2, qk_norm=True, features=OLMO),
    "Cohere's": replace(SMALL, targets=("k_proj", "up_proj"), features=COHERE),
}
WIDE = Case(num_layers=2, embed_dim=1024, hidden_dim=2816, heads=(8, 2, 128), targets=LINEARS)
ODD = replace(CASES["biases, norms of q and k, a window"], num_layers=2, embed_dim=1000, hidden_dim=1400)
COMPILED = {
    "token": replace(WIDE, num_layers=3, heads=(8, 8, 128), vocab_size=4096),
    "grouped queries, long": replace(
        WIDE, embed_dim=576, hidden_dim=1536, heads=(9, 3, 64), slots=4096, position=3900, targets=("q_proj", "v_proj")
    ),
    "32 rows": replace(WIDE, batch=32, slots=512, position=500, num_experts=8),
    "20 rows, biases": replace(ODD, batch=20, slots=256, position=200),
}


def check(case: Case, dtype: str, tolerance: float, **options: Any) -> None:
    """Logits and what is written into the cache; the rest of the cache is NaN where no token may look."""
    model, adapter, cache, tokens, positions = make(case)
    exact = in_fp32((model, adapter, cache))
    wanted, routing, wanted_cache = jax.jit(by_modules)(*exact, tokens, positions)
    if dtype == "float32":
        model, adapter, cache = exact
    clear = np.ones(case.batch, bool)
    if dtype == "bfloat16" and adapter is not None:  # rounding decides between experts that are nearly equal
        rounded = jax.jit(by_modules)(model, adapter, cache, tokens, positions)[1]
        clear = np.asarray((rounded.experts == routing.experts).all((1, 2)))
        assert clear.mean() > 0.9
    ahead = jnp.arange(case.slots)[None] > positions[:, None]
    if case.window:
        ahead |= jnp.arange(case.slots)[None] <= positions[:, None] - case.window
    ahead = ahead[None, :, :, None, None]
    if case.targets and case.targets[0] == "o_proj":  # layer 0 runs in XLA before the router, and multiplies all by 0
        ahead &= False
    cache = KVCache(*(jnp.where(ahead, jnp.nan, x) for x in (cache.k, cache.v)))
    logits, experts, found = jax.jit(partial(portable_step, **options))(model, adapter, tokens, positions, cache)
    assert np.linalg.norm((logits - wanted)[clear]) < tolerance * np.linalg.norm(wanted[clear])
    for x, y in ((found.k, wanted_cache.k), (found.v, wanted_cache.v)):
        seen, y = (np.asarray(jnp.where(ahead, 0, kv), np.float64)[:, clear] for kv in (x, y))
        np.testing.assert_allclose(seen, y, atol=4 * tolerance * abs(y).max(), rtol=0)
        assert jnp.isnan(jnp.where(ahead, x, jnp.nan)).all()
    if adapter is None:
        assert experts is None
    else:
        np.testing.assert_array_equal(experts.experts[clear], routing.experts[clear, 0])


@pytest.mark.parametrize("case", quick.first(CASES, 2))
def test_interpreted(case):
    check(CASES[case], "float32", 1e-5, interpret=True)


@pytest.mark.parametrize("case", quick.first(FEATURES))
def test_features_of_other_families(case):
    check(FEATURES[case], "float32", 2e-5, interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_lora(batch):
    """One expert for every token, which nothing routes."""
    model, _, cache, tokens, positions = in_fp32(make(replace(SMALL, num_layers=1, batch=batch)))
    settings = AdapterConfig(adapter="lora", targets=("v_proj", "down_proj"), rank=8, alpha=4.0)
    adapter = LoRA(settings, model.config, rngs=nnx.Rngs(0))
    adapter.experts = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape) / 8, adapter.experts)
    wanted, routing, _ = jax.jit(by_modules)(model, adapter, cache, tokens, positions)
    bare, *_ = jax.jit(by_modules)(model, None, cache, tokens, positions)
    step = jax.jit(partial(portable_step, interpret=True))
    logits, experts, _ = step(model, adapter, tokens, positions, cache)
    assert experts is None is routing
    assert np.linalg.norm(wanted - bare) > 1e-2 * np.linalg.norm(wanted)
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * abs(wanted).max(), rtol=0)


def test_bank():
    """Rows with an AdaFuse adapter, a LoRA and none, of one bank; its experts have the model's type."""
    model, adapter, cache, tokens, positions = in_fp32(
        make(replace(SMALL, num_layers=1, batch=3, targets=("q_proj", "up_proj")))
    )
    lora = LoRA(AdapterConfig(adapter="lora", targets=("up_proj",), rank=4), model.config, rngs=nnx.Rngs(0))
    lora.experts = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape) / 8, lora.experts)
    bank = AdapterBank(model, max_experts=8)
    ids = jnp.array([bank.load(name, of).id for name, of in (("mixture", adapter), ("lora", lora))] + [NO_ADAPTER])
    stacked = of_rows(bank.stacked, ids)
    assert shape_unsupported_reason(model, bank.stacked, 3) is None
    wanted, routing, _ = jax.jit(by_modules)(model, stacked, cache, tokens, positions)
    bare, *_ = jax.jit(by_modules)(model, None, cache, tokens, positions)
    moved = np.linalg.norm(wanted - bare, axis=1) / np.linalg.norm(wanted, axis=1)
    assert (moved[:2] > 1e-2).all()
    assert moved[2] < 1e-5
    logits, chosen, _ = jax.jit(partial(portable_step, interpret=True))(model, stacked, tokens, positions, cache)
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * abs(wanted).max(), rtol=0)
    np.testing.assert_array_equal(chosen.experts, routing.of_first_token().experts)


@pytest.mark.slow
def test_interpreted_in_bfloat16():
    check(replace(CASES["rows"], batch=2, num_layers=1), "bfloat16", 2e-2, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", [*CASES, *FEATURES, *COMPILED])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled(case, dtype):
    with jax.default_matmul_precision("highest"):
        check((CASES | FEATURES | COMPILED)[case], dtype, 2e-2 if dtype == "bfloat16" else 1e-5)


class TestChoice:
    """The choice of the step that decodes a batch, and the reason in the log."""

    TINY = replace(SMALL, num_layers=1, targets=("q_proj",))

    @pytest.fixture
    def log(self, monkeypatch, caplog):
        """Messages of the choice, each as often as it is logged."""
        logger = logging.getLogger("adafuse_jax.inference.backends.unfused")
        monkeypatch.setattr(logger, "filters", [])
        caplog.set_level(logging.DEBUG, logger=logger.name)
        return caplog

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        monkeypatch.setattr(portable, "device_unsupported_reason", lambda model: None)

    def test_kernels_read_experts_in_the_models_type(self, on_gpu, log):
        model, adapter, *_ = make(self.TINY)
        exact = in_fp32(adapter)
        backend = Unfused(model, exact)
        chosen = backend.for_batch(4)
        assert isinstance(chosen, LayerKernels)
        assert chosen.for_batch(4) is chosen
        assert backend.for_batch(4) is chosen
        assert "decoding 4 rows unmerged in five kernel launches a layer" in log.text
        _, read = chosen.reads
        for name in ("A", "B"):
            found, wanted = (getattr(of.experts["q_proj"], name)[...] for of in (read, adapter))
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == model.dtype
        assert chosen.adapter is exact
        assert exact.experts["q_proj"].A[...].dtype == jnp.float32

    def test_more_rows_than_a_program_takes(self, on_gpu, log):
        backend = Unfused(*make(self.TINY)[:2])
        assert backend.for_batch(33) is backend
        assert "XLA ops: the kernels cannot, as there are 33 rows" in log.text

    def test_a_bank_that_outgrows_the_kernels(self, on_gpu, log, monkeypatch):
        """Its ranks are known when a step is traced."""
        model, *_ = make(self.TINY)
        bank = AdapterBank(model, max_experts=4)
        chosen = Unfused(model, bank).for_batch(1)
        assert isinstance(chosen, LayerKernels)
        bank.reserve(Bucket(rank=512, targets=("q_proj",)))
        cache, found = KVCache(*jnp.ones((2, 1, 3, 4, 1, 8))), []

        def in_xla(reads, carry, token, position, cache, hold):
            found.append(cache)
            return "xla", None, jax.tree.map(lambda x: 2 * x, cache), carry

        monkeypatch.setattr(Unfused, "step", staticmethod(in_xla))
        for rows in (3, 2):  # all, of which nothing is copied, and the first
            logits, _, new, _ = chosen.step(chosen.reads, None, jnp.zeros(rows, jnp.int32), None, cache, None)
            assert logits == "xla"
            assert found[-1].k.shape[1] == rows
            np.testing.assert_array_equal(new.k[0, :, 0, 0, 0], [2, 2, 2 if rows == 3 else 1])
        assert found[0] is cache
        assert "decoding 2 rows in XLA ops: the kernels cannot, as q_proj has rank 512" in log.text

    def test_what_reads_other_things_keeps_its_step(self, on_gpu, log):
        """A subclass with an adapter of its own, and its rule about rows."""

        class Other(Unfused):
            one_row = True

        model, adapter, *_ = make(self.TINY)
        backend = Other(model, adapter, "other")
        backend._reads = model, SimpleNamespace()
        assert backend.for_batch(1) is backend
        assert "SimpleNamespace has no experts that are known before the first layer" in log.text
        with pytest.raises(UserError, match="there are 2 prompts"):
            backend.for_batch(2)

    def test_shapes(self):
        model, adapter, *_ = make(replace(self.TINY, heads=(4, 2, 48)))
        assert "heads have 48 dimensions" in str(shape_unsupported_reason(model, adapter, 1))
        model, adapter, *_ = make(replace(self.TINY, rank=512))
        assert "q_proj has rank 512" in str(shape_unsupported_reason(model, adapter, 1))

    def test_devices(self):
        model, adapter, *_ = make(self.TINY)
        if jax.default_backend() == "cpu":
            assert "this is cpu" in str(unsupported_reason(model, adapter, 1))
        for capability, fits in (("8.0", True), ("12.0", True), ("7.5", False), ("gfx942", False), ("", False)):
            device = SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)
            reason = triton_unsupported_reason(device)  # type: ignore[arg-type]
            assert (reason is None) == fits

    def test_several_devices_take_xla_ops(self, monkeypatch, log):
        monkeypatch.setattr(portable, "mesh_of", lambda model: "a mesh")
        backend = Unfused(*make(self.TINY)[:2])
        assert backend.for_batch(1) is backend
        assert "the kernels cannot, as they run on one device, and the model is on several" in log.text
