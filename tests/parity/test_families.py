"""Families whose blocks are not Llama's, against transformers: logits, greedy tokens after prompts of many lengths, and
tensors that go in and out unchanged. The references are `goldens/families`, made by goldens/make_families.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import tiny
from flax import nnx
from generation import generate
from goldens import family_models, rope_models
from goldens.family_models import CASES, lengths, write_model_dir
from goldens.tiny_models import Case, read_tensors, write_json
from transformers import AutoConfig

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.checkpoints.hf_config import parse_hf_config
from adafuse_jax.checkpoints.hf_export import export_backbone
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.tokenizer import load_tokenizer
from adafuse_jax.inference.engine import Engine
from adafuse_jax.models.loss import token_losses
from adafuse_jax.models.registry import FAMILIES

GOLDENS = tiny.GOLDENS / "families"
TOLERANCE = 1e-4  # largest logit difference over the standard deviation of the logits, float32
QUICK = [pytest.param(case, marks=() if name.endswith("_0") else pytest.mark.slow) for name, case in CASES.items()]

IN_TURN = [f"{family}_{i % 3}" for i, family in enumerate(family_models.FAMILIES)]
"""A case of each family, with the first, second and third lengths in turn."""


def golden_of(case: Case) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{case.name}.npz") as golden:
        return dict(golden)


def test_every_case_has_a_golden():
    assert {path.stem for path in GOLDENS.glob("*.npz")} == CASES.keys()


@pytest.mark.parametrize("case", QUICK, ids=CASES)
def test_logits_and_greedy_tokens(case: Case, tmp_path: Path):
    """The logits of every step of a greedy continuation, from one forward pass of prompts and continuations."""
    golden, model = golden_of(case), load_backbone(write_model_dir(case, tmp_path))
    rows = [np.concatenate([golden[f"prompt_{n}"], golden[f"greedy_{n}"]]) for n in lengths(case)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens).logits)(model, jnp.asarray(tokens)))
    for n, of_row in zip(lengths(case), logits, strict=True):
        expected, greedy = golden[f"logits_{n}"], golden[f"greedy_{n}"]
        found = of_row[n - 1 : n - 1 + len(greedy)]
        error = np.abs(found - expected).max() / expected.std()
        assert error <= TOLERANCE, f"after {n} tokens logits differ by {error:.1e} of their standard deviation"
        np.testing.assert_array_equal(found.argmax(-1), greedy)


@pytest.mark.parametrize("name", quick.first(rope_models.CASES, 3))
def test_every_kind_of_rope(name: str, tmp_path: Path):
    """Texts within the original length and past it, with keys of transformers 4 and of 5."""
    case = rope_models.CASES[name]
    model = load_backbone(rope_models.write_model_dir(case, tmp_path), "float32")
    with np.load(tiny.GOLDENS / "rope_models.npz") as golden:
        assert golden.keys() == rope_models.CASES.keys()
        for length, expected in zip(rope_models.LENGTHS, golden[name], strict=True):
            found = model(rope_models.tokens(case, length)[None], unroll=True).logits[0, -1]
            assert np.abs(found - expected).max() / expected.std() <= TOLERANCE


def test_kinds_of_rope_that_a_class_lacks_are_refused(tmp_path: Path):
    cases = {(case.config["model_type"], case.name.rsplit("_", 1)[1]) for case in rope_models.CASES.values()}
    assert cases | rope_models.LACKING == {(family, kind) for family in FAMILIES for kind in rope_models.KINDS}
    for family, kind in rope_models.LACKING:
        write_json(rope_models.case_of(family, kind, is_new=True).config, tmp_path / "config.json")
        with pytest.raises(UserError, match=f"rope_type is '{kind}'; supported|short_factor is missing"):
            parse_hf_config(tmp_path)


@pytest.mark.parametrize("name", quick.first(sorted(IN_TURN)))
def test_decoding_from_the_cache(name: str, tmp_path: Path):
    """Prompts in chunks, all rows together, then token by token."""
    case = CASES[name]
    golden, model = golden_of(case), load_backbone(write_model_dir(case, tmp_path))
    prompts = [golden[f"prompt_{n}"].tolist() for n in lengths(case)]
    assert generate(Engine(model, eos_ids=()), *prompts, n=8) == [golden[f"greedy_{n}"].tolist() for n in lengths(case)]


@pytest.mark.parametrize("name", quick.first(["gemma2_0", "granite_0"]))
def test_loss_and_its_gradient_are_those_of_the_logits(name: str, tmp_path: Path):
    """Multipliers and soft caps are in the loss, which makes logits a part at a time."""
    model = load_backbone(write_model_dir(CASES[name], tmp_path))
    tokens = jnp.asarray(golden_of(CASES[name])["prompt_65"])[None]

    def in_parts(model):
        return token_losses(model, model.run(tokens).hidden, tokens, jnp.ones(tokens.shape))[0]

    def at_once(model):
        log_p = jax.nn.log_softmax(model(tokens).logits[0, :-1])
        return -jnp.take_along_axis(log_p, tokens[0, 1:, None], axis=-1).sum()

    (loss, gradient), (wanted, exact) = (jax.jit(jax.value_and_grad(f))(model) for f in (in_parts, at_once))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma-3-270m", "qwen2.5-coder-0.5b"])
def test_real_models(packaged_dir: Callable[[str], Path], model: str):
    """64 greedy tokens after ten prompts, in float32."""
    directory = packaged_dir(model)
    golden = json.loads((GOLDENS / "real.json").read_text())[model]
    tokenizer, prompts = load_tokenizer(directory), [row["prompt"] for row in golden]
    texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    assert [tokenizer(text)["input_ids"] for text in texts] == prompts
    engine = Engine(load_backbone(directory, "float32"), eos_ids=())
    assert generate(engine, *prompts, n=64) == [row["greedy"] for row in golden]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_export_gives_the_same_tensors_and_config(case: Case, tmp_path: Path):
    """With config.json at hand it is kept; without, transformers reads the new one as the same model."""
    source = write_model_dir(case, tmp_path / "source")
    model = load_backbone(source)
    export_backbone(model, tmp_path / "with", source=source)
    export_backbone(model, tmp_path / "without")
    tensors = read_tensors(source)
    for out in (tmp_path / "with", tmp_path / "without"):
        exported, again = read_tensors(out), load_backbone(out)
        assert exported.keys() == tensors.keys()
        assert all(exported[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
        assert again.config == model.config
        equal = jax.tree.map(lambda x, y: bool((x == y).all()), nnx.state(again), nnx.state(model))
        assert all(jax.tree.leaves(equal))
    wanted, copied, written = (
        AutoConfig.from_pretrained(path).to_dict() for path in (source, tmp_path / "with", tmp_path / "without")
    )
    own = ("_name_or_path", "transformers_version", "dtype")
    assert {k: v for k, v in copied.items() if k not in own} == {k: v for k, v in wanted.items() if k not in own}
    # Keys that only files of other versions have, and that nothing reads where others say the same.
    spare = {"sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval", "head_dim", "hidden_act"}
    defaults = {
        "attention_factor",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    }  # written out, or what they give
    for table in (wanted, written):
        table["rope_parameters"] = {k: v for k, v in table["rope_parameters"].items() if k not in defaults}
    for name in wanted.keys() - spare - set(own):
        assert written[name] == wanted[name], name
