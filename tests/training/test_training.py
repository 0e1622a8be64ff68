"""The training step: loss, packing, accumulation, schedule, and what it must leave alone."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from goldens.tiny_models import CASES, write_model_dir
from random_models import random_adapter, tokens_of
from training_batches import as_batch, config, examples

from adafuse_jax import load_backbone
from adafuse_jax.adapters.router import expert_load
from adafuse_jax.data.chat import Encoded
from adafuse_jax.data.packing import Rows, pack
from adafuse_jax.evaluation.heldout import HeldOut, score
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.loss import token_losses
from adafuse_jax.training import step
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.schedules import Phases, learning_rate, tied_gradients
from adafuse_jax.training.step import TrainState, train_step


@pytest.fixture(scope="module", params=[pytest.param("llama_mqa_sharded", marks=pytest.mark.slow), "qwen2_window"])
def model(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    write_model_dir(CASES[request.param], out)
    return load_backbone(out, "float32")


@cache
def optimizer_of(steps: int, **changes) -> optax.GradientTransformation:
    """One object for equal settings: a step is compiled once for each object and each shape of the batch, so that tests
    that share both share the program."""
    return make_optimizer(config(**changes), steps)


def state_of(adapter, optimizer) -> TrainState:
    return TrainState(step=jnp.int32(0), adapter=adapter, moments=optimizer.init(adapter), key=jax.random.key(0))


FEW = ("q_proj", "down_proj")
"""Targets whose router sees the token; fewer than all, to compile less."""
REMAT_AT = 4
"""Micro-batches of a step that computes its activations again."""


def fresh_state(model, **changes) -> TrainState:
    """A state, by default without a balance loss, for steps with `fast()`."""
    return state_of(random_adapter(model.config, **({"targets": FEW, "balance_coefficient": 0.0} | changes)), fast())


def fast() -> optax.GradientTransformation:
    return optimizer_of(60)


def precise() -> optax.GradientTransformation:
    return optimizer_of(10, learning_rate=1e-3)


def repeated(rows: Rows, count: int) -> Rows:
    """`count` rows, the given ones again and again."""
    return Rows(*(np.resize(getattr(rows, f.name), (count, rows.tokens.shape[1])) for f in dataclasses.fields(Rows)))


def router_loads(model, adapter, rows: Rows, parts: int) -> list[jax.Array]:
    """f [E] of each of so many equal parts of the rows that has tokens, by a pass through all layers."""
    segments = jnp.array(rows.segment_ids)
    out = model.run(rows.tokens, adapter=adapter, positions=jnp.array(rows.positions), segment_ids=segments)
    loads = []
    for part in np.split(np.arange(len(rows)), parts):
        routing = jax.tree.map(lambda x, part=part: x[part], out.routing)
        if (real := segments[part] > 0).any():
            loads.append(expert_load(routing, real)[0])
    return loads


class TestLoss:
    @pytest.mark.parametrize("length", [2, 100, 257, 300])
    def test_equals_float64(self, model, length):
        """Chunks that fit the sequence and chunks that do not."""
        tokens = tokens_of(model, (2, min(length, 120)))
        tokens = jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=5)
        mask = jax.random.bernoulli(jax.random.key(1), 0.5, tokens.shape)
        hidden = jax.random.normal(jax.random.key(2), (*tokens.shape, model.config.embed_dim))
        logits = np.asarray(model.logits(hidden), np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        wanted = np.zeros(2)
        for b in range(2):
            for t in range(1, length):
                wanted[b] += mask[b, t] * (log_z[b, t - 1] - logits[b, t - 1, tokens[b, t]])
        np.testing.assert_allclose(token_losses(model, hidden, tokens, mask), wanted, rtol=1e-5)


class TestPacking:
    def test_packed_loss_equals_the_examples_alone(self, model):
        adapter = random_adapter(model.config)
        alone = examples(model, (9, 14, 5, 20, 11))
        rows = pack(alone, 32)
        assert len(rows) < len(alone)
        out = model.run(
            rows.tokens, adapter=adapter, positions=jnp.array(rows.positions), segment_ids=jnp.array(rows.segment_ids)
        )
        packed = float(token_losses(model, out.hidden, rows.tokens, rows.loss_mask).sum())
        assert packed == pytest.approx(score(model, adapter, alone, batch_size=2).sum(), rel=1e-4)

    def test_no_gradient_crosses_examples(self, model):
        """The loss of the second segment does not move with the embeddings of the first."""
        adapter = random_adapter(model.config)
        first, second = examples(model, (10, 12))
        rows = pack([first, second], 32)
        only_second = jnp.array(rows.loss_mask & (rows.segment_ids == 2))

        def loss(embeddings):
            moved = jax.tree.map(lambda x: x, model)
            moved.embed_tokens[...] = embeddings
            out = moved.run(
                tokens, adapter=adapter, positions=jnp.array(rows.positions), segment_ids=jnp.array(rows.segment_ids)
            )
            return token_losses(model, out.hidden, tokens, only_second).sum()

        tokens = jnp.array(rows.tokens)
        gradient = jnp.abs(jax.grad(loss)(model.embed_tokens[...])).sum(-1)
        only_first = sorted(set(first.tokens.tolist()) - set(second.tokens.tolist()))
        assert gradient[jnp.array(only_first)].max() == 0
        assert gradient[jnp.array(sorted(set(second.tokens[:-1].tolist())))].min() > 0


class TestStep:
    @pytest.mark.parametrize("targets", [FEW, ("gate_proj",)], ids=["embedding", "context"])
    def test_accumulation_equals_one_large_batch(self, model, targets):
        """The balance loss, too, whose f is that of the whole step: 8 rows at once, and as 2 × 4 or 4 × 2, packed from
        very different lengths, and two of padding. The router sees the token, or (first target in the FFN) the
        context."""
        rows = pack(examples(model, (32, 20, 3, 30, 9, 16, 4, 31, 2, 26, 5, 6), seed=3), 32)
        rows = repeated(rows, 8)
        rows.segment_ids[6:], rows.loss_mask[6:] = 0, False
        results, gaps = [], []
        for accum in (1, 2, 4):
            adapter = random_adapter(model.config, balance_coefficient=1.0, targets=targets)
            state = state_of(adapter, precise())
            loads = router_loads(model, adapter, rows, accum)
            gaps.append(max(float(jnp.abs(load - loads[0]).max()) for load in loads))
            for _ in range(3):
                state, metrics = train_step(
                    state,
                    model,
                    as_batch(rows, accum),
                    optimizer=precise(),
                    remat="full" if accum == REMAT_AT else "none",
                )
            results.append((state.adapter, metrics))
        assert min(gaps[1:]) > 0.01, "the micro-batches load the experts alike, and would not show a difference"
        for adapter, metrics in results[1:]:
            for name in metrics:
                np.testing.assert_allclose(metrics[name], results[0][1][name], rtol=1e-4, atol=1e-6, err_msg=name)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), adapter, results[0][0])

    def test_a_balance_loss_of_each_micro_batch_would_differ(self, model, monkeypatch):
        """A difference far above the tolerance of the test before, which therefore would detect it."""
        rows = pack(examples(model, (32, 20, 3, 30, 9, 16, 4, 31), seed=3), 32, packing=False)
        routers = []
        for whole in (True, False):
            adapter = random_adapter(model.config, balance_coefficient=1.0, targets=FEW)
            options = {"optimizer": precise(), "remat": "full"}
            if not whole:
                monkeypatch.setattr(step, "load_of_step", lambda *_, **options: None)
                options["forward"] = lambda *a, **k: step.forward(*a, **k)  # not compiled yet, unlike `forward`
            state, _ = train_step(state_of(adapter, precise()), model, as_batch(rows, REMAT_AT), **options)
            routers.append(np.array(state.moments[1][0].mu.router.weight[...]))
        assert np.abs(routers[0] - routers[1]).max() > 0.01 * np.abs(routers[0]).max()

    def test_rows_of_padding_weigh_nothing(self, model):
        """Five rows in a batch of eight are a batch of five."""
        rows = pack(examples(model, (30, 20, 8, 25, 31), seed=3), 32, packing=False)
        padded = Rows(*(np.pad(getattr(rows, f.name), ((0, 3), (0, 0))) for f in dataclasses.fields(Rows)))
        results = []
        for batch in (as_batch(rows, 1), as_batch(padded, 2)):
            state = state_of(random_adapter(model.config, balance_coefficient=1.0, targets=FEW), precise())
            state, metrics = train_step(state, model, batch, optimizer=precise(), remat="none")
            results.append((state.moments, metrics))
        for moments, metrics in results[1:]:
            for name in metrics:
                np.testing.assert_allclose(metrics[name], results[0][1][name], rtol=1e-4, atol=1e-6, err_msg=name)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), moments, results[0][0])

    def test_loss_falls_and_the_backbone_stays(self, model):
        rows = repeated(pack(examples(model, (30, 20, 25, 31)), 32, packing=False), 8)
        before = jax.tree.map(np.array, model)
        state, losses = fresh_state(model), []
        for _ in range(60):
            state, metrics = train_step(state, model, as_batch(rows, 1), optimizer=fast(), remat="none")
            losses.append(float(metrics["loss"]))
        assert losses[-1] < 0.5 * losses[0]
        jax.tree.map(np.testing.assert_array_equal, before, model)

    def test_every_adapter_parameter_gets_a_gradient_once_b_is_not_zero(self, model):
        rows = pack(examples(model, [32] * 8), 32)
        state = fresh_state(model, targets=LINEARS)
        before = jax.tree.map(np.array, state.adapter)
        state, metrics = train_step(state, model, as_batch(rows, 1), optimizer=fast(), remat="none")
        moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.adapter, before)
        assert all(jax.tree.leaves(moved))
        assert metrics["load"].sum() == pytest.approx(1, abs=1e-5)

    def test_optimiser_state_is_the_adapters_only(self, model):
        adapter = random_adapter(model.config)
        moments = make_optimizer(config(), 10).init(adapter)
        arrays = [x.shape for x in jax.tree.leaves(moments) if x.ndim]
        assert sorted(arrays) == sorted(2 * [x.shape for x in jax.tree.leaves(adapter)])

    def test_clipping_bounds_the_update_direction(self, model):
        rows, moments = repeated(pack(examples(model, (30, 20)), 32, packing=False), 8), []
        for optimizer in (fast(), optimizer_of(60, clip_norm=1e-6)):
            state, _ = train_step(fresh_state(model), model, as_batch(rows, 1), optimizer=optimizer, remat="none")
            moments.append(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(state.moments) if x.ndim))
        assert moments[1] < 1e-6 < moments[0]


class TestSchedule:
    def test_warm_up_then_cosine(self):
        rate = learning_rate(config(learning_rate=1.0, warmup_ratio=0.1, min_lr_ratio=0.2), 100)
        values = [float(rate(step)) for step in range(101)]
        assert values[0] > 0
        assert values[10] == pytest.approx(1.0)
        assert all(a < b for a, b in itertools.pairwise(values[:11]))
        assert all(a > b for a, b in itertools.pairwise(values[10:]))
        assert values[100] == pytest.approx(0.2)

    def test_weight_decay_spares_the_router(self, model):
        adapter = random_adapter(model.config)
        optimizer = make_optimizer(config(weight_decay=0.5, warmup_ratio=0.0), 10)
        zero = jax.tree.map(jnp.zeros_like, adapter)
        updates, _ = optimizer.update(zero, optimizer.init(adapter), adapter)
        assert jnp.abs(updates.router.weight[...]).max() == 0
        assert jnp.abs(updates.experts["q_proj"].A[...]).max() > 0

    def test_experts_are_tied_and_routers_move_in_their_share_of_the_steps(self, model):
        """Experts are tied in two of four steps, and routers learn in three. `grad_norm` is that of the gradients that
        are clipped."""
        rows = repeated(pack(examples(model, (30, 20, 25, 31)), 32, packing=False), 8)
        phases = Phases.of(0.5, 0.6, 4)
        assert phases == Phases(tied_steps=2, router_steps=3)
        assert Phases.of(0.07, 0.55, 100) == Phases(tied_steps=7, router_steps=55)
        assert Phases.of(0.0, 1.0, 4) == Phases()
        state = fresh_state(model)
        state = dataclasses.replace(state, adapter=phases.initial(state.adapter))
        batch, options = as_batch(rows, 1), {"optimizer": fast(), "remat": "none"}
        for at in range(4):
            before = np.array(state.adapter.router.weight[...])
            _, usual = train_step(jax.tree.map(jnp.copy, state), model, batch, **options)
            state, metrics = train_step(state, model, batch, **options, phases=phases)
            b = np.array(state.adapter.experts["q_proj"].B[...])  # [L, E, out, R]
            assert np.array_equal(b, np.broadcast_to(b[:, :1], b.shape)) == (at < 2)
            assert np.array_equal(state.adapter.router.weight[...], before) == (at == 3)
            assert np.isclose(metrics["grad_norm"], usual["grad_norm"], rtol=1e-4) == (at >= 2)

    def test_tied_gradients_have_the_norm_of_a_lora_s(self, model):
        """∂/∂θ of f(θ, …, θ) is the sum of the parts."""
        found = tied_gradients(random_adapter(model.config))
        parts = random_adapter(model.config).experts["q_proj"].B[...]
        norm = jnp.sqrt(jnp.sum(jnp.square(found.experts["q_proj"].B[...])))
        np.testing.assert_allclose(norm, jnp.sqrt(jnp.sum(jnp.square(parts.sum(1)))), rtol=1e-5)


class TestHeldOut:
    def test_accuracy_picks_the_likelier_candidate(self, model):
        """Candidates are whole continuations; the right one is planted by its likelihood under a full forward."""
        adapter = random_adapter(model.config)
        rng = np.random.default_rng(0)
        choices, answers = [], []
        for _ in range(6):
            prompt = rng.integers(3, model.config.vocab_size, 8)
            candidates = [np.concatenate([prompt, rng.integers(3, model.config.vocab_size, n)]) for n in (2, 2, 2)]
            mask = np.arange(10) >= 8
            choices.append([Encoded(c.astype(np.int32), mask) for c in candidates])
            likelihoods = []
            for candidate in candidates:
                logp = jax.nn.log_softmax(model(candidate[None], adapter=adapter).logits[0])
                likelihoods.append(float(logp[7, candidate[8]] + logp[8, candidate[9]]))
            answers.append(int(np.argmax(likelihoods)))
        held_out = HeldOut(rows=[], choices=choices, answers=answers)
        assert held_out.evaluate(model, adapter, batch_size=4) == {"accuracy": 1.0}
        wrong = HeldOut(rows=[], choices=choices, answers=[(a + 1) % 3 for a in answers])
        assert wrong.evaluate(model, adapter, batch_size=4) == {"accuracy": 0.0}


class TestTrainingImprovesRouting:
    def test_balance_coefficient_flattens_the_load(self, model):
        rows = pack(examples(model, [32] * 8), 32)
        loads = []
        for coefficient in (0.0, 1.0):
            optimizer = optimizer_of(40, learning_rate=3e-2)
            state = state_of(random_adapter(model.config, balance_coefficient=coefficient), optimizer)
            for _ in range(40):
                state, metrics = train_step(state, model, as_batch(rows, 1), optimizer=optimizer, remat="none")
            loads.append(float(jnp.std(metrics["load"])))
        assert loads[1] < loads[0]


def test_nnx_state_of_an_adapter_is_all_trainable():
    from adafuse_jax import AdaFuse, AdapterConfig, ModelConfig
    from adafuse_jax.adapters.low_rank import LoRAParam

    shapes = ModelConfig(
        model_type="llama", vocab_size=8, embed_dim=8, hidden_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        max_position_embeddings=8, norm_eps=1e-5,
    )  # fmt: skip
    state = nnx.state(AdaFuse(AdapterConfig(num_experts=2, rank=1), shapes, rngs=nnx.Rngs(0)))
    assert all(isinstance(leaf, LoRAParam) for _, leaf in nnx.to_flat_state(state))
