"""Every field of `ModelConfig` is consumed or refused: by the megakernel, by sharding and by export. A new field fails here
until each of them does either."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.family_models import CASES, FAMILIES

from adafuse_jax import Backbone, ModelConfig, UserError, export_backbone
from adafuse_jax.checkpoints.hf_config import parse_hf_config, parse_tables
from adafuse_jax.checkpoints.hf_export import _require_described, config_table
from adafuse_jax.core.errors import MAX_MESSAGE
from adafuse_jax.core.tables import Table
from adafuse_jax.inference.backends import megakernel, portable
from adafuse_jax.models.config import RopeConfig, flat_fields
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.parallel import mesh
from adafuse_jax.parallel.axes import logical_axes, partition_spec

ROPE = RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=16)
BASE = ModelConfig(
    model_type="qwen3", vocab_size=12, embed_dim=16, hidden_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    max_position_embeddings=64, norm_eps=1e-5, rope=ROPE, qk_norm=True, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip
FAMILY_BASES = {
    "qwen3": BASE,
    "qwen2": dataclasses.replace(BASE, model_type="qwen2", qk_norm=False, qkv_bias=True),
    "llama": dataclasses.replace(BASE, model_type="llama", qk_norm=False),
    "mistral": dataclasses.replace(BASE, model_type="mistral", qk_norm=False),
}
OTHERS: dict[str, Any] = {
    "model_type": "mistral", "vocab_size": 16, "embed_dim": 32, "hidden_dim": 32, "num_layers": 3, "num_heads": 2,
    "num_kv_heads": 4, "head_dim": 8, "max_position_embeddings": 32, "norm_eps": 1e-3, "norm": "layer",
    "norm_placement": "both", "parallel_block": True, "activation": "gelu", "rope.theta": 500.0,
    "rope.kind": "linear", "rope.factor": 2.0, "rope.low_freq_factor": 0.5, "rope.high_freq_factor": 3.0,
    "rope.original_max_position_embeddings": 8, "rope.beta_fast": 9.0, "rope.beta_slow": 2.0, "rope.truncate": False,
    "rope.short_factor": (1.0, 3.0), "rope.long_factor": (2.0, 3.0), "rope.attention_factor": 1.5,
    "rope.partial_rotary_factor": 0.5, "rope.interleaved": True, "rope.query_scaling_beta": 0.25,
    "local_rope": RopeConfig(theta=77.0), "nope_layers": (1,), "tie_word_embeddings": True, "qkv_bias": True, "o_bias": True,
    "mlp_bias": True, "qk_norm": False, "qk_norm_full": True, "sliding_windows": (None, 3), "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5, "attention_multiplier": 0.125, "logit_multiplier": 0.125, "attention_softcap": 20.0,
    "logit_softcap": 30.0, "bos_token_id": 3, "eos_token_ids": (4, 5), "pad_token_id": 6,
}  # fmt: skip
"""Field → a value that `BASE` does not have."""
NAMES = [name for name, *_ in flat_fields(BASE)]
NOT_IN_KERNELS = {"rope.partial_rotary_factor", "rope.interleaved", "rope.query_scaling_beta"}
"""Fields that the megakernel and the layer kernels refuse unless they have their defaults."""
NOT_IN_MEGAKERNEL = NOT_IN_KERNELS | {"parallel_block", "qk_norm_full"}
"""Fields that the megakernel refuses."""
BESIDE_LLAMA = NOT_IN_MEGAKERNEL | {
    "activation", "norm", "norm_placement", "local_rope", "nope_layers", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logit_multiplier", "attention_softcap", "logit_softcap",
}  # fmt: skip
"""Fields of other blocks than Llama's."""
REFUSED = {name: OTHERS[name] for name in NOT_IN_MEGAKERNEL} | {
    "activation": "gelu", "norm": "layer", "norm_placement": "post"
}  # fmt: skip
"""Values that the megakernel refuses."""
IN_MEGAKERNEL = {"norm": "rms_1p", "activation": "gelu_pytorch_tanh"}
"""Values that it takes, of fields of which it does not take that of `OTHERS`."""
OF_FAMILIES = {
    model_type: dataclasses.replace(
        parse_tables(Table(CASES[f"{model_type}_0"].config, "config.json"), Table({}, "generation_config.json")).model,
        bos_token_id=1,
    )
    for model_type in FAMILIES
}
"""The families whose blocks are not Llama's: a model of each."""
YARN = RopeConfig(kind="yarn", theta=100.0, factor=8.0, original_max_position_embeddings=64)
LONGROPE = RopeConfig(
    kind="longrope", original_max_position_embeddings=32, short_factor=(2.0, 1.0), long_factor=(1.0, 1.0)
)
ROPE_BASES = dict.fromkeys(("rope.beta_slow", "rope.truncate", "rope.attention_factor"), YARN) | {
    "rope.beta_fast": dataclasses.replace(YARN, truncate=False), "rope.short_factor": LONGROPE,
    "rope.long_factor": dataclasses.replace(LONGROPE, original_max_position_embeddings=4),
}  # fmt: skip
"""Field → RoPE of a kind that reads it, where `ROPE` does not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Streamed(ModelConfig):
    """A family of tomorrow, which no consumer knows."""

    residual_streams: int = 1


def base_of(name: str) -> ModelConfig:
    """`BASE`, with RoPE of a kind that reads the field, and windows for one of layers that have them."""
    windows = OTHERS["sliding_windows"] if name == "local_rope" else ()
    return dataclasses.replace(BASE, rope=ROPE_BASES.get(name, ROPE), sliding_windows=windows)


def perturbed(config: ModelConfig, *names: str, values: dict[str, Any] = OTHERS) -> ModelConfig:
    """`config` with the value of `values` in the fields `names`."""
    for name in names:
        outer, _, inner = name.partition(".")
        value = dataclasses.replace(getattr(config, outer), **{inner: values[name]}) if inner else values[name]
        config = dataclasses.replace(config, **{outer: value})
    return config


def test_every_field_has_another_value():
    assert list(OTHERS) == NAMES
    for name, value, _ in flat_fields(BASE):
        assert value != OTHERS[name], name


@pytest.mark.parametrize("consumer", [megakernel, mesh], ids=["megakernel", "sharding"])
def test_every_field_is_declared_once(consumer: Any):
    refused = NOT_IN_MEGAKERNEL if consumer is megakernel else set()
    assert consumer.CONSUMED_FIELDS | consumer.IRRELEVANT_FIELDS.keys() == set(NAMES) - refused
    assert not consumer.CONSUMED_FIELDS & consumer.IRRELEVANT_FIELDS.keys()


def backbone(config: ModelConfig) -> Backbone:
    """A backbone on the host, each leaf drawn from its path alone."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Backbone(config, rngs=nnx.Rngs(0))))


