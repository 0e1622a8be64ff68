"""benchmarks.training.data on a few rows: both starts have the same rows, and the table has what was measured."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from data_fixtures import CHATML, write_tokenizer

from benchmarks.training import data


@pytest.mark.slow
def test_both_starts_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = write_tokenizer(tmp_path / "model", template=CHATML, eos="<|im_end|>")
    with gzip.open(tmp_path / "alpaca.json.gz", "wt") as file:
        json.dump([{"instruction": f"Say {i}.", "input": "", "output": "x" * 2000} for i in range(5)], file)
    flags = {"model": model, "alpaca": tmp_path / "alpaca.json.gz", "work": tmp_path / "work", "out": tmp_path / "out"}
    monkeypatch.setattr(
        sys, "argv", ["data", "--examples", "40", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))]
    )
    data.main()
    record = json.loads((tmp_path / "out" / "data.json").read_text())
    (size,) = record["sizes"]
    lines = [json.loads(line) for line in (tmp_path / "work" / "40.jsonl").read_text().splitlines()]
    assert len(lines) == size["examples"] == 40
    assert {len(line["output"]) for line in lines} == {1000}
    first, second = size["starts"].values()
    assert first["fingerprint"] == second["fingerprint"]
    assert first["rows"] == second["rows"] > 0
    assert first["examples_per_second"] == pytest.approx(40 / first["seconds"])
    table = (tmp_path / "out" / "data.md").read_text()
    for start in (first, second):
        assert f"| {start['seconds']:.1f} s | {start['examples_per_second']:,.0f} |" in table
