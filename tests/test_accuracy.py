"""The accuracy study from data files to table and pictures, on a tiny model and questions made here; and its parts against
independent ways to the same numbers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import encode_all, load_tokenizer
from adafuse_jax.data.examples import MultipleChoice
from adafuse_jax.data.packing import pack
from adafuse_jax.evaluation.loading import load
from adafuse_jax.evaluation.multiple_choice import Questions as Encoded
from adafuse_jax.evaluation.multiple_choice import chosen_by_likelihood
from adafuse_jax.models.config import ModelConfig
from adafuse_jax.training.schedules import Phases
from benchmarks import accuracy, accuracy_report
from benchmarks.accuracy_data import (
    FILES,
    SCIENCEQA_TEST,
    SCIENCEQA_TRAINING,
    SETS,
    _scienceqa,
    pack_candidates,
    read_set,
    targets_of,
)
from benchmarks.accuracy_methods import (
    ABLATIONS,
    METHODS,
    VARIANTS,
    ablated,
    available,
    changes,
    make_adapter,
    settings_of,
)
from benchmarks.accuracy_training import (
    REMAT_ABOVE,
    LaneRows,
    accuracies,
    acting,
    compiled,
    low_rank_activations,
    schedule,
    start,
    step,
    train,
    trainable_parameters,
)
from benchmarks.token_classes import CLASSES, class_of, classes_of

FEW: dict[str, Any] = {
    "rank": 2, "alpha": 4.0, "num_experts": 4, "experts_per_layer": (2, 4), "targets": ("q_proj", "down_proj")
}  # fmt: skip
"""Numbers of every method here, and one shape of batches below, so that tests share their compiled programs."""
LENGTH, BATCH = 192, 2
SHAPES = ModelConfig(
    model_type="llama", vocab_size=8, embed_dim=8, hidden_dim=8, num_layers=4, num_heads=2, num_kv_heads=1,
    head_dim=4, max_position_embeddings=8, norm_eps=1e-5,
)  # fmt: skip


def small(name: str) -> dict[str, Any]:
    settings = settings_of(name)
    return settings | {key: value for key, value in FEW.items() if key in settings}


ADAFUSE = small("adafuse")


def write_gz(path: Path, rows: list[dict[str, Any]], *, lines: bool) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()))


def write_study(out: Path) -> Path:
    """`model/` and `data/`: the files of the three sets in their own forms, with few and short questions."""
    tiny.write_model(out / "model")
    data = out / "data"
    data.mkdir()
    for name, files in FILES.items():
        for file, count, first in zip(files, (24, 7), (0, 100), strict=True):
            rows = [
                {
                    "instruction": f"{name[0]} {i}?\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
                    "input": "",
                    "output": "",
                    "answer": f"answer{1 + i % 2}",
                }
                for i in range(first, first + count)
            ]
            write_gz(data / file, rows, lines=False)

    def science(i: int, split: str, answer: Any) -> dict[str, Any]:
        choices = ["x", "y\nz", "w"]
        return {"split": split, "question": f"S {i}?", "hint": "H" * (i % 2), "choices": choices, "answer": answer}

    sample = [science(i, "train", "ABC"[i % 3]) for i in range(12)] + [science(30, "test", "A")]
    think = [science(i, "train", i % 3) for i in range(8, 20)] + [science(40, "val", 1), science(31, "train", 0)]
    for file, rows in zip(SCIENCEQA_TRAINING, (sample, think), strict=True):
        write_gz(data / file, rows, lines=True)
    test = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": ("Context: H\n" if i % 2 else "") + f"S {i}?\nA. x\nB. y\nz\nC. w"},
                {"from": "gpt", "value": "ABC"[i % 3]},
            ],
        }
        for i in range(30, 36)
    ]
    write_gz(data / SCIENCEQA_TEST, [*test, test[0] | {"id": "99", "image": "x.png"}], lines=False)
    return out


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def tokenizer(study: Path) -> Any:
    return load_tokenizer(study / "model")


@pytest.fixture(scope="module")
def loaded(study: Path) -> Any:
    return load(str(study / "model"))


@pytest.fixture(scope="module")
def questions() -> list[MultipleChoice]:
    return [MultipleChoice(f"Which is {i}?", ("éé", "it is so", "no", "yes!")[: 2 + i % 3], i % 2) for i in range(9)]


def test_splits_share_no_question(study: Path):
    sizes = {}
    for name in SETS:
        found = read_set(name, study / "data")
        splits = [{(q.question, q.choices) for q in part} for part in (found.training, found.validation, found.test)]
        assert not splits[0] & splits[1]
        assert not splits[2] & (splits[0] | splits[1])
        sizes[name] = [len(part) for part in splits]
    # ScienceQA: 12 + 12 training rows of which 4 are twice, and one validation row; the row that is tested is dropped
    assert sizes == {"scienceqa": [19, 2, 6], "openbookqa": [22, 2, 7], "arc-easy": [22, 2, 7]}


def test_both_forms_of_scienceqa_become_one(study: Path):
    found = read_set("scienceqa", study / "data")
    rule = "\n\nAnswer with the letter of the correct choice."
    (odd,) = (q for q in found.test if "S 31" in q.question)
    assert odd == MultipleChoice("Question: Context: H\nS 31?\nA. x\nB. y\nz\nC. w" + rule, ("A", "B", "C"), 1)
    (even,) = (q for q in (*found.training, *found.validation) if "S 10?" in q.question)
    assert even == MultipleChoice("Question: S 10?\nA. x\nB. y\nz\nC. w" + rule, ("A", "B", "C"), 1)


def test_real_data(shared_dir: Path):
    """The sizes that the report states; and ScienceQA's two sources tell the same questions in the same words."""
    data = shared_dir / "assets" / "data"
    sizes = {name: read_set(name, data) for name in SETS}
    assert {name: [len(q.training), len(q.validation), len(q.test)] for name, q in sizes.items()} == {
        "scienceqa": [861, 96, 2224],
        "openbookqa": [4457, 495, 500],
        "arc-easy": [2024, 225, 2376],
    }
    lines = gzip.decompress((data / SCIENCEQA_TRAINING[1]).read_bytes()).decode().splitlines()
    tested = [_scienceqa(row) for row in map(json.loads, lines) if row["split"] == "test"]
    assert len(tested) == 194
    assert set(tested) <= set(sizes["scienceqa"].test)


