"""Rotary embedding against transformers (`goldens/rope.npz`), within and past the original length, and from a cache."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from generation import by_full_forward, generate, prompt_of
from goldens.rope_cases import CASES, HEAD_DIM, LENGTHS, config, heads

from adafuse_jax import Backbone, ModelConfig, UserError
from adafuse_jax.core.tables import Table
from adafuse_jax.inference import prefill
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.config import RopeConfig
from adafuse_jax.models.families.rope import RopeKeys
from adafuse_jax.models.kv_cache import KVCache
from adafuse_jax.models.rotary import rotation, sequence_lengths

KEYS = {
    "llama": RopeKeys(),
    "gemma3": RopeKeys(),
    "phi3": RopeKeys(partial=True, original=4096),
    "glm4": RopeKeys(defaults=RopeConfig(interleaved=True, partial_rotary_factor=0.5), partial=True),
    "cohere2": RopeKeys(defaults=RopeConfig(interleaved=True)),
    "ministral3": RopeKeys(scales_queries=True),
}
LONG = RopeConfig(
    kind="longrope", theta=100.0, original_max_position_embeddings=20, short_factor=(1.0, 1.2, 1.5, 2.0),
    long_factor=(1.0, 4.0, 6.0, 8.0), attention_factor=1.2,
)  # fmt: skip
DYNAMIC = RopeConfig(kind="dynamic", theta=100.0, factor=2.0, original_max_position_embeddings=20)
SMALL = ModelConfig(
    model_type="llama", vocab_size=32, embed_dim=16, hidden_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    max_position_embeddings=64, norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(tiny.GOLDENS / "rope.npz") as arrays:
        return dict(arrays)


def read(name: str) -> RopeConfig:
    case = CASES[name]
    table = config(case)
    rope, unused = KEYS[case.module].read(
        Table(table, "config.json"), table["max_position_embeddings"], HEAD_DIM, layer_type=case.layer_type
    )
    assert not unused
    return rope


def rotated(rope: RopeConfig, positions: np.ndarray, x: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    of_tokens = None if lengths is None else jnp.asarray(lengths)[None]
    found = rotation(rope, HEAD_DIM, jnp.asarray(positions)[None], of_tokens)
    return np.concatenate([found.of_queries(jnp.asarray(x)[None]), found.of_keys(jnp.asarray(x)[None])])


@pytest.mark.parametrize("name", CASES)
def test_queries_and_keys_are_those_of_transformers(name: str, golden: dict[str, np.ndarray]):
    rope = read(name)
    for length in LENGTHS:
        lengths = np.full(length, length)
        np.testing.assert_allclose(
            rotated(rope, np.arange(length), heads(length), lengths), golden[f"{name}/{length}"], atol=2e-5
        )
    steps = golden[f"{name}/decoded"]
    at = np.arange(24, 24 + steps.shape[1])
    np.testing.assert_allclose(rotated(rope, at, heads(24 + len(at))[24:]), steps, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layer_type is None])
def test_written_and_read_again(name: str):
    keys, rope, max_positions = KEYS[CASES[name].module], read(name), config(CASES[name])["max_position_embeddings"]
    table = json.loads(json.dumps(keys.write(rope)))
    # These are what transformers has read, in goldens/make_rope.py.
    assert table == json.loads((tiny.GOLDENS / "rope_written.json").read_text())[name]
    assert keys.read(Table(table, "config.json"), max_positions, HEAD_DIM) == (rope, [])


def test_lengths_are_those_of_each_segment():
    ids = jnp.array([[1, 1, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert sequence_lengths(positions, ids).tolist() == [[3, 3, 3, 2, 2, 1], [6] * 6]
    assert sequence_lengths(positions).tolist() == [[3], [6]]


def model(rope: RopeConfig, max_positions: int) -> Backbone:
    changed = dataclasses.replace(SMALL, rope=rope, max_position_embeddings=max_positions)
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, Backbone(changed, rngs=nnx.Rngs(0)))


@nnx.jit
def read_tokens(model: Backbone, tokens: jax.Array, at: jax.Array, cache: KVCache, lengths: jax.Array | None):
    out = model(tokens, positions=at + jnp.arange(tokens.shape[1])[None], cache=cache, lengths=lengths)
    return out.logits[0, -1].argmax(), out.cache


def as_transformers(model: Backbone, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens as transformers decodes them: the prompt with its own length, then a token at a time into its cache."""
    cache, at, tokens, lengths = KVCache.empty(model.config, 1, 64, jnp.dtype("float32")), 0, prompt, len(prompt)
    answer: list[int] = []
    while len(answer) < new:
        token, cache = read_tokens(model, jnp.array([tokens]), jnp.array(at), cache, jnp.array([lengths]))
        at, tokens, lengths = at + len(tokens), [int(token)], at + len(tokens) + 1
        answer.append(int(token))
    return answer


@pytest.fixture(scope="module")
def dynamic() -> Engine:
    return Engine(model(DYNAMIC, 20), eos_ids=())


@pytest.fixture(scope="module")
def longrope() -> Engine:
    return Engine(model(LONG, 60), eos_ids=())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefill, "CHUNKS", (16,))


