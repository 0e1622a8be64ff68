"""A method trained as replicas on tiny rows, as the studies do: methods learn, phases act, losses are those of a hand."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import tiny
from study_data import BATCH, LENGTH, choices, small

from adafuse_jax.adapters.registry import resolve_forward
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import encode_all
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.evaluation.loading import load
from adafuse_jax.models.decoder import Backbone
from adafuse_jax.training.schedules import learning_rate
from studies.science_questions.methods import METHODS, make, trainable_parameters
from studies.training import CONFIG, Texts, Trained, Trainer, optimizer_of, phases_of

ADAFUSE = small("adafuse")


def train(
    settings: dict[str, Any],
    model: Backbone,
    rows: Rows,
    *,
    seeds: tuple[int, ...],
    rates: tuple[float, ...],
    steps: int,
) -> Trained:
    trainer = Trainer(
        partial(make, settings), steps=steps, optimizer=optimizer_of(steps), phases=phases_of(settings, steps)
    )
    return trainer.train(model, Texts.of(rows), seeds=seeds, rates=rates, batch_size=BATCH, points=40)


def start(settings: dict[str, Any], model: Backbone, seeds: tuple[int, ...]) -> Any:
    """The parameters before the first step."""
    trainer = Trainer(partial(make, settings), steps=1, optimizer=optimizer_of(1), phases=phases_of(settings, 1))
    return trainer.start(model, np.array(seeds, np.int32), np.ones(len(seeds), np.float32)).adapter


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(str(tiny.write_model(tmp_path_factory.mktemp("model") / "model")))


@pytest.fixture(scope="module")
def rows(loaded: Any) -> Any:
    return pack(encode_all(choices() * 2, loaded.tokenizer, LENGTH)[0], LENGTH)


@pytest.mark.parametrize(
    "name", quick.first((name for name in METHODS if name not in ("none", "lora-matched", "adafuse-ffn")), 2)
)
@pytest.mark.slow
def test_every_method_learns(name: str, loaded: Any, rows: Any):
    """The loss falls, and the learning rate that is given is the one that counts: at 0 nothing changes."""
    settings, rate = small(name), 1e-3 if name == "full" else 3e-2
    trained = train(settings, loaded.model, rows, seeds=(0, 0), rates=(rate, 0.0), steps=8 * -(-len(rows) // BATCH))
    first, last = (trained.history[at]["loss"][0] for at in (0, -1))
    assert last < 0.9 * first
    assert trained.diverged == [False, False]
    before = start(settings, loaded.model, (0, 0))
    still = zip(jax.tree.leaves(trained.adapter), jax.tree.leaves(before), strict=True)
    assert all(np.array_equal(after[1], old[1]) for after, old in still)
    if name != "mola":
        assert trainable_parameters(settings, loaded.model) == sum(leaf[0].size for leaf in jax.tree.leaves(before))


def test_tied_experts_learn_as_one_lora_and_then_apart(loaded: Any, rows: Any):
    """Updates of tied experts equal that of the LoRA which they are; untied, they differ."""
    tied, lora = small("adafuse") | {"tied": 1.0, "balance_coefficient": 0.0}, small("lora")
    plan: dict[str, Any] = {"seeds": (0, 1), "rates": (1e-2, 1e-2), "steps": 4}
    together, halfway = (
        train(settings, loaded.model, rows, **plan).adapter.experts["q_proj"]
        for settings in (tied, tied | {"tied": 0.5})
    )
    for factor in (together.A[...], together.B[...]):  # [S, L, E, …]
        assert np.array_equal(factor, np.broadcast_to(factor[:, :, :1], factor.shape))
    for factor in (halfway.A[...], halfway.B[...]):
        assert all(not np.allclose(factor[:, :, 0], factor[:, :, e], atol=1e-5) for e in range(1, factor.shape[2]))

    trainers = [
        Trainer(partial(make, settings), steps=4, optimizer=optimizer_of(4), phases=phases_of(settings, 4))
        for settings in (tied, lora)
    ]
    seeds, rates = np.array([0, 1], np.int32), np.full(2, 1e-2, np.float32)
    those, that = (trainer.start(loaded.model, seeds, rates) for trainer in trainers)
    for name, experts in those.adapter.experts.items():
        that.adapter.experts[name].A[...] = jnp.copy(experts.A[:, :, :1])
    batch = jax.tree.map(lambda leaf: leaf[np.array([[[0, 1]], [[2, 0]]])], Texts.of(rows))  # [S, 1, B, T]
    those, that = (
        trainer.step(state, loaded.model, batch)[0] for trainer, state in zip(trainers, (those, that), strict=True)
    )
    for name, experts in those.adapter.experts.items():
        np.testing.assert_allclose(experts.B[:, :, 3], that.adapter.experts[name].B[:, :, 0], rtol=1e-2, atol=1e-6)
    squares = []  # second moments: the gradients' global norms are equal, too
    for state in (those, that):
        (adam,) = (node for node in jax.tree.leaves(state.moments, is_leaf=is_adam) if is_adam(node))
        squares.append(sum(float(jnp.sum(leaf[0])) for leaf in jax.tree.leaves(adam.nu)))
    assert squares[0] == pytest.approx(squares[1], rel=1e-2)


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_frozen_routers_stay(loaded: Any, rows: Any):
    plan: dict[str, Any] = {"seeds": (0, 1), "rates": (1e-2, 1e-2), "steps": 4}
    first = start(ADAFUSE, loaded.model, (0, 1))
    at_once, half, never, usual = (
        train(ADAFUSE | settings, loaded.model, rows, **plan).adapter
        for settings in ({"settled": 0.0}, {"settled": 0.5}, {"settled": 1.0}, {})
    )
    assert np.array_equal(at_once.router.weight[...], first.router.weight[...])
    assert not np.allclose(at_once.experts["q_proj"].B[...], 0)
    distances = [np.abs(params.router.weight[...] - first.router.weight[...]).mean() for params in (half, usual)]
    assert 0 < distances[0] < distances[1]
    np.testing.assert_allclose(never.router.weight[...], usual.router.weight[...], atol=1e-6)


def test_mola_counts_the_experts_that_are_there(loaded: Any):
    few, even = (
        trainable_parameters(small("mola") | {"experts_per_layer": numbers}, loaded.model)
        for numbers in ((2, 8), (5, 5))
    )
    assert few == even


def test_a_replica_that_diverges_is_recorded(loaded: Any, rows: Any):
    trained = train(ADAFUSE, loaded.model, rows, seeds=(0, 0), rates=(1e-3, 1e38), steps=4)
    assert trained.diverged == [False, True]
    json.dumps(trained.history, allow_nan=False)


def test_loss_of_a_step_by_hand(loaded: Any, rows: Any):
    """The first loss of the history is the mean over the targets of the cross-entropy of the first batch."""
    trained = train(ADAFUSE, loaded.model, rows, seeds=(0, 7), rates=(0.0, 0.0), steps=1)
    for replica, seed in enumerate((0, 7)):
        batch = Batches(rows=(rows,), seed=seed, batch_size=BATCH).at(0)
        inputs = {"positions": batch.positions[0], "segment_ids": batch.segment_ids[0]}
        logits = forward(loaded.model, batch.tokens[0], **inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.array(batch.tokens[0, :, 1:]))
        mask = batch.loss_mask[0, :, 1:]
        assert trained.history[0]["loss"][replica] == pytest.approx(float((losses * mask).sum() / mask.sum()), abs=2e-5)
    assert trained.tokens == int((Batches(rows=(rows,), seed=0, batch_size=BATCH).at(0).segment_ids > 0).sum())
    assert sum(trained.history[0]["load"]) == pytest.approx(1, abs=1e-5)


@jax.jit
def forward(model: Any, tokens: Any, **inputs: Any) -> Any:
    return model(tokens, **inputs).logits


def test_programs_compiled_ahead_train_alike(loaded: Any, rows: Any):
    texts, results = Texts.of(rows), []
    for ahead in (True, False):
        trainer = Trainer(partial(make, ADAFUSE), steps=2, optimizer=optimizer_of(2), phases=phases_of(ADAFUSE, 2))
        if ahead:
            trainer.compile(loaded.model, texts, replicas=2, batch_size=BATCH)
        results.append(
            trainer.train(loaded.model, texts, seeds=(0, 1), rates=(1e-2, 1e-3), batch_size=BATCH, points=40).adapter
        )
    for first, second in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(first, second)


def test_full_training_runs_in_the_backbones_type(loaded: Any):
    params = jax.tree.map(lambda leaf: leaf[0], start({"adapter": "full"}, loaded.model, (0,)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded.model)
    backbone, adapter = resolve_forward(params, half)
    assert adapter is None
    assert backbone.dtype == jnp.bfloat16


def test_schedule():
    values = [float(learning_rate(CONFIG, 100)(step)) for step in range(100)]
    assert values.index(max(values)) == 5
    assert values[5] == pytest.approx(1)
    assert values[0] == pytest.approx(1 / 6)
    assert 0.1 < values[-1] < 0.11
    assert float(learning_rate(CONFIG, 1)(0)) == 0.5
