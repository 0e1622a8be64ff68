"""LoRA, MoRAL, MoLA and PESC against an independent per-token float64 loop, their identities, training and decoding."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import nnx
from goldens.tiny_models import CASES, write_model_dir
from random_models import FEW, METHODS, SMALL, random_method, tokens_of
from reference import f64, hidden_states, top_k_gates

from adafuse_jax import AdapterConfig, Backbone, UserError, load_backbone
from adafuse_jax.adapters.presets import PRESETS
from adafuse_jax.adapters.registry import make_adapter, num_parameters
from adafuse_jax.checkpoints.adapter_directory import load_adapter, save_adapter
from adafuse_jax.data.batches import Batch
from adafuse_jax.inference.backends.registry import strategies_of
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.config import LINEARS
from adafuse_jax.models.hooks import Hook, Routing
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.optimizer import make_optimizer
from adafuse_jax.training.step import TrainState, train_step
from benchmarks.simple_merging import Merging

FAMILIES = ("llama_mqa_sharded", "qwen3_bias")
"""Models of three layers each, because MoLA's groups are of one layer each here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    return functools.cache(
        lambda name: load_backbone(write_model_dir(CASES[name], tmp_path_factory.mktemp(name)), "float32")
    )


def run(model: Backbone, tokens, adapter=None, **options):
    """A forward pass that compiles nothing but its single operations."""
    return model(tokens, adapter=adapter, unroll=True, **options)


def reference(model: Backbone, adapter, tokens: np.ndarray) -> np.ndarray:
    """Logits by every method's equation, written independently: expert by expert in float64."""
    config = adapter.config
    scale = config.alpha / config.rank
    erf = np.vectorize(math.erf)
    depth = model.config.num_layers

    def experts_at(layer):
        parts = config.experts_per_layer
        return config.num_experts if parts is None else parts[math.floor(layer / depth * len(parts))]

    def adapted(layer, name, x, y):
        if config.adapter == "pesc":
            if name != "ffn":
                return y
            mixture = adapter.experts
            gates = top_k_gates(f64(mixture.router.weight[layer]) @ x, config.top_k)
            for e, gate in enumerate(gates):
                z = f64(mixture.lora.A[layer, e]) @ y
                if e == 0:
                    total = y
                total = total + gate * scale * (f64(mixture.lora.B[layer, e]) @ (z * (1 + erf(z / math.sqrt(2))) / 2))
            return total
        if name not in config.targets:
            return y
        if config.adapter == "lora":
            return y + scale * (f64(adapter.experts[name].B[layer, 0]) @ (f64(adapter.experts[name].A[layer, 0]) @ x))
        mixture, num_experts = adapter.experts[name], experts_at(layer)
        gates = top_k_gates(f64(mixture.router.weight[layer, :num_experts]) @ x, config.top_k)
        for e in range(num_experts):
            y = y + gates[e] * scale * (f64(mixture.lora.B[layer, e]) @ (f64(mixture.lora.A[layer, e]) @ x))
        return y

    return hidden_states(model, tokens, adapted)


