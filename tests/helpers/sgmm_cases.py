"""Inputs of SGMM, and its result in float64 with the bound on what rounding may lose.

|out − exact| ≤ half a unit in the last place of exact + (R + J) · 2⁻²³ · (|base| + Σ_j |c_j| |B| |A|)
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sgmm import Terms, golden_terms, switch_terms

HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
"""Half a unit in the last place of 1, which is all that one rounding may lose."""
SUM_ERROR = 2.0**-23
"""Error of one addition in fp32; tensor cores truncate."""
SCALE = 2.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs. `terms` are given as (expert, coefficient), or made for `top_k` random experts of a token.

    Experts of coefficient 0 are NaN, and so are weights that a pristine copy (`golden`) replaces.
    """

    shapes: dict[str, tuple[int, int]]
    num_layers: int = 2
    num_experts: int = 4
    rank: int = 16
    top_k: int = 2
    golden: bool = True
    dtype: str = "bfloat16"
    terms: tuple[tuple[int, float], ...] | None = None
    pallas: bool = True

    def draw(self, seed: int = 0):
        """weights, a, b, terms, pristine."""
        rng = np.random.default_rng(seed)
        terms = self.terms_of(rng)
        weights, a, b, pristine = {}, {}, {}, {}
        lead = self.num_layers, self.num_experts
        unused = np.setdiff1d(
            np.arange(self.num_experts), np.asarray(terms.experts)[np.asarray(terms.coefficients) != 0]
        )
        for name, (out_dim, in_dim) in self.shapes.items():
            w = rng.standard_normal((self.num_layers, out_dim, in_dim))
            a[name] = rng.standard_normal((*lead, self.rank, in_dim)) / self.rank**0.5
            b[name] = rng.standard_normal((*lead, out_dim, self.rank))
            a[name][:, unused] = b[name][:, unused] = np.nan
            weights[name], pristine[name] = (np.full_like(w, np.nan), w) if self.golden else (w, w)
        weights, a, b, pristine = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), (weights, a, b, pristine))
        return weights, a, b, terms, pristine if self.golden else None

    def terms_of(self, rng: np.random.Generator) -> Terms:
        if self.terms is not None:
            experts, coefficients = zip(*self.terms, strict=True)
            return Terms(jnp.asarray(experts, jnp.int32), jnp.asarray(coefficients, jnp.float32))
        previous, current = (random_gates(rng, self.num_experts, self.top_k) for _ in range(2))
        return golden_terms(*current, SCALE) if self.golden else switch_terms(previous, current, SCALE)


