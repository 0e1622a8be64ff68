"""Splits by name: of files, folders, columns and saved sets; which is trained on, and which is held out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Text
from adafuse_jax.data.files import split_in_name
from adafuse_jax.data.sources import Dataset, DatasetSpec
from adafuse_jax.training.building import Sources, parts, pick
from adafuse_jax.training.config import TrainConfig

ULTRA = ("test_gen", "test_sft", "train_gen", "train_sft")


def shards(folder: Path, *names: str) -> Path:
    for name in names:
        part = datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(2)])
        (folder / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


def lines(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name.split(".")[0]}) + "\n")
    return folder


def texts(source, split=None) -> list[str]:
    return [e.text for e in Dataset(DatasetSpec.parse(str(source))).load(split).examples]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("train-2", "train"), ("train_part_03", "train"), ("a_train", "train"),
        ("train-00001", "train"), ("train-00000-of-00002", "train"), ("train_sft-00000-of-00002-1a2b", "train_sft"),
        ("dev-00000-of-00001", "dev"), ("my_dev", "validation"), ("x.test", "test"), ("valid", "validation"),
        ("arc-easy_test.llmadapters", "test"), ("train_sft", "train_sft"), ("evaluation", "test"),
        ("my_test_chats", None), ("general", None), ("contest", None), ("trainer", None),
    ],
)  # fmt: skip
def test_names(name, split):
    assert split_in_name(name) == split


@pytest.mark.parametrize("folder", [ULTRA, ("auxiliary_train", "dev", "test", "validation"), ("validation",)])
def test_shards_have_the_splits_that_datasets_names(tmp_path, folder):
    shards(tmp_path / "d", *folder)
    theirs = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert set(Dataset(DatasetSpec(source=str(tmp_path / "d"))).splits) == set(theirs) == set(folder)
    for name in folder:
        assert texts(f"{tmp_path / 'd'}#{name}") == list(theirs[name]["text"])


class TestTrainingSplit:
    def test_one_of_several_must_be_chosen(self, tmp_path):
        source = shards(tmp_path / "ultra", *ULTRA)
        with pytest.raises(UserError) as caught:
            texts(source)
        assert f"splits are test_gen, test_sft, train_gen, train_sft: choose one, as {source}#train_gen" in str(
            caught.value
        )
        assert texts(f"{source}#train_sft") == ["train_sft 0", "train_sft 1"]
        with pytest.raises(UserError, match="no split 'train_x'"):
            texts(f"{source}#train_x")

    def test_the_only_one_that_begins_with_train(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert texts(shards(tmp_path, "train_sft", "test_sft")) == ["train_sft 0", "train_sft 1"]
        (line,) = (r.message for r in caplog.records)
        assert line == f"{tmp_path}: no split train; training on train_sft (its splits: test_sft, train_sft)"

    def test_the_only_one(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert len(texts(shards(tmp_path / "a", "validation"))) == 2
        assert "training on validation" in caplog.text
        with pytest.raises(UserError, match=r"no split 'train'.*#test"):
            texts(shards(tmp_path / "b", "test"))
        assert len(texts(f"{tmp_path / 'b'}#test")) == 2

    def test_train_goes_before_others_that_begin_so(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert texts(lines(tmp_path, "train.jsonl", "train_extra.jsonl", "dev.jsonl")) == ["train"]
        assert f"{tmp_path}: training on the split train, not on train_extra" in caplog.messages
        assert texts(tmp_path, "train_extra") == ["train_extra"]
        assert texts(tmp_path, "val") == ["dev"]


class TestFiles:
    def test_names_that_say_nothing_are_train(self, tmp_path, caplog):
        source = lines(tmp_path, "general.jsonl", "my_test_chats.jsonl")
        assert texts(source) == ["general", "my_test_chats"]
        lines(tmp_path, "test.jsonl")
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert texts(source) == ["general", "my_test_chats"]
        assert "files of the split train: general.jsonl, my_test_chats.jsonl" in caplog.text
        lines(tmp_path, "a_train.jsonl")
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert texts(source) == ["a_train"]
        assert "files not used, as others are named train: general.jsonl, my_test_chats.jsonl" in caplog.text

    def test_folders(self, tmp_path):
        source = lines(tmp_path, "train/a.jsonl", "train/b.jsonl", "val/a.jsonl", "other/a.jsonl")
        assert Dataset(DatasetSpec(source=str(source))).splits == ("train", "validation")
        assert texts(source, "validation") == ["val/a"]
        assert texts(f"{source}:other") == ["other/a"]
        lines(tmp_path / "b", "data/train/a.jsonl", "data/test/a.jsonl")
        assert Dataset(DatasetSpec(source=str(tmp_path / "b"))).splits == ("test", "train")

    def test_dev_beside_validation_keeps_its_name(self, tmp_path):
        data = datasets.Dataset.from_list([{"text": "a"}])
        datasets.DatasetDict(train=data, dev=data, validation=data, val=data).save_to_disk(str(tmp_path / "d"))
        assert Dataset(DatasetSpec(source=str(tmp_path / "d"))).splits == ("train", "dev", "validation", "val")

    def test_saved_text_that_is_not_utf8(self, tmp_path):
        broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
        data = datasets.Dataset(pa.table({"text": broken, "other": broken}))
        datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "d"))
        with pytest.raises(UserError, match=r"d#train: row 2: column 'text': byte 0xff"):
            texts(tmp_path / "d")
        loaded = Dataset(DatasetSpec(source=str(tmp_path / "d")), skip_bad_rows=True).load()
        assert (loaded.examples, loaded.bad) == ([Text("a")], 1)

    def test_a_column(self, tmp_path, caplog):
        path = tmp_path / "a.jsonl"
        rows = [{"text": s, "split": s} for s in ("train_sft", "test_sft", "train_sft")]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert texts(path) == ["train_sft"] * 2
        assert texts(f"{path}#test_sft") == ["test_sft"]
        path.write_text(path.read_text() + '{"text": "x", "split": null}\n')
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert len(texts(path)) == 4
        assert "columns not used: split" in caplog.text
        path.write_text("".join(json.dumps({"text": "a", "split": i}) + "\n" for i in range(3)))
        assert len(texts(path)) == 3
        path.write_text("".join(json.dumps({"text": "a", "split": f"hair {i}"}) + "\n" for i in range(30)))
        assert len(texts(path)) == 30

    def test_names_are_one_line_in_messages(self, tmp_path, caplog):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"text": "a", "split": "train\n\x1b[31m" + "x" * 1000}) + "\n")
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert len(texts(path)) == 1
        (message,) = caplog.messages
        assert message.isprintable()
        assert len(message) < 400

    def test_a_bad_row_counts_for_its_split(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text(
            '{"text": "a", "split": "train"}\n{"text": null, "split": "test"}\n{"text": "b", "split": "test"}\n'
        )
        data = Dataset(DatasetSpec(source=str(path)))
        assert data.load("train").examples[0].text == "a"
        with pytest.raises(UserError, match="row 2, line 2: column 'text'"):
            data.load("test")
        skipping = Dataset(DatasetSpec(source=str(path)), skip_bad_rows=True)
        assert (skipping.load("train").bad, skipping.load("test").bad) == (0, 1)


@pytest.mark.parametrize(
    ("splits", "chosen", "training", "held"),
    [
        (ULTRA, "#train_sft", "train_sft", "test_sft"),
        (ULTRA, "#train_gen", "train_gen", "test_gen"),
        (("train", "dev", "test"), "", "train", "dev"),
        (("train", "test_sft"), "", "train", "test_sft"),
        (("train", "test_a", "test_b"), "", "train", None),
        (("validation",), "", "validation", None),
        (("validation", "test"), "#validation", "validation", "test"),
    ],
)
def test_what_is_held_out(tmp_path, splits, chosen, training, held):
    shards(tmp_path, *splits)
    config = TrainConfig(model="m", dataset=("d",), output="o", eval_fraction=0.5)
    data = Dataset(DatasetSpec.parse(f"{tmp_path}{chosen}"))
    (trained,), scored = parts(config, Sources(training=[data], evaluation=[]))
    pick(scored, 10)
    examples = list(trained.training())
    for part in scored:
        if part is not trained:
            part.find()
    held_out = [e for part in scored for e in part.found]
    if held is None:  # a share of the training split
        examples, held = examples + held_out, training
    assert {e.text for e in examples} == {f"{training} 0", f"{training} 1"}
    assert {e.text[:-2] for e in held_out} == {held}


def test_syntax(tmp_path):
    parse = DatasetSpec.parse
    expected = DatasetSpec(source="org/name", subset="sub", split="train_sft", format="text", weight=2.0)
    assert parse("org/name:sub#train_sft@text=2") == expected
    assert parse("~/x.jsonl").source == str(Path("~/x.jsonl").expanduser())
    (tmp_path / "a#b.jsonl").write_text('{"text": "a"}\n')
    assert parse(f"{tmp_path}/a#b.jsonl#train") == DatasetSpec(source=f"{tmp_path}/a#b.jsonl", split="train")
    with pytest.raises(UserError, match="write SOURCE"):
        parse("org/name#")
