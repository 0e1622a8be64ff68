"""Linears with pre-gated experts against float64: the definition in XLA and the kernel, interpreted and compiled."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from linear_cases import CASES, LARGE_CASES, SCALE, Case, assert_near

import benchmarks.kernels.pregated_linear as benchmark
from adafuse_jax.adapters.low_rank import LoRAExperts
from adafuse_jax.models.hooks import Routing
from pallas_kernels.pregated_linear import (
    Group,
    Mixture,
    Tiles,
    make_mixture,
    pregated_linear,
    pregated_linear_xla,
    tiles_for,
    triton_call,
    unsupported_reason,
)
from pallas_kernels.quantised import QuantLayout, quantise

SMALL = Tiles(tile_m=16, tile_k=32, num_warps=4, num_stages=1)


def by_xla(x, weights, a, b, mixture, layer):
    return {name: pregated_linear_xla(x, w, a.get(name), b.get(name), mixture, layer) for name, w in weights.items()}


def by_kernel(x, weights, a, b, mixture, layer, tiles: Tiles | None = None, **options: Any):
    """One launch; afterwards the group's counter holds the number of programs that shrink, and the others are 0."""
    num_used = (
        jnp.zeros(1, jnp.int32) if mixture is None else (mixture.gates != 0).any(axis=1).sum(dtype=jnp.int32)[None]
    )
    group = Group(
        tiles=tiles or tiles_for(len(x), [w.shape[1] for w in weights.values()], x.shape[1], x.dtype.itemsize),
        out_dtype=x.dtype,
        counter=1,
        counters=2,
    )
    ready = jnp.zeros(2 * next(iter(weights.values()), x).shape[0], jnp.int32)
    at = jnp.asarray(layer, jnp.int32)[None]
    y, ready = pregated_linear(x, weights, a, b, mixture, num_used, at, ready, group=group, **options)
    tile_m, splits = group.tiles.of_a[0], group.tiles.shrink_splits
    num_shrink = splits * sum(len(mixture.experts) * -(-f.shape[2] // tile_m) for f in a.values())
    np.testing.assert_array_equal(ready, np.eye(len(ready), dtype=int)[2 * layer + 1] * num_shrink)
    return y


@pytest.mark.parametrize("case", CASES)
def test_xla(case):
    inputs, layer = CASES[case].draw(), CASES[case].layer
    assert_near(jax.jit(by_xla)(*inputs, jnp.int32(layer)), *inputs, layer)


QUICK = ("q, k, v", "one plain", "gates of zero", "batch", "batch, fp32", "batch shares experts", "ragged", "nothing")


@pytest.mark.parametrize("case", quick.first([*QUICK, *(name for name in CASES if name not in QUICK)], len(QUICK)))
def test_interpreted(case):
    """By small tiles, several of which a linear has."""
    inputs, layer = CASES[case].draw(), CASES[case].layer
    assert_near(by_kernel(*inputs, layer, tiles=SMALL, interpret=True), *inputs, layer)


@pytest.mark.parametrize("case", quick.first([f"random {seed}" for seed in range(6)]))
def test_default_tiles(case):
    inputs, layer = CASES[case].draw(), CASES[case].layer
    assert_near(by_kernel(*inputs, layer, interpret=True), *inputs, layer)


SPLIT = Tiles(tile_m=16, tile_k=32, shrink_m=8, splits=3, shrink_splits=3, num_warps=4, num_stages=1)
SEVERAL = Tiles(tile_m=16, tile_k=64, shrink_m=32, num_warps=4, num_stages=1)


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        ("batch", SPLIT),  # no more steps than splits
        ("batch shares experts", SEVERAL),  # two experts at a time, one of them beyond those in use
        ("batch of nothing", SPLIT),
        ("random 4", SPLIT),
    ],
)
def test_programs_share_columns_and_take_experts_at_once(case, tiles):
    inputs, layer = CASES[case].draw(), CASES[case].layer
    assert len(inputs[0]) > 1
    assert_near(by_kernel(*inputs, layer, tiles=tiles, interpret=True), *inputs, layer)


@pytest.mark.parametrize("in_dim", [24, 64, 200])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_steps_of_one_row(in_dim, num_stages):
    """One step through the columns of W, two, and more, whose first and last have B and t beside them."""
    tiles = Tiles(tile_m=16, tile_k=32, shrink_m=4, shrink_k=64, num_warps=4, num_stages=num_stages)
    case = Case(outs={"q": 40, "k": 24}, in_dim=in_dim)
    inputs = case.draw()
    assert_near(by_kernel(*inputs, case.layer, tiles=tiles, interpret=True), *inputs, case.layer)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("shrink", [(1, 2048), (2, 1024), (8, 512)])
