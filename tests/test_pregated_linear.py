"""Linears with pre-gated experts against float64: here `xla` and `pallas` interpreted, with `-m gpu`
every implementation compiled.

|y − exact| ≤ half a unit in the last place of exact, once for y and once for the gated A x inside, and an allowance for
sums in fp32 in every order
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import benchmarks.kernels.pregated_linear as benchmark
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.models.hooks import Routing
from pallas_kernels.pregated_linear import IMPLEMENTATIONS, Mixture, choose_implementation, make_mixture, op
from pallas_kernels.pregated_linear import pregated_linear as linear
from pallas_kernels.pregated_linear.kernel_sm90 import pregated_linear_sm90, unsupported_reason

HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Half a unit in the last place of 1, which is all that one rounding may lose."""
SUM_ERROR = 2.0**-23
"""Of one addition in fp32; tensor cores truncate."""
SCALE = 2.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs. `choices` [B][k] are (expert, gate), or made for `top_k` random experts of every row.

    Experts that no row uses are NaN, and so are the layers that are not asked for.
    """

    outs: dict[str, int]
    in_dim: int
    batch: int = 1
    num_experts: int = 4
    rank: int = 16
    top_k: int = 2
    plain: tuple[str, ...] = ()
    num_layers: int = 2
    layer: int = 1
    dtype: str = "bfloat16"
    choices: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def choose(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Experts and gates, [B, k] each."""
        if self.choices is not None:
            choices = np.array(self.choices)
            return choices[..., 0].astype(np.int32), choices[..., 1].astype(np.float32)
        experts = np.stack([rng.choice(self.num_experts, self.top_k, replace=False) for _ in range(self.batch)])
        return experts.astype(np.int32), rng.dirichlet(np.ones(self.top_k), self.batch).astype(np.float32)

    def draw(self, seed: int = 0):
        """x, weights, a, b, mixture."""
        rng = np.random.default_rng(seed)
        experts, gates = self.choose(rng)
        unused = [e for e in range(self.num_experts) if not (gates[experts == e] != 0).any()]
        others = [layer for layer in range(self.num_layers) if layer != self.layer]
        x = rng.standard_normal((self.batch, self.in_dim))
        weights, a, b = {}, {}, {}
        for name, out_dim in self.outs.items():
            weights[name] = rng.standard_normal((self.num_layers, out_dim, self.in_dim)) / self.in_dim**0.5
            if name not in self.plain:
                lead = (self.num_layers, self.num_experts)
                a[name] = rng.standard_normal((*lead, self.rank, self.in_dim)) / self.in_dim**0.5
                b[name] = rng.standard_normal((*lead, out_dim, self.rank)) / self.rank**0.5
                a[name][:, unused] = b[name][:, unused] = np.nan
        for stack in (*weights.values(), *a.values(), *b.values()):
            stack[others] = np.nan
        x, weights, a, b = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), (x, weights, a, b))
        mixture = jax.jit(make_mixture, static_argnums=(2, 3))(experts, gates, SCALE, self.num_experts)
        return x, weights, a, b, mixture if a else None


def assert_near(y, x, weights, a, b, mixture, layer):
    assert y.keys() == weights.keys()
    half = HALF_ULP[x.dtype.name]
    for name, w in weights.items():
        x64, w64 = np.asarray(x, np.float64), np.asarray(w[layer], np.float64)
        additions, exact, inexact = x64.shape[1], x64 @ w64.T, 0.0
        size = abs(x64) @ abs(w64).T
        if name in a:
            gates = np.asarray(mixture.gates, np.float64)
            used = (gates != 0).any(axis=1)
            experts = np.asarray(mixture.experts)[used]
            a64, b64 = (np.asarray(factor[name][layer], np.float64)[experts] for factor in (a, b))
            t, t_size = (
                np.einsum("bi,uri,ub->bur", f(x64), f(a64), f(gates[used])) for f in (lambda array: array, abs)
            )
            exact = exact + np.einsum("bur,uor->bo", t, b64)
            inexact = np.einsum("bur,uor->bo", abs(t), abs(b64))
            size = size + np.einsum("bur,uor->bo", t_size, abs(b64))
            additions += len(experts) * a64.shape[1]
        allowed = 1.01 * half * (abs(exact) + inexact) + additions**0.5 * 4 * SUM_ERROR * size
        smallest = float(jnp.finfo(x.dtype).smallest_subnormal)
        assert y[name].shape == exact.shape
        assert y[name].dtype == x.dtype
        error = abs(np.asarray(y[name], np.float64) - exact)
        assert (error <= allowed + smallest).all(), (name, (error / allowed).max())