def test_missing_file_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"openbookqa_train.*cannot be read.*--data must hold it"):
        read_set("openbookqa", tmp_path)


def test_packed_scores_choose_as_unpacked_ones(loaded: Any, questions: list[MultipleChoice]):
    """Against `evaluation`, which scores every candidate in a row of its own."""
    packed = pack_candidates(questions, loaded.tokenizer, LENGTH, rows_multiple=BATCH)
    assert len(packed.tokens) % BATCH == 0
    assert (packed.segment_ids.max(1) > 1).any(), "no row has several candidates"
    chosen = chosen_by_likelihood(loaded, Encoded.encode(questions, loaded.tokenizer, 256), batch_size=4)["accuracy"]
    expected = np.mean(np.array(chosen) == [q.answer for q in questions])
    assert accuracies(loaded.model, None, packed, batch_size=BATCH) == [expected]
    long = MultipleChoice("long " * 40, ("a", "b"), 0)
    assert pack_candidates([long, *questions], loaded.tokenizer, LENGTH, rows_multiple=1).left_out == 1


def test_candidates_that_differ_in_one_token_share_their_text(loaded: Any):
    """As many letters as choices after one prompt; chosen as by candidates in rows of their own."""
    letters = [MultipleChoice(f"Which is {i}?", tuple("ABCD"[: 2 + i % 3]), i % 2) for i in range(9)]
    packed = pack_candidates(letters, loaded.tokenizer, LENGTH, rows_multiple=BATCH)
    assert (np.sort(packed.owner[packed.owner >= 0]) == np.arange(sum(packed.choices))).all(), "one target a candidate"
    assert packed.segment_ids.max(1).sum() == len(letters), "one text a question"
    chosen = chosen_by_likelihood(loaded, Encoded.encode(letters, loaded.tokenizer, 256), batch_size=4)["accuracy"]
    expected = np.mean(np.array(chosen) == [q.answer for q in letters])
    assert accuracies(loaded.model, None, packed, batch_size=BATCH) == [expected]


