"""Specs, files, directories, splits, and every kind of bad input: one line with the fault, its place and the remedy."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tiny

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, MultipleChoice, Text
from adafuse_jax.data.sources import PRESETS, DatasetSpec, available_splits, held_out_split, load, load_examples

ROWS = [{"text": f"row {i}"} for i in range(5)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(source, split=None, **spec) -> list[str]:
    return [e.text for e in load_examples(DatasetSpec(source=str(source), **spec), split)]


def files_under(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


class TestParse:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("slimorca", {"source": "slimorca"}),
            ("allenai/ai2_arc:ARC-Easy", {"source": "allenai/ai2_arc", "subset": "ARC-Easy"}),
            ("org/name@alpaca", {"source": "org/name", "format": "alpaca"}),
            ("org/name=0.3", {"source": "org/name", "weight": 0.3}),
            ("org/name:sub@text=2", {"source": "org/name", "subset": "sub", "format": "text", "weight": 2.0}),
        ],
    )
    def test_syntax(self, text, expected):
        assert DatasetSpec.parse(text) == DatasetSpec(**expected)

    def test_a_path_may_hold_the_separators(self, tmp_path):
        path = tmp_path / "a:b@c=d.jsonl"
        path.write_bytes(jsonl(ROWS))
        assert DatasetSpec.parse(str(path)) == DatasetSpec(source=str(path))
        assert DatasetSpec.parse(f"{path}@text=2") == DatasetSpec(source=str(path), format="text", weight=2.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x=0", "above 0"), ("x=-1", "above 0"), ("x=nan", "above 0"), ("x=much", "'much'"),
            ("x@foo", "none of auto, chat"), ("", "write SOURCE"), ("x:", "write SOURCE"), ("=1", "write SOURCE"),
        ],
    )  # fmt: skip
    def test_mistakes(self, text, message):
        with pytest.raises(UserError, match=message):
            DatasetSpec.parse(text)


class TestFiles:
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
    def test_every_kind(self, tmp_path, name):
        path = tmp_path / name
        if name.endswith("parquet"):
            datasets.Dataset.from_list(ROWS).to_parquet(str(path))
        else:
            csv = "text,n\r\n" + "".join(f"row {i},{i}\r\n" for i in range(5))
            data = csv.encode() if ".csv" in name else jsonl(ROWS) if "jsonl" in name else json.dumps(ROWS).encode()
            path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
        before = files_under(tmp_path)
        assert texts(path) == [row["text"] for row in ROWS]
        assert available_splits(DatasetSpec(source=str(path))) == ("train",)
        assert files_under(tmp_path) == before

    def test_csv_cells_stay_text(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text('\ufeffinstruction,input,output\n007,NA,1.50\n"a, ""b""\nc",,None\n', encoding="utf-8")
        found = [[m.content for m in e.messages] for e in load_examples(DatasetSpec(source=str(path)))]
        assert found == [["007\n\nNA", "1.50"], ['a, "b"\nc', "None"]]

    def test_unicode_line_separators_do_not_split_rows(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a\u2028b"}\n\n{"text": "c\u0085d"}\n', encoding="utf-8")
        assert texts(path) == ["a\u2028b", "c\u0085d"]

    def test_a_file_is_read_again_when_it_changes(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(jsonl(ROWS[:2]))
        assert len(texts(path)) == 2
        path.write_bytes(jsonl(ROWS))
        assert len(texts(path)) == 5

    def test_a_path_wins_over_a_preset(self, tmp_path, monkeypatch):
        (tmp_path / "slimorca").mkdir()
        (tmp_path / "slimorca" / "train.jsonl").write_bytes(jsonl(ROWS))
        monkeypatch.chdir(tmp_path)
        assert texts("slimorca") == [row["text"] for row in ROWS]

    def test_nothing_on_stderr(self, tmp_path):
        (tmp_path / "good.jsonl").write_bytes(jsonl(ROWS))
        (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": }\n')
        code = """if True:
            from adafuse_jax.data.sources import *
            load(DatasetSpec(source="good.jsonl"))
            try: load(DatasetSpec(source="bad.jsonl"))
            except UserError: pass
        """
        env = {"PYTHONPATH": str(tiny.REPOSITORY), "HOME": str(tmp_path), "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestSplits:
    def test_files_named_by_split(self, tmp_path):
        for name in ("train-00000-of-00002", "train-00001-of-00002", "my_dev", "x.test"):
            (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"text": name}]))
        (tmp_path / "notes.jsonl").write_bytes(jsonl([{"text": "unsplit"}]))
        (tmp_path / "dataset_infos.json").write_text("{}")
        assert set(available_splits(DatasetSpec(source=str(tmp_path)))) == {"train", "validation", "test"}
        assert texts(tmp_path) == ["train-00000-of-00002", "train-00001-of-00002"]
        assert texts(tmp_path, "val") == texts(tmp_path, split="validation") == ["my_dev"]
        with pytest.raises(UserError, match=r"no split 'extra'.*its splits are"):
            texts(tmp_path, "extra")

    def test_a_clone_of_a_hub_dataset(self, tmp_path):
        for folder in ("ARC-Easy", "data"):
            (tmp_path / folder).mkdir()
            datasets.Dataset.from_list([{"text": folder}]).to_parquet(str(tmp_path / folder / "test-00000.parquet"))
        assert texts(tmp_path, "test") == ["data"]
        assert texts(tmp_path, "test", subset="ARC-Easy") == ["ARC-Easy"]
        with pytest.raises(UserError, match=r"no subset 'x'.*ARC-Easy, data"):
            texts(tmp_path, subset="x")

    def test_split_column(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(jsonl([{"text": s + str(i), "split": s} for i in range(2) for s in ("train", "val", "test")]))
        assert set(available_splits(DatasetSpec(source=str(path)))) == {"train", "validation", "test"}
        assert texts(path) == ["train0", "train1"]
        assert texts(path, "validation") == ["val0", "val1"]

    @pytest.mark.parametrize("split_dict", [True, False])
    def test_saved_datasets(self, tmp_path, split_dict):
        data = datasets.Dataset.from_list(ROWS)
        saved = datasets.DatasetDict({"train": data, "val": data.select([0])}) if split_dict else data
        saved.save_to_disk(str(tmp_path / "d"))
        before = files_under(tmp_path)
        assert texts(tmp_path / "d") == [row["text"] for row in ROWS]
        if split_dict:
            assert texts(tmp_path / "d", "validation") == ["row 0"]
        assert available_splits(DatasetSpec(source=str(tmp_path / "d"))) == (
            ("train", "validation") if split_dict else ("train",)
        )
        assert files_under(tmp_path) == before

    def test_held_out(self):
        examples = [Text(str(i)) for i in range(100)]
        training, held = held_out_split(examples, 0.1, seed=1)
        assert (len(training), len(held)) == (90, 10)
        assert {e.text for e in training} | {e.text for e in held} == {e.text for e in examples}
        assert held == sorted(held, key=lambda e: int(e.text))
        assert held_out_split(examples, 0.1, seed=1) == (training, held)
        assert held_out_split(examples, 0.1, seed=2)[1] != held
        assert [len(part) for part in held_out_split(examples[:2], 0.9, seed=0)] == [1, 1]
        with pytest.raises(UserError, match="between 0 and 1"):
            held_out_split(examples, 1.0, seed=0)
        with pytest.raises(UserError, match="at least two"):
            held_out_split(examples[:1], 0.5, seed=0)


GOOD_LINE = b'{"text": "a"}\n'
BAD_FILES = [
    ("a.jsonl", GOOD_LINE * 2 + b'{"text": }\n', "malformed JSON.*line 3"),
    ("a.jsonl", GOOD_LINE + b'{"text": "a', "malformed JSON.*line 2"),
    ("a.jsonl", GOOD_LINE + b"[1]\n", "line 2: not a JSON object"),
    ("a.json", b'[\n{"text": "a"},\n{"text" "b"}]', "malformed JSON.*line 3"),
    ("a.json", b"5", "list of objects"),
    ("a.jsonl", GOOD_LINE * 3 + b'{"text": "\xff"}\n' + GOOD_LINE, "not UTF-8.*line 4: byte 0xff"),
    ("a.csv", "text\ncaf\xe9\n".encode("latin-1"), "not UTF-8.*line 2: byte 0xe9"),
    ("a.csv", b"text,text\na,b\n", "repeated column.*text, text"),
    ("a.csv", b"text,b\na,b\nc,d,e\n", "row 2, line 3: 3 cells for the 2 columns text, b"),
    ("a.csv", b"text\n", "no rows"),
    ("a.jsonl", b"", "empty file"),
    ("a.jsonl", b"\n \n", "empty file"),
    ("a.json", b"[]", "no rows"),
    ("a.parquet", b"", "empty file"),
    ("a.parquet", b"PAR1 not really", "cannot read"),
    ("a.jsonl.gz", gzip.compress(GOOD_LINE * 9, mtime=0)[:-12], "truncated gzip"),
    ("a.jsonl.gz", GOOD_LINE, "broken gzip file"),
    ("a.jsonl.gz", gzip.compress(GOOD_LINE * 9, mtime=0)[:-8] + b"\0" * 8, "broken gzip file.*CRC"),
    ("a.jsonl.gz", gzip.compress(GOOD_LINE, mtime=0)[:10] + b"\xff" * 30, "broken gzip file"),
    ("a.jsonl.gz", gzip.compress(GOOD_LINE + b"{", mtime=0), "malformed JSON.*line 2"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), "empty file"),
    ("a.txt", b"hello", "unknown file type.*jsonl"),
]


class TestBadInput:
    @pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
    def test_file(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load(DatasetSpec(source=str(tmp_path / name)))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(files_under(tmp_path)) == [name]

    def test_directory(self, tmp_path):
        with pytest.raises(UserError, match="no data files"):
            load(DatasetSpec(source=str(tmp_path)))
        (tmp_path / "main").mkdir()
        with pytest.raises(UserError, match="its folders are main"):
            load(DatasetSpec(source=str(tmp_path)))
        (tmp_path / "train.csv").write_text("text\na\n")
        (tmp_path / "train.jsonl").write_bytes(GOOD_LINE)
        with pytest.raises(UserError, match="mixed file types"):
            load(DatasetSpec(source=str(tmp_path)))
        with pytest.raises(UserError, match="a file has no subsets"):
            load(DatasetSpec(source=str(tmp_path / "train.csv"), subset="main"))

    def test_broken_saved_dataset(self, tmp_path):
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "d"))
        next((tmp_path / "d").glob("*.arrow")).unlink()
        with pytest.raises(UserError, match="cannot read"):
            load(DatasetSpec(source=str(tmp_path / "d")))

    @pytest.mark.parametrize(
        "source", ["missing.jsonl", "./missing", "x" * 5000, "data/missing.parquet", "slimorcas", "a/b/c"]
    )
    def test_no_such_source(self, source):
        with pytest.raises(UserError, match="no such dataset") as caught:
            load(DatasetSpec(source=source))
        assert ("did you mean slimorca?" in str(caught.value)) == (source == "slimorcas")

    def test_nothing_usable(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(jsonl([{"instruction": "a", "output": ""}]))
        with pytest.raises(UserError, match=r"no usable rows.*1 with an empty response"):
            load(DatasetSpec(source=str(tmp_path / "a.jsonl")))


class TestHub:
    """The hub is out of reach here: the calls are checked, and their errors are reported in one line."""

    def test_preset_calls(self, monkeypatch):
        calls = []

        def load_dataset(path, name, split):
            calls.append((path, name, split))
            return datasets.Dataset.from_list(
                [{"question": "q", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "2"}]
            )

        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, name: ["train", "validation"])
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        (example,) = load_examples(DatasetSpec.parse("arc-easy"), "val")
        assert (example.choices, example.answer) == (("A", "B"), 1)
        assert calls == [("allenai/ai2_arc", "ARC-Easy", "validation")]
        with pytest.raises(UserError, match="its splits are train, validation"):
            load_examples(DatasetSpec.parse("arc-easy"), "test")

    def test_unreachable(self, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="cannot load from the hub: Open-Orca/SlimOrca") as caught:
            load(DatasetSpec.parse("slimorca"))
        assert "\n" not in str(caught.value)

    def test_presets_are_hub_ids(self):
        assert all(p.hub_id.count("/") == 1 for p in PRESETS.values())


REAL = {
    "alpaca_en_demo.json.gz": (Chat, 999, "train"),
    "code_alpaca_2k.json.gz": (Chat, 2015, "train"),
    "gsm8k_train.jsonl.gz": (Chat, 7473, "train"),
    "sharegpt_500.jsonl.gz": (Chat, 497, "train"),
    "scienceqa_test_llava_CQM-A.json.gz": (Chat, 2224, "train"),
    "scienceqa_think_textonly.jsonl.gz": (MultipleChoice, 180, "validation"),
    "scienceqa_mola_600_textonly.jsonl.gz": (MultipleChoice, 200, "test"),
    "openbookqa_train.llmadapters.json.gz": (MultipleChoice, 4957, "train"),
    "arc-easy_test.llmadapters.json.gz": (MultipleChoice, 2376, "train"),
    "winogrande_test.llmadapters.json.gz": (MultipleChoice, 1267, "train"),
    "mmlu_dev.jsonl.gz": (MultipleChoice, 285, "train"),
    "mmlu_test.jsonl.gz": (MultipleChoice, 14042, "train"),
    "hellaswag_abstainqa.jsonl.gz": (MultipleChoice, 2000, "train"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared_dir, name):
    kind, count, split = REAL[name]
    examples = load_examples(DatasetSpec(source=str(shared_dir / "assets" / "data" / name)), split)
    assert len(examples) == count
    assert {type(e) for e in examples} == {kind}


def test_the_two_copies_of_scienceqa_agree(shared_dir):
    """Question and answer of the same test problems, published by different people in different formats."""
    folder = shared_dir / "assets" / "data"
    with gzip.open(folder / "scienceqa_test_llava_CQM-A.json.gz") as file:
        llava = {row["id"]: row["conversations"] for row in json.load(file)}
    with gzip.open(folder / "scienceqa_think_textonly.jsonl.gz", "rt", encoding="utf-8") as file:
        ids = [row["pid"] for row in map(json.loads, file) if row["split"] == "test"]
    ours = load_examples(DatasetSpec(source=str(folder / "scienceqa_think_textonly.jsonl.gz")), "test")
    assert len(ids) == len(ours) == 194
    for pid, example in zip(ids, ours, strict=True):
        assert example.choices[example.answer] == llava[pid][1]["value"]


def test_real_files_that_are_no_training_data(shared_dir):
    for name in ("mt_bench_question.jsonl.gz", "truthfulqa.csv.gz"):
        with pytest.raises(UserError, match="unrecognised columns"):
            load(DatasetSpec(source=str(shared_dir / "assets" / "data" / name)))
