"""Rows of JSON, CSV and Parquet files: what stands in the file, one bad row named, and little memory for long lines."""

from __future__ import annotations

import gzip
import json
import logging
import os
import threading
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adafuse_jax.core.errors import UserError
from adafuse_jax.data import files
from adafuse_jax.data.examples import Chat, Message, Text
from adafuse_jax.data.files import file_rows
from adafuse_jax.data.sources import Dataset, DatasetSpec, load

ROW = '{"instruction": "a", "output": "b"}'
AB = ["a", "b"]


def pairs(path: Path, *, skip: bool = False) -> list[list[str]]:
    """[prompt, reply] of every example."""
    loaded = load(DatasetSpec(source=str(path)), skip_bad_rows=skip)
    return [[m.content for m in example.messages] for example in loaded.examples]


def error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(DatasetSpec(source=str(path)))
    message = str(caught.value)
    assert len(message) <= 400
    assert "\n" not in message
    return message.replace(f"{path.parent}/", "")


def outcome(path: Path, *, skip: bool = False) -> str | list:
    """The examples, or the error."""
    try:
        return load(DatasetSpec(source=str(path)), skip_bad_rows=skip).examples
    except UserError as refusal:
        return str(refusal)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


class TestJson:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.jsonl", f"\ufeff{ROW}\r\n\r\n{ROW}\r\n", [AB, AB]),
            ("a.jsonl", f"{ROW}\r{ROW}", [AB, AB]),
            ("a.jsonl", f"{ROW}\n\ufeff{ROW}\n", [AB, AB]),
            ("a.jsonl", f"[{ROW},\n{ROW}]", [AB, AB]),
            ("a.jsonl", gzip.compress(f"{ROW}\n".encode(), mtime=0), [AB]),
            ("a.jsonl", '{\n"instruction": "a",\n"output": "b"\n}\n', [AB]),
            ("a.json", f"{ROW}\n{ROW}\n", [AB, AB]),
            ("a.json", f" \n[\n{ROW}\n,\r{ROW} ]\n", [AB, AB]),
            ("a.json", ROW, [AB]),
            ("a.json", f'{{\n "version": "1",\n "data": [{ROW}, {ROW}]}}', [AB, AB]),
            ("a.json", '{"instruction": ["a", "c"], "output": ["b", "d"]}', [AB, ["c", "d"]]),
            ("a.json", '{"instruction": {"0": "a", "1": "c"}, "output": {"0": "b", "1": "d"}}', [AB, ["c", "d"]]),
            ("a.json", f'{{"x": {ROW}, "y": {ROW}}}', [AB, AB]),
            ("a.json", f'{{"train": [{ROW}], "test": [{ROW}, {ROW}]}}', [AB]),
        ],
    )
    def test_layouts(self, tmp_path, name, content, expected):
        assert pairs(write(tmp_path / name, content)) == expected

    def test_numbers_and_times_stand_as_in_the_file(self, tmp_path):
        values = ["1", "1.50", "-0", "1e400", "9" * 5000, "true", '"2020-01-01 00:00:00"', "null"]
        lines = [f'{{"instruction": {value}, "output": "b", "unused": {value}}}' for value in values[:-1]]
        lines.append('{"instruction": "x", "output": "b", "unused": null}')
        found = pairs(write(tmp_path / "a.jsonl", "\n".join(lines)))
        assert [prompt for prompt, _ in found] == [*(value.strip('"') for value in values[:-1]), "x"]

    def test_columns_nobody_uses_may_hold_anything(self, tmp_path, caplog):
        lines = [
            ROW,
            *(ROW[:-1] + f', "x": {x}}}' for x in ("1", '"a"', "[{}]", "NaN", '"\\ud83d"', '{"a": 1, "a": 2}')),
        ]
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            assert pairs(write(tmp_path / "a.jsonl", "\n".join(lines))) == [AB] * 7
        assert [r.message for r in caplog.records] == [f"{tmp_path}/a.jsonl: columns not used: x"]

    def test_a_late_column_is_used(self, tmp_path):
        path = write(tmp_path / "a.jsonl", f"{ROW}\n" * 500 + ROW[:-1] + ', "input": "c"}')
        assert pairs(path) == [AB] * 500 + [["a\n\nc", "b"]]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", f"{ROW}\nnull\n", "malformed row: a.jsonl: row 2, line 2: not a JSON object but null"),
            ("a.jsonl", f"{ROW}\n\n[1]\n", "malformed row: a.jsonl: row 2, line 3: not a JSON object but a list"),
            ("a.jsonl", f"[1]\n{ROW}\n", "malformed row: a.jsonl: row 1, line 1: not a JSON object but a list"),
            ("a.jsonl", ROW[:-1] + f"\n{ROW}", "malformed JSON: a.jsonl: row 1, line 1: column 35: Expecting ','"),
            ("a.jsonl", ROW + ROW, "malformed JSON: a.jsonl: row 1, line 1: column 36: Extra data"),
            ("a.jsonl", f"{ROW}\n" + "[" * 10**5, "row 2, line 2: nested too deeply"),
            ("a.jsonl", f"{ROW}\n" + '{"a":' * 10**5, "row 2, line 2: nested too deeply"),
            ("a.jsonl", ROW[:-1] + ', "output": "c"}', "row 1, line 1: column 'output' stands more than once"),
            ("a.jsonl", f'{ROW}\n{{"instruction": "a", "output": NaN}}', "row 2, line 2: column 'output' holds nan"),
            ("a.jsonl", '{"instruction": "a", "output": "\\ud83d"}', "line 1: column 'output' has half of a surrogate pair"),
            ("a.json", '[{"instruction": "a", "output": "\\ud83d"}]', "column 'output' has half of a surrogate pair"),
            ("a.json", f"[{ROW},\n null]", "malformed row: a.json: row 2, line 2: not a JSON object but null"),
            ("a.json", f"[{ROW},\n{ROW}\n", "malformed JSON: a.json: line 3, column 1: the list does not end"),
            ("a.json", f"[{ROW}\n {ROW}]", "malformed JSON: a.json: line 2, column 2: Expecting ',' delimiter"),
            ("a.json", f"[{ROW}]\n]", "malformed JSON: a.json: line 2, column 1: Extra data after the list"),
            ("a.json", "[" * 10**5, "nested too deeply"),
            ("a.json", '{"instruction": {"0": "a"}, "output": {"1": "b"}}', "column 'instruction' holds a dict"),
            ("a.json", f"[{ROW},\n".encode() + b'{"x": "\xff"}]', "not UTF-8: a.json: line 2: byte 0xff"),
            ("a.jsonl", f"\n[{ROW},\n".encode() + b'{"x": "\xff"}]', "not UTF-8: a.jsonl: line 3: byte 0xff"),
            ("a.jsonl", b'\n[{"x": "\xff"}]', "not UTF-8: a.jsonl: line 2: byte 0xff"),
            ("a.json", b'{\n"x": "\xff"}', "not UTF-8: a.json: line 2: byte 0xff"),
            ("a.json", '{"version": 1}', "no rows: a.json: a JSON object with the keys version"),
            ("a.json", "null", "malformed rows: a.json: it holds null"),
        ],
    )  # fmt: skip
    def test_faults(self, tmp_path, name, content, message):
        assert message in error(write(tmp_path / name, content))

    def test_lists_are_read_in_pieces(self, tmp_path, monkeypatch):
        """Every way to split a list between two reads, and the line number of a mistake far from the start."""
        rows = [{"text": 'é" \\ [{,]} \u2028 1' * n, "x": [n, {"y": 0.5}]} for n in range(1, 9)]
        for chunk in range(1, 60):
            monkeypatch.setattr("adafuse_jax.data.json_rows.CHUNK", chunk)
            path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=chunk % 2 == 0, indent=chunk % 3 or None))
            assert load(DatasetSpec(source=str(path))).examples == [Text(row["text"]) for row in rows]
        bad = "\n" * 100 + json.dumps(rows, indent=1).replace('"y": 0.5', '"y" 0.5')
        lines = bad.split("\n")
        number = next(i for i, line in enumerate(lines, 1) if '"y" 0.5' in line)
        column = lines[number - 1].index("0.5") + 1
        assert f"line {number}, column {column}: Expecting ':' delimiter" in error(write(tmp_path / "b.json", bad))