def test_t_is_complete_when_it_is_read(shrink):
    """The same y of many launches in a row, whose programs ask for t before and after it is published."""
    case = Case(outs={"q": 4096}, in_dim=4096, num_experts=8, top_k=2, rank=64, num_layers=1, layer=0)
    inputs = case.draw()
    tiles = replace(tiles_for(1, [4096], 4096, 2), shrink_m=shrink[0], shrink_k=shrink[1])
    found = [by_kernel(*inputs, 0, tiles=tiles)["q"] for _ in range(200)]
    assert_near({"q": found[0]}, *inputs, 0)
    assert all(bool((y == found[0]).all()) for y in found)


def test_splits_change_neither_bias_nor_residual():
    """Shared columns make the same y, which depends on both."""
    case = Case(outs={"o": 40}, in_dim=160, batch=3, dtype="float32")
    x, weights, a, b, mixture = case.draw()
    keys = jax.random.split(jax.random.key(0))
    more = {"biases": {"o": jax.random.normal(keys[0], (2, 40))}, "residual": jax.random.normal(keys[1], (3, 40))}
    whole, parts = (
        by_kernel(x, weights, a, b, mixture, 1, tiles=replace(SMALL, splits=splits), interpret=True, **more)["o"]
        for splits in (1, 2)
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)
    assert abs(parts - by_kernel(x, weights, a, b, mixture, 1, interpret=True)["o"]).max() > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES])
def test_compiled(case):
    inputs, layer = (CASES | LARGE_CASES)[case].draw(), (CASES | LARGE_CASES)[case].layer
    assert_near(by_kernel(*inputs, layer), *inputs, layer)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_waiting_programs_do_not_keep_out_those_that_shrink():
    """Far more programs than a GPU holds at once, most of which wait for the first."""
    case = Case(
        outs={"gate": 20_000, "up": 20_000}, in_dim=256, num_experts=8, top_k=8, rank=256, num_layers=1, layer=0
    )
    inputs = case.draw()
    for _ in range(20):
        y = by_kernel(*inputs, 0, tiles=Tiles(tile_m=1, tile_k=256, num_warps=1, num_stages=1))
    assert_near(y, *inputs, 0)


def test_a_repeated_program_begins_to_count_anew():
    """Its counters are zeros of its own, also where they are one constant element."""
    case = Case(outs={"q": 16}, in_dim=32, num_layers=1, layer=0, rank=8)
    x, weights, a, b, mixture = case.draw()
    group, one = Group(tiles=SMALL, out_dtype=x.dtype), jnp.zeros(1, jnp.int32)
    call = partial(pregated_linear, group=group, interpret=jax.default_backend() != "gpu")
    run = jax.jit(lambda x: call(x, weights, a, b, mixture, one + 2, one, jnp.zeros(1, jnp.int32))[1])
    assert [int(run(x)[0]) for _ in range(3)] == [len(mixture.experts)] * 3


@pytest.mark.parametrize("batch", [1, 4])
def test_same_as_adapter(batch):
    """The experts' module as it decodes, from the router's own output."""
    case = Case(outs={"q": 48}, in_dim=40, batch=batch, num_experts=16, dtype="float32")
    x, weights, a, b, _ = case.draw()
    experts, gates = case.choose(np.random.default_rng(0))
    mixture = make_mixture(experts, gates, SCALE, case.num_experts)
    module = jax.eval_shape(
        lambda: LoRAExperts(1, 48, 40, num_experts=16, rank=case.rank, scale=SCALE, rngs=nnx.Rngs(0))
    )
    module.A.set_value(a["q"][case.layer])
    module.B.set_value(b["q"][case.layer])
    routing = Routing(jnp.asarray(experts)[:, None], jnp.asarray(gates)[:, None], jnp.zeros((batch, 1, 16)))
    wanted = x @ weights["q"][case.layer].T + module(x[:, None], routing)[:, 0]
    y = by_xla(x, weights, a, b, mixture, case.layer)
    np.testing.assert_allclose(y["q"], wanted, rtol=1e-5, atol=1e-5)


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


def test_unsupported_reasons():
    assert unsupported_reason(32, {"q": jnp.zeros((1, 1, 256, 1))}, {}) is None
    assert "there are 33 rows" in str(unsupported_reason(33, {}, {}))
    assert "q has rank 257" in str(unsupported_reason(1, {"q": jnp.zeros((1, 1, 257, 1))}, {}))
    case = Case(outs={"q": 8}, in_dim=8, batch=33)
    with pytest.raises(ValueError, match="cannot run: there are 33 rows"):
        by_kernel(*case.draw(), case.layer)


def test_vmap_is_refused():
    x, weights, a, b, mixture = CASES["q, k, v"].draw()
    with pytest.raises(NotImplementedError, match="not under vmap"):
        jax.vmap(lambda x: by_kernel(x, weights, a, b, mixture, 1, interpret=True))(jnp.stack([x, x]))