def kernel_inputs(config: ModelConfig) -> tuple[Any, list[np.ndarray]]:
    """All that the kernel gets of a model, sizes and arrays, and the logits that come of ones."""
    model, given = jax.tree.map(jnp.asarray, backbone(config)), []

    def decode_token(shape: Any, *arrays: Any) -> tuple[jax.Array, ...]:
        given.append((shape, arrays))
        new = jnp.zeros((config.num_layers, 1, config.num_kv_heads, config.head_dim))
        return jnp.ones((1, config.vocab_size)), new, new

    cache = KVCache.empty(config, 1, 8, jnp.dtype("float32"))
    with mock.patch.object(megakernel, "decode_token", decode_token):
        fused = megakernel.Fused.of(model, None)
        logits, *_ = megakernel.fused_step(model, None, fused, jnp.array([3]), jnp.array([5]), cache)
    ((shape, arrays),) = given
    return shape, [np.asarray(leaf) for leaf in jax.tree.leaves((arrays, logits))]


def equal(mine: tuple[Any, list[np.ndarray]], theirs: tuple[Any, list[np.ndarray]]) -> bool:
    return (
        mine[0] == theirs[0]
        and len(mine[1]) == len(theirs[1])
        and all(x.shape == y.shape and (x == y).all() for x, y in zip(mine[1], theirs[1], strict=True))
    )


@pytest.fixture(scope="module")
def inputs_of() -> Callable[[ModelConfig], tuple[Any, list[np.ndarray]]]:
    return functools.cache(kernel_inputs)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_IN_MEGAKERNEL])
def test_the_megakernel_gets_what_it_consumes(name: str, inputs_of: Callable):
    base = base_of(name)
    unchanged = equal(kernel_inputs(perturbed(base, name, values=OTHERS | IN_MEGAKERNEL)), inputs_of(base))
    assert unchanged == (name in megakernel.IRRELEVANT_FIELDS)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_kernels_refuse_by_name(name: str):
    config = perturbed(dataclasses.replace(BASE, head_dim=32), name, values=REFUSED)
    model = jax.tree.map(jnp.asarray, backbone(config))
    wanted = f"the model has {name} {REFUSED[name]!r}, which it does not take"
    assert megakernel.fused_unsupported_reason(model) == wanted
    refused = name in NOT_IN_KERNELS | {"activation"}
    assert portable.shape_unsupported_reason(model, None, 1) == (wanted if refused else None)