class TestCsv:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("instruction,output\na,b,\n1.50,007,\n", [AB, ["1.50", "007"]]),
            (",instruction,output\n0,a,b\n1,NA,2020-01-01 00:00:00\n", [AB, ["NA", "2020-01-01 00:00:00"]]),
            ("\ufeff\n instruction ,output,\r\na,b\r\n\r\n  \r\na,b,c\r\n", [AB, AB]),
            ('instruction,output\r"a\rc",b\r"x ""y""",\t\r', [["a\rc", "b"]]),
            ("instruction,x,output,x\na,1,b,2\n", [AB]),
            ('output,history,instruction\nb,"[[""u"", ""v""]]",a\n', [["u", "v", "a", "b"]]),
        ],
    )
    def test_layouts(self, tmp_path, content, expected):
        assert pairs(write(tmp_path / "a.csv", content)) == expected

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("instruction,output\na,b,easy\n", "malformed CSV: a.csv: row 1, line 2: 3 cells for the 2 columns"),
            ("instruction,output\na,b\nName a, please,b\n", "row 2, line 3: 3 cells for the 2 columns"),
            ("instruction,output\na,b,\na,b,c\n", "row 2, line 3: 3 cells for the 2 columns"),
            ("instruction,output\na,b,\na,b\n", "row 2, line 3: 2 cells for the 2 columns"),
            ("instruction,output\na,b\na,b,\n", "row 2, line 3: 3 cells for the 2 columns"),
            ("instruction,output\na,b,,\n", "row 1, line 2: 4 cells for the 2 columns"),
            ("instruction,output\na,b\na\n", "row 2, line 3: 1 cells for the 2 columns"),
            (
                'instruction,output\na,b\n"c\nd,e\n',
                "malformed CSV: a.csv: line 3: a quote opens there and never closes",
            ),
            ('instruction,output\n"a"x,b\n', "malformed CSV: a.csv: row 1, line 2: ',' expected after"),
            ('instruction,output\n"\n\n",b\nc,\n"d",,\n', "row 3, line 6: 3 cells"),
            ("instruction,output,output\na,b,c\n", "repeated column: a.csv: line 1"),
            ("instruction;output\na;b\n", "malformed CSV: a.csv: line 1: semicolons separate the columns"),
            ("\ninstruction\toutput\na\tb\n", "malformed CSV: a.csv: line 2: tabs separate the columns"),
            ("instruction,output\n", "no rows: a.csv"),
        ],
    )
    def test_faults(self, tmp_path, content, message):
        assert message in error(write(tmp_path / "a.csv", content))