@pytest.mark.usefixtures("small_chunks")
class TestDecoding:
    """Prompts in two chunks, and answers past the original length of 20 tokens."""

    @pytest.mark.parametrize("length", [15, 20, 21, 30])
    def test_dynamic(self, dynamic: Engine, length: int):
        prompt = prompt_of(dynamic.model, length)
        assert generate(dynamic, prompt, n=8) == [as_transformers(dynamic.model, prompt, 8)]

    def test_longrope_of_a_long_prompt_is_the_full_forward(self, longrope: Engine):
        prompt = prompt_of(longrope.model, 30)
        (answer,) = generate(longrope, prompt, n=8)
        assert answer == by_full_forward(longrope.model, None, prompt, answer)

    def test_longrope_of_a_short_prompt_ends_at_the_original_length(self, longrope: Engine):
        prompt = prompt_of(longrope.model, 14)
        (answer,) = generate(longrope, prompt, n=30)
        assert len(answer) == 21 - 14
        tokens = np.array([[*prompt, *answer[:-1]]])  # as long as the original length: short factors
        logits = longrope.model(tokens, unroll=True).logits[0]
        assert np.asarray(logits)[13:].argmax(-1).tolist() == answer
        assert longrope.max_new_tokens(20, 9) == 1
        assert longrope.max_new_tokens(21, 9) == 9

    def test_no_cache_is_shared_past_the_original_length(self, dynamic: Engine):
        """A prompt that begins with one of another length gives the tokens that it gives alone."""
        prompt = prompt_of(dynamic.model, 30)
        for length in (30, 18, 26, 19, 30):
            (answer,) = generate(dynamic, prompt[:length], n=6, keep_cache=True)
            assert answer == as_transformers(dynamic.model, prompt[:length], 6)


@pytest.mark.usefixtures("small_chunks")
def test_the_rope_of_layers_with_a_window_may_depend_on_the_length(dynamic: Engine):
    """Windows wider than the context, in all layers: as the same RoPE in layers without."""
    local = nnx.merge(nnx.graphdef(with_local(DYNAMIC)), nnx.state(dynamic.model))
    prompt = prompt_of(local, 30)
    logits = [backbone(jnp.array([prompt])).logits for backbone in (local, dynamic.model)]
    np.testing.assert_array_equal(*logits)
    engine = Engine(local, eos_ids=())
    for length in (30, 18, 26):
        (answer,) = generate(engine, prompt[:length], n=6, keep_cache=True)
        assert answer == as_transformers(dynamic.model, prompt[:length], 6)
    assert with_local(LONG).config.context_after(20) == 21


def with_local(rope: RopeConfig) -> Backbone:
    changed = dataclasses.replace(
        SMALL, local_rope=rope, sliding_windows=(50, 50), max_position_embeddings=40, rope=RopeConfig(theta=7.0)
    )
    return Backbone(changed, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_packed_segments_have_the_angles_of_their_own_lengths(rope: RopeConfig):
    """A row of a segment past the original length and one within it gives the logits of each alone."""
    backbone, (long, short) = model(rope, 60), (prompt_of(model(rope, 60), n) for n in (26, 12))
    run = nnx.jit(lambda model, tokens, **options: model(tokens, **options).logits[0])
    ids, at = jnp.repeat(jnp.array([1, 2]), jnp.array([26, 12])), jnp.concatenate([jnp.arange(26), jnp.arange(12)])
    packed = run(backbone, jnp.array([[*long, *short]]), positions=at[None], segment_ids=ids[None])
    for found, alone in ((packed[:26], long), (packed[26:], short)):
        np.testing.assert_allclose(found, run(backbone, jnp.array([alone])), atol=1e-4 * float(packed.std()))


def test_contexts_are_as_long_as_the_kind_reaches():
    yarn = RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64)
    for rope, wanted in ((DYNAMIC, 40), (LONG, 60), (yarn, 256), (RopeConfig(kind="linear", factor=4.0), 60)):
        config = dataclasses.replace(SMALL, rope=rope, max_position_embeddings=20 if rope == DYNAMIC else 60)
        assert config.context_length == wanted
        assert config.context_after(21) == wanted
        assert config.context_after(20) == (21 if rope == LONG else wanted)


def test_a_chunk_of_a_prompt_needs_its_length():
    with pytest.raises(ValueError, match="rope dynamic depends on a prompt's length"):
        model(DYNAMIC, 20)(jnp.ones((1, 4), int), cache=KVCache.empty(SMALL, 1, 8, jnp.dtype("float32")))


@pytest.mark.parametrize(
    ("rope_scaling", "named"),
    [
        ({"rope_type": "yarn"}, "factor is missing"),
        ({"rope_type": "longrope", "short_factor": [1] * 8, "long_factor": [1] * 7}, "long_factor is [1, 1"),
        ({"rope_type": "longrope", "short_factor": [0] * 8, "long_factor": [1] * 8}, "list of 8 numbers"),
        ({"rope_type": "dynamic", "factor": None}, "factor is None"),
        ({"rope_type": "proportional"}, "supported: default, linear, llama3, yarn, dynamic, longrope"),
        ({"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_cannot_be_computed_is_named(rope_scaling: dict, named: str):
    with pytest.raises(UserError) as caught:
        RopeKeys().read(Table({"rope_scaling": rope_scaling}, "config.json"), 128, HEAD_DIM)
    assert named in str(caught.value)
