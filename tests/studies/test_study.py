"""The accuracy study of pre-gated experts on a tiny model: its parts against independent ways to the same numbers, and the
whole from data files to the tables."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from study_data import write_gz, write_study

from adafuse_jax.checkpoints.hf_checkpoint import load_backbone
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import load_tokenizer
from adafuse_jax.data.packing import Rows
from benchmarks.common.timing import Stopwatch
from studies.accuracy import arms, made_up, mixture, pregated, scoring, tasks
from studies.accuracy.__main__ import main
from studies.accuracy.programs import problems
from studies.accuracy.study import Plan, Run, Study, best_rate, grid, of_seeds
from studies.questions import Packed
from studies.runs import Runs, read_records
from studies.training import Trainer, optimizer_of, phases_of

LENGTH, LIMIT = 192, 6
FEW: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "down_proj")}
SMALL = {
    "lora-32": arms.ARMS["lora-32"] | FEW,
    "adafuse-context": arms.ARMS["adafuse-context"] | FEW | {"num_experts": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short questions of all sets in their files' forms."""
    folder = write_study(tmp_path_factory.mktemp("study")) / "data"
    for split, first, count in (("training", 0, 30), ("test", 27, 6)):
        sums = [(f"{i} + 2?", f"It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}") for i in range(first, first + count)]
        write_gz(folder / tasks.GSM8K[split], [{"question": q, "answer": a} for q, a in sums], lines=True)
    for name, file in tasks.INSTRUCTIONS.items():
        rows = [{"instruction": f"{name} {i}", "input": "x" * (i % 2), "output": f"y{i}"} for i in range(40)]
        write_gz(folder / file, rows, lines=False)
    return folder


@pytest.fixture(scope="module")
def file(data: Path, stories260k_dir: Path) -> Path:
    out = data.parent / "mixture.npz"
    flags = ["--prepare", "--model", str(stories260k_dir), "--data", str(data), "--mixture", str(out)]
    assert main([*flags, "--length", str(LENGTH), "--limit", str(LIMIT)]) == 0
    return out


@pytest.fixture(scope="module")
def mixed(file: Path) -> mixture.Mixture:
    return mixture.load(file)


@pytest.fixture(scope="module")
def model(stories260k_dir: Path) -> Any:
    return load_backbone(str(stories260k_dir), "float32")


def test_languages_contradict_each_other():
    assert made_up.in_language(47, "vel") == "nu ka"
    assert made_up.in_language(47, "dor") == "ta ka"
    for language in made_up.LANGUAGES:
        assert sorted(made_up.MEANING[language]) == list("0123456789")
    assert all(a != b for a, b in zip(*made_up.MEANING.values(), strict=True))
    questions = list(made_up.questions())
    assert len({q for q, _ in questions}) == len(questions)


def test_splits_share_no_question(data: Path):
    read = {name: tasks.read_task(name, data) for name in tasks.SETS}
    for task in read.values():
        parts = [{tasks._question(e) for e in getattr(task, split)} for split in tasks.SPLITS]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert all(parts)
    for split in tasks.SPLITS:
        vel, dor = ([tasks._key(e) for e in getattr(read[name], split)] for name in made_up.LANGUAGES)
        assert vel == dor
    gsm8k = read["gsm8k"]  # of 30 + 6 questions three are both
    assert len(gsm8k.training) + len(gsm8k.validation) == 27
    assert gsm8k.test[0].messages[1].content == "It is 29.\n#### 29"  # type: ignore[union-attr]


def test_final_number():
    cases = {"so 1,234.\n#### 1,200": 1200, "7 and -3.50": -3.5, "none": None, "5 ####": None, "#### 7.": 7}
    assert {text: tasks.final_number(text) for text in cases} == cases