class TestEquation:
    @pytest.mark.parametrize(
        ("method", "family"),
        [*((method, FAMILIES[0]) for method in METHODS), ("mola", FAMILIES[1]), ("pesc", FAMILIES[1])],
    )
    def test_equals_a_float64_loop(self, models, family, method):
        model = models(family)
        adapter = random_method(method, model.config)
        tokens = tokens_of(model, (1, 10))
        out = model(tokens, adapter=adapter)
        wanted = reference(model, adapter, np.asarray(tokens[0]))
        np.testing.assert_allclose(out.hidden[0], wanted, atol=2e-5 * np.abs(wanted).max())
        assert np.abs(out.hidden - run(model, tokens).hidden).max() > 1e-2 * np.abs(wanted).max()

    @pytest.mark.parametrize("method", METHODS)
    def test_is_the_backbone_while_b_is_zero(self, models, method):
        model = models(FAMILIES[0])
        adapter = make_adapter(AdapterConfig(adapter=method, **SMALL[method]), model.config, rngs=nnx.Rngs(0))
        tokens = tokens_of(model)
        bare = run(model, tokens).logits
        np.testing.assert_allclose(run(model, tokens, adapter).logits, bare, atol=1e-5 * bare.std())

    @pytest.mark.parametrize("method", METHODS)
    def test_each_hook_is_exact_while_b_is_zero(self, models, method):
        """Bit for bit, linear by linear and block by block."""
        model = models(FAMILIES[0])
        adapter = make_adapter(AdapterConfig(adapter=method, **SMALL[method]), model.config, rngs=nnx.Rngs(0))
        layer, experts = (jax.tree.map(lambda leaf: leaf[1], part) for part in (model.layers, adapter.experts))
        hook, bare = adapter.hook(experts, 1, None, jax.random.key(0)), Hook()
        for name in LINEARS:
            linear = getattr(layer, name)
            x = jax.random.normal(jax.random.key(1), (2, 5, linear.weight.shape[-1]))
            np.testing.assert_array_equal(hook(name, linear, x), bare(name, linear, x))
        x = jax.random.normal(jax.random.key(2), (2, 5, model.config.embed_dim))
        np.testing.assert_array_equal(hook.ffn(jnp.tanh, x), bare.ffn(jnp.tanh, x))

    @pytest.mark.parametrize("method", METHODS)
    def test_one_token_and_many_take_the_same_sum(self, models, method):
        """Token by token with a cache, each gathers its experts; all at once, all run densely."""
        model = models(FAMILIES[0])
        adapter, tokens = random_method(method, model.config), tokens_of(model, (1, 8))
        wanted = run(model, tokens, adapter).logits[0]
        cache, found = KVCache.empty(model.config, 1, 16, jnp.float32), []
        step = jax.jit(lambda token, at, cache: run(model, token, adapter, positions=at, cache=cache))
        for position in range(8):
            out = step(tokens[:, position : position + 1], jnp.array([[position]]), cache)
            cache = out.cache
            found.append(out.logits[0, 0])
        np.testing.assert_allclose(np.array(found), wanted, atol=3e-5 * wanted.std())

    @pytest.mark.parametrize("method", METHODS)
    def test_dropout_acts_only_with_a_key(self, models, method):
        model = models(FAMILIES[0])
        tokens = tokens_of(model)
        plain, dropping = (random_method(method, model.config, dropout=share) for share in (0.0, 0.5))
        wanted = run(model, tokens, plain).logits
        np.testing.assert_array_equal(run(model, tokens, dropping).logits, wanted)
        first, second = (run(model, tokens, dropping, dropout_key=jax.random.key(i)).logits for i in (0, 1))
        assert not np.array_equal(first, wanted)
        assert not np.array_equal(first, second)