def random_case(seed: int, widest: int) -> Case:
    """Any shapes that every implementation takes."""
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(1, 17))
    return Case(
        outs={name: int(rng.integers(1, widest)) for name in "qv"},
        in_dim=int(rng.integers(1, widest)),
        batch=int(rng.choice([1, 1, 2, 5, 16, 32])),
        num_experts=num_experts,
        rank=int(rng.integers(8, 129)),
        top_k=int(rng.integers(1, min(4, num_experts) + 1)),
        plain=("v",) if rng.integers(4) == 0 else (),
        num_layers=3,
        layer=int(rng.integers(3)),
        dtype=str(rng.choice(["bfloat16", "float16", "float32"])),
    )


QKV = {"q": 64, "k": 32, "v": 32}
SHARED = (((0, 0.7), (2, 0.3)), ((2, 0.5), (0, 0.5)), ((0, 1.0), (2, 0.0)))
CASES = {
    "one expert": Case(outs={"o": 64}, in_dim=64, num_experts=1, top_k=1, rank=8),
    "q, k, v": Case(outs=QKV, in_dim=64),
    "ragged": Case(outs={"gate": 37, "up": 141, "z": 1}, in_dim=83, rank=24, dtype="float16"),
    "first layer, fp32": Case(outs=QKV, in_dim=48, layer=0, dtype="float32"),
    "16 experts of rank 128": Case(outs={"q": 40}, in_dim=72, num_experts=16, rank=128, top_k=4, dtype="float16"),
    "one plain": Case(outs=QKV, in_dim=64, plain=("k",)),
    "all plain": Case(outs=QKV, in_dim=64, plain=("q", "k", "v"), batch=3),
    "repeated": Case(outs={"q": 40}, in_dim=32, choices=(((1, 0.5), (1, 0.25), (3, 0.25)),)),
    "gates of zero": Case(outs={"q": 40}, in_dim=32, choices=(((1, 0.0), (2, 0.6), (0, 0.0)),)),
    "nothing": Case(outs={"q": 40}, in_dim=32, choices=(((1, 0.0), (2, 0.0)),)),
    "batch": Case(outs=QKV, in_dim=64, batch=5, num_experts=8),
    "batch, fp32": Case(outs={"q": 33}, in_dim=40, batch=3, rank=8, dtype="float32"),
    "batch shares experts": Case(outs={"q": 40}, in_dim=32, batch=3, num_experts=8, choices=SHARED),
    "batch of 32, 16 experts": Case(outs={"q": 50}, in_dim=60, batch=32, num_experts=16, dtype="float16"),
    "batch repeats in a row": Case(
        outs={"q": 40}, in_dim=32, batch=2, num_experts=8, choices=(((1, 0.5), (1, 0.5)), ((7, -0.5), (3, 0.0)))
    ),
    "batch of nothing": Case(outs={"q": 40}, in_dim=32, batch=2, choices=(((1, 0.0), (2, 0.0)),) * 2),
    **{f"random {seed}": random_case(seed, widest=130) for seed in range(6)},
}
LARGE_CASES = {
    "token": Case(outs={"q": 1024, "k": 256, "v": 256}, in_dim=1024, num_experts=8, rank=64),
    "token, gate and up": Case(outs={"gate": 2752, "up": 2752}, in_dim=1024, num_experts=8, rank=128, dtype="float16"),
    "batch of 20, wide": Case(outs={"gate": 1408, "up": 1408}, in_dim=4096, batch=20, num_experts=8, rank=128),
    "batch of 8": Case(outs={"q": 1024, "k": 256, "v": 256}, in_dim=1024, batch=8, num_experts=8, rank=64),
    "batch of 32": Case(outs={"down": 1024}, in_dim=2752, batch=32, num_experts=16, rank=64, top_k=4),
    "batch, fp32": Case(outs={"o": 515}, in_dim=1001, batch=9, rank=17, dtype="float32"),
    **{f"random {seed}": random_case(seed, widest=2000) for seed in range(10, 18)},
}


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
@pytest.mark.parametrize("case", INTERPRETED)
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
        """The scripts tell everything once per process."""
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
    """Of q only."""
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
        """Of one layer: W once, the factors of the experts in use."""
        factors = benchmark.draw({"q": 32}, 48, num_layers=2)
        w, factor = 2 * 32 * 48, 2 * benchmark.RANK * (32 + 48)
        for batch, used in ((1, 2), (2, 4), (8, 8)):
            assert benchmark.moved_bytes(*factors, benchmark.mixture_of(batch)) == w + used * factor

    def test_wrong_results_end_the_run(self, monkeypatch):
        """One element is off, in the function measured and not in the reference."""

        def wrong(x, weights, a, b, mixture, layer, *, implementation):
            y = linear(x, weights, a, b, mixture, layer, implementation="xla")
            return y | {"k": y["k"].at[0, 3].add(1.0)} if implementation == "wrong" else y

        monkeypatch.setattr(benchmark, "pregated_linear", wrong)
        with pytest.raises(SystemExit, match="4 wrong results"):
            benchmark.run({"k": ({"k": 16}, 48)}, 2, repeats=1, batches=(1, 3), implementations=("wrong", "xla"))