def random_gates(rng: np.random.Generator, num_experts: int, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The (experts, gates) of a token."""
    experts = rng.choice(num_experts, top_k, replace=False)
    return jnp.asarray(experts, jnp.int32), jnp.asarray(rng.dirichlet(np.ones(top_k)), jnp.float32)


def random_case(seed: int, widest: int) -> Case:
    """Any shapes that every implementation takes."""
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(4, 17))
    return Case(
        shapes={n: (8 * int(rng.integers(1, widest // 8)), 16 * int(rng.integers(1, widest // 16))) for n in "qv"},
        num_layers=int(rng.integers(1, 4)),
        num_experts=num_experts,
        rank=int(rng.integers(8, 65)),
        top_k=int(rng.integers(1, 5)),
        golden=bool(rng.integers(2)),
        dtype=str(rng.choice(["bfloat16", "float16"])),
    )


GQA = {"q": (128, 64), "k": (64, 64)}
CASES = {
    "one expert, one tile": Case(shapes={"q": (128, 64)}, num_layers=1, num_experts=1, rank=8, top_k=1),
    "switch, fewer k than q": Case(shapes=GQA, golden=False),
    "ragged tiles": Case(shapes={"q": (136, 80), "down": (40, 144)}, rank=24, dtype="float16"),
    "16 experts of rank 128": Case(shapes={"q": (64, 64)}, num_experts=16, rank=128, top_k=4),
    "switch of 4": Case(shapes={"up": (72, 80)}, num_experts=16, rank=64, top_k=4, golden=False, dtype="float16"),
    "repeated experts": Case(shapes=GQA, golden=False, terms=((1, 0.5), (3, -0.3), (1, 0.25))),
    "zeros between": Case(shapes=GQA, terms=((0, 0.0), (2, 0.7), (0, 0.0), (1, -0.3), (3, 0.0))),
    "far apart": Case(shapes=GQA, golden=False, terms=((2, 1e-12), (0, -3e4), (1, 1e-30), (3, 0.5), (0, 1e-44))),
    "nothing to add, pristine": Case(shapes=GQA, terms=((0, 0.0), (1, 0.0))),
    "nothing to add, in place": Case(shapes=GQA, golden=False, terms=((0, 0.0),)),
    "fp32": Case(shapes=GQA, dtype="float32", pallas=False),
    "fp32 switch": Case(shapes={"q": (24, 40), "v": (8, 40)}, rank=8, golden=False, dtype="float32", pallas=False),
    "odd sizes": Case(shapes={"q": (37, 51), "v": (1, 7)}, rank=9, pallas=False),
    "rows no multiple of 8": Case(shapes={"q": (36, 64)}, golden=False, pallas=False),
    **{f"random {seed}": random_case(seed, widest=160) for seed in range(3)},
}
LARGE_GQA = {"q": (2048, 2048), "k": (512, 2048)}
LARGE_CASES = {
    "golden": Case(shapes=LARGE_GQA, num_experts=8, rank=64),
    "switch": Case(shapes=LARGE_GQA, num_layers=4, num_experts=8, rank=64, golden=False),
    "rank 8": Case(shapes=LARGE_GQA, rank=8, golden=False),
    "rank 128, 16 experts": Case(shapes=LARGE_GQA, num_experts=16, rank=128, top_k=4),
    "rank 128, switch of 4": Case(shapes=LARGE_GQA, num_experts=16, rank=128, top_k=4, golden=False, dtype="float16"),
    "rank 40, ragged": Case(shapes={"q": (1000, 1040), "down": (2040, 2000)}, rank=40, top_k=3, dtype="float16"),
    "three of one": Case(shapes=LARGE_GQA, num_layers=3, rank=32, terms=((3, 0.5), (1, 0.2), (3, 0.1), (3, -1.0))),
    "zeros": Case(shapes=LARGE_GQA, rank=32, golden=False, terms=((0, 0.0), (2, 0.7), (0, 0.0), (1, -0.3))),
    "far apart": Case(shapes=LARGE_GQA, golden=False, terms=((2, 1e-12), (0, -3e4), (1, 1e-30), (3, 0.5))),
    "nothing": Case(shapes=LARGE_GQA, terms=((0, 0.0), (1, 0.0))),
    "fp32": Case(shapes={"q": (512, 512), "k": (136, 512)}, rank=64, dtype="float32", pallas=False),
    "fp32 switch": Case(shapes={"q": (500, 340)}, golden=False, dtype="float32", pallas=False),
    "odd sizes": Case(shapes={"q": (515, 1001), "v": (33, 1001)}, rank=17, pallas=False),
    **{f"random {seed}": random_case(seed, widest=2048) for seed in range(10, 14)},
}


def exact_merge(base, a, b, terms):
    """name → (float64 result, Σ of the absolute values of what it sums)."""
    found = {}
    pairs = [(int(e), np.float64(c)) for e, c in zip(terms.experts, terms.coefficients, strict=True) if c != 0]
    for name in base:
        total = np.asarray(base[name], np.float64)
        size = abs(total)
        a64, b64 = ({e: np.asarray(x[name][:, e], np.float64) for e, _ in pairs} for x in (a, b))
        for layer in range(len(total)):
            for e, c in pairs:
                total[layer] += c * (b64[e][layer] @ a64[e][layer])
                size[layer] += abs(c) * (abs(b64[e][layer]) @ abs(a64[e][layer]))
        found[name] = total, size
    return found


def assert_near(found, exact, additions: int, roundings: int = 1) -> None:
    """Assert errors within the bound at the top of this file; `roundings` such merges follow one another."""
    for name, (total, size) in exact.items():
        dtype = found[name].dtype
        smallest = float(jnp.finfo(dtype).tiny)
        half_ulp = HALF_ULP[dtype.name] * 2.0 ** np.floor(np.log2(np.maximum(abs(total), smallest)))
        error, bound = abs(np.asarray(found[name], np.float64) - total), half_ulp + additions * SUM_ERROR * size
        assert (error <= roundings * bound).all(), f"{name}: error {np.nanmax(error / bound):.3g} times the bound"