class TestParquet:
    def table(self, path: Path, **columns) -> Path:
        pq.write_table(pa.table(columns), path)
        return path

    def test_values_as_text(self, tmp_path):
        values = {
            "1.5": pa.array([1.5]),
            "0.1": pa.array([0.1], pa.float32()),
            "7": pa.array([7]),
            "true": pa.array([True]),
            "2020-01-02 00:00:00": pa.array(["2020-01-02"]).cast(pa.timestamp("ns")),
            "é": pa.array(["é".encode()]),
        }
        for text, value in values.items():
            assert pairs(self.table(tmp_path / "a.parquet", instruction=value, output=["b"])) == [[text, "b"]]

    def test_only_the_columns_in_use_are_read(self, tmp_path):
        broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
        late = pa.array([2**62], pa.timestamp("us"))
        path = self.table(tmp_path / "a.parquet", instruction=["a"], output=["b"], other=broken, when=late)
        assert pairs(path) == [AB]
        assert "b.parquet: row 1: column 'text': byte 0xff" in error(self.table(tmp_path / "b.parquet", text=broken))
        assert "row 1: column 'text': date value" in error(self.table(tmp_path / "c.parquet", text=late))

    def test_faults(self, tmp_path):
        assert "columns are x;" in error(self.table(tmp_path / "a.parquet", x=[1]))
        assert "no rows" in error(self.table(tmp_path / "a.parquet", text=pa.array([], pa.string())))
        pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "b.parquet")
        assert "repeated column: b.parquet: schema" in error(tmp_path / "b.parquet")


