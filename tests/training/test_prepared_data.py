"""Data of a run, built in a stream by several processes and read from the cache, against a slow reference; what the cache's
key depends on."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import re
import resource
import shutil
import tracemalloc
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import slow_data
from data_fixtures import CHATML, transformers_tokenizer, write_tokenizer

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import chat, encoders
from adafuse_jax.data.batches import Batches
from adafuse_jax.data.chat import Encoding, encode_all, load_tokenizer
from adafuse_jax.data.encoders import encode_stream
from adafuse_jax.data.examples import Chat, Message, Text
from adafuse_jax.data.packing import PackedRows
from adafuse_jax.data.sources import Dataset, DatasetSpec, held_out_indices
from adafuse_jax.training import building
from adafuse_jax.training.config import TrainConfig
from adafuse_jax.training.data import Data, prepare_data

WORDS = ["the", "quick", "brown", "fox", "naïve", "東京", "😀", "jumps\n", "over", "'", '"lazy"', "dogs", "12", "345"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    merged = " ".join(WORDS * 8)
    return load_tokenizer(write_tokenizer(directory / "t", template=CHATML, eos="<|im_end|>", merges_from=merged))


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(2)) for _ in range(count)]


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"instruction": p, "output": r}) + "\n" for p, r in rows))
    return str(path)


def prepared(tokenizer, cache: Path | str, *dataset: str, **changes: Any) -> Data:
    settings: dict[str, Any] = {"max_length": 128, "eval_fraction": 0.1, "eval_examples": 7, "data_cache": str(cache)}
    return prepare_data(TrainConfig(model="m", dataset=dataset, output="o", **settings | changes), tokenizer)


@pytest.fixture
def in_small_chunks(monkeypatch):
    """Nearly all chunks go to other processes."""
    for module, name, value in ((chat, "CHUNK_EXAMPLES", 7), (encoders, "OWN_CHUNKS", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(encoders, "_processors", lambda: 2)
    monkeypatch.setattr(building, "FINGERPRINT_TOKENS", 3 * 128)


@pytest.mark.parametrize(("packing", "weights"), [(True, None), (False, (3.0, 1.0))])
def test_rows_order_and_fingerprint_are_those_of_the_slow_reference(
    tokenizer, tmp_path, in_small_chunks, packing, weights
):
    sets = [pairs(90), pairs(40, seed=1)]
    marks = [""] * 2 if weights is None else [f"={w}" for w in weights]
    dataset = [write(tmp_path / f"{i}.jsonl", rows) + marks[i] for i, rows in enumerate(sets)]
    reference = transformers_tokenizer(tokenizer.name_or_path)
    expected, held_out = [], []
    for rows in sets:
        held = held_out_indices(len(rows), 0.1, 5)
        examples = [slow_data.encoded(reference, *row, 128) for row in rows]
        held_out += [examples[i] for i in held]
        fitting = [e for i, e in enumerate(examples) if i not in held and e is not None]
        expected.append(slow_data.packed(fitting, 128, packing=packing))
    held_out = [held_out[i * len(held_out) // 7] for i in range(7)]

    for start in ("builds", "reads"):
        data = prepared(tokenizer, tmp_path / "cache", *dataset, packing=packing, seed=5)
        for ours, theirs in zip(data.batches.rows, expected, strict=True):
            rows = ours.rows()
            for name in ("tokens", "loss_mask", "segment_ids", "positions"):
                np.testing.assert_array_equal(getattr(rows, name), getattr(theirs, name), err_msg=start)
        assert data.fingerprint == slow_data.fingerprint(weights, expected)
        assert data.largest_token == max(int(rows.tokens.max()) for rows in expected)
        for ours, theirs in zip(data.held_out.rows, [e for e in held_out if e is not None], strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.loss_mask[1:], theirs.loss_mask[1:])


def test_a_batch_is_of_rows_laid_out_alone(tokenizer, tmp_path):
    """The first row of a batch is a row of the whole, whichever rows are drawn beside it."""
    data = prepared(tokenizer, tmp_path / "cache", write(tmp_path / "a.jsonl", pairs(60)), batch_size=3)
    whole = data.batches.rows[0].rows()
    for step in range(4):
        batch = data.batches.at(step)
        _, places = data.batches.locate(np.arange(3 * step, 3 * step + 3))
        for name in ("tokens", "loss_mask", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(batch, name)[0], getattr(whole, name)[places])
            assert getattr(batch, name).dtype == getattr(whole, name).dtype


def entries(cache: Path) -> int:
    return len(list(cache.iterdir())) if cache.exists() else 0


def test_everything_that_changes_the_data_changes_its_key(tokenizer, tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", tmp_path / "a.jsonl"
    data = write(path, pairs(30))
    prepared(tokenizer, cache, data)

    def is_new(tokenizer=tokenizer, **changes: Any) -> bool:
        before = entries(cache)
        prepared(tokenizer, cache, changes.pop("dataset", data), **changes)
        return entries(cache) > before

    assert not is_new()
    assert not is_new(batch_size=2, grad_accum=3, learning_rate=1.0, steps=3)
    os.utime(path, (1, 1))
    assert not is_new(), "the same content"
    for changes in (
        {"max_length": 64}, {"packing": False}, {"skip_bad_rows": True}, {"eval_fraction": 0.2}, {"eval_examples": 3},
        {"seed": 1}, {"dataset": f"{data}@alpaca"}, {"dataset": f"{data}=2"}, {"eval_dataset": (data,)},
        {"eval_examples": 0},
    ):  # fmt: skip
        assert is_new(**changes), changes
    assert not is_new(eval_examples=0, seed=9, eval_fraction=0.3), "nothing is held out by them"
    other = load_tokenizer(write_tokenizer(tmp_path / "t", template=CHATML.replace("m['role']", "m['role'] + ' '")))
    assert is_new(other)
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"quick", b"quack"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert is_new(), "other content of the same size and time"
    monkeypatch.setattr("adafuse_jax.training.data.code_version", lambda *_: {"code": "of another version"})
    assert is_new()


@pytest.mark.parametrize("changed", ["dataset", "eval_dataset"])
def test_a_file_that_changes_before_it_is_read_is_not_stored(tokenizer, tmp_path, monkeypatch, changed):
    """Under the key of what it was; with as many rows as before."""
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("dataset", "eval_dataset")}
    given = [write(path, pairs(30)) for path in paths.values()]
    build = building.build

    def later(*arguments: Any) -> dict[str, Any]:
        write(paths[changed], pairs(30, seed=1))
        return build(*arguments)

    monkeypatch.setattr(building, "build", later)
    with pytest.raises(UserError, match=rf"{changed}\.jsonl: changed while it was read"):
        prepared(tokenizer, tmp_path / "cache", given[0], eval_dataset=(given[1],))
    assert not list((tmp_path / "cache").glob("*/prepared"))


def test_memory_of_the_fingerprint_does_not_grow_with_the_length_of_rows():
    """Rows of 65,536 tokens: 64 of them, 16 MB an array."""
    tokens = np.arange(64 * 2**16, dtype=np.int32)
    ends = np.arange(65, dtype=np.int64)
    rows = PackedRows(
        tokens=tokens, loss_mask=tokens % 2 == 1, starts=ends * 2**16, members=np.arange(64, dtype=np.int32),
        row_starts=ends, length=2**16,
    )  # fmt: skip
    batches = Batches(rows=(rows,), seed=0, batch_size=1)
    tracemalloc.start()
    try:
        building._fingerprint(batches)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_pipes_of_the_same_content_are_read_from_the_cache(tokenizer, tmp_path):
    content, fingerprints = gzip.compress(Path(write(tmp_path / "a.jsonl", pairs(30))).read_bytes()), set()
    for _ in range(2):
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        os.dup2(reading, 250)  # the same name
        fingerprints.add(prepared(tokenizer, tmp_path / "cache", "/dev/fd/250").fingerprint)
        os.close(reading)
        os.close(250)
    assert len(fingerprints) == entries(tmp_path / "cache") == 1


def test_saved_data_sets_and_those_of_the_hub_are_read_from_the_cache(tokenizer, tmp_path, monkeypatch):
    """While their content, or the fingerprint that `datasets` gives it, is the same."""
    columns = [{"instruction": p, "output": r} for p, r in pairs(30)]
    cache, saved = tmp_path / "cache", tmp_path / "saved"
    found = []
    for rows in (columns, columns, columns[:20]):
        datasets.Dataset.from_list(rows).save_to_disk(str(saved))
        found.append(prepared(tokenizer, cache, str(saved)).fingerprint)
        shutil.rmtree(saved)
    assert found[0] == found[1] != found[2]
    assert entries(cache) == 2

    def load(rows: list[dict], hub_id: str, subset: str | None, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    for rows in (columns, columns, columns[:20]):
        monkeypatch.setattr(datasets, "load_dataset", partial(load, rows))
        found.append(prepared(tokenizer, cache, "org/name").fingerprint)
    assert found[3:] == found[:3]
    assert entries(cache) == 4


def test_a_saved_data_set_that_is_loaded_into_memory_is_known_by_its_content(tokenizer, tmp_path, monkeypatch):
    """Loading by HF_DATASETS_IN_MEMORY_MAX_SIZE; also one of several splits."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)
    for kind in (lambda data: data, lambda data: datasets.DatasetDict({"train": data, "test": data})):
        found = []
        for seed in (0, 1):
            columns = [{"instruction": p, "output": r} for p, r in pairs(30, seed)]
            kind(datasets.Dataset.from_list(columns)).save_to_disk(str(tmp_path / "saved"))
            found.append(prepared(tokenizer, tmp_path / "cache", str(tmp_path / "saved")).fingerprint)
            shutil.rmtree(tmp_path / "saved")
        assert found[0] != found[1]


