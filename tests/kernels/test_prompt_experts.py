"""The experts of a prompt's tokens against float64, interpreted and compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prompt_experts import expand, expand_gated, expand_into, pair_tokens, shrink, unsupported_reason
from pallas_kernels.prompt_experts.pairs import PAIR_TILE, TOKEN_TILE

LAYER, NUM_LAYERS, SCALE = 1, 2, 2.0


def draw(tokens: int, num_experts: int, top_k: int, rank: int, widths: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Two linears of one input. Of every seven tokens one has gates of 0; the other layer is NaN."""
    rng, (into, out) = np.random.default_rng(0), widths
    chosen = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :top_k]
    gates = rng.random((tokens, top_k))
    gates[::7] = 0
    x, y = (rng.standard_normal((tokens, n)) for n in (into, out))
    a = rng.standard_normal((2, NUM_LAYERS, num_experts, rank, into)) * into**-0.5
    b = rng.standard_normal((2, NUM_LAYERS, num_experts, out, rank)) * rank**-0.5
    a[:, 1 - LAYER] = b[:, 1 - LAYER] = np.nan
    found = {name: jnp.asarray(value, dtype) for name, value in {"x": x, "y": y, "a": a, "b": b}.items()}
    return found | {"chosen": jnp.asarray(chosen, jnp.int32), "gates": jnp.asarray(gates, jnp.float32)}


def exact(given: dict[str, Any], linear: int) -> np.ndarray:
    x, y, a, b, gates = (np.asarray(given[n], np.float64) for n in ("x", "y", "a", "b", "gates"))
    for t, (experts, of_token) in enumerate(zip(np.asarray(given["chosen"]), gates, strict=True)):
        for e, gate in zip(experts, of_token, strict=True):
            y[t] += SCALE * gate * b[linear, LAYER, e] @ (a[linear, LAYER, e] @ x[t])
    return y


def check(shape: tuple, dtype: str, *, interpret: bool) -> None:
    given = draw(*shape, dtype)

    @jax.jit
    def by_kernels(x, y, a, b, chosen, gates):
        pairs, layer = pair_tokens(chosen, gates, shape[1], SCALE), jnp.array([LAYER])
        h = shrink(x, [*a], layer, pairs, interpret=interpret)
        into = [expand_into(y, h, b[i], layer, pairs, linear=i, interpret=interpret) for i in range(2)]
        alone = [y + expand(h, b[i], layer, pairs, linear=i, interpret=interpret) for i in range(2)]
        return *into, *alone, expand_gated(y, y, h, [*b], layer, pairs, interpret=interpret)

    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    gate, up = (exact(given, linear) for linear in range(2))
    product = gate / (1 + np.exp(-gate)) * up
    wanted_by_name = {"gate": gate, "up": up, "gate alone": gate, "up alone": up, "gated": product}
    for (name, wanted), found in zip(wanted_by_name.items(), by_kernels(**given), strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < tolerance, name


CASES = {
    "few sets": (192, 3, 2, 16, (64, 128)),
    "one expert": (64, 4, 1, 16, (128, 64)),
    "many": (128, 8, 4, 32, (64, 64)),
    "uneven splits": (64, 3, 2, 16, (704, 64)),
}
LARGE = {
    "7B": (2048, 8, 2, 64, (4096, 4096)),
    "gate, up": (2048, 8, 2, 64, (4096, 11008)),
    "down": (512, 8, 2, 64, (11008, 4096)),
    "many": (1024, 64, 2, 16, (576, 1536)),
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case):
    check(CASES[case], "float32", interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", LARGE)
def test_compiled(case):
    check(LARGE[case], "bfloat16", interpret=False)


def test_every_pair_with_a_gate_has_a_place():
    given = draw(192, 5, 3, 16, (64, 64), "float32")
    pairs = jax.jit(pair_tokens, static_argnums=(2, 3))(given["chosen"], given["gates"], 5, SCALE)
    found = [
        (int(token), int(pairs.expert[place // PAIR_TILE])) for place, token in enumerate(pairs.token) if token < 192
    ]
    numbers = zip(np.asarray(given["chosen"]), np.asarray(given["gates"]), strict=True)
    chosen = [{int(e) for e, gate in zip(*token, strict=True) if gate} for token in numbers]
    assert sorted(found) == sorted((t, e) for t in range(192) for e in chosen[t])
    for tile, (order, used) in enumerate(zip(np.asarray(pairs.order).reshape(-1, TOKEN_TILE), pairs.used, strict=True)):
        for i in range(int(pairs.count[tile])):
            for at, token in enumerate(order):
                place = int(pairs.place[tile, i, at])
                assert (place < len(pairs.token)) == (int(used[i]) in chosen[token])
                assert place == len(pairs.token) or pairs.token[place] == token


def test_unsupported_reasons():
    assert unsupported_reason(64, [4096], jnp.dtype("bfloat16")) is None
    assert "float32" in str(unsupported_reason(64, [4096], jnp.dtype("float32")))
    assert "rank 48" in str(unsupported_reason(48, [4096], jnp.dtype("float16")))
    assert "a width of 100" in str(unsupported_reason(64, [4096, 100], jnp.dtype("float16")))
