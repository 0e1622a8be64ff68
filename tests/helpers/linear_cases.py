"""Inputs of the pre-gated linear, and the bound on what rounding may lose against float64.

|y − exact| ≤ half a unit in the last place of exact, once for y and once for the gated A x inside, and an allowance for
sums in fp32 in every order
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pregated_linear import make_mixture
from pallas_kernels.quantised import QuantArray, QuantLayout, quantise
from pallas_kernels.quantised.reference import dequantise_np

HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Half a unit in the last place of 1, which is all that one rounding may lose."""
SUM_ERROR = 2.0**-23
"""Error of one addition in fp32; tensor cores truncate."""
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
    layout: QuantLayout | None = None

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
        if self.layout is not None:
            weights = {name: quantise(w, self.layout, jnp.bfloat16) for name, w in weights.items()}
        mixture = jax.jit(make_mixture, static_argnums=(2, 3))(experts, gates, SCALE, self.num_experts)
        return x, weights, a, b, mixture if a else None


def in_float64(weight) -> np.ndarray:
    """A matrix, exactly."""
    if not isinstance(weight, QuantArray):
        return np.asarray(weight, np.float64)
    return dequantise_np(np.asarray(weight.codes), np.asarray(weight.scales), weight.layout)


def assert_near(y, x, weights, a, b, mixture, layer):
    assert y.keys() == weights.keys()
    half = HALF_ULP[x.dtype.name]
    for name, w in weights.items():
        x64, w64 = np.asarray(x, np.float64), in_float64(w[layer])
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
    "32 rows of a large linear": Case(
        outs={"o": 4096}, in_dim=4224, batch=32, num_experts=8, rank=160, num_layers=1, layer=0
    ),
    "17 rows of large linears": Case(
        outs={"q": 7169, "k": 1024}, in_dim=4104, batch=17, num_experts=8, num_layers=1, layer=0, dtype="float16"
    ),
    "batch, fp32": Case(outs={"o": 515}, in_dim=1001, batch=9, rank=17, dtype="float32"),
    **{f"random {seed}": random_case(seed, widest=2000) for seed in range(10, 18)},
}
