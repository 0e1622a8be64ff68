"""The questions that the studies share: their files, splits and packing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_data import BATCH, LENGTH, choices, write_study

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import MultipleChoice
from adafuse_jax.evaluation.loading import load
from adafuse_jax.evaluation.multiple_choice import Questions as Encoded
from adafuse_jax.evaluation.multiple_choice import chosen_by_likelihood
from studies.questions import SCIENCEQA_TRAINING, SETS, _scienceqa, pack_candidates, read_set
from studies.science_questions.study import accuracies


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def loaded(study: Path) -> Any:
    return load(str(study / "model"))


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
    """Sizes as in the report; ScienceQA's two sources have the same questions in the same words."""
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


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"openbookqa_train.*cannot be read.*--data must hold it"):
        read_set("openbookqa", tmp_path)


def test_packed_scores_choose_as_unpacked_ones(loaded: Any):
    """Comparison with `evaluation`, which scores every candidate in a row of its own."""
    questions = choices()
    packed = pack_candidates(questions, loaded.tokenizer, LENGTH)
    assert (packed.segment_ids.max(1) > 1).any(), "no row has several candidates"
    chosen = chosen_by_likelihood(loaded, Encoded.encode(questions, loaded.tokenizer, 256), batch_size=4)["accuracy"]
    expected = np.mean(np.array(chosen) == [q.answer for q in questions])
    assert accuracies(loaded.model, None, packed, batch_size=BATCH) == [expected]
    long = MultipleChoice("long " * 40, ("a", "b"), 0)
    assert pack_candidates([long, *questions], loaded.tokenizer, LENGTH).left_out == 1


def test_candidates_that_differ_in_one_token_share_their_text(loaded: Any):
    """Choices of several letters after one prompt, compared with candidates in rows of their own."""
    letters = [MultipleChoice(f"Which is {i}?", tuple("ABCD"[: 2 + i % 3]), i % 2) for i in range(9)]
    packed = pack_candidates(letters, loaded.tokenizer, LENGTH)
    assert (np.sort(packed.owner[packed.owner >= 0]) == np.arange(sum(packed.choices))).all(), "one target a candidate"
    assert packed.segment_ids.max(1).sum() == len(letters), "one text a question"
    chosen = chosen_by_likelihood(loaded, Encoded.encode(letters, loaded.tokenizer, 256), batch_size=4)["accuracy"]
    expected = np.mean(np.array(chosen) == [q.answer for q in letters])
    assert accuracies(loaded.model, None, packed, batch_size=BATCH) == [expected]