def test_mixture_file_holds_every_example_once(mixed: mixture.Mixture, stories260k_dir: Path):
    tokenizer = load_tokenizer(stories260k_dir)
    rows, seen = mixed.training, np.zeros(len(tasks.SETS), int)
    assert mixed.split == "validation"
    for row in range(len(rows.tokens)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = rows.segment_ids[row] == segment
            (task,) = set(rows.tasks[row, here])
            seen[task] += 1
            text = tokenizer.decode(rows.tokens[row, here])
            assert (f"Answer in {tasks.SETS[task].title()}." in text) == (tasks.SETS[task] in made_up.LANGUAGES)
            inside = here & (rows.loss_mask[row] > 0)
            assert rows.loss_mask[row, inside].sum() == pytest.approx(1)
            assert np.ptp(rows.loss_mask[row, inside]) == 0
    assert seen.tolist() == [LIMIT] * len(tasks.SETS)
    packed = mixed.scored["vel"]
    row = packed.tokens[0]
    first = packed.owner[0] == 0
    words = tokenizer.decode([t for t in packed.wanted[0, first] if t not in mixed.stops])
    assert set(words.split()) <= set(made_up.WORDS)
    assert (row[packed.place[0, first][1:]] == packed.wanted[0, first][:-1]).all(), "a target follows its place"


def test_measures_by_hand():
    nothing = np.zeros((1, 6), int)
    form: dict[str, Any] = dict.fromkeys(("tokens", "positions", "segment_ids", "place", "wanted"), nothing)
    owner = np.array([[0, 0, 1, 2, 3, -1]])
    losses, hits = np.array([[1.0, 2.0, 1.5, 0.5, 3.0, 9.0]]), np.array([[1, 0, 1, 1, 1, 0]], bool)
    choices = Packed(**form, owner=owner, choices=[2, 2], answers=[0, 0], left_out=0)
    found = scoring.measured(choices, losses, hits)
    p = np.exp([-3.0, -1.5]), np.exp([-0.5, -3.0])
    assert found["accuracy"] == 50
    assert found["choice_loss"] == pytest.approx(-np.mean([np.log(q[0] / q.sum()) for q in p]))
    texts = Packed(**form, owner=owner, choices=[1] * 4, answers=[0] * 4, left_out=0)
    found = scoring.measured(texts, losses, hits)
    assert found == {"loss": pytest.approx(1.6), "likelihood": pytest.approx(100 * np.exp(-1.6)), "exact": 75}
    of_all = {name: dict.fromkeys(tasks.MEASURES[name], 10.0 * i) for i, name in enumerate(tasks.SETS)}
    of_all["gsm8k"] = {"exact": 8.0, "likelihood": 0.0}
    assert scoring.mixture_mean(of_all) == pytest.approx((4 + 10 * sum(range(1, 8))) / 8)


def test_loss_of_a_step_by_hand(mixed: mixture.Mixture, model: Any):
    """Mean over the examples of a batch of the mean over an example's targets, of a LoRA that is still zero."""
    rows = mixed.training
    arm = SMALL["lora-32"]
    trainer = Trainer(
        partial(arms.make, arm), steps=1, optimizer=optimizer_of(1), phases=phases_of(arm, 1), forward=pregated.forward
    )
    trained = trainer.train(model, rows, seeds=(0, 7), rates=(0.0, 0.0), batch_size=2, points=20)
    run = jax.jit(lambda t, p, s: jax.nn.log_softmax(model(t, positions=p, segment_ids=s).logits))
    for replica, seed in enumerate((0, 7)):
        order = Batches(
            rows=(Rows(rows.tokens, rows.tokens > 0, rows.segment_ids, rows.positions),), seed=seed, batch_size=2
        )
        batch, examples = order.at(0), []
        tokens, segments = batch.tokens[0], batch.segment_ids[0]
        logs = run(tokens, batch.positions[0], segments)
        for row in range(2):
            (found,) = np.flatnonzero((rows.tokens == tokens[row]).all(1))
            place = np.flatnonzero(rows.loss_mask[found]) - 1
            for segment in range(1, segments[row].max() + 1):
                of = place[segments[row, place] == segment]
                examples.append(-np.mean(logs[row, of, tokens[row, of + 1]]))
        assert trained.history[0]["loss"][replica] == pytest.approx(np.mean(examples), rel=1e-4)


def test_targets_of_rows():
    mask = np.random.default_rng(0).random((5, 40)) < 0.1
    mask[:, 0] = False
    tokens = np.random.default_rng(1).integers(0, 99, mask.shape)
    rows = Rows(tokens, mask, tokens, tokens)
    place, wanted, is_target = mixture.targets_of(rows)
    found = np.zeros_like(mask)
    for row, (places, following, real) in enumerate(zip(place, wanted, is_target, strict=True)):
        found[row, places[real] + 1] = True
        np.testing.assert_array_equal(rows.tokens[row, places[real] + 1], following[real])
    np.testing.assert_array_equal(found, mask)


def test_weights_of_examples():
    mask = np.array([[0, 1, 1, 0, 1, 0]], bool)
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    rows = Rows(mask.astype(np.int32), mask, segments, segments)
    assert mixture.weights_of(rows).tolist() == [[0, 0.5, 0.5, 0, 1, 0]]


@pytest.mark.slow
def test_study_from_files_to_tables(file: Path, stories260k_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An arm at two learning rates, then on two seeds; started again; then the tables, beside a LoRA of other numbers."""
    monkeypatch.setattr(arms, "ARMS", SMALL)
    runs, out, arm = tmp_path / "runs", tmp_path / "study.md", "adafuse-context"
    record = tmp_path / "record.jsonl.gz"
    places = ["--runs", str(runs), "--record", str(record)]
    flags = ["--model", str(stories260k_dir), "--mixture", str(file), *places, "--dtype", "float32"]
    flags += ["--steps", "8", "--batch-size", "2", "--new-tokens", "3", "--learning-rates", "1e-2", "1e-3"]
    assert main([*flags, "--budget-seconds", "1e-6"]) == 0
    assert not list(runs.glob("*")), "the budget was over before the first run"
    plan = Plan(steps=8, batch_size=2, new_tokens=3, dtype="float32")
    study = Study(str(stories260k_dir), file, Runs(record, runs), plan)
    study.do_all([grid(arm, (1e-2, 1e-3))], budget_seconds=None, watch=Stopwatch())
    replicas = study.records[f"grid-{arm}-0@0.01,0@0.001"]["replicas"]
    best = best_rate(study.records, arm)
    assert max(r["mean"] for r in replicas) == next(r["mean"] for r in replicas if r["learning_rate"] == best)
    study.do_all([of_seeds(arm, (0, 5), study.records)], budget_seconds=None, watch=Stopwatch())

    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert main([*flags, "--arms", arm]) == main([*flags, "--arms", arm, "--stage", "seeds", "--seeds", "0", "5"]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == before, "what is recorded is not done again"
    records = read_records(runs)
    assert records == study.records
    for record in records.values():
        losses = [point["loss"][0] for point in record["history"]]
        assert sum(losses[-3:]) < sum(losses[:3])
        for replica in record["replicas"]:
            assert replica["mean"] == pytest.approx(scoring.mixture_mean(replica["measures"]), abs=1e-3)
            assert sum(replica["load"]) == pytest.approx(1, abs=1e-3)
    (seeds,) = (record for record in records.values() if record["run"]["stage"] == "seeds")
    again, other = (replica["measures"]["code"]["loss"] for replica in seeds["replicas"])
    was = next(r for r in replicas if r["learning_rate"] == best)
    assert again == pytest.approx(was["measures"]["code"]["loss"], rel=1e-3)
    assert other != again

    for name, record in records.items():
        lora = json.loads(json.dumps(record).replace(arm, "lora-32")) | {"settings": arms.table(SMALL["lora-32"])}
        for replica in lora["replicas"]:
            replica["measures"]["vel"]["exact"] -= 8 * (2 + replica["seed"] / 5)  # 2 or 3 points less in the mean
        (runs / f"{name.replace(arm, 'lora-32')}.json").write_text(json.dumps(lora))
    assert main(["--report", *places, "--out", str(out)]) == main(["--merge", *places]) == 0
    text = out.read_text()
    for path in list(runs.iterdir()):
        path.unlink()
    assert main([*flags, "--arms", arm]) == main(["--report", *places, "--out", str(out)]) == 0
    assert not list(runs.iterdir()), "what is in the record is not done again"
    assert out.read_text() == text
    assert f"**{was['mean']:.2f}**" in text
    assert f"| {arm} | lora-32 | +2.50 ± 6.35 | +0.00 ± 0.00 | lora-32 | +2.50 ± 6.35 | +0.00 ± 0.00 |" in text
    with pytest.raises(UserError, match="another --runs"):
        main([*flags, "--steps", "5"])
    monkeypatch.setitem(arms.ARMS, arm, SMALL[arm] | {"rank": 3})
    with pytest.raises(UserError, match="no longer is; remove it"):
        main(flags)


@pytest.mark.slow
def test_bare_backbone_and_programs_are_recorded(
    file: Path, stories260k_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Scores without training, of equal replicas; pass@1 as the judged replies have it; tables and pictures of both."""
    monkeypatch.setattr(arms, "ARMS", SMALL)
    plan = Plan(steps=2, batch_size=2, new_tokens=3, dtype="float32")
    runs = Runs(tmp_path / "record.jsonl.gz", tmp_path / "runs")
    study = Study(str(stories260k_dir), file, runs, plan, programs=True)
    right = [p.right for p in problems("validation")[:LIMIT]]
    monkeypatch.setattr(study, "replies", lambda *_: [["7"] * LIMIT + right, ["7"] * LIMIT + [*right[:3], "", "", ""]])
    arm = "adafuse-context"
    todo = [
        Run(stage=stage, arm=arm, seeds=(0, 0), rates=rates)
        for stage, rates in (("bare", (0, 0)), ("grid", (1e-3, 2e-3)))
    ]
    study.do_all(todo, budget_seconds=None, watch=Stopwatch())
    bare, trained = (record["replicas"] for record in study.records.values())
    assert bare[0]["measures"]["vel"] == bare[1]["measures"]["vel"] != trained[1]["measures"]["vel"]
    for replicas in (bare, trained):
        assert [r["measures"]["code"]["passed"] for r in replicas] == [100, 50]
        assert [r["programs"] for r in replicas] == ["pppppp", "pppeee"]
        assert all(sum(shares) == pytest.approx(1, abs=1e-3) for r in replicas for shares in r["use"].values())
    assert study.identity["programs"]
    out = tmp_path / "tables.md"
    assert main(["--report", "--runs", str(runs.folder), "--record", str(runs.record), "--out", str(out)]) == 0
    assert "## The bare backbone" in out.read_text()
    assert f"| {arm} | 100.0 |" in out.read_text() or f"| {arm} | 50.0 |" in out.read_text()
    assert all((tmp_path / f"tables_{name}.png").stat().st_size > 5000 for name in ("cost", "use"))
    with pytest.raises(UserError, match="another --runs"):
        Study(str(stories260k_dir), file, Runs(runs.record, runs.folder), plan)


def test_runs_have_names_of_their_own():
    run = Run(stage="grid", arm="mola", seeds=(0, 0), rates=(1e-3, 2.5e-4))
    assert run.name == "grid-mola-0@0.001,0@0.00025"
    assert dataclasses.replace(run, seeds=(0, 1)).name != run.name


def test_arms_cost_what_they_are_compared_at(smollm2_dir: Path):
    """Costs within 1% of the LoRA with as many active or as many total parameters; the layer-wise baselines are as
    published."""
    from adafuse_jax.checkpoints.hf_config import parse_hf_config

    config = parse_hf_config(smollm2_dir).model
    active, total = (arms.parameters(arms.ARMS[name], config)[0] for name in ("lora-32", "lora-128"))
    for name, settings in arms.ARMS.items():
        if name.startswith("adafuse"):
            assert arms.parameters(settings, config) == (
                pytest.approx(total, rel=0.01),
                pytest.approx(active, rel=0.01),
            )