def test_every_field_of_tiles_and_group_is_read(monkeypatch):
    """Each changes the launch or its result; `gated`, `eps` and the types are in the steps' tests."""
    launches = []

    def record(kernel, refs, outs, **launch):
        launches.append((launch, str(jax.make_jaxpr(lambda r: triton_call_launch(kernel, r, outs, **launch))(refs))))
        return jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), outs)

    triton_call_launch = triton_call.launch
    monkeypatch.setattr(triton_call, "launch", record)
    x, weights, a, b, mixture = Case(outs={"q": 64}, in_dim=64, batch=2).draw()
    rest = mixture, jnp.ones(1, jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros(4, jnp.int32)
    group = Group(tiles=SMALL, out_dtype=x.dtype)
    names = [f.name for f in fields(SMALL) if f.name != "tile_q"]  # of quantised weights
    changed = [replace(group, tiles=replace(SMALL, **{name: 2 * getattr(SMALL, name) or 8})) for name in names]
    for g in (group, group, *changed, replace(group, counter=1), replace(group, counters=2)):
        pregated_linear.__wrapped__(x, weights, a, b, *rest, group=g)
    assert launches[0] == launches[1]
    assert all(launch != launches[0] for launch in launches[2:])
    x, weights, a, b, mixture = Case(outs={"q": 64}, in_dim=64).draw()
    quantised = {name: quantise(w, QuantLayout(4, 32), x.dtype) for name, w in weights.items()}
    rest = mixture, *rest[1:]
    for tile_q in (32, 64):
        tiles = replace(SMALL, tile_q=tile_q)
        pregated_linear.__wrapped__(x, quantised, a, b, *rest, group=replace(group, tiles=tiles))
    assert launches[-1] != launches[-2]


def invalid(**changes):
    """The arguments of a right call, some of them changed by a function."""
    x, weights, a, b, mixture = replace(CASES["q, k, v"], batch=3).draw()
    arguments = {
        "x": x,
        "weights": weights,
        "a": a,
        "b": b,
        "mixture": mixture,
        "layer": 1,
        "norm": None,
        "tiles": SMALL,
    }
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


def changed(function):
    """Change the argument of q only."""
    return lambda arrays: arrays | {"q": function(arrays["q"])}


INVALID = {
    "no linears": (dict.fromkeys(("weights", "a", "b"), lambda _: {}), "the same linears"),
    "a and b": ({"a": lambda a: {"q": a["q"]}}, r"the same linears.* \['q'\], \['k', 'q', 'v'\]"),
    "no weight": ({"weights": lambda w: {"q": w["q"]}}, "all of them in weights"),
    "x of one row": ({"x": lambda x: x[0]}, r"x is bfloat16\(64,\); it must be \[B, in\]"),
    "integers": ({"x": lambda x: x.astype(jnp.int8)}, "x is int8"),
    "one layer": ({"weights": changed(lambda w: w[0])}, r"q: W is bfloat16\(64, 64\)"),
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
    "splits of a row": (
        {"x": lambda x: x[:1], "tiles": lambda tiles: replace(tiles, shrink_splits=2)},
        "splits are for several rows, plain weights",
    ),
    "norm of rows": ({"norm": lambda _: jnp.ones((2, 64))}, "the norm is for one row, and there are 3"),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid(what):
    changes, message = INVALID[what]
    with pytest.raises(ValueError, match=message):
        by_kernel(**invalid(**changes))


class TestBenchmark:
    """The script at a tiny size."""

    def run(self, **options):
        groups = {"q, k": ({"q": 32, "k": 16}, 48)}
        benchmark.run(groups, num_layers=2, repeats=1, batches=(1, 3), implementations=("xla",), **options)

    def test_lines(self, capsys):
        self.run()
        _, *lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert all("GB/s" in line for line in lines)

    @pytest.mark.parametrize("batch", [1, 8])
    def test_tiles_of_the_sweep(self, batch):
        """The tiles that the decode step takes are among them, and no two are equal."""
        swept = benchmark.swept_tiles(batch)
        assert all(tiles_for(batch, outs, 4096, 2) in swept for outs in ([4096], [4096] * 3))
        assert len(set(swept)) == len(swept)

    def test_bytes(self):
        """Bytes of one layer: W once, and the factors of the experts in use."""
        factors = benchmark.draw({"q": 32}, 48, num_layers=2)
        w, factor = 2 * 32 * 48, 2 * benchmark.RANK * (32 + 48)
        for batch, used in ((1, 2), (2, 4), (8, 8)):
            assert benchmark.moved_bytes(*factors, benchmark.mixture_of(batch)) == w + used * factor

    def test_wrong_results_end_the_run(self, monkeypatch):
        """A single element is off, in the function measured and not in the reference."""

        def wrong(*arguments):
            y = benchmark.by_xla(*arguments)
            return y | {"k": y["k"].at[0, 3].add(1.0)}

        monkeypatch.setitem(benchmark.IMPLEMENTATIONS, "wrong", wrong)
        with pytest.raises(SystemExit, match="4 wrong results"):
            benchmark.run({"k": ({"k": 16}, 48)}, 2, repeats=1, batches=(1, 3), implementations=("wrong", "xla"))
