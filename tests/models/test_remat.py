"""Derivatives of our own, and policies of rematerialisation: equal gradients, and what each computes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from quick import first
from random_models import random_adapter, tokens_of

from adafuse_jax.adapters.low_rank import low_rank_product
from adafuse_jax.models.decoder import unstack
from adafuse_jax.models.layers import logit_product
from adafuse_jax.models.remat import KEPT, rematerialized


def loss_of(model, tokens, adapter, remat: str, unroll: bool):
    out = model.run(tokens, adapter=adapter, remat=remat, unroll=unroll)
    return jnp.sum(jnp.sin(out.hidden))


@pytest.mark.parametrize("unroll", first([False, True]))
def test_gradients_of_every_policy(models, unroll: bool):
    model = models("qwen3")
    adapter, tokens = random_adapter(model.config, targets=("q_proj", "down_proj")), tokens_of(model)
    gradients = [
        jax.jit(jax.grad(partial(loss_of, model, tokens, remat=remat, unroll=unroll)))(adapter)
        for remat in ("none", *KEPT)
    ]
    for found in gradients[1:]:
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max()))


def operand_shapes(program: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of the second operands of all products of a program, those of its loops and calls included."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.invars[1].aval.shape
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(part, "eqns"):
                yield from operand_shapes(part)


def test_products_computed_again(models):
    """Numbers of products with a weight of q, gate or up, which have one shape, and of k or v: each is computed once, its
    derivative once, and a policy adds those that it does not keep."""
    model = models("qwen3")
    config = model.config
    adapter, tokens = random_adapter(config, targets=("q_proj",)), tokens_of(model)

    def products(remat: str) -> tuple[int, int]:
        loss = partial(loss_of, model, tokens, remat=remat, unroll=False)
        counts = Counter(operand_shapes(jax.make_jaxpr(jax.grad(loss))(adapter).jaxpr))
        return counts[config.linear_shape("gate_proj")], counts[config.linear_shape("k_proj")]

    assert config.linear_shape("q_proj") == config.linear_shape("gate_proj") != config.linear_shape("k_proj")
    assert products("none") == (6, 4)
    assert products("products") == (6, 4)
    assert products("attention") == (6 + 2, 4)
    assert products("full") == (6 + 3, 4 + 2)


def test_an_unknown_policy():
    with pytest.raises(ValueError, match=r"policy='some' must be none or one of products, attention, full"):
        rematerialized(lambda x: x, "some", in_scan=True)


def check_gradients(ours, plain, arguments, tolerance: float):
    weight = np.random.default_rng(0).normal(size=plain(*arguments).shape)
    np.testing.assert_allclose(ours(*arguments), plain(*arguments), rtol=tolerance, atol=tolerance)
    found, wanted = (
        jax.grad(lambda *x, f=f: jnp.sum(f(*x) * weight), argnums=tuple(range(len(arguments))))(*arguments)
        for f in (ours, plain)
    )
    for leaf, expected in zip(found, wanted, strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_allclose(leaf, expected, rtol=tolerance, atol=tolerance)


def draws(*shapes: tuple[int, ...], dtype=np.float64) -> list:
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_low_rank_product_in_float64():
    with jax.enable_x64(True):
        x, a, b, gates = draws((2, 5, 7), (4, 3, 7), (4, 6, 3), (2, 5, 4))
        chosen = gates > 0.2  # the others are 0, as of experts that the router did not choose

        def plain(x, a, b, gates):
            return jnp.einsum("bti,eri,eor,bte->bto", x, a, b, jnp.where(chosen, gates, 0))

        def ours(x, a, b, gates):
            return low_rank_product(x, a, b, jnp.where(chosen, gates, 0))

        check_gradients(ours, plain, (x, a, b, gates), 1e-12)


def test_low_rank_product_in_bfloat16_has_gradients_in_float32():
    x, gates = draws((2, 5, 64), (2, 5, 4), dtype=jnp.float32)
    a, b, weight = draws((4, 8, 64), (4, 32, 8), (2, 5, 32), dtype=jnp.float32)
    gates = jax.nn.softmax(gates)

    def loss(a, b, dtype):
        return jnp.sum(weight * low_rank_product(x.astype(dtype), a, b, gates).astype(jnp.float32))

    found, wanted = (jax.grad(loss, (0, 1))(a, b, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    for leaf, exact in zip(found, wanted, strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - exact) < 0.03 * np.linalg.norm(exact)
        assert np.any(np.asarray(leaf) != np.asarray(leaf.astype(jnp.bfloat16), np.float32))


def test_logit_product():
    hidden, head = draws((2, 5, 8), (11, 8), dtype=jnp.float32)
    check_gradients(logit_product, lambda h, w: jnp.einsum("btd,vd->btv", h, w), (hidden, head), 1e-5)


def test_unstack():
    tree = {"a": draws((3, 2, 4), dtype=jnp.float32)[0], "b": draws((3, 5), dtype=jnp.float32)[0]}

    def loss(tree, slices):
        return sum(jnp.sum(jnp.sin((i + 1) * leaf)) for i, part in enumerate(slices(tree)) for leaf in part.values())

    found = jax.grad(lambda tree: loss(tree, lambda tree: unstack(tree, 3)))(tree)
    wanted = jax.grad(lambda tree: loss(tree, lambda t: [{k: v[i] for k, v in t.items()} for i in range(3)]))(tree)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-6)
