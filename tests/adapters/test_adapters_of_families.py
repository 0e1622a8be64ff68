"""Adapters of every method on the blocks that are not Llama's: against the float64 loops, and the gate at each place of the
router."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import quick
from adapters.test_adapters import reference_hidden
from adapters.test_methods import METHODS, reference
from goldens.family_models import CASES, write_model_dir
from random_models import FEW, POSITIONS, random_adapter, random_method, tokens_of

from adafuse_jax import load_backbone

FAMILIES = ("gemma3_text", "olmo2", "cohere2", "gemma2", "glm4", "granite", "exaone4", "smollm3", "phi3", "seed_oss")
BLOCKS = FAMILIES[:3]
"""Norms on both sides, behind only, and a parallel block."""
PLACES = [(family, place) for family in BLOCKS for place in POSITIONS if place != "all"]
PLACES += [(family, "after_attention") for family in FAMILIES if family not in BLOCKS]
TOLERANCE = 3e-5  # of the largest hidden state


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    return functools.cache(
        lambda name: load_backbone(write_model_dir(CASES[f"{name}_0"], tmp_path_factory.mktemp(name)), "float32")
    )


def assert_equal(found, wanted: np.ndarray, bare) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())
    assert np.abs(found - bare).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("case", quick.first(PLACES, 4), ids=map(" ".join, PLACES))
def test_adafuse(models, case):
    family, place = case
    model = models(family)
    adapter = random_adapter(model.config, targets=POSITIONS[place])
    tokens = tokens_of(model, (1, 9))
    out = model.run(tokens, adapter=adapter, unroll=True)
    hidden, gates = reference_hidden(model, adapter, np.asarray(tokens[0]))
    assert_equal(out.hidden[0], hidden, model.run(tokens, unroll=True).hidden[0])
    np.testing.assert_allclose(out.routing.dense_gates()[0], gates, atol=1e-5)


@pytest.mark.parametrize("family", quick.first(BLOCKS))
def test_methods(models, family):
    model = models(family)
    tokens = tokens_of(model, (1, 9))
    bare = model.run(tokens, unroll=True).hidden[0]
    for method in METHODS:
        fewer = FEW[method] | ({"experts_per_layer": (2, 4)} if method == "mola" else {})
        adapter = random_method(method, model.config, **fewer)
        wanted = reference(model, adapter, np.asarray(tokens[0]))
        assert_equal(model.run(tokens, adapter=adapter, unroll=True).hidden[0], wanted, bare)