class TestBadRows:
    LINES = (
        ROW,
        "{",
        ROW,
        "null",
        '{"instruction": 1}',
        ROW[:-1] + ', "output": 2}',
        '{"instruction": "a", "output": ""}',
    )

    def test_are_left_out_and_counted(self, tmp_path, caplog):
        path = write(tmp_path / "a.jsonl", "\n".join(self.LINES).encode() + b'\n{"x": "\xff"}\n')
        with caplog.at_level(logging.INFO, "adafuse_jax"):
            loaded = load(DatasetSpec(source=str(path)), skip_bad_rows=True)
        assert (len(loaded.examples), loaded.skipped, loaded.bad) == (2, {"an empty response": 1}, 5)
        (line,) = (r.message for r in caplog.records)
        assert "2 examples; skipped 1 with an empty response, 5 bad rows, the first: malformed JSON" in line
        assert "a.jsonl: row 2, line 2" in line
        assert "row 2, line 2" in error(path)

    def test_csv(self, tmp_path):
        path = write(tmp_path / "a.csv", 'instruction,output\na,b\na, x,b\n"a"y,b\na\na,b\n')
        assert pairs(path, skip=True) == [AB, AB]

    def test_parquet(self, tmp_path):
        mixed = pa.StringArray.from_buffers(
            3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
        )
        pq.write_table(pa.table({"text": mixed}), tmp_path / "a.parquet")
        loaded = load(DatasetSpec(source=str(tmp_path / "a.parquet")), skip_bad_rows=True)
        assert (loaded.examples, loaded.bad) == ([Text("a"), Text("b")], 1)

    def test_none_is_left(self, tmp_path):
        path = write(tmp_path / "a.jsonl", f"{ROW[:-2]}\n" * 3)
        with pytest.raises(UserError, match=r"malformed JSON.*row 1, line 1"):
            load(DatasetSpec(source=str(path)), skip_bad_rows=True)
        path = write(tmp_path / "b.jsonl", '{"instruction": "a", "output": [1]}\n')
        with pytest.raises(UserError, match=r"no usable rows.*1 bad rows, the first.*row 1, line 1"):
            load(DatasetSpec(source=str(path)), skip_bad_rows=True)

    def test_examples_carry_their_place(self, tmp_path):
        path = write(tmp_path / "a.jsonl", f"\n{ROW}\n")
        (example,) = load(DatasetSpec(source=str(path))).examples
        assert example.where == f"{path}: row 1, line 2"
        assert example == Chat((Message("user", "a"), Message("assistant", "b")))


