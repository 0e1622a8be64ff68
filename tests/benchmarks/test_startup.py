"""benchmarks.decode.startup: a real start of a tiny model, and the files."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

from benchmarks.decode import startup


def test_starts_and_files(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(tiny.REPOSITORY)
    tiny.write_model(tmp_path / "model")
    startup.main(
        ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tokens", "2", "--repeats", "1"]
    )
    record = json.loads((tmp_path / "out" / "startup-model.json").read_text())
    first, (again,) = record["nothing_cached"], record["cached"]
    assert first["compilations"] > 4
    assert (first["read_from_cache"], again["compilations"]) == (0, 0)
    assert again["read_from_cache"] == first["compilations"]
    assert "transformers" not in first["imported"]
    parts = {part["part"]: part for part in again["parts"]}
    assert 0 < parts["tokenizer"]["begin"] < parts["weights"]["end"] < parts["answer"]["end"] <= again["tokens_printed"]
    assert again["tokens_printed"] < again["seconds"]
    assert parts["weights"]["bytes"] > 0
    written = (tmp_path / "out" / "startup-model.md").read_text()
    assert written in capsys.readouterr().out
    assert "| programs cached, the fastest |" in written
