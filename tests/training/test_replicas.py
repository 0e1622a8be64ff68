"""Replicas trained together against each trained alone; and their attention, values and gradients."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import tiny
from goldens.tiny_models import CASES, write_model_dir
from training_batches import as_batch, config, examples

from adafuse_jax import load_backbone
from adafuse_jax.adapters.config import AdapterConfig
from adafuse_jax.data.batches import Batch, Batches
from adafuse_jax.data.packing import pack
from adafuse_jax.models.attention import Visibility, attention, implementation_of
from adafuse_jax.training.initial import initial_state
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.replicas import (
    initial_replicas,
    replica_attention,
    replica_forward,
    replicas_step,
    stacked,
    with_rate,
)
from adafuse_jax.training.schedules import Phases
from adafuse_jax.training.step import TrainState, train_step

STEPS, SEEDS, RATES = 4, (3, 4), (1e-2, 1e-3)
SMALL = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "down_proj")}
METHODS = {
    "adafuse": SMALL | {"num_experts": 4, "top_k": 2, "balance_coefficient": 0.5, "dropout": 0.1},
    "full": {},
}
PHASES = Phases.of(0.25, 0.75, STEPS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("model")
    write_model_dir(CASES["llama_mqa_sharded"], out)
    return load_backbone(out, "float32")


@pytest.mark.parametrize("method", quick.first(METHODS))
def test_each_replica_ends_as_it_would_alone(model: Any, method: str):
    """Seeds and learning rates of their own, two micro-batches, dropout, balance loss; AdaFuse's experts are tied in the
    first step, and its router is frozen in the last."""
    adapter_config = AdapterConfig(adapter=method, **METHODS[method])
    phases = PHASES if method == "adafuse" else Phases()
    rows = pack(examples(model, (32, 20, 3, 30, 9, 16, 4, 31)), 32)
    batches = [Batches(rows=(rows,), seed=seed, batch_size=2, grad_accum=2) for seed in SEEDS]

    def initial(optimizer: Any) -> Any:
        return partial(initial_state, adapter_config, model, None, optimizer, phases)

    together = with_rate(make_optimizer(config(learning_rate=1.0), STEPS))
    states = jax.jit(partial(initial_replicas, initial(together)))(np.array(SEEDS), np.array(RATES))
    routers, losses = [], []
    for step in range(STEPS):
        states, metrics = replicas_step(
            states,
            model,
            stacked([order.at(step) for order in batches]),
            optimizer=together,
            remat="none",
            phases=phases,
        )
        losses.append(metrics["loss"])
        if method == "adafuse":
            routers.append(np.array(states.adapter.router.weight[...]))
    for replica, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True)):
        optimizer = make_optimizer(config(learning_rate=rate), STEPS)
        state: TrainState = jax.jit(initial(optimizer))(jax.random.key(seed))
        for step in range(STEPS):
            state, alone = train_step(
                state, model, batches[replica].at(step), optimizer=optimizer, remat="none", phases=phases
            )
            assert losses[step][replica] == pytest.approx(float(alone["loss"]), rel=1e-4)
        for name, value in alone.items():
            np.testing.assert_allclose(metrics[name][replica], value, rtol=1e-3, atol=1e-4, err_msg=name)
        for leaf, single in zip(jax.tree.leaves(states.adapter), jax.tree.leaves(state.adapter), strict=True):
            np.testing.assert_allclose(leaf[replica], single, rtol=1e-3, atol=2e-5)
    if method == "adafuse":
        assert not np.allclose(routers[1], routers[2], atol=1e-6)
        assert np.array_equal(routers[2], routers[3])
        a = states.adapter.experts["q_proj"].A[...]  # [S, L, E, R, in]
        assert not np.allclose(a[:, :, 0], a[:, :, 1], atol=1e-5), "experts are apart after their phase"


def test_a_replica_that_diverges_disturbs_no_other(model: Any):
    adapter_config = AdapterConfig(adapter="adafuse", **METHODS["adafuse"] | {"dropout": 0.0})
    optimizer = with_rate(make_optimizer(config(learning_rate=1.0), 4))
    initial = partial(initial_state, adapter_config, model, None, optimizer, Phases())
    batch = stacked([as_batch(pack(examples(model, (30, 20)), 32), 1)] * 2)
    states = jax.jit(partial(initial_replicas, initial))(np.array([0, 0]), np.array([1e-3, 1e38]))
    for _ in range(3):
        states, metrics = replicas_step(states, model, batch, optimizer=optimizer, remat="none")
    assert np.isfinite(metrics["loss"]).tolist() == [True, False]
    assert all(np.isfinite(leaf[0]).all() for leaf in jax.tree.leaves(states.adapter))


def test_weights_in_place_of_the_loss_mask(model: Any):
    """The loss is the weighted mean over the targets; a weight of 2 is a target that stands there twice."""
    rows = pack(examples(model, (32, 20, 28, 30)), 32, packing=False)
    batch = as_batch(rows, 1)
    optimizer = make_optimizer(config(), 4)
    adapter_config = AdapterConfig(adapter="lora", **SMALL)
    weights = batch.loss_mask * np.array([2.0, 1.0, 0.0, 1.0], np.float32)[:, None]
    double = jax.tree.map(lambda leaf: leaf[:, [0, 0, 1, 3]], batch)
    losses = []
    for rows_of_step in (Batch(batch.tokens, weights, batch.segment_ids, batch.positions), double):
        state = initial_state(adapter_config, model, None, optimizer, Phases(), jax.random.key(0))
        _, metrics = train_step(state, model, rows_of_step, optimizer=optimizer, remat="none", forward=replica_forward)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


REPLICAS, ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 3, 2, 8, 6, 2, 4


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("own_segments", [False, True], ids=["the same segments", "segments of a replica"])
def test_attention_equals_single_calls(own_segments: bool, window: int | None, remat: bool):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (REPLICAS, ROWS, LENGTH, HEADS, HEAD_DIM))
    k, v = (jax.random.normal(key, (REPLICAS, ROWS, LENGTH, KV_HEADS, HEAD_DIM)) for key in keys[1:3])
    ids = jnp.sort(jax.random.randint(keys[3], (REPLICAS, ROWS, LENGTH), 1, 4))
    ids = ids if own_segments else ids[0]

    def gradients(attend: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
            def layer(x: Any, _: None) -> tuple[Any, None]:
                return x + attend(x, k, v, Visibility.of_sequence(LENGTH, ids), window), None

            body = jax.checkpoint(layer) if remat else layer
            return jnp.sum(jnp.sin(jax.lax.scan(body, q, None, length=2)[0]))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))

    together = jax.jit(jax.vmap(gradients(replica_attention), (0, 0, 0, 0 if own_segments else None)))(q, k, v, ids)
    for replica in range(REPLICAS):
        alone = gradients(attention)(q[replica], k[replica], v[replica], ids[replica] if own_segments else ids)
        for leaf, single in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(leaf[replica], single, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
def test_attention_on_a_gpu_is_cudnns_of_each_replica():
    """Values and gradients in 16 bits, where `attention` is cuDNN's, with one mask for all heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, 2, 64, 6, 64), jnp.bfloat16)
    k, v = (jax.random.normal(key, (3, 2, 64, 2, 64), jnp.bfloat16) for key in keys[1:])
    ids = jnp.repeat(jnp.arange(1, 3), 32)[None].repeat(2, 0)

    def gradients(attend: Any, max_segments: int | None) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            visibility = Visibility.of_sequence(64, ids, max_segments)
            return jnp.sum(jnp.sin(attend(q, k, v, visibility).astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))

    for max_segments, name in ((None, "cudnn_masked"), (2, "cudnn_packed")):
        assert implementation_of(q[0], k[0], Visibility.of_sequence(64, ids, max_segments)) == name
        together = jax.jit(jax.vmap(gradients(replica_attention, max_segments)))(q, k, v)
        for replica in range(3):
            alone = jax.jit(gradients(attention, max_segments))(q[replica], k[replica], v[replica])
            for leaf, single in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                error = np.asarray(leaf[replica], np.float64) - np.asarray(single, np.float64)
                assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(np.asarray(single, np.float64))


def test_the_documented_example_runs(tmp_path: Path):
    folder = tiny.write_folder(tmp_path)
    text = (tiny.REPOSITORY / "docs" / "training.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('("openbookqa",)', f'("{folder}/choices.jsonl",), max_length=128')
    names: dict[str, Any] = {}
    exec(code.replace('"DIR"', f'"{folder}/model"').replace(", 100\n", ", 2\n"), names)
    assert names["metrics"]["loss"].shape == (3,)
    assert np.isfinite(names["metrics"]["loss"]).all()
    assert names["first"].experts["q_proj"].A.ndim == 4


def test_rows_without_segments(models):
    """Their mask is one for all rows."""
    model = models("llama_gqa")
    tokens = jax.random.randint(jax.random.key(1), (3, 2, 5), 0, model.config.vocab_size)
    together = jax.vmap(lambda rows: model.run(rows, attention=replica_attention).hidden)(tokens)
    for rows, hidden in zip(tokens, together, strict=True):
        np.testing.assert_allclose(hidden, model.run(rows).hidden, rtol=1e-5, atol=1e-5)
