"""benchmarks.serving on tiny shapes: lengths, times by hand, ratios, and all of it on a server process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.records import write_json
from benchmarks.serving import __main__ as serving
from benchmarks.serving.client import Served, summary
from benchmarks.serving.report import targets
from benchmarks.serving.requests import lengths_of, make_requests


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Questions of 5, 50 and 5,000 tokens with replies of 10, 100 and 10, and one without a reply."""
    rows = [
        {"conversations": [{"from": "human", "value": "x" * 4 * q}, {"from": "gpt", "value": "y" * 4 * r}]}
        for q, r in ((5, 10), (50, 100), (5000, 10))
    ]
    rows.append({"conversations": [{"from": "human", "value": "x" * 400}]})
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows))
    return path


def test_lengths_are_those_of_the_conversations(conversations: Path):
    lengths = lengths_of(conversations, 6, max_prompt=100, max_new=64)
    assert sorted(lengths) == [(5, 10)] * 3 + [(50, 64)] * 3
    requests = make_requests(lengths, ["a", "b"], vocab_size=64, seed=0)
    assert [(len(asked.prompt), asked.new_tokens) for asked in requests] == lengths
    assert [asked.model for asked in requests] == ["a", "b"] * 3
    assert all(3 <= token < 64 for asked in requests for token in asked.prompt)
    assert requests != make_requests(lengths, ["a", "b"], vocab_size=64, seed=1)


def test_requests_of_loads():
    """Few clients have fewer requests; those of one client need caches of one size, here of 128 and not of 64."""
    assert [serving.loop_size(clients, 128) for clients in (1, 8, 32)] == [8, 64, 128]
    assert serving.alike([(60, 4), (60, 5), (100, 28), (120, 9), (64, 64)], 5) == [
        (60, 5), (100, 28), (64, 64), (60, 5), (100, 28)
    ]  # fmt: skip


def test_times_by_hand():
    """Two requests of three and two tokens; the second begins when the first has one token."""
    found = summary([Served(0.0, [0.5, 0.6, 0.8]), Served(0.5, [0.7, 1.0])])
    assert found["tokens"] == 5
    assert found["tokens_per_s"] == pytest.approx(5.0)
    assert found["first_ms"]["median"] == pytest.approx(350)
    assert found["between_ms"]["median"] == pytest.approx(200)
    assert "failed" in summary([Served(0.0, [0.5]), Served(0.0, [], "status 429")])["error"]


def test_ratios():
    """Every ratio from numbers of which each is its own."""

    def part(rate: float, offline: float, alone: float, p99: float) -> dict:
        load = {"tokens_per_s": rate, "between_ms": {"median": 2.0, "p99": p99}}
        loads = {"closed-1": load, "closed-8": load, "closed-32": load, "disturbed": load}
        return {"loads": loads, "offline": {"tokens_per_s": offline}, "alone": {"median": alone}}

    parts = {
        "bare": part(90.0, 100.0, 1.6, 6.0),
        "one": part(72.0, 80.0, 2.0, 8.0),
        "eight": part(45.0, 50.0, 2.0, 9.0),
    }
    found = targets(parts | {"peer": {"closed": {"32": {"tokens_per_s": 30.0}}}})
    assert [*found.values()] == pytest.approx([0.9, 0.8, 0.5, 1.25, 1.0, 3.0, 4.0, 4.5, 3.0])
    assert set(targets({}).values()) == {None}


def test_a_server_that_does_not_start(conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last line of its log stands in the table."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho starts >&2\necho 'UserError: 2 devices are needed' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(serving.sys, "executable", str(program))
    serving.main(["--out", str(tmp_path), "--conversations", str(conversations), "--part", "one", "--size", "tiny"])
    assert (
        "| one |  | ServerError: the server does not start: UserError: 2 devices are needed |"
        in (tmp_path / "serving.md").read_text()
    )


@pytest.mark.slow
def test_all_of_it_on_tiny_shapes(conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = "--size tiny --dtype float32 --targets qv --slots 4 --context 256 --requests 8 --alone 2 --new-tokens 16"
    flags += " --clients 1 4 --rates 50 --poisson-seconds 0.1 --long-prompt 100 --long-count 1 --disturbed-clients 4"
    out = tmp_path / "out"
    serving.main(["--out", str(out), "--conversations", str(conversations), "--part", "eight", *flags.split()])
    part = json.loads((out / "serving-part-eight.json").read_text())
    loads = part["loads"]
    assert loads.keys() == {"closed-1", "closed-4", "poisson-50", "disturbed"}
    assert [loads[name]["requests"] for name in ("closed-1", "poisson-50")] == [2, 5]
    tokens = sum(min(new, 16) for _, new in lengths_of(conversations, 8, max_prompt=240, max_new=16))
    assert part["offline"]["tokens"] == loads["closed-4"]["tokens"] == loads["disturbed"]["tokens"] == tokens
    assert 0 < part["seconds"]["model"] < part["seconds"]["warm_up"] < part["seconds"]["offline"]
    assert all(load["tokens_per_s"] > 0 for load in part["loads"].values())
    assert "| eight | closed-4 |" in (out / "serving.md").read_text()
    write_json(out / "serving-part-peer.json", {"part": "peer", "command": "x", "closed": {"4": {"tokens_per_s": 5.0}}})
    serving.main(["--out", str(out), "--part", "merge"])
    assert "| transformers, bare | closed-4 | 5 |" in capsys.readouterr().out
