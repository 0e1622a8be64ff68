"""The study of science questions from data files to table and plots, on a tiny model and questions made here; and its parts
against independent ways to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from study_data import BATCH, LENGTH, small, write_study

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.models.decoder import Backbone
from studies.questions import (
    SETS,
    pack_candidates,
    read_set,
)
from studies.runs import read_records
from studies.science_questions import __main__ as program
from studies.science_questions import report as study_report
from studies.science_questions.methods import (
    ABLATIONS,
    METHODS,
    VARIANTS,
    ablated,
    changes,
    make,
    needs_remat,
    settings_of,
)
from studies.science_questions.token_classes import CLASSES, class_of, classes_of

ADAFUSE = small("adafuse")
SHAPES = ModelConfig(
    model_type="llama", vocab_size=8, embed_dim=8, hidden_dim=8, num_layers=4, num_heads=2, num_kv_heads=1,
    head_dim=4, max_position_embeddings=8, norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def tokenizer(study: Path) -> Any:
    return load_tokenizer(study / "model")


def test_settings_of_all_methods_are_consistent():
    backbone = jax.eval_shape(lambda: Backbone(SHAPES, rngs=nnx.Rngs(0)))
    for name in (*METHODS, *ABLATIONS):
        settings = settings_of(name)
        if settings["adapter"] not in ("none", "full"):
            jax.eval_shape(lambda settings=settings: make(settings, backbone, jax.random.key(0)))
    for base in VARIANTS:
        for name in (name for name in ABLATIONS if changes(name, base)):
            settings = settings_of(name, base)
            changed = {key for key in settings if settings[key] != METHODS[base].get(key)} - {"alpha", "renormalize"}
            assert len(changed) == 1, name
            assert settings["alpha"] / settings["rank"] == METHODS[base]["alpha"] / METHODS[base]["rank"]
    assert METHODS["lora-matched"]["rank"] == METHODS["adafuse"]["rank"] * METHODS["adafuse"]["num_experts"]
    assert [name for name in ABLATIONS if not changes(name, "adafuse-tied-4")] == ["E=4", "R=32"]
    assert [name for name in ABLATIONS if not changes(name, "adafuse")] == ["E=8", "R=16", "settled=1"]
    sizes = [METHODS[name]["num_experts"] * METHODS[name]["rank"] for name in VARIANTS]
    assert len(set(sizes)) == 1, "the variants have equally many parameters, but for the router's"
    assert needs_remat(settings_of("R=64"))
    assert not any(needs_remat(settings_of(name)) for name in METHODS)


def test_ablations_change_the_best_variant():
    grids: dict[str, dict[float, float]] = {"mola": {1e-3: 0.9}, "adafuse": {1e-3: 0.5, 2e-3: 0.6}}
    assert ablated(grids) == "adafuse"
    assert ablated(grids | {"adafuse-settled": {1e-3: 0.6}}) == "adafuse", "of equal ones the first"
    assert ablated(grids | {"adafuse-tied": {1e-3: 0.7}, "adafuse-settled": {}}) == "adafuse-tied"
    assert settings_of("k=4", "adafuse-tied") == METHODS["adafuse-tied"] | {"top_k": 4}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" cat", "word, after a space"), ("\ncat", "word, after a space"), ("cat", "letters, within a word"),
        ("'s", "letters, within a word"), ("é", "letters, within a word"), (" 12", "digits"), ("7", "digits"),
        ("?", "punctuation"), (" +=", "punctuation"), ("'", "punctuation"), ("\n\n", "white space"), ("a1", "other"),
        ("", "other"), ("\ufffd", "other"),
    ],
)  # fmt: skip
def test_class_of_a_token(text: str, name: str):
    assert class_of(text) == name


def test_classes_of_a_vocabulary(tokenizer: Any):
    classes = classes_of(tokenizer, 264)
    by_token = {
        text: CLASSES[classes[tokenizer.convert_tokens_to_ids(text)]] for text in ("a", "7", "!", "Ġ", "<|im_end|>")
    }
    assert by_token == {
        "a": "letters, within a word", "7": "digits", "!": "punctuation", "Ġ": "white space", "<|im_end|>": "special"
    }  # fmt: skip
    assert (classes[260:] == CLASSES.index("other")).all()


TIED_ADAFUSE = "adafuse-tied"


def flags(study: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "--model", str(study / "model"), "--data", str(study / "data"), "--runs", str(tmp_path / "runs"),
        "--record", str(tmp_path / "record.jsonl.gz"),
        "--out", str(tmp_path / "out"), "--methods", "none", TIED_ADAFUSE, "--ablations", "k=4",
        "--seeds", "0", "1", "--replicas", "2", "--learning-rates", "1e-3", "1e-2", "--epochs", "0.5",
        "--batch-size", str(BATCH), "--length", str(LENGTH), "--dtype", "float32", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_study_from_start_to_report(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(METHODS, TIED_ADAFUSE, ADAFUSE | {"tied": 0.5})
    assert program.main(flags(study, tmp_path, "--budget-seconds", "0")) == 0
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert not runs.exists(), "nothing starts beyond the budget"
    assert program.main(flags(study, tmp_path)) == 0
    names = sorted(path.name.split("-")[0] for path in runs.iterdir())
    assert names == sorted(["bare", "grid", "mixture", *["alone"] * 3, "ablation"])
    report = json.loads((out / "science_questions.json").read_text())
    rows = {(row["regime"], row["method"]): row for row in report["rows"]}
    assert set(rows) == {
        ("bare", "none"), ("mixture", TIED_ADAFUSE), ("alone", TIED_ADAFUSE), ("ablation", "k=4")
    }  # fmt: skip
    for (regime, _), row in rows.items():
        per_seed = np.mean([row["per_set"][name]["seeds"] for name in SETS], axis=0)
        assert row["mean_accuracy"] == pytest.approx(per_seed.mean())
        if regime == "bare":
            assert row["standard_error"] is None
            continue
        assert row["seeds"] == [0, 1]
        assert row["standard_error"] == pytest.approx(np.std(per_seed, ddof=1) / np.sqrt(2))
        grid = {float(rate): value for rate, value in row["validation_accuracy_by_learning_rate"].items()}
        assert regime == "ablation" or row["learning_rate"] == max(grid, key=lambda rate: (grid[rate], -rate))
    assert rows["ablation", "k=4"]["learning_rate"] == rows["mixture", TIED_ADAFUSE]["learning_rate"]
    table = (out / "science_questions.md").read_text()
    assert capsys.readouterr().out.endswith(table + "\n")
    for row in rows.values():
        assert f"| {row['method']} | " in table
        assert f"**{100 * row['mean_accuracy']:.2f}" in table
    assert (out / "science_questions.png").stat().st_size > 10_000
    assert (out / f"science_questions_experts_{TIED_ADAFUSE}.png").stat().st_size > 10_000
    used = json.loads(next(runs.glob("mixture-*adafuse*.json")).read_text())["expert_use"]
    tokens = {name: np.array(table).sum() / ADAFUSE["top_k"] for name, table in used.items()}
    tokenizer = load_tokenizer(study / "model")
    for name in SETS:
        packed = pack_candidates(read_set(name, study / "data").test, tokenizer, LENGTH)
        assert tokens[name] == (packed.segment_ids > 0).sum()

    # one run is gone: it alone is done again, with the same result
    (gone,) = runs.glob("ablation-*.json")
    before = json.loads(gone.read_text())
    unchanged = {path: path.stat().st_mtime_ns for path in runs.iterdir() if path != gone}
    gone.unlink()
    assert program.main(flags(study, tmp_path)) == 0
    assert json.loads(gone.read_text())["replicas"] == before["replicas"]
    again = json.loads((out / "science_questions.json").read_text())["rows"]
    names = [row["method"] for row in report["rows"]]
    assert [row["method"] for row in again] == names == ["none", TIED_ADAFUSE, TIED_ADAFUSE, "k=4"]
    table = (out / "science_questions.md").read_text()
    by_file_name = read_records(runs)
    other = json.loads(json.dumps(by_file_name).replace(TIED_ADAFUSE, "full"))
    found = [row["method"] for row in study_report.summarise(by_file_name | other)]
    assert found == ["none", "full", TIED_ADAFUSE, "full", TIED_ADAFUSE, "k=4"], "the tables' order is that of METHODS"
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir() if path != gone} == unchanged

    # merged, the runs are in the record: none is done again, and the report is the same
    assert program.main(["--merge", *flags(study, tmp_path)]) == 0
    record = tmp_path / "record.jsonl.gz"
    packed = record.read_bytes()
    assert read_records(record) == by_file_name
    assert program.main(["--merge", *flags(study, tmp_path)]) == 0
    assert record.read_bytes() == packed, "equal runs are equal bytes"
    for path in list(runs.iterdir()):
        path.unlink()
    assert program.main(flags(study, tmp_path)) == program.main(["--report", *flags(study, tmp_path)]) == 0
    assert not list(runs.iterdir()), "what is in the record is not done again"
    assert [row["method"] for row in json.loads((out / "science_questions.json").read_text())["rows"]] == names
    assert (out / "science_questions.md").read_text() == table
    with pytest.raises(UserError, match=r"--runs .*: no run is there"):
        program.main(["--merge", *flags(study, tmp_path)])
    with pytest.raises(UserError, match=r"was made with .*'epochs': 0.5.*'epochs': 2.0.*another --runs"):
        program.main(flags(study, tmp_path, "--epochs", "2"))
    monkeypatch.setitem(METHODS, TIED_ADAFUSE, METHODS[TIED_ADAFUSE] | {"rank": 1})
    with pytest.raises(UserError, match=r"run .*tied-.*: was made with .*, which adafuse-tied no longer is; remove it"):
        program.main(flags(study, tmp_path))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--replicas", "0"), "--replicas is 0: it must be greater than 0"),
        (("--epochs", "-1"), "--epochs is -1.0: it must be greater than 0"),
        (
            ("--learning-rates", "1e37", "1e38", "--epochs", "2"),
            f"{TIED_ADAFUSE}: the loss is not finite with any of --learning-rates",
        ),
    ],
)
def test_bad_flags(more: tuple[str, ...], expected: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, TIED_ADAFUSE, ADAFUSE | {"tied": 0.5})
    with pytest.raises(UserError) as caught:
        program.main([*flags(study, tmp_path), "--methods", TIED_ADAFUSE, "--sets", "scienceqa", *more])
    assert expected in str(caught.value)


def test_the_report_names_what_is_not_run_yet():
    table = {
        "command": "x", "device": "d", "jax": "0",
        "scored_and_left_out": {"validation": [816, 0]},
        "validation": {"lora": {"0.0003": 0.25, "0.0006": 0.5}},
        "study": {"sets": {"s": [1, 1, 1]}, "epochs": 2, "batch_size": 8, "length": 512, "dtype": "bfloat16"},
    }  # fmt: skip
    bare = {
        "method": "none", "regime": "bare", "diverged": False, "replicas_trained_together": 0, "mean_accuracy": 0.3,
        "standard_error": None, "per_set": {"s": {"accuracy": 0.3, "standard_error": None}}, "learning_rate": None,
        "seeds": [], "seconds_per_seed": 0.0, "trainable_params": 0, "devices": ["A"],
    }  # fmt: skip
    text = study_report.markdown([bare], table)
    assert "Run on" not in text
    other = bare | {"method": "lora", "devices": ["A", "B"], "replicas_trained_together": 1}
    assert "Run on A: none (bare).\nRun on A and B: lora (bare)." in study_report.markdown([bare, other], table)
    assert "| lora | 25.00 (0.0003) | 50.00 (0.0006) |" in text
    assert "| adafuse | not run yet |" in text
    assert "| k=1 | | | not run yet |" in text
