"""AdaFuse against an independent per-token float64 loop, and the identities that define it."""

from __future__ import annotations

import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from random_models import FAMILIES, POSITIONS, random_adapter, tokens_of
from reference import f64, hidden_states, top_k_gates

from adafuse_jax import AdaFuse, AdapterConfig
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.router import Router, balance_loss, router_statistics
from adafuse_jax.checkpoints.adapter_directory import load_adapter, save_adapter
from adafuse_jax.core.errors import UserError
from adafuse_jax.models.hooks import Routing


def reference_hidden(model, adapter: AdaFuse, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Final hidden states and dense gates of one row, token by token and expert by expert in float64 (Eq. 2)."""
    config, all_gates = adapter.config, []

    def adapted(layer, name, x, y):
        if name not in config.targets:
            return y
        if layer == 0 and name == config.targets[0]:
            all_gates.append(top_k_gates(f64(adapter.router.weight[...]) @ x, config.top_k))
        experts = adapter.experts[name]
        for gate, a, b in zip(all_gates[-1], f64(experts.A[layer]), f64(experts.B[layer]), strict=True):
            y = y + gate * config.alpha / config.rank * (b @ (a @ x))
        return y

    return hidden_states(model, tokens, adapted), np.array(all_gates)


class TestEquation:
    @pytest.mark.parametrize("targets", POSITIONS.values(), ids=POSITIONS)
    @pytest.mark.parametrize("family", quick.first(FAMILIES, 2))
    def test_equals_a_float64_loop(self, models, family, targets):
        model = models(family)
        adapter = random_adapter(model.config, targets=targets)
        tokens = tokens_of(model)
        out = model(tokens, adapter=adapter)
        for row in range(len(tokens)):
            hidden, gates = reference_hidden(model, adapter, np.asarray(tokens[row]))
            np.testing.assert_allclose(out.hidden[row], hidden, atol=2e-5 * np.abs(hidden).max())
            np.testing.assert_allclose(out.routing.dense_gates()[row], gates, atol=1e-5)

    @pytest.mark.parametrize("targets", POSITIONS.values(), ids=POSITIONS)
    def test_adapter_changes_the_output(self, models, targets):
        model = models("llama_gqa")
        tokens = tokens_of(model)
        difference = model(tokens, adapter=random_adapter(model.config, targets=targets)).logits - model(tokens).logits
        assert jnp.abs(difference).max() > 1e-2

    @pytest.mark.parametrize("targets", POSITIONS.values(), ids=POSITIONS)
    @pytest.mark.parametrize("family", quick.first(FAMILIES, 2))
    def test_equals_the_backbone_while_b_is_zero(self, models, family, targets):
        """The experts add 0; two XLA programs may still differ in the order of a sum."""
        model = models(family)
        adapter = AdaFuse(AdapterConfig(targets=targets, num_experts=4, rank=3), model.config, rngs=nnx.Rngs(0))
        tokens = tokens_of(model)
        out, bare = model(tokens, adapter=adapter), model(tokens).logits
        np.testing.assert_allclose(out.logits, bare, rtol=0, atol=2e-6 * float(jnp.abs(bare).max()))
        for name, experts in adapter.experts.items():
            of_a_layer = jax.tree.map(lambda leaf: leaf[0], experts)
            x = jax.random.normal(jax.random.key(0), (*tokens.shape, model.config.linear_shape(name)[1]))
            assert not of_a_layer(x, out.routing).any()

    def test_permuting_the_experts_changes_nothing(self, models):
        model = models("llama_gqa")
        adapter, order = random_adapter(model.config), jnp.array([2, 0, 3, 1])
        tokens = tokens_of(model)
        before = model(tokens, adapter=adapter).logits
        adapter.router.weight[...] = adapter.router.weight[order]
        for experts in adapter.experts.values():
            experts.A[...], experts.B[...] = experts.A[:, order], experts.B[:, order]
        np.testing.assert_allclose(model(tokens, adapter=adapter).logits, before, atol=1e-5)

    def test_few_and_many_tokens_take_the_same_sum(self, models):
        """A single token gathers its experts, many tokens run all experts densely."""
        model = models("llama_gqa")
        experts = jax.tree.map(lambda x: x[0], random_adapter(model.config).experts["q_proj"])
        x = jax.random.normal(jax.random.key(0), (3, 5, model.config.embed_dim))
        router = Router(model.config.embed_dim, 4, 2, renormalize=True, rngs=nnx.Rngs(1))
        routing = router(x)
        np.testing.assert_allclose(experts._gathered(x, routing), experts._dense(x, routing), atol=1e-5)

    def test_dropout_acts_only_with_a_key(self, models):
        model = models("llama_gqa")
        adapter = random_adapter(model.config)
        dropped = random_adapter(model.config, dropout=0.5)
        tokens = tokens_of(model)
        plain = model(tokens, adapter=adapter).logits
        np.testing.assert_array_equal(model(tokens, adapter=dropped).logits, plain)
        first, second = (model(tokens, adapter=dropped, dropout_key=jax.random.key(i)).logits for i in (0, 1))
        assert not np.array_equal(first, plain)
        assert not np.array_equal(first, second)


class TestRouter:
    @pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (16, 4), (3, 3)])
    def test_gates_sum_to_one_with_exactly_k_nonzero(self, num_experts, top_k):
        router = Router(10, num_experts, top_k, renormalize=True, rngs=nnx.Rngs(0))
        gates = router(jax.random.normal(jax.random.key(1), (5, 7, 10))).dense_gates()
        np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)
        np.testing.assert_array_equal((gates > 0).sum(-1), top_k)

    def test_softmax_then_top_k_then_renormalise_is_the_same(self):
        x = jax.random.normal(jax.random.key(1), (5, 7, 10))
        inside = Router(10, 8, 2, renormalize=True, rngs=nnx.Rngs(0))(x)
        outside = Router(10, 8, 2, renormalize=False, rngs=nnx.Rngs(0))(x)
        np.testing.assert_array_equal(inside.experts, outside.experts)
        np.testing.assert_allclose(inside.gates, outside.gates / outside.gates.sum(-1, keepdims=True), rtol=1e-5)
        assert (outside.gates.sum(-1) < 1).all()

    def test_router_is_fp32_whatever_the_activations(self):
        router = Router(10, 8, 2, renormalize=True, rngs=nnx.Rngs(0))
        routing = router(jnp.ones((1, 1, 10), jnp.bfloat16))
        assert router.weight[...].dtype == routing.gates.dtype == routing.probabilities.dtype == jnp.float32

    def test_balance_loss_by_hand(self):
        """Two real tokens and one of padding, E = 2, k = 1: f = (1, 0), P = (0.8, 0.2) → 2 · 0.8."""
        probabilities = jnp.array([[[0.9, 0.1], [0.7, 0.3], [0.0, 1.0]]])
        routing = Routing(jnp.array([[[0], [0], [1]]]), jnp.ones((1, 3, 1)), probabilities)
        assert balance_loss(routing, jnp.array([[True, True, False]])) == pytest.approx(1.6)

    def test_balance_loss_is_one_when_balanced_and_e_when_collapsed(self):
        mask = jnp.ones((1, 4), bool)
        balanced = Routing(jnp.arange(4)[None, :, None], jnp.ones((1, 4, 1)), jnp.full((1, 4, 4), 0.25))
        collapsed = Routing(
            jnp.zeros((1, 4, 1), int), jnp.ones((1, 4, 1)), jnp.tile(jnp.array([1.0, 0, 0, 0]), (1, 4, 1))
        )
        assert balance_loss(balanced, mask) == pytest.approx(1)
        assert balance_loss(collapsed, mask) == pytest.approx(4)

    def test_balance_loss_trains_the_router(self):
        x = jax.random.normal(jax.random.key(0), (1, 64, 6))
        router = Router(6, 4, 1, renormalize=True, rngs=nnx.Rngs(0))
        router.weight[...] = router.weight[...].at[0].add(jnp.full(6, 0.5))
        x = x + 1.0

        def loss(router):
            return balance_loss(router(x), jnp.ones((1, 64), bool))

        start = loss(router)
        for _ in range(50):
            router = jax.tree.map(lambda w, g: w - 0.5 * g, router, jax.grad(loss)(router))
        assert loss(router) < 0.7 * start

    def test_statistics_by_hand(self):
        experts = jnp.array([[[0, 1], [0, 2], [1, 2]]])
        routing = Routing(experts, jnp.full((1, 3, 2), 0.5), jnp.full((1, 3, 3), 1 / 3))
        stats = router_statistics(routing, jnp.array([[True, True, False]]))
        np.testing.assert_allclose(stats["load"], [0.5, 0.25, 0.25])
        np.testing.assert_allclose(stats["pair"], [[1, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]])
        assert stats["entropy"] == pytest.approx(np.log(3))


class TestGatesAreSharedByAllLayers:
    @pytest.mark.parametrize("targets", POSITIONS.values(), ids=POSITIONS)
    def test_one_routing_for_the_token(self, models, targets):
        """Gates depend on the token alone if q, k or v is among the targets, otherwise also on the tokens before it."""
        model = models("llama_gqa")
        adapter = random_adapter(model.config, targets=targets)
        adapter.router.weight[...] = adapter.router.weight[...] * 5
        one = jnp.array([[5, 7, 9, 11, 13, 15, 9]])
        gates = model(one, adapter=adapter).routing.dense_gates()[0]
        same = np.allclose(gates[2], gates[6], atol=1e-6)
        assert same == (targets[0] == "q_proj")


class TestDirectory:
    def test_round_trip(self, models, tmp_path):
        model = models("llama_gqa")
        adapter = random_adapter(model.config, targets=("q_proj", "down_proj"), dropout=0.1, balance_coefficient=0.3)
        save_adapter(adapter, tmp_path / "a", backbone_name="tiny", backbone_identity="id")
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        again = load_adapter(tmp_path / "a", model.config, backbone_identity="id", dtype=jnp.float32)
        assert again.config == adapter.config
        jax.tree.map(np.testing.assert_array_equal, again, adapter)

    def test_a_flipped_byte_is_found(self, models, tmp_path):
        """A byte in the values, where safetensors has no checksum. Adapters of earlier versions have no digest."""
        model = models("llama_gqa")
        save_adapter(random_adapter(model.config), tmp_path / "a", backbone_name="tiny", backbone_identity="id")
        weights, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)
        with pytest.raises(
            UserError, match=r"other bytes than were written .*; restore the file, or remove weights_sha256"
        ):
            load_adapter(tmp_path / "a", model.config, backbone_identity="id", dtype=jnp.float32)
        table = json.loads(config.read_text())
        del table["weights_sha256"]
        config.write_text(json.dumps(table))
        load_adapter(tmp_path / "a", model.config, backbone_identity="id", dtype=jnp.float32)

    def test_experts_are_cast_and_the_router_is_not(self, models, tmp_path):
        model = models("llama_gqa")
        save_adapter(random_adapter(model.config), tmp_path / "a", backbone_name="tiny", backbone_identity="id")
        again = load_adapter(tmp_path / "a", model.config, backbone_identity="id", dtype=jnp.bfloat16)
        assert again.experts["q_proj"].A[...].dtype == jnp.bfloat16
        assert again.router.weight[...].dtype == jnp.float32


class TestEverySettingIsRead:
    CHANGES: ClassVar = {
        "targets": ("q_proj",), "num_experts": 5, "rank": 5, "top_k": 1, "alpha": 1.0, "dropout": 0.5,
        "renormalize": False, "balance_coefficient": 0.5,
    }  # fmt: skip

    def test_the_table_is_complete(self):
        assert PRESETS["adafuse"].settings.keys() == self.CHANGES.keys()

    @pytest.mark.parametrize("name", CHANGES)
    def test_a_change_changes_the_training_loss(self, models, name):
        model = models("llama_gqa")
        tokens = tokens_of(model)

        def loss(**settings):
            adapter = random_adapter(model.config, **settings)
            out = model(tokens, adapter=adapter, dropout_key=jax.random.key(0))
            mask = jnp.ones(tokens.shape, bool)
            return float(out.logits.std() + adapter.config.balance_coefficient * balance_loss(out.routing, mask))

        assert loss() != loss(**{name: self.CHANGES[name]})