def test_log_lines_of_a_start_that_reads(tokenizer, tmp_path, caplog):
    """Rows skipped, cut and left out are counted at every start."""
    path = tmp_path / "a.jsonl"
    rows = [*pairs(20), ("x", ""), ("y" * 500, "z"), ("y", "z" * 500)]
    write(path, rows)
    path.write_text(path.read_text() + '{"instruction": 1}\n')
    found = []
    with caplog.at_level(logging.INFO, "adafuse_jax"):
        for _ in range(2):
            caplog.clear()
            prepared(tokenizer, tmp_path / "cache", str(path), skip_bad_rows=True, eval_examples=0)
            found.append([message for message in caplog.messages if not re.search("data.cache", message)])
    assert found[0] == found[1]
    text = "\n".join(found[0])
    for words in ("1 with an empty response", "1 bad rows, the first:", "examples left out", "where they are cut"):
        assert words in text


def stream(examples: list, tokenizer, **changes: Any) -> tuple[list, Encoding]:
    encoding = Encoding(name="set", skip_bad_rows=changes.get("skip_bad_rows", False))
    chunks = encode_stream(iter(examples), tokenizer, 128, encoding, total=len(examples))
    return [row for chunk in chunks for row in chunk.rows()], encoding


def exchange(prompt: str, reply: str, where: str = "") -> Chat:
    return Chat((Message("user", prompt), Message("assistant", reply)), where=where)