def test_the_megakernel_refuses_rope_of_some_layers_by_name():
    config = dataclasses.replace(BASE, local_rope=RopeConfig(interleaved=True), sliding_windows=(None, 3))
    reason = megakernel.field_unsupported_reason(config)
    assert reason == "the model has rope.interleaved True, which it does not take"


@pytest.mark.parametrize("model_type", [*OF_FAMILIES])
def test_families_of_the_megakernel(model_type: str):
    """The families of docs/models.md are taken, the others refused by name."""
    reason = megakernel.field_unsupported_reason(OF_FAMILIES[model_type])
    assert (reason is None) == (model_type in TAKEN), reason


TAKEN = {"gemma2", "gemma3_text", "granite", "phi3", "seed_oss", "smollm3"}


def sharded(config: ModelConfig) -> dict[str, tuple]:
    """Leaf → its shape and how it is sharded."""
    abstract = jax.eval_shape(lambda: Backbone(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {jax.tree_util.keystr(path): (leaf.shape, partition_spec(logical_axes(path))) for path, leaf in leaves}


@pytest.mark.parametrize("name", NAMES)
def test_sharding_depends_on_what_it_consumes(name: str):
    unchanged = sharded(perturbed(BASE, name)) == sharded(BASE)
    assert unchanged == (name in mesh.IRRELEVANT_FIELDS)


def test_a_leaf_that_no_table_has_is_refused():
    with pytest.raises(ValueError, match="layers/pre_feedforward_layernorm/weight has no logical axes"):
        logical_axes(("layers", "pre_feedforward_layernorm", "weight"))


def test_an_unknown_field_is_refused_unless_it_has_its_default(tmp_path: Path):
    """The megakernel, the mesh and export each refuse it; they are silent as long as the field changes nothing."""
    plain = Streamed(**{field.name: getattr(BASE, field.name) for field in dataclasses.fields(ModelConfig)})
    several = dataclasses.replace(plain, residual_streams=4)
    models = [jax.tree.map(jnp.asarray, backbone(config)) for config in (plain, several)]
    reasons = [megakernel.fused_unsupported_reason(model) for model in models]
    assert "Hopper" in (reasons[0] or "")
    assert reasons[1] == "the model has residual_streams 4, which it does not take"
    mesh.make_mesh(1, plain)
    with pytest.raises(UserError, match=r"--tensor-parallel: the model has residual_streams 4, which it does not take"):
        mesh.make_mesh(1, several)
    assert parse_hf_config(exported(plain, tmp_path / "plain")).model == BASE_READ
    with pytest.raises(UserError, match=r"residual_streams 4 of the model cannot be written"):
        exported(several, tmp_path / "several")
    assert not (tmp_path / "several").exists()


BASE_READ = dataclasses.replace(BASE, sliding_windows=(None,) * BASE.num_layers)
"""`BASE` as read from a file, which names every layer's window."""


def exported(config: ModelConfig, out: Path) -> Path:
    export_backbone(backbone(config), out)
    return out


def round_trip(config: ModelConfig, out: Path) -> dict[str, Any]:
    """The two files of an export, which is read as `config`."""
    exported(config, out)
    windows = config.sliding_windows or (None,) * config.num_layers
    wanted = dataclasses.replace(config, sliding_windows=windows, rope=config.rope.canonical())
    assert parse_hf_config(out).model == wanted
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config")}


WITH: dict[str, dict[str, Any]] = {
    "qkv_bias": {"o_bias": True},
    "o_bias": {"qkv_bias": True},
    "qk_norm": {"model_type": "llama"},
    "mlp_bias": {"model_type": "llama", "qk_norm": False},
    "model_type": {"qk_norm": False},
    "rope.kind": {"rope": RopeConfig(kind="linear", factor=8.0)},
}
"""Field → others that the same key of config.json decides, or a family that has the field."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BESIDE_LLAMA])
def test_export_writes_the_field(tmp_path: Path, name: str):
    """Another value gives other files, from which it is read again."""
    base = base_of(name)
    changed = dataclasses.replace(perturbed(base, name), **WITH.get(name, {}))
    assert round_trip(changed, tmp_path / "changed") != round_trip(base, tmp_path / "base")


def test_export_leaves_out_what_the_kind_of_rope_does_not_read(tmp_path: Path):
    config = dataclasses.replace(BASE, rope=RopeConfig(factor=2.0, beta_fast=3.0))
    assert round_trip(config, tmp_path / "out")["config"]["rope_scaling"] is None


@pytest.mark.parametrize("family", FAMILY_BASES)
@pytest.mark.parametrize("name", NAMES)
def test_export_of_each_family_is_read_again_or_refused(tmp_path: Path, family: str, name: str):
    try:
        round_trip(perturbed(FAMILY_BASES[family], name), tmp_path / "out")
    except UserError as error:
        message = str(error)
        named = any(part.split(".")[-1] in message for part in (name, *WITH.get(name, ())))
        assert named or name in ("model_type", "num_kv_heads", "rope.kind"), message  # these contradict other fields
        assert len(message) <= MAX_MESSAGE
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_export_writes_or_refuses_each_field_of_other_families(family: str):
    """config.json alone, without weights: it is read as the changed model, or export names the field."""
    base, written = OF_FAMILIES[family], set()
    for name in (name for name in NAMES if name not in ("model_type", "num_layers", "sliding_windows")):
        if (changed := perturbed(base, name)) == base:
            continue
        table = config_table(changed, "float32")
        tokens = {"bos_token_id": changed.bos_token_id, "eos_token_id": [*changed.eos_token_ids]}
        try:
            _require_described(changed, table, tokens | {"pad_token_id": changed.pad_token_id})
            written.add(name)
        except UserError as error:
            message, part = str(error), name.split(".")[-1]
            assert part in message or part in ("embed_dim", "num_kv_heads", "kind", "o_bias", "qkv_bias"), message
    assert {"vocab_size", "rope.theta", "norm_eps", "activation"} <= written
    assert written & BESIDE_LLAMA - {"activation"} == WRITTEN.get(family, set())


WRITTEN = {
    "gemma2": {"attention_multiplier", "attention_softcap", "logit_softcap"},
    "gemma3_text": {"attention_multiplier", "logit_softcap", "local_rope"},
    "granite": {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logit_multiplier"},
    "olmo3": {"local_rope"},
    "smollm3": {"nope_layers"},
    "cohere2": {"logit_multiplier"},
    "phi3": {"rope.partial_rotary_factor"},
    "ministral3": {"rope.query_scaling_beta"},
}
"""Family → the fields that its config.json can say, of those that the megakernel refuses."""


def test_special_tokens_are_the_models_and_the_rest_the_sources(tmp_path: Path):
    source = exported(BASE, tmp_path / "source")
    table = {"temperature": 0.5, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 3}
    (source / "generation_config.json").write_text(json.dumps(table))
    (source / "tokenizer.json").write_text("{}")
    changed = dataclasses.replace(BASE, eos_token_ids=(5, 2), pad_token_id=None)
    export_backbone(backbone(changed), tmp_path / "out", source=source)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"temperature": 0.5, "eos_token_id": [5, 2], "bos_token_id": 1}
    assert parse_hf_config(tmp_path / "out").model == dataclasses.replace(BASE_READ, eos_token_ids=(5, 2))


def test_special_ids_that_are_no_tokens_are_exported(tmp_path: Path):
    """Export them unchanged; a reader leaves them out."""
    config = dataclasses.replace(BASE, eos_token_ids=(2, 10**6), pad_token_id=-1)
    exported(config, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 10**6]
    assert parse_hf_config(tmp_path / "out").model == BASE_READ


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"sliding_windows": (4, 4)}, "sliding_windows (4, 4)"),
        ("llama", {"qk_norm": True}, "qk_norm True"),
        ("llama", {"qkv_bias": True}, "qkv_bias True"),
        ("mistral", {"o_bias": True}, "o_bias True"),
        ("mistral", {"sliding_windows": (4, 5)}, "sliding_windows (4, 5)"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias False"),
        ("qwen3", {"qk_norm": False}, "qk_norm False"),
        ("qwen3", {"rope": RopeConfig(attention_factor=2.0)}, "rope.attention_factor 2.0"),
        ("qwen3", {"rope": RopeConfig(kind="dynamic", factor=2.0)}, "rope.original_max_position_embeddings 8192"),
        ("llama", {"rope": RopeConfig(partial_rotary_factor=0.5)}, "rope.partial_rotary_factor 0.5"),
        ("mistral", {"rope": RopeConfig(interleaved=True)}, "rope.interleaved True"),
        ("qwen2", {"rope": RopeConfig(query_scaling_beta=0.25)}, "rope.query_scaling_beta 0.25"),
    ],
)
def test_export_refuses_what_the_family_cannot_say(tmp_path: Path, family: str, changes: dict[str, Any], expected: str):
    with pytest.raises(UserError) as caught:
        exported(dataclasses.replace(FAMILY_BASES[family], **changes), tmp_path / "out")
    assert expected in str(caught.value)
    assert family in str(caught.value)
    assert not (tmp_path / "out").exists()