@pytest.fixture(scope="module")
def rows(questions: list[MultipleChoice], tokenizer: Any) -> Any:
    return pack(encode_all(questions * 2, tokenizer, LENGTH)[0], LENGTH)


def test_lanes_are_runs_of_their_own(loaded: Any, rows: Any):
    """A lane ends as it does in another place beside another lane; a seed changes how it begins and what it sees."""
    plan = {"epochs": 1.5, "batch_size": BATCH}
    some = train(ADAFUSE, loaded.model, rows, seeds=(3, 4), rates=(1e-2, 1e-3), **plan)
    others = train(ADAFUSE, loaded.model, rows, seeds=(5, 3), rates=(1e-1, 1e-2), **plan)
    for here, there in zip(jax.tree.leaves(some.lanes.params), jax.tree.leaves(others.lanes.params), strict=True):
        np.testing.assert_allclose(here[0], there[1], rtol=1e-3, atol=1e-5)
        assert not np.allclose(here[1], there[1], rtol=1e-3, atol=1e-5)
    assert some.history[-1]["loss"][0] == pytest.approx(others.history[-1]["loss"][1], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in available() if name not in ("none", "lora-matched", "adafuse-ffn")])
def test_every_method_learns(name: str, loaded: Any, rows: Any):
    """The loss falls, and the learning rate that is given is the one that counts: at 0 nothing changes."""
    settings, rate = small(name), 1e-3 if name == "full" else 3e-2
    trained = train(settings, loaded.model, rows, seeds=(0, 0), rates=(rate, 0.0), epochs=8, batch_size=BATCH)
    first, last = (trained.history[at]["loss"][0] for at in (0, -1))
    assert last < 0.9 * first
    assert trained.diverged == [False, False]
    before = start(settings, loaded.model, (0, 0)).params
    still = zip(jax.tree.leaves(trained.lanes.params), jax.tree.leaves(before), strict=True)
    assert all(np.array_equal(after[1], old[1]) for after, old in still)
    if name != "mola":
        assert trainable_parameters(settings, loaded.model) == sum(leaf[0].size for leaf in jax.tree.leaves(before))