class TestRouting:
    def test_every_linear_of_every_layer_decides_for_itself(self, models):
        model = models(FAMILIES[0])
        routing = run(model, tokens_of(model), random_method("moral", model.config)).routing
        assert routing.experts.shape == (3, 3, 2, 12, 2)  # L, routers, B, T, k
        gates = routing.dense_gates().reshape(9, -1)
        assert len({row.tobytes() for row in np.asarray(gates)}) == 9

    def test_pesc_asks_one_router_a_layer(self, models):
        model = models(FAMILIES[0])
        routing = run(model, tokens_of(model), random_method("pesc", model.config)).routing
        assert routing.experts.shape == (3, 1, 2, 12, 2)

    def test_mola_has_fewer_experts_below(self, models):
        model = models(FAMILIES[0])
        routing = run(model, tokens_of(model), random_method("mola", model.config)).routing
        for layer, num_experts in enumerate((2, 4, 5)):
            assert routing.experts[layer].max() == num_experts - 1
            assert routing.probabilities[layer, ..., num_experts:].max(initial=0) == 0
            np.testing.assert_allclose(routing.probabilities[layer, ..., :num_experts].sum(-1), 1, atol=1e-5)

    def test_mola_divides_the_depth(self, models):
        model = models(FAMILIES[0])
        layers = dataclasses.replace(model.config, num_layers=8, sliding_windows=(None,) * 8)
        mola = make_adapter(AdapterConfig(adapter="mola", rank=1), layers, rngs=nnx.Rngs(0))
        assert mola.layer_experts == (2, 2, 4, 4, 6, 6, 8, 8)
        with pytest.raises(UserError, match="the model has 3 layers"):
            make_adapter(AdapterConfig(adapter="mola", rank=1), model.config, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize(("method", "weight"), [("moral", 1 / 3), ("pesc", 1 / 3), ("mola", 1)])
    def test_balance_is_over_all_layers(self, models, method, weight):
        """Σ_l N_l Σ_e f_e P_e, with the mean of a layer's routers; MoRAL and PESC take the mean over the three layers."""
        model = models(FAMILIES[0])
        adapter, tokens = random_method(method, model.config), tokens_of(model)
        routing = run(model, tokens, adapter).routing
        mask = np.arange(12) < np.array([[9], [12]])
        num_experts = adapter.layer_experts if method != "pesc" else (4, 4, 4)
        wanted = 0.0
        for layer in range(3):
            for router in range(routing.experts.shape[1]):
                chosen, p = routing.experts[layer, router][mask], f64(routing.probabilities[layer, router])[mask]
                for e in range(num_experts[layer]):
                    f = float((chosen == e).mean())
                    wanted += weight * num_experts[layer] * f * p[:, e].mean() / routing.experts.shape[1]
        assert adapter.balance_loss(routing, jnp.array(mask)) == pytest.approx(wanted, rel=1e-5)

    def test_experts_of_a_row_lists_those_of_all_routers(self):
        experts = jnp.arange(2 * 3 * 2 * 1 * 2).reshape(2, 3, 2, 1, 2)
        routing = Routing(experts, experts * 1.0, jnp.zeros((2, 3, 2, 1, 24)))
        np.testing.assert_array_equal(routing.of_first_token().experts[1], [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23])


def batch_of(model: Backbone) -> Batch:
    tokens = np.asarray(tokens_of(model, (1, 2, 16)))
    segments = np.ones_like(tokens)
    segments[..., 13:] = 0
    return Batch(
        **{
            "tokens": tokens,
            "loss_mask": (segments > 0) & (np.arange(16) > 4),
            "positions": np.broadcast_to(np.arange(16), tokens.shape).astype(np.int32),
            "segment_ids": segments.astype(np.int32),
        }
    )


class TestTraining:
    @pytest.mark.parametrize("method", quick.first(["mola", "lora", "pesc"]))
    def test_a_step_moves_every_parameter_that_there_is(self, models, method):
        model = models(FAMILIES[0])
        adapter = random_method(method, model.config, **FEW[method])
        before = jax.tree.map(np.array, adapter)
        optimizer = make_optimizer(TrainConfig(model="m", dataset=("d",), output="o", learning_rate=1e-2), 10)
        state = TrainState(step=jnp.int32(0), adapter=adapter, moments=optimizer.init(adapter), key=jax.random.key(0))
        state, metrics = train_step(state, model, batch_of(model), optimizer=optimizer, remat="none")
        moved = 0
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.adapter), strict=True):
            changed = np.asarray(new) != old
            assert not (changed & (old == 0)).any()  # experts that a layer lacks
            moved += int(changed.sum())
        assert moved > 0.8 * num_parameters(state.adapter)
        assert ("load" in metrics) == (method != "lora")
        if method != "lora":
            assert metrics["load"].sum() == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("method", ["mola", "pesc"])
    def test_the_balance_loss_reaches_every_router(self, models, method):
        model, tokens = models(FAMILIES[0]), tokens_of(models(FAMILIES[0]))

        @jax.jit
        @jax.grad
        def gradient(adapter):
            return adapter.balance_loss(model.run(tokens, adapter=adapter).routing, jnp.ones(tokens.shape, bool))

        grads = jax.tree_util.tree_leaves_with_path(gradient(random_method(method, model.config, **FEW[method])))
        routers = [g for path, g in grads if "router" in jax.tree_util.keystr(path)]
        assert len(routers) == (2 if method == "mola" else 1)
        assert all(float(jnp.abs(layer).max()) > 0 for g in routers for layer in g)

    def test_parameters_are_counted_by_hand(self, models):
        c = models(FAMILIES[0]).config
        linears = [c.linear_shape(name) for name in LINEARS]
        ffn = [c.linear_shape(name) for name in LINEARS[4:]]
        wanted = {
            "lora": 3 * sum(3 * (o + i) for o, i in linears),
            "moral": 3 * sum(4 * (3 * (o + i) + i) for o, i in ffn),
            "mola": (2 + 4 + 5) * sum(3 * (o + i) + i for o, i in linears),
            "pesc": 3 * 4 * (3 * 2 * c.embed_dim + c.embed_dim),
        }
        found = {method: num_parameters(random_method(method, c)) for method in METHODS}
        assert found == wanted


