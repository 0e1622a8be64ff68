"""A quantised backbone against the one with its dequantised weights: outputs, and gradients of every method."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from random_models import FEW, random_adapter, random_method, tokens_of

from adafuse_jax.core.errors import UserError
from adafuse_jax.models.config import LINEARS, ModelConfig
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.models.quantised import LAYOUTS, quantisation_of, quantised
from adafuse_jax.parallel.mesh import make_mesh
from pallas_kernels.quantised import INT4_G64, INT8

CONFIG = ModelConfig(
    model_type="llama", vocab_size=96, embed_dim=64, hidden_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=64, norm_eps=1e-5, qkv_bias=True,
)  # fmt: skip


def pair(layout=INT4_G64, dtype="float32") -> tuple[Backbone, Backbone]:
    """A quantised model, and the plain one with its weights."""
    model = quantised(Backbone(CONFIG, dtype=dtype, rngs=nnx.Rngs(0)), layout)
    plain = jax.tree.map(lambda leaf: leaf, model)
    for name in LINEARS:
        linear = getattr(plain.layers, name)
        linear.weight = nnx.Param(linear.weight[...].dequantised(dtype))
    return model, plain


def loss_of(model, tokens, adapter, unroll: bool = False, remat="none"):
    out = model.run(tokens, adapter=adapter, unroll=unroll, remat=remat)
    return jnp.sum(jnp.sin(out.hidden.astype(jnp.float32)))


@pytest.mark.parametrize("method", quick.first(["adafuse", "lora", "pesc", "moral", "mola"], 2))
def test_losses_and_gradients(method: str):
    model, plain = pair()
    few = FEW | {"mola": FEW["mola"] | {"experts_per_layer": (2, 4)}}
    adapter = random_adapter(CONFIG) if method == "adafuse" else random_method(method, CONFIG, **few[method])
    tokens = tokens_of(model)
    found, wanted = (jax.jit(jax.value_and_grad(partial(loss_of, m, tokens)))(adapter) for m in (model, plain))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for leaf, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6 * float(jnp.abs(other).max()))


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "unroll"), [("products", False), ("attention", True), ("full", False)])
def test_gradients_of_every_policy(remat: str, unroll: bool):
    model, plain = pair(INT8, "bfloat16")
    adapter, tokens = random_adapter(CONFIG), tokens_of(model)
    found, wanted = (
        jax.jit(jax.grad(partial(loss_of, m, tokens, unroll=unroll, remat=r)))(adapter)
        for m, r in ((model, remat), (plain, "none"))
    )
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=2e-2, atol=2e-2 * float(jnp.abs(other).max()))


def test_no_layer_keeps_its_weights_for_the_backward_pass():
    """In no type but that of the codes, whatever the scan stacks."""
    adapter, weights = random_adapter(CONFIG, targets=("q_proj",)), {CONFIG.linear_shape(name) for name in LINEARS}

    def kept(model: Backbone) -> list[tuple[int, ...]]:
        _, pull = jax.vjp(partial(loss_of, model, tokens_of(model)), adapter)
        arrays = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape") and leaf.dtype != jnp.uint8]
        return [array.shape for array in arrays if array.shape[-2:] in weights and array.shape[:-2] == (2,)]

    quantised_model, plain = pair()
    assert len(kept(plain)) >= 4
    assert not kept(quantised_model)


@pytest.mark.gpu
def test_unrolled_layers_keep_no_weights_either():
    """The compiler dequantises neither all layers at once nor once for both passes: memory grows with the layers by less
    than half their weights. A CPU's compiler would."""
    wide = replace(CONFIG, embed_dim=512, hidden_dim=1024)

    def temporaries(num_layers: int) -> int:
        config = replace(wide, num_layers=num_layers)
        model = jax.eval_shape(lambda: quantised(Backbone(config, dtype="bfloat16", rngs=nnx.Rngs(0)), INT4_G64))
        adapter = jax.eval_shape(lambda: random_adapter(config, targets=("q_proj",)))
        gradient = jax.jit(jax.grad(lambda a, m, t: loss_of(m, t, a, unroll=True)))
        tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
        return gradient.lower(adapter, model, tokens).compile().memory_analysis().temp_size_in_bytes

    bytes_of_layer = 2 * sum(np.prod(wide.linear_shape(name)) for name in LINEARS)
    assert temporaries(6) - temporaries(2) < 4 * bytes_of_layer / 2


def test_scans_and_unrolled_layers_agree():
    """A step with a cache slices codes and scales; an unrolled one does not."""
    model, plain = pair()
    tokens = tokens_of(model)
    wanted = jax.jit(lambda: plain(tokens).logits)()
    for unroll in (False, True):
        np.testing.assert_allclose(jax.jit(partial(model, tokens, unroll=unroll))().logits, wanted, atol=1e-5)


def test_what_is_quantised():
    plain = Backbone(CONFIG, dtype="bfloat16", rngs=nnx.Rngs(0))
    model = quantised(plain, INT8)
    assert quantisation_of(plain) is None
    assert quantisation_of(model) == LAYOUTS["int8"]
    floats = sum(leaf.size for leaf in jax.tree.leaves(model) if leaf.dtype == jnp.bfloat16)
    linears = sum(CONFIG.num_layers * np.prod(CONFIG.linear_shape(name)) for name in LINEARS)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model)) == linears + 2 * floats
    with pytest.raises(
        UserError, match=r"--quantize int4: q_proj has 64 inputs, no multiple of 128; give --quantize int8"
    ):
        quantised(plain, LAYOUTS["int4"])


@pytest.mark.parametrize(("layout", "gigabytes"), [(None, 13.48), ("int8", 7.00), ("int4-g64", 3.97), ("int4", 3.86)])
def test_bytes_of_7b(layout, gigabytes: float):
    """The table of docs/quantisation.md."""
    config = replace(
        CONFIG, vocab_size=32000, embed_dim=4096, hidden_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=128, qkv_bias=False,
    )  # fmt: skip

    def make() -> Backbone:
        model = Backbone(config, dtype="bfloat16", rngs=nnx.Rngs(0))
        return model if layout is None else quantised(model, LAYOUTS[layout])

    leaves = jax.tree.leaves(jax.eval_shape(make))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_devices_that_would_split_a_group(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 2)
    with pytest.raises(UserError, match=r"the 1 groups of 64 of the model's queries evenly; .* quantise to int8$"):
        make_mesh(2, CONFIG, INT4_G64)