def test_tied_experts_learn_as_one_lora_and_then_apart(loaded: Any, rows: Any):
    """Their update is that of the LoRA which they are; let go, they differ."""
    tied, lora = small("adafuse") | {"tied": 1.0, "balance_coefficient": 0.0}, small("lora")
    plan = {"seeds": (0, 1), "rates": (1e-2, 1e-2), "epochs": 2.0, "batch_size": BATCH}
    together, halfway = (
        train(settings, loaded.model, rows, **plan).lanes.params.experts["q_proj"]
        for settings in (tied, tied | {"tied": 0.5})
    )
    for factor in (together.A[...], together.B[...]):  # [S, L, E, …]
        assert np.array_equal(factor, np.broadcast_to(factor[:, :, :1], factor.shape))
    for factor in (halfway.A[...], halfway.B[...]):
        assert all(not np.allclose(factor[:, :, 0], factor[:, :, e], atol=1e-5) for e in range(1, factor.shape[2]))

    those, that = start(tied, loaded.model, (0, 1)), start(lora, loaded.model, (0, 1))
    for name, experts in those.params.experts.items():
        that.params.experts[name].A[...] = experts.A[:, :, :1]
    place, wanted, there = targets_of(rows)
    drawn = np.array([[0, 1], [2, 0]])
    batch = LaneRows(
        tokens=rows.tokens[drawn], positions=rows.positions[drawn], segment_ids=rows.segment_ids[drawn],
        place=place[drawn], wanted=wanted[drawn], there=there[drawn],
    )  # fmt: skip
    rates = jnp.full(2, 1e-2)
    those, _ = step(
        those, loaded.model, batch, rates, jnp.float32(0), jnp.int32(0), Phases(tied_steps=jnp.int32(1)), remat=False
    )
    that, _ = step(that, loaded.model, batch, rates, jnp.float32(0), jnp.int32(0), Phases(), remat=False)
    for name, experts in those.params.experts.items():
        np.testing.assert_allclose(experts.B[:, :, 3], that.params.experts[name].B[:, :, 0], rtol=1e-2, atol=1e-6)
    one, two = (jax.tree.leaves(state.moments)[1:] for state in (those, that))  # their global norms are equal, too
    squares = [sum(float(jnp.sum(m[0])) for m in moments[len(moments) // 2 :]) for moments in (one, two)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-2)


def test_routers_that_have_settled_stay(loaded: Any, rows: Any):
    plan = {"seeds": (0, 1), "rates": (1e-2, 1e-2), "epochs": 2.0, "batch_size": BATCH}
    first = start(ADAFUSE, loaded.model, (0, 1)).params
    at_once, half, never, usual = (
        train(ADAFUSE | settings, loaded.model, rows, **plan).lanes.params
        for settings in ({"settled": 0.0}, {"settled": 0.5}, {"settled": 1.0}, {})
    )
    assert np.array_equal(at_once.router.weight[...], first.router.weight[...])
    assert not np.allclose(at_once.experts["q_proj"].B[...], 0)
    distances = [np.abs(params.router.weight[...] - first.router.weight[...]).mean() for params in (half, usual)]
    assert 0 < distances[0] < distances[1]
    np.testing.assert_allclose(never.router.weight[...], usual.router.weight[...], atol=1e-6)


@pytest.mark.skipif("mola" not in available(), reason="MoLA is not in this version")
def test_mola_counts_the_experts_that_are_there(loaded: Any):
    few, even = (
        trainable_parameters(small("mola") | {"experts_per_layer": numbers}, loaded.model)
        for numbers in ((2, 8), (5, 5))
    )
    assert few == even


def test_a_lane_that_diverges_disturbs_no_other(loaded: Any, rows: Any):
    trained = train(ADAFUSE, loaded.model, rows, seeds=(0, 0), rates=(1e-3, 1e38), epochs=2, batch_size=BATCH)
    assert trained.diverged == [False, True]
    json.dumps(trained.history, allow_nan=False)


def test_loss_of_a_step_by_hand(loaded: Any, rows: Any):
    """The first loss of the history is the mean over the targets of the cross-entropy of the first batch."""
    trained = train(ADAFUSE, loaded.model, rows, seeds=(0, 7), rates=(0.0, 0.0), epochs=0.01, batch_size=BATCH)
    assert trained.steps == 1
    for lane, seed in enumerate((0, 7)):
        batch = Batches(rows=(rows,), seed=seed, batch_size=BATCH).at(0)
        inputs = {"positions": batch.positions[0], "segment_ids": batch.segment_ids[0]}
        logits = forward(loaded.model, batch.tokens[0], **inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.array(batch.tokens[0, :, 1:]))
        mask = batch.loss_mask[0, :, 1:]
        assert trained.history[0]["loss"][lane] == pytest.approx(float((losses * mask).sum() / mask.sum()), rel=1e-5)
    assert trained.tokens == int((Batches(rows=(rows,), seed=0, batch_size=BATCH).at(0).segment_ids > 0).sum())
    assert sum(trained.history[0]["load"]) == pytest.approx(1, abs=1e-5)


@jax.jit
def forward(model: Any, tokens: Any, **inputs: Any) -> Any:
    return model(tokens, **inputs).logits


def test_targets_of_rows(rows: Any):
    place, wanted, there = targets_of(rows)
    mask = np.zeros_like(rows.loss_mask)
    for row, (places, tokens, real) in enumerate(zip(place, wanted, there, strict=True)):
        mask[row, places[real] + 1] = True
        np.testing.assert_array_equal(rows.tokens[row, places[real] + 1], tokens[real])
    np.testing.assert_array_equal(mask, rows.loss_mask)


def test_programs_made_ahead_train_alike(loaded: Any, rows: Any):
    plan = {"seeds": (0, 1), "rates": (1e-2, 1e-3), "epochs": 0.5, "batch_size": BATCH}
    width = targets_of(rows)[0].shape[1]
    ahead = compiled(ADAFUSE, loaded.model, lanes=2, batch_size=BATCH, scored=BATCH, length=LENGTH, targets=width)
    made, now = (train(ADAFUSE, loaded.model, rows, programs=programs, **plan) for programs in (ahead, None))
    for here, there in zip(jax.tree.leaves(made.lanes.params), jax.tree.leaves(now.lanes.params), strict=True):
        np.testing.assert_array_equal(here, there)


def test_full_training_runs_in_the_backbones_type(loaded: Any):
    params = jax.tree.map(lambda leaf: leaf[0], start({"adapter": "full"}, loaded.model, (0,)).params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded.model)
    backbone, adapter = acting(half, params)
    assert adapter is None
    assert backbone.dtype == jnp.bfloat16


def test_schedule():
    values = [schedule(step, 100) for step in range(100)]
    assert values.index(max(values)) == 5
    assert values[5] == 1
    assert values[0] == pytest.approx(1 / 6)
    assert 0.1 < values[-1] < 0.11
    assert schedule(0, 1) == 0.5


def test_settings_of_all_methods_are_consistent():
    for name in (*available(), *ABLATIONS):
        settings = settings_of(name)
        if settings["adapter"] not in ("none", "full"):
            jax.eval_shape(lambda settings=settings: make_adapter(settings, SHAPES, jax.random.key(0)))
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
    assert low_rank_activations(settings_of("R=64")) == 8 * 64 * 7 > REMAT_ABOVE
    assert max(low_rank_activations(settings_of(name)) for name in METHODS) <= REMAT_ABOVE


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
        "--model", str(study / "model"), "--data", str(study / "data"), "--work", str(tmp_path / "work"),
        "--out", str(tmp_path / "out"), "--methods", "none", "full", TIED_ADAFUSE, "--ablations", "k=4",
        "--seeds", "0", "1", "--lanes", "2", "--learning-rates", "1e-3", "1e-2", "--epochs", "0.5",
        "--batch-size", str(BATCH), "--length", str(LENGTH), "--dtype", "float32", *more,
    ]  # fmt: skip


def test_study_from_start_to_report(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(METHODS, TIED_ADAFUSE, ADAFUSE | {"tied": 0.5})
    assert accuracy.main(flags(study, tmp_path, "--budget-seconds", "0")) == 0
    work, out = tmp_path / "work", tmp_path / "out"
    assert not list(work.iterdir()), "nothing starts beyond the budget"
    assert accuracy.main(flags(study, tmp_path)) == 0
    names = sorted(path.name.split("-")[0] for path in work.iterdir())
    assert names == sorted(["bare", *["grid"] * 2, *["mixture"] * 2, *["alone"] * 6, "ablation"])
    report = json.loads((out / "accuracy.json").read_text())
    rows = {(row["regime"], row["method"]): row for row in report["rows"]}
    assert set(rows) == {
        ("bare", "none"), ("mixture", "full"), ("mixture", TIED_ADAFUSE), ("alone", "full"), ("alone", TIED_ADAFUSE),
        ("ablation", "k=4"),
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
    table = (out / "accuracy.md").read_text()
    assert capsys.readouterr().out.endswith(table + "\n")
    for row in rows.values():
        assert f"| {row['method']} | " in table
        assert f"**{100 * row['mean_accuracy']:.2f}" in table
    assert (out / "accuracy.png").stat().st_size > 10_000
    assert (out / f"accuracy_experts_{TIED_ADAFUSE}.png").stat().st_size > 10_000
    used = json.loads(next(work.glob("mixture-*adafuse*.json")).read_text())["expert_use"]
    tokens = {name: np.array(table).sum() / ADAFUSE["top_k"] for name, table in used.items()}
    tokenizer = load_tokenizer(study / "model")
    for name in SETS:
        packed = pack_candidates(read_set(name, study / "data").test, tokenizer, LENGTH, rows_multiple=BATCH)
        assert tokens[name] == (packed.segment_ids > 0).sum()

    # one run is gone: it alone is done again, and says the same
    (gone,) = work.glob("ablation-*.json")
    before = json.loads(gone.read_text())
    kept = {path: path.stat().st_mtime_ns for path in work.iterdir() if path != gone}
    gone.unlink()
    assert accuracy.main(flags(study, tmp_path)) == 0
    assert json.loads(gone.read_text())["lanes"] == before["lanes"]
    again = json.loads((out / "accuracy.json").read_text())["rows"]
    assert [row["method"] for row in again] == [row["method"] for row in report["rows"]]
    by_file_name = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
    names = [row["method"] for row in accuracy_report.summarise(by_file_name)]
    assert names == ["none", "full", TIED_ADAFUSE, "full", TIED_ADAFUSE, "k=4"], "the tables' order is that of METHODS"
    assert {path: path.stat().st_mtime_ns for path in work.iterdir() if path != gone} == kept
    with pytest.MonkeyPatch.context() as other:
        other.setitem(METHODS, "full", METHODS["full"] | {"rank": 1})
        with pytest.raises(UserError, match=r"full-.*json: was made with .*, which full no longer is; remove it"):
            accuracy.main(flags(study, tmp_path))
    with pytest.raises(UserError, match=r"was made with .*'epochs': 0.5.*'epochs': 2.0.*another --work"):
        accuracy.main(flags(study, tmp_path, "--epochs", "2"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--lanes", "0"), "--lanes is 0: it must be greater than 0"),
        (("--epochs", "-1"), "--epochs is -1.0: it must be greater than 0"),
        (
            ("--learning-rates", "1e37", "1e38", "--epochs", "2"),
            f"{TIED_ADAFUSE}: the loss is not finite with any of --learning-rates",
        ),
    ],
)
def test_bad_flags(more: tuple[str, ...], says: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, TIED_ADAFUSE, ADAFUSE | {"tied": 0.5})
    with pytest.raises(UserError) as told:
        accuracy.main([*flags(study, tmp_path), "--methods", TIED_ADAFUSE, "--sets", "scienceqa", *more])
    assert says in str(told.value)


def test_the_report_names_what_is_not_run_yet():
    table = {
        "command": "x", "device": "d", "jax": "0",
        "scored_and_left_out": {"validation": [816, 0]},
        "validation": {"lora": {"0.0003": 0.25, "0.0006": 0.5}},
        "study": {"sets": {"s": [1, 1, 1]}, "epochs": 2, "batch_size": 8, "length": 512, "dtype": "bfloat16"},
    }  # fmt: skip
    bare = {
        "method": "none", "regime": "bare", "diverged": False, "lanes_trained_together": 0, "mean_accuracy": 0.3,
        "standard_error": None, "per_set": {"s": {"accuracy": 0.3, "standard_error": None}}, "learning_rate": None,
        "seeds": [], "seconds_per_seed": 0.0, "trainable_params": 0, "devices": ["A"],
    }  # fmt: skip
    text = accuracy_report.markdown([bare], table)
    assert "Run on" not in text
    other = bare | {"method": "lora", "devices": ["A", "B"], "lanes_trained_together": 1}
    assert "Run on A: none (bare).\nRun on A and B: lora (bare)." in accuracy_report.markdown([bare, other], table)
    assert "| lora | 25.00 (0.0003) | 50.00 (0.0006) |" in text
    assert "| adafuse | not run yet |" in text
    assert "| k=1 | | | not run yet |" in text