class TestPresets:
    def test_every_setting_is_of_some_method_and_refused_by_the_others(self):
        names = {f.name for f in dataclasses.fields(AdapterConfig)} - {"adapter"}
        assert names == {name for preset in PRESETS.values() for name in preset.settings}
        given = {
            "targets": ("q_proj",), "num_experts": 3, "experts_per_layer": (3,), "rank": 3, "top_k": 1, "alpha": 1.0,
            "dropout": 0.5, "renormalize": False, "balance_coefficient": 0.5,
        }  # fmt: skip
        for method, preset in PRESETS.items():
            for name, value in given.items():
                if name in preset.settings:
                    assert getattr(AdapterConfig(adapter=method, **{name: value}), name) == value
                else:
                    with pytest.raises(
                        UserError, match=f"--{name.replace('_', '-')} is no setting of --adapter {method}"
                    ):
                        AdapterConfig(adapter=method, **{name: value})

    @pytest.mark.parametrize("method", quick.first(METHODS, 2))
    def test_every_setting_is_read(self, models, method):
        """Change each setting: the last layer's hook, its outputs or the balance loss must change."""
        model = models(FAMILIES[0])
        changes = {
            "targets": ("q_proj",), "num_experts": 5, "experts_per_layer": (3,), "rank": 5, "top_k": 1, "alpha": 1.0,
            "dropout": 0.5, "renormalize": False, "balance_coefficient": 0.5,
        }  # fmt: skip
        mask = jnp.ones((2, 5), bool)

        def loss(**settings):
            adapter = random_method(method, model.config, **(FEW[method] | settings))
            layer, experts = (jax.tree.map(lambda leaf: leaf[2], part) for part in (model.layers, adapter.experts))
            hook = adapter.hook(experts, 2, None, jax.random.key(0))
            total = 0.0
            for name in ("q_proj", "down_proj"):
                linear = getattr(layer, name)
                total += hook(name, linear, jax.random.normal(jax.random.key(1), (2, 5, linear.weight.shape[-1]))).std()
            total += hook.ffn(jnp.tanh, jax.random.normal(jax.random.key(2), (2, 5, model.config.embed_dim))).std()
            if method == "lora":
                return float(total)
            routing = jax.tree.map(lambda leaf: jnp.stack(3 * [leaf]), hook.layer_routing)
            return float(total + adapter.config.balance_coefficient * adapter.balance_loss(routing, mask))

        same = loss()
        for name in PRESETS[method].settings:
            assert loss(**{name: changes[name]}) != same, name