class TestStreams:
    @pytest.mark.parametrize(
        "content",
        [
            f"{ROW}\n".encode(),
            f" [{ROW}]".encode(),
            gzip.compress(f"{ROW}\n".encode(), mtime=0),
            b"instruction,output\na,b\n",
            "parquet",
        ],
    )
    def test_a_pipe_is_read_once_its_format_from_its_bytes(self, tmp_path, content):
        if content == "parquet":
            pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "a.parquet")
            content = (tmp_path / "a.parquet").read_bytes()
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        data = Dataset(DatasetSpec.parse(f"/dev/fd/{reading}"))
        os.close(reading)
        assert data.splits == ("train",)
        assert [[m.content for m in e.messages] for e in data.load().examples] == [AB]

    def test_named_pipes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "WRITER_SECONDS", 0.05)
        pipe = tmp_path / "p.jsonl"
        os.mkfifo(pipe)
        assert "it is a pipe that no process writes to" in error(pipe)

        def slow_writer():
            with open(pipe, "w") as file:  # open waits for a reader
                threading.Event().wait(0.2)
                file.write(f"{ROW}\n" * 3)

        monkeypatch.setattr(files, "WRITER_SECONDS", 0.1)
        writer = threading.Thread(target=slow_writer)
        writer.start()
        for _ in range(100):
            found = outcome(pipe)
            if isinstance(found, list):
                break
            assert "no process writes" in found  # the writer's thread has not begun
        assert len(found) == 3
        writer.join()

    def test_what_is_no_file(self, tmp_path):
        assert "it is a device" in error(Path("/dev/null"))
        (tmp_path / "a.jsonl").mkdir()
        assert "no data files" in error(tmp_path / "a.jsonl")
        assert "no such dataset" in error(Path("/" + "x" * 300 + ".jsonl"))

    def test_unreadable(self, tmp_path, monkeypatch):
        def refuse(path, *_):
            raise PermissionError(13, "Permission denied", str(path))

        path = write(tmp_path / "a.jsonl", ROW)
        monkeypatch.setattr(files, "_open", refuse)
        assert error(path) == "cannot read: a.jsonl: Permission denied: check the file and its permissions"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_memory_is_a_few_times_the_longest_line(tmp_path, name):
    size = 2**23
    long = json.dumps({"text": "hello world " * (size // 12), "x": 1})
    contents = {
        "a.jsonl": f'{{"text": "a"}}\n{long}\n',
        "a.json": f"[{long}]",
        "a.csv": "text\n" + "hello wo" * (size // 8),
    }
    path = write(tmp_path / name, contents[name])
    tracemalloc.start()
    try:
        loaded = load(DatasetSpec(source=str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(loaded.examples[-1].text) > size - 12
    assert peak < (10 if name.endswith("csv") else 5) * size  # the csv module builds cells of 4-byte characters


def test_well_formed_files_give_the_rows_that_datasets_gives(tmp_path):
    rows = [
        {"id": i, "score": i / 4, "ok": i % 2 == 0, "text": f'a, "{i}"\n\u2028é', "tags": ["x"] * (i % 3)}
        for i in range(50)
    ]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "b.json", json.dumps(rows, indent=2, ensure_ascii=False))
    for name in ("a.jsonl", "b.json"):
        theirs = datasets.load_dataset("json", data_files=str(tmp_path / name), cache_dir=str(tmp_path), split="train")
        ours = [row for _, row in file_rows(tmp_path / name).items]
        assert [{**row, "id": int(row["id"]), "score": float(row["score"])} for row in ours] == list(theirs) == rows
    datasets.Dataset.from_list(rows).to_csv(str(tmp_path / "c.csv"))
    theirs = datasets.load_dataset("csv", data_files=str(tmp_path / "c.csv"), cache_dir=str(tmp_path), split="train")
    ours = [row for _, row in file_rows(tmp_path / "c.csv").items]
    assert [row["text"] for row in ours] == list(theirs["text"])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.data())
def test_damaged_files_give_rows_or_one_line(tmp_path, data):
    name, content = data.draw(
        st.sampled_from(
            [
                ("a.jsonl", (ROW + "\n").encode() * 3),
                ("a.json", json.dumps({"data": [json.loads(ROW)], "n": [1.5, None, {}]}).encode()),
                ("a.json", f"[{ROW}, {ROW}]".encode()),
                (
                    "b.jsonl",
                    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}\n',
                ),
                ("a.csv", b'instruction,output,system\n"a, b",c,d\n"e\n""f",g,\n'),
                ("a.jsonl.gz", gzip.compress(ROW.encode(), mtime=0)),
            ]
        )
    )
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        new = data.draw(
            st.sampled_from([b"", b'"', b"{", b"[", b"]", b",", b"\r", b"\0", b"\xff", b"null", b"9" * 30, b"\\ud800"])
        )
        damaged[at : at + data.draw(st.integers(0, 3))] = new
    path = write(tmp_path / name, bytes(damaged))
    for skip in (False, True):
        found = outcome(path, skip=skip)
        assert found
        if isinstance(found, str):
            assert len(found) <= 400
            assert "\n" not in found
            assert name in found
