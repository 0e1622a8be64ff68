"""benchmarks/common: the stopwatch counts the calls it times, records name their origin, tables are Markdown."""

from __future__ import annotations

import json
import subprocess

import jax
import jax.numpy as jnp
import pytest
import tiny

from benchmarks.common import timing
from benchmarks.common.ceilings import measure_ceilings
from benchmarks.common.records import command_line, commit, facts, first_line, write_json
from benchmarks.common.reports import number, picture, table
from benchmarks.common.timing import MAX_CALLS, MIN_CALLS, Stopwatch, Timing, time_calls


class Clock:
    """A clock that stands still but for what a call takes."""

    now = 0.0

    def call(self, seconds: float = 0.5):
        def call(count: int) -> int:
            self.now += seconds
            return count + 1

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


class TestTiming:
    def test_median_and_spread(self):
        found = Timing(repeats=(0.003, 0.001, 0.0015), calls=4)
        assert (found.ms, found.spread_ms) == (pytest.approx(1.5), pytest.approx(2.0))
        assert str(found) == "1.500 ± 2.000 ms"

    def test_calls_are_chained(self, clock):
        found, state = time_calls(clock.call(), 0, calls=4, repeats=3)
        assert found == Timing(repeats=(0.5, 0.5, 0.5), calls=4)
        assert state == 4 * (3 + 1)  # one repeat warms up

    def test_restarts_are_not_timed(self, clock):
        def restart(count: int) -> int:
            clock.now += 100
            return 0

        found, state = time_calls(clock.call(), 0, calls=4, repeats=3, restart=restart, warm_up=False)
        assert (found.ms, state) == (500.0, 4)
        assert clock.now == 3 * (100 + 4 * 0.5)

    @pytest.mark.parametrize(("seconds", "calls"), [(5.0, 10), (0.1, MIN_CALLS), (1e6, MAX_CALLS)])
    def test_calls_fill_the_seconds(self, clock, seconds, calls):
        found, _ = time_calls(clock.call(), 0, seconds=seconds, repeats=2)
        assert found == Timing(repeats=(0.5, 0.5), calls=calls)

    def test_waits_for_the_work(self, clock):
        """Seconds that a device takes after a call has returned count."""

        def wait(count: int) -> int:
            clock.now += count
            return count

        found, _ = time_calls(lambda count: 8, 0, calls=2, repeats=1, restart=lambda _: 0, wait=wait, warm_up=False)
        assert found.ms == 4000.0

    def test_stopwatch(self, clock):
        watch = Stopwatch()
        clock.now += 3
        assert watch.seconds == 3


def test_ceilings():
    found = measure_ceilings(2**12, 64, seconds=1e-4, repeats=2)
    assert found["array_bytes"] == 2**14
    for kind in ("read", "copy", "matmul"):
        assert min(found[kind].values()) > 0
        assert found[f"best_{kind}"] == max(found[kind].values())


class TestRecords:
    def test_origin(self):
        root = tiny.REPOSITORY
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
        if not head:
            pytest.skip("not a clone")
        assert facts() == {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}
        assert head.startswith((commit() or "").removesuffix("-dirty"))

    def test_without_git(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert commit() is None

    def test_command(self):
        assert command_line("benchmarks.decode", ["--out", "a b"]) == "python -m benchmarks.decode --out 'a b'"

    def test_file(self, tmp_path):
        write_json(tmp_path / "results" / "x.json", {"ms": 1.5})
        assert json.loads((tmp_path / "results" / "x.json").read_text()) == {"ms": 1.5}

    def test_first_line(self):
        assert first_line(ValueError("\none\ntwo")) == "ValueError: one"
        assert first_line(KeyError()) == "KeyError: "
        assert len(first_line(ValueError("x" * 9999))) == 300


class TestReports:
    def test_table(self):
        assert table(("a", "", "c"), [[1, "x|y"], ["", 2, 3]]) == [
            "| a | | c |", "|---|---|---|", "| 1 | x/y |  |", "|  | 2 | 3 |",
        ]  # fmt: skip

    def test_number(self):
        assert (number(1.25, ".1f", "%"), number(None, ".1f", "%")) == ("1.2%", "")

    def test_picture(self, tmp_path):
        with picture(tmp_path / "x.png", ncols=2) as (_, axes):
            axes[1].plot([1, 2])
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_jax_work_is_waited_for():
    found, state = time_calls(jax.jit(lambda x: x + 1), jnp.zeros(8), calls=3, repeats=2)
    assert (state == 9).all()
    assert len(found.repeats) == 2
    assert min(found.repeats) > 0
