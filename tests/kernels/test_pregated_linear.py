"""Linears with pre-gated experts against float64: here `xla` and `pallas` interpreted, with `-m gpu`
every implementation compiled."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.experimental.pallas import mosaic_gpu as plgpu
from linear_cases import CASES, LARGE_CASES, SCALE, Case, assert_near

import benchmarks.kernels.pregated_linear as benchmark
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.models.hooks import Routing
from pallas_kernels.pregated_linear import IMPLEMENTATIONS, Mixture, choose_implementation, make_mixture, op
from pallas_kernels.pregated_linear import pregated_linear as linear
from pallas_kernels.pregated_linear.kernel_sm90 import pregated_linear_sm90, unsupported_reason


def run(case: Case, implementation: str, traced: bool):
    x, weights, a, b, mixture = case.draw()
    call = partial(linear, implementation=implementation)
    if traced:
        return jax.jit(call)(x, weights, a, b, mixture, jnp.int32(case.layer))
    return jax.jit(call, static_argnums=5)(x, weights, a, b, mixture, case.layer)


@pytest.mark.parametrize("case", CASES)
def test_xla(case):
    assert_near(run(CASES[case], "xla", traced=True), *CASES[case].draw(), CASES[case].layer)


@pytest.mark.parametrize("case", ["q, k, v", "batch"])
def test_constant_layer(case):
    assert_near(run(CASES[case], "xla", traced=False), *CASES[case].draw(), CASES[case].layer)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES])
def test_compiled(case, implementation):
    case = (CASES | LARGE_CASES)[case]
    x, weights, a, *_ = case.draw()
    if implementation == "pallas" and unsupported_reason(x, weights, a) is not None:
        pytest.skip("not for these shapes")
    for traced in (False, True):
        assert_near(run(case, implementation, traced), *case.draw(), case.layer)


INTERPRETED = {
    "q, k, v": Case(outs={"q": 192, "k": 64, "v": 64}, in_dim=192, rank=64),
    "rank 128, one plain": Case(
        outs={"q": 128, "z": 192}, in_dim=128, rank=128, batch=3, num_experts=8, plain=("z",), dtype="float16"
    ),
    "all plain": Case(outs={"q": 64}, in_dim=64, batch=2, plain=("q",)),
    "gates of zero": Case(outs={"q": 64}, in_dim=64, rank=64, choices=(((1, 0.0), (2, 0.6), (0, 0.0)),)),
}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12) or jax.default_backend() != "cpu",
    reason="the interpreter runs on CPUs; before JAX 0.12 it fails unless every warpgroup sees a barrier's last phase",
)
@pytest.mark.parametrize("case", quick.first(INTERPRETED))
def test_interpreted(case):
    x, weights, a, b, mixture = INTERPRETED[case].draw()
    interpret, layer = plgpu.InterpretGPUParams(), INTERPRETED[case].layer
    y = pregated_linear_sm90(x, weights, a, b, mixture, layer, interpret=interpret, num_ctas=3)
    assert_near(y, x, weights, a, b, mixture, layer)


def test_what_pallas_cannot_do_is_said():
    for case, said in (
        (Case(outs={"q": 64}, in_dim=64, dtype="float32"), "x is float32"),
        (Case(outs={"q": 64}, in_dim=64, batch=33), "33 rows"),
        (Case(outs={"q": 40}, in_dim=64), r"q is \[40, 64\]"),
        (Case(outs={"q": 64}, in_dim=64, rank=24), "q has rank 24"),
        (Case(outs={"q": 64}, in_dim=64 * 200, batch=32, plain=("q",)), "12288 at most"),
    ):
        with pytest.raises(ValueError, match=f"cannot run as pallas: .*{said}"):
            linear(*case.draw(), case.layer, implementation="pallas")


@pytest.mark.parametrize("batch", [1, 4])
def test_same_as_adapter(batch):
    """The experts' module as it decodes, from the router's own output."""
    case = Case(outs={"q": 48}, in_dim=40, batch=batch, num_experts=16, dtype="float32")
    x, weights, a, b, _ = case.draw()
    experts, gates = case.choose(np.random.default_rng(0))
    mixture = make_mixture(experts, gates, SCALE, case.num_experts)
    module = jax.eval_shape(lambda: _module(case))
    module.A.set_value(a["q"][case.layer])
    module.B.set_value(b["q"][case.layer])
    routing = Routing(jnp.asarray(experts)[:, None], jnp.asarray(gates)[:, None], jnp.zeros((batch, 1, 16)))
    wanted = x @ weights["q"][case.layer].T + module(x[:, None], routing)[:, 0]
    y = linear(x, weights, a, b, mixture, case.layer, implementation="xla")
    np.testing.assert_allclose(y["q"], wanted, rtol=1e-5, atol=1e-5)


def _module(case: Case) -> LoRAExperts:
    from flax import nnx

    return LoRAExperts(1, 48, 40, num_experts=case.num_experts, rank=case.rank, scale=SCALE, rngs=nnx.Rngs(0))


class TestMixture:
    @pytest.mark.parametrize("seed", range(4))
    def test_gates_are_those_of_the_rows(self, seed):
        rng = np.random.default_rng(seed)
        batch, num_experts, top_k = int(rng.integers(1, 9)), int(rng.integers(4, 17)), int(rng.integers(1, 5))
        case = Case(outs={}, in_dim=1, batch=batch, num_experts=num_experts, top_k=top_k)
        experts, gates = case.choose(rng)
        mixture = make_mixture(experts, gates, SCALE, num_experts)
        dense = np.zeros((num_experts, batch), np.float32)
        for row in range(batch):
            dense[experts[row], row] += SCALE * gates[row]
        found = np.zeros_like(dense)
        np.add.at(found, np.asarray(mixture.experts), np.asarray(mixture.gates))
        np.testing.assert_array_equal(found, dense)
        assert mixture.experts.shape == (min(num_experts, batch * top_k),)
        assert (mixture.experts.dtype, mixture.gates.dtype) == (jnp.int32, jnp.float32)

    def test_used_come_first_and_the_rest_repeat(self):
        mixture = make_mixture(jnp.array([[5, 2], [2, 6]]), jnp.array([[0.5, 0.5], [1.0, 0.0]]), 2.0, 8)
        assert mixture.experts.tolist() == [2, 5, 2, 2]
        assert mixture.gates.tolist() == [[1.0, 2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]

    def test_one_row_keeps_its_order(self):
        mixture = make_mixture(jnp.array([[5, 2]]), jnp.array([[0.75, 0.25]], jnp.bfloat16), 2.0, 8)
        assert mixture.experts.tolist() == [5, 2]
        assert mixture.gates.tolist() == [[1.5], [0.5]]


class TestChoice:
    @pytest.fixture(autouse=True)
    def unfiltered(self, monkeypatch):
        """Remove the filter that logs each message once per process."""
        monkeypatch.setattr(op.log, "filters", [])

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="for machines without a GPU")
    def test_cpu(self, caplog):
        x, weights, a, b, mixture = CASES["q, k, v"].draw()
        with caplog.at_level(logging.INFO, logger="pallas_kernels"):
            y = linear(x, weights, a, b, mixture, 1)
        for line, name, needed in zip(caplog.messages, ("pallas", "triton"), ("Hopper", "Ampere"), strict=True):
            assert name in line
            assert needed in line
            assert jax.devices()[0].device_kind in line
        assert_near(y, x, weights, a, b, mixture, 1)

    def test_ampere_without_triton(self, monkeypatch, caplog):
        monkeypatch.setattr(op, "compute_capability", lambda: "8.0")
        monkeypatch.setattr(op.importlib.util, "find_spec", lambda name: None)
        x, weights, *_ = CASES["q, k, v"].draw()
        with caplog.at_level(logging.INFO, logger="pallas_kernels"):
            assert choose_implementation(x, weights, {}) == "xla"
        assert "jax-triton is not installed" in caplog.text


def invalid(**changes):
    """The arguments of a right call, some of them changed by a function."""
    x, weights, a, b, mixture = replace(CASES["q, k, v"], batch=3).draw()
    arguments = {"x": x, "weights": weights, "a": a, "b": b, "mixture": mixture, "layer": 1, "implementation": "xla"}
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


def changed(function):
    """Change the argument of q only."""
    return lambda arrays: arrays | {"q": function(arrays["q"])}


INVALID = {
    "no targets": (dict.fromkeys(("weights", "a", "b"), lambda _: {}), "the same targets"),
    "a and b": ({"a": lambda a: {"q": a["q"]}}, r"the same targets.* \['q'\], \['k', 'q', 'v'\]"),
    "no weight": ({"weights": lambda w: {"q": w["q"]}}, "all of them in weights"),
    "x of one row": ({"x": lambda x: x[0]}, r"x is bfloat16\(64,\); it must be \[B, in\]"),
    "integers": ({"x": lambda x: x.astype(jnp.int8)}, "x is int8"),
    "one layer": ({"weights": changed(lambda w: w[0])}, r"q: W \(64, 64\) must be \[L, out, in\]"),
    "input of W": (
        {"weights": changed(lambda w: w[..., :32])},
        r"q: W is bfloat16\(2, 64, 32\).* must be .*\(2, 64, 64\)",
    ),
    "type of W": ({"weights": changed(lambda w: w.astype(jnp.float32))}, "q: W is float32.* must be bfloat16"),
    "layers of A": ({"a": changed(lambda x: x[:1])}, r"q: A is bfloat16\(1, 4, 16, 64\).* must be .*\(2, 4, 16, 64\)"),
    "transposed B": ({"b": changed(lambda x: x.mT)}, r"q: B is .* must be .*\(2, 4, 64, 16\)"),
    "type of B": ({"b": changed(lambda x: x.astype(jnp.float16))}, "q: B is float16"),
    "no mixture": ({"mixture": lambda _: None}, r"mixture None must have experts \[U\] and gates \[U, 3\]"),
    "no experts": ({"mixture": lambda _: Mixture(jnp.zeros(0, jnp.int32), jnp.zeros((0, 3)))}, r"mixture \(\(0,\)"),
    "another batch": (
        {"mixture": lambda m: Mixture(m.experts, m.gates[:, :2])},
        r"\(4, 2\)\) must have .* gates \[U, 3\]",
    ),
    "layer": ({"layer": lambda _: 2}, "layer 2 is none of the 2"),
    "layers": ({"layer": lambda _: jnp.arange(2)}, r"layer \(2,\) must be a scalar"),
    "implementation": ({"implementation": lambda _: "cuda"}, "'cuda' is none of pallas, triton, xla"),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid(what):
    changes, message = INVALID[what]
    with pytest.raises(ValueError, match=message):
        linear(**invalid(**changes))


class TestBenchmark:
    """The script at a tiny size."""

    def run(self):
        groups = {"q, k": ({"q": 32, "k": 16}, 48)}
        benchmark.run(groups, num_layers=2, repeats=1, batches=(1, 3), implementations=("xla",))

    def test_lines(self, capsys):
        self.run()
        _, *lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert all("GB/s" in line for line in lines)

    def test_bytes(self):
        """Bytes of one layer: W once, and the factors of the experts in use."""
        factors = benchmark.draw({"q": 32}, 48, num_layers=2)
        w, factor = 2 * 32 * 48, 2 * benchmark.RANK * (32 + 48)
        for batch, used in ((1, 2), (2, 4), (8, 8)):
            assert benchmark.moved_bytes(*factors, benchmark.mixture_of(batch)) == w + used * factor

    def test_wrong_results_end_the_run(self, monkeypatch):
        """A single element is off, in the function measured and not in the reference."""

        def wrong(x, weights, a, b, mixture, layer, *, implementation):
            y = linear(x, weights, a, b, mixture, layer, implementation="xla")
            return y | {"k": y["k"].at[0, 3].add(1.0)} if implementation == "wrong" else y

        monkeypatch.setattr(benchmark, "pregated_linear", wrong)
        with pytest.raises(SystemExit, match="4 wrong results"):
            benchmark.run({"k": ({"k": 16}, 48)}, 2, repeats=1, batches=(1, 3), implementations=("wrong", "xla"))