REFUSING = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('refused') }}{% endif %}" + CHATML


class TestSeveralProcesses:
    def test_give_the_rows_of_one(self, tokenizer, in_small_chunks):
        examples = [exchange(p, r) if i % 3 else Text(p * 9) for i, (p, r) in enumerate(pairs(100))]
        expected, unfit = encode_all(examples, tokenizer, 128)
        found, encoding = stream(examples, tokenizer)
        assert encoding.counts["unfit"] == unfit
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)

    def test_refused_examples_are_counted_and_the_first_is_named(self, tmp_path, in_small_chunks, caplog):
        refusing = load_tokenizer(write_tokenizer(tmp_path / "t", template=REFUSING))
        texts = [("bad" if i in (40, 60) else p) for i, (p, _) in enumerate(pairs(80))]
        examples = [exchange(p, "a", where=f"row {i}") for i, p in enumerate(texts)]
        with pytest.raises(UserError, match=r"^row 40: chat template.*refused"):
            stream(examples, refusing)
        found, encoding = stream(examples, refusing, skip_bad_rows=True)
        fitting, unfit = encode_all([examples[i] for i in range(80) if i not in (40, 60)], refusing, 128)
        assert (len(found), encoding.refused, encoding.counts["unfit"]) == (len(fitting), 2, unfit)
        assert "2 of 80 examples left out, which the chat template refuses; the first: row 40" in caplog.text

    def test_forget_examples_that_were_refused(self, tokenizer):
        """Chunks of 2 MB, of which nothing is left in memory."""
        asked = Message("user", "x" * 250_000), Message("assistant", "a")
        examples, sizes = [Chat(asked, tools='[{"name": "f"}]')] * 2, []
        with encoders._Encoders(tokenizer, 128, datetime.now()) as processes:
            processes._count = 1
            for _ in range(12):
                assert len(processes._submit(examples).result().refusals) == 2
                pages = int(Path(f"/proc/{processes._processes[0].pid}/statm").read_text().split()[1])
                sizes.append(pages * resource.getpagesize() / 1e6)
        assert sizes[-1] < sizes[2] + 6, sizes

    @pytest.mark.slow
    def test_a_template_that_takes_too_long_ends_the_start(self, tmp_path, in_small_chunks):
        loop = "{% if messages[0]['content'] == 'bad' %}{{ 10 ** (10 ** 9) }}{% endif %}" + CHATML
        slow = load_tokenizer(write_tokenizer(tmp_path / "t", template=loop))
        texts = ["bad" if i == 40 else "good" for i in range(60)]
        with pytest.raises(UserError, match="takes more than 3 seconds"):
            stream([exchange(p, "a") for p in texts], slow, skip_bad_rows=True)


@pytest.mark.parametrize("value", ["~nobody-of-this-name/x", "~nobody-of-this-name"])
def test_a_cache_in_the_home_of_nobody_is_refused(tokenizer, tmp_path, value):
    with pytest.raises(UserError, match=rf"--data-cache {value}: there is no user"):
        prepared(tokenizer, value, write(tmp_path / "a.jsonl", pairs(30)))


def test_rows_are_read_in_a_stream(tmp_path):
    """20 MB of rows in less than 2 MB of memory."""
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": f"{i} " + "x" * 5000}) + "\n")
    data = Dataset(DatasetSpec(source=str(path)))
    tracemalloc.start()
    try:
        assert data.count("train").examples == sum(1 for _ in data.examples("train")) == 4000
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, pairs(10))
    data = Dataset(DatasetSpec(source=str(path)))
    assert data.count("train").examples == 10
    write(path, pairs(9))
    with pytest.raises(UserError, match="changed while it was read"):
        list(data.examples("train"))
