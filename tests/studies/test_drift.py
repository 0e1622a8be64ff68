"""studies/drift on a real small model and a random adapter, with few steps."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_adapter

from adafuse_jax import load_backbone
from adafuse_jax.checkpoints.adapter_directory import save_adapter
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint
from adafuse_jax.core.errors import UserError
from adafuse_jax.inference.backends.merged import Merged, adapted_weights
from studies.drift import measure
from studies.drift.__main__ import main


@pytest.fixture(scope="module")
def adapter_dir(stories260k_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("drift") / "adapter"
    adapter = random_adapter(load_backbone(stories260k_dir, "float32").config)
    save_adapter(adapter, out, backbone_name="stories", backbone_identity=HFCheckpoint.open(stories260k_dir).identity())
    return out


@pytest.fixture
def run(stories260k_dir, adapter_dir, tmp_path):
    def run(**more: object) -> dict:
        flags = {"model": stories260k_dir, "adapter": adapter_dir, "out": tmp_path} | more
        main([f"--{name}={value}" for name, value in flags.items()])
        return json.loads((tmp_path / "drift.json").read_text())

    return run


class TestDrift:
    @pytest.mark.slow
    def test_files_and_their_numbers(self, run, tmp_path):
        result = run(steps=120)
        assert {"command", "device", "jax", "adapter", "tokens", "results"} <= result.keys()
        for of in result["results"].values():
            assert [row["steps"] for row in of["switch"]] == [1, 10, 100, 120]
        bf16, fp32 = (result["results"][dtype] for dtype in ("bfloat16", "float32"))
        for of, rounding in ((bf16, 2.0**-9), (fp32, 2.0**-24)):
            errors = [row["weight_error"] for row in of["switch"]]
            assert errors == sorted(errors)
            assert 0.2 * rounding < errors[0] < rounding
            assert 0.2 * rounding < of["golden"]["weight_error"] < rounding
            assert 4 < errors[2] / errors[0] < 40  # about √100 steps
        assert bf16["switch"][-1]["kl"] > 2 * bf16["golden"]["kl"] > 1e-6
        assert bf16["golden"]["kl"] < 2 * bf16["unmerged"]["kl"]
        assert max(row["kl"] for row in fp32["switch"]) < 1e-8
        assert (tmp_path / "drift.md").read_text().count("| switch") == 8
        assert (tmp_path / "drift.png").stat().st_size > 10_000

    @pytest.mark.slow
    def test_a_text_gives_the_tokens(self, run, shared_dir):
        text = shared_dir / "assets" / "models" / "stories260K.md"
        result = run(steps=3, text=text)
        assert result["tokens"] == str(text)
        assert [row["steps"] for row in result["results"]["float32"]["switch"]] == [1, 3]

    def test_a_short_text_is_refused(self, run, tmp_path):
        (tmp_path / "short.txt").write_text("Once upon a time")
        with pytest.raises(UserError, match="at least 512"):
            run(steps=3, text=tmp_path / "short.txt")

    def test_weight_error_against_numpy(self, stories260k_dir):
        model = load_backbone(stories260k_dir, "float32")
        adapter = random_adapter(model.config, targets=("q_proj", "down_proj"))
        pristine = adapted_weights(model, adapter)
        merged = Merged.nothing("switch", model, adapter)
        experts, gates = jnp.array([[3, 1], [1, 2]]), jnp.array([[0.7, 0.3], [0.4, 0.6]])
        merged = measure.switch(adapter, jax.tree.map(jnp.copy, merged), experts, gates, 0, 2)
        difference = exact_norm = 0.0
        for name, w in merged.weights.items():
            a, b = (np.asarray(x[...], np.float64) for x in (adapter.experts[name].A, adapter.experts[name].B))
            delta = sum(g * adapter.config.scale * b[:, e] @ a[:, e] for e, g in zip((1, 2), (0.4, 0.6), strict=True))
            exact = np.asarray(pristine[name], np.float64) + delta
            assert np.abs(delta).max() > 0.01
            difference += np.sum((np.asarray(w, np.float64) - exact) ** 2)
            exact_norm += np.sum(exact**2)
        found = measure.weight_error(merged.weights, pristine, adapter, merged)
        assert found == pytest.approx(np.sqrt(difference / exact_norm), rel=0.05)
        assert 0 < found < 1e-6

    def test_each_token_merged_equals_unmerged(self, stories260k_dir):
        model = load_backbone(stories260k_dir, "float32")
        adapter = random_adapter(model.config, targets=("o_proj", "up_proj"))
        tokens = jnp.arange(3, 60)
        wanted = np.asarray(measure.logits_of(model, adapter, tokens))
        found = np.asarray(measure.merged_logits(model, adapter, tokens))
        assert np.abs(found - wanted).max() < 1e-4 * wanted.std()
        assert measure.divergence(wanted, found) < 1e-9
        assert measure.divergence(wanted, np.asarray(model(tokens[None]).logits[0])) > 1e-3
