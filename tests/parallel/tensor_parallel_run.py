"""Run by test_tensor_parallel.py in a process with several CPU devices: tokens with and without tensor parallelism."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from fused_cases import Case, by_modules, in_fp32, make
from generation import generate, prompt_of
from goldens.tiny_models import CASES, write_model_dir
from jax import lax
from jax.sharding import Mesh
from random_models import FEW, family_case, random_adapter, random_method

from adafuse_jax import UserError, load_backbone
from adafuse_jax.inference import programs
from adafuse_jax.inference.backends.megakernel import Fused, Megakernel, fused_step, fused_unsupported_reason
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.config import LINEARS
from adafuse_jax.parallel.axes import TENSOR
from adafuse_jax.parallel.mesh import make_mesh, place_state, shard
from pallas_kernels.megakernel import decode_token, kernel_sm90
from pallas_kernels.megakernel.plan import ALL_REDUCED
from pallas_kernels.megakernel.sizes import TILE_K
from pallas_kernels.quantised import INT4_G64, INT8, QuantArray


def run(family: str, targets: tuple[str, ...], devices: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_model_dir(CASES[family_case(family)], Path(folder))
        model = load_backbone(folder, "float32")
    adapter = random_adapter(model.config, targets=targets)
    prompts = [prompt_of(model, n, seed=n) for n in (21, 9)]
    alone = generate(Engine(model, adapter, eos_ids=()), *prompts, n=12)
    mesh = make_mesh(devices, model.config)
    cut, cut_adapter = shard(model, mesh), shard(adapter, mesh)
    programs.decode_step.clear_cache()
    engine = Engine(cut, cut_adapter, eos_ids=())
    together = [generate(engine, *prompts, n=12) for _ in range(2)]

    def share(leaf) -> float:
        return leaf.addressable_shards[0].data.size / leaf.size

    linears = {
        name: share(getattr(cut.layers, name).weight[...])
        for name in ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
    }
    experts = {name: (share(e.A[...]), share(e.B[...])) for name, e in cut_adapter.experts.items()}
    return {
        "alone": alone, "together": together, "linears": linears, "experts": experts,
        "programs": programs.decode_step._cache_size(),
    }  # fmt: skip


def run_methods(family: str, devices: int) -> dict[str, bool]:
    """Method and strategy → whether the devices together give the tokens of one."""
    with tempfile.TemporaryDirectory() as folder:
        write_model_dir(CASES[family], Path(folder))
        model = load_backbone(folder, "float32")
    mesh, same = make_mesh(devices, model.config), {}
    prompts = [prompt_of(model, n, seed=n) for n in (11, 9)]
    few = FEW | {"mola": FEW["mola"] | {"experts_per_layer": (2, 4)}}
    for method, strategy in (("lora", "merged"), ("mola", "unmerged"), ("pesc", "unmerged")):
        adapter = random_method(method, model.config, **few[method])
        alone = generate(Engine(model, adapter, eos_ids=()), *prompts, n=6)
        engine = Engine(shard(model, mesh), shard(adapter, mesh), strategy=strategy, eos_ids=())
        same[f"{method} {strategy}"] = generate(engine, *prompts, n=6) == alone
    return same


def one_shard(inputs, plan, model, *, axis, **_):
    """Output of the kernel for one device's shard, computed in plain fp32."""
    n, f32 = plan.padded_batch, jnp.float32
    inputs = jax.tree.map(lambda leaf: leaf.astype(f32) if leaf.dtype == jnp.bfloat16 else leaf, inputs)
    for name, scales in inputs["scales"].items():
        weight = QuantArray(inputs["weights"][name], scales.swapaxes(1, 2), plan.layout)
        inputs["weights"][name] = weight.dequantised(f32)
    x = inputs["x"][: model.embed_dim // TILE_K * n].reshape(-1, n, TILE_K).swapaxes(0, 1).reshape(n, -1)
    head_dim, rows = model.head_dim, len(inputs["positions"])

    def normed(x, weight):
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + model.norm_eps) * weight

    def linear(name, layer, h):
        y = h @ inputs["weights"][name][layer].T
        if name in inputs.get("a", ()):
            for expert, gates in zip(inputs["experts"], inputs["gates"], strict=True):
                y += gates[:, None] * (h @ inputs["a"][name][layer, expert].T @ inputs["b"][name][layer, expert].T)
        y = lax.psum(y, axis) if axis is not None and name in ALL_REDUCED else y
        return y + (inputs["biases"][name][layer] if name in inputs["biases"] else 0)

    def rotated(heads, norm, layer):
        if norm is not None:
            heads = normed(heads, norm[layer, :head_dim])
        partners = jnp.roll(heads, head_dim // 2, axis=-1)
        return heads * inputs["cos"][:, None] + partners * inputs["sin"][:, None]

    def attention(q, k, v, layer):
        out = []
        for row in range(rows):
            slots, position = jnp.arange(inputs["cache_k"].shape[2]), inputs["positions"][row]
            seen = (slots < position) & (slots > position - inputs["windows"][layer])
            keys, values = (
                jnp.repeat(
                    jnp.concatenate([inputs[c][layer, row], new[row][None]]), model.num_heads // model.num_kv_heads, 1
                )
                for c, new in (("cache_k", k), ("cache_v", v))
            )
            scores = jnp.einsum("hd,shd->hs", q[row], keys) * head_dim**-0.5
            weights = jax.nn.softmax(jnp.where(jnp.append(seen, True), scores, -jnp.inf), axis=-1)
            out.append(jnp.einsum("hs,shd->hd", weights, values).reshape(-1))
        return jnp.pad(jnp.stack(out), ((0, n - rows), (0, 0)))

    k_new, v_new = [], []
    for layer in range(model.num_layers):
        h = normed(x, inputs["norms"][2 * layer])
        q, k, v = (linear(f"{c}_proj", layer, h).reshape(n, -1, head_dim) for c in "qkv")
        q, k = (rotated(heads, inputs.get(f"{c}_norm"), layer) for c, heads in (("q", q), ("k", k)))
        x += linear("o_proj", layer, attention(q, k, v, layer))
        h = normed(x, inputs["norms"][2 * layer + 1])
        hidden = jax.nn.silu(linear("gate_proj", layer, h)) * linear("up_proj", layer, h)
        x += linear("down_proj", layer, hidden)
        k_new, v_new = [*k_new, k], [*v_new, v]
    logits = normed(x, inputs["norms"][-1]) @ inputs["weights"]["lm_head"].T
    logits = logits if axis is None else lax.all_gather(logits, axis, axis=1, tiled=True)
    return logits.T, *(jnp.stack(new).astype(jnp.bfloat16) for new in (k_new, v_new))


def run_fused(devices: int) -> dict:
    """Case → how far the shares' logits and new keys are from those of the modules, in fp32; and what the launch needs when
    it is compiled for GPUs. A vocabulary of 258 is padded on each device."""
    cases = {
        "all 7, two rows": Case(targets=LINEARS, num_layers=2, batch=2, hidden_dim=256, bias=True, position=100),
        "norms, context router": Case(targets=("o_proj", "up_proj"), hidden_dim=256, qk_norm=True, window=50, rank=40),
        "bare, tied": Case(embed_dim=192, hidden_dim=256, num_layers=2, tied=True, vocab_size=258),
        "int4-g64": Case(targets=("q_proj", "down_proj"), hidden_dim=256, layout=INT4_G64),
        "int8": Case(hidden_dim=256, vocab_size=258, layout=INT8),
    }
    found = {}
    for name, case in cases.items():
        model, adapter, cache, tokens, positions = make(case)
        mesh = make_mesh(devices, model.config)
        cut, cut_adapter, cut_cache = shard(model, mesh), adapter and shard(adapter, mesh), place_state(cache, mesh)
        arguments = cut, cut_adapter, Fused.of(cut, cut_adapter), tokens, positions, cut_cache
        exact, _, after = by_modules(in_fp32(model), in_fp32(adapter), in_fp32(cache), tokens, positions)
        with mock.patch.object(kernel_sm90, "run_megakernel", one_shard):
            logits, _, cut_after = jax.jit(lambda *arguments: fused_step(*arguments, num_ctas=3))(*arguments)
        pairs = (logits, exact), (cut_after.k, after.k), (cut_after.v, after.v)
        pairs = [[np.asarray(x, np.float64) for x in pair] for pair in pairs]
        found[name] = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]
        assert cut_after.k.sharding.is_equivalent_to(cut_cache.k.sharding, 5)
    step = jax.jit(lambda *arguments: fused_step(*arguments, num_ctas=132))
    text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    needs = {name: f"{name} = true" in text for name in ("uses_xla_collective_metadata", "skip_device_barrier")}
    reasons = [
        fused_unsupported_reason(shard(model, Mesh(devices, axes)))
        for devices, axes in (
            (jax.devices()[1:], (TENSOR,)),
            (jax.devices()[:1], (TENSOR,)),
            (mesh.devices[None], ("data", TENSOR)),
        )
    ]
    model, adapter, *_ = make(replace(cases["all 7, two rows"], vocab_size=512))
    tokens, compiled = [], []
    whole = [(model, adapter), (shard(model, mesh), shard(adapter, mesh))]
    with (
        mock.patch.object(kernel_sm90, "run_megakernel", one_shard),
        mock.patch("adafuse_jax.inference.backends.megakernel.fused_unsupported_reason", return_value=None),
        mock.patch("adafuse_jax.inference.backends.megakernel.decode_token", partial(decode_token, num_ctas=3)),
    ):
        for parts in whole:
            programs.decode_step.clear_cache()
            engine = Engine(*parts, eos_ids=(), strategy="fused")
            tokens.append([generate(engine, *([5, 3, 8], [7]), n=12) for _ in range(2)])
            compiled.append(programs.decode_step._cache_size())
        unasked = [Engine(*whole[1]).strategy]
        with mock.patch("adafuse_jax.inference.backends.megakernel.TRIED_DEVICES", 1):
            unasked += [Engine(*whole[1]).strategy, Engine(*whole[1], strategy="fused").strategy]
        lora = shard(random_method("lora", model.config, **FEW["lora"]), mesh)
        launched = isinstance(Engine(whole[1][0], lora, strategy="merged").backend, Megakernel)
        try:
            refused = Engine(*whole[1], strategy="golden").strategy
        except UserError as error:
            refused = str(error)
    return {
        "unasked": unasked,
        "launched": launched,
        "refused": refused,
        "errors": found,
        "tokens": tokens,
        "programs": compiled,
        "multicast": "symmetric_memory" in text,
        "reasons": reasons,
    } | needs


if __name__ == "__main__":
    assert jax.device_count() >= 2
    family, what, devices = sys.argv[1:]
    if what == "fused":
        found = run_fused(int(devices))
    elif what == "methods":
        found = run_methods(family, int(devices))
    else:
        found = run(family, tuple(what.split(",")), int(devices))
    print(json.dumps(found))