class TestDirectory:
    @pytest.mark.parametrize("method", METHODS)
    def test_round_trip(self, models, tmp_path: Path, method):
        model = models(FAMILIES[0])
        adapter = random_method(method, model.config)
        save_adapter(adapter, tmp_path / "a", backbone_name="tiny", backbone_identity="id")
        again = load_adapter(tmp_path / "a", model.config, backbone_identity="id", dtype=jnp.float32)
        assert again.config == adapter.config
        jax.tree.map(np.testing.assert_array_equal, again, adapter)
        cast = load_adapter(tmp_path / "a", model.config, backbone_identity="id", dtype=jnp.bfloat16)
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
            assert leaf.dtype == (jnp.float32 if "router" in jax.tree_util.keystr(path) else jnp.bfloat16)


def generate(engine: Engine, prompts, n: int) -> list[list[int]]:
    tokens = list(engine.generate(prompts, max_new_tokens=n))
    return [[int(token.ids[row]) for token in tokens] for row in range(len(prompts))]


class TestDecoding:
    PROMPTS = ([5, 9, 20, 31, 7], [11, 40, 3, 8, 8, 17, 60, 2, 33], [70])

    @pytest.mark.parametrize("method", quick.first(METHODS))
    def test_a_batch_decodes_what_full_forwards_give(self, models, method):
        model = models(FAMILIES[0])
        adapter = random_method(method, model.config, **FEW[method])
        found = generate(Engine(model, adapter, eos_ids=()), self.PROMPTS, 6)
        for prompt, tokens in zip(self.PROMPTS, found, strict=True):
            row = jnp.array([[*prompt, *tokens]])
            wanted = run(model, row, adapter).logits[0].argmax(-1)
            np.testing.assert_array_equal(wanted[len(prompt) - 1 : -1], tokens)

    @pytest.mark.parametrize("method", ["moral", "mola"])
    def test_simple_merge_gives_the_same_tokens(self, models, method):
        model = models(FAMILIES[0])
        adapter = random_method(method, model.config, **FEW[method])
        prompt = [self.PROMPTS[1]]
        wanted = generate(Engine(model, adapter, eos_ids=()), prompt, 12)
        engine = Engine(model, adapter, strategy="simple", eos_ids=())
        assert generate(engine, prompt, 12) == wanted
        with pytest.raises(UserError, match="one at a time"):
            generate(engine, self.PROMPTS, 2)

    def test_simple_merge_gives_the_same_logits_by_other_arithmetic(self, models):
        model = models(FAMILIES[0])
        adapter, token = random_method("mola", model.config, **FEW["mola"]), jnp.array([[7]])
        wanted = run(model, token, adapter).logits
        found = run(model, token, Merging(adapter, model.dtype)).logits
        np.testing.assert_allclose(found, wanted, atol=3e-5 * wanted.std())
        assert not np.array_equal(found, wanted)

    def test_merged_lora_gives_the_same_tokens_in_a_batch(self, models):
        model = models(FAMILIES[0])
        lora = random_method("lora", model.config, **FEW["lora"])
        before = jax.tree.map(np.array, model)
        wanted = generate(Engine(model, lora, eos_ids=()), self.PROMPTS, 12)
        assert generate(Engine(model, lora, strategy="merged", eos_ids=()), self.PROMPTS, 12) == wanted
        jax.tree.map(np.testing.assert_array_equal, before, model)

    def test_the_experts_that_read_a_token_are_told(self, models):
        model = models(FAMILIES[0])
        adapter = random_method("mola", model.config, **FEW["mola"])
        first, second, *_ = Engine(model, adapter, eos_ids=()).generate([[5, 9]], max_new_tokens=3)
        assert first.experts is None
        routed = run(model, jnp.array([[5, 9, int(first.ids[0])]]), adapter).routing.experts[..., 0, 2, :]
        np.testing.assert_array_equal(np.sort(second.experts[0]), np.sort(np.asarray(routed).ravel()))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_strategy_that_does_not_fit_is_refused(self, models, method):
        model = models(FAMILIES[0])
        adapter = random_method(method, model.config, **FEW[method])
        for strategy in ("golden", "switch", "simple", "merged"):
            if strategy not in strategies_of(adapter.config):
                with pytest.raises(UserError, match=f"--strategy {strategy} does not fit an adapter of {method}"):
                    Engine(model, adapter, strategy=strategy)
