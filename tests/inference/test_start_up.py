"""The start of decode.py: which libraries it imports, and what is compiled when."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from adafuse_jax.checkpoints import placement
from adafuse_jax.checkpoints.hf_checkpoint import HFCheckpoint, empty_backbone, load_backbone
from adafuse_jax.checkpoints.safetensors_files import Tensors
from adafuse_jax.core.errors import UserError
from adafuse_jax.data.examples import Chat, Message
from adafuse_jax.inference import session
from adafuse_jax.inference.ahead import Program, compiled_ahead
from adafuse_jax.inference.config import DecodeConfig
from adafuse_jax.inference.session import Session

LIBRARIES = ("transformers", "torch", "datasets", "orbax", "huggingface_hub", "matplotlib", "pandas", "pyarrow")
IN_PROCESS = """
import json, runpy, sys
sys.argv = ["decode.py", *sys.argv[2:]]
try:
    runpy.run_path("decode.py", run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("start"))


@pytest.fixture
def fresh() -> None:
    """No program is compiled yet."""
    jax.clear_caches()
    compiled.clear()


def test_libraries_that_decoding_does_not_need_are_not_imported(folder):
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, "-", *tiny.decode_flags(folder)],
        capture_output=True, text=True, timeout=300, cwd=tiny.REPOSITORY, env=tiny.environment(),
    )  # fmt: skip
    answer, found = done.stdout.rstrip("\n").rsplit("\n", 1)
    code, modules = json.loads(found)
    assert code == 0, done.stderr
    assert answer
    assert "tokenizers" in modules
    assert not [name for name in modules if name.split(".")[0] in LIBRARIES]


@pytest.mark.parametrize("prompts", [["Hi"], ["Hi", "A longer prompt, in the same batch."]])
def test_nothing_is_compiled_after_the_session_is_there(folder, fresh, prompts):
    config = DecodeConfig(model=str(folder / "model"), max_new_tokens=4)
    started = Session(config, first=prompts)
    assert compiled
    compiled.clear()
    answers = started.answer_all(started.tokens_of_all(prompts))
    assert compiled == []
    later = Session(config)
    assert [a.token_ids for a in later.answer_all(later.tokens_of_all(prompts))] == [a.token_ids for a in answers]


def test_a_first_prompt_that_is_refused_changes_nothing(folder):
    config = DecodeConfig(model=str(folder / "model"), max_new_tokens=4)
    prompt = Chat((Message("user", "x" * 9000),))
    started = Session(config, first=[prompt])
    with pytest.raises(UserError, match="the context holds"):
        started.answer(prompt)
    assert started.answer("Hi").token_ids


def test_weights_that_cannot_be_loaded(folder, monkeypatch):
    def broken(*_, **__):
        raise UserError("weights.safetensors: broken; restore it")

    monkeypatch.setattr(session, "load_backbone", broken)
    with pytest.raises(UserError, match="broken; restore it"):
        Session(DecodeConfig(model=str(folder / "model")), first=["Hi"])


def test_the_choice_of_a_backend_is_logged_once(folder, caplog):
    caplog.set_level("DEBUG", "adafuse_jax")
    Session(DecodeConfig(model=str(folder / "model")), first=["Hi"])
    assert caplog.text.count("decoding unmerged") == 1


@pytest.fixture
def interrupt(monkeypatch) -> Iterator[Callable[..., None]]:
    """Ctrl-C while the first tensors are awaited, as from a slow disk; afterwards none may have been read."""
    reads, over, view = [], threading.Event(), Tensors.view

    def slow(self: Tensors, name: str) -> np.ndarray:
        assert over.wait(20)
        found = view(self, name)
        reads.append(name)
        return found

    def raise_it(*_: object) -> None:
        threading.Timer(0.5, over.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Tensors, "view", slow)
    yield raise_it
    assert over.is_set()
    assert reads == []


def test_ctrl_c_ends_the_loading_of_a_session(folder, interrupt, monkeypatch):
    monkeypatch.setattr(session, "compiled_ahead", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Session(DecodeConfig(model=str(folder / "model")), first=["Hi"])


def test_ctrl_c_ends_the_loading(folder, interrupt):
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            load_backbone(folder / "model")
    finally:
        signal.signal(signal.SIGALRM, before)


class TestProgram:
    def test_runs_only_outside(self, fresh):
        runs: list[int] = []

        def double(x):
            jax.debug.callback(lambda: runs.append(1))
            return 2 * x

        program, x = Program(double), np.arange(3.0, dtype=np.float32)
        results = []
        with compiled_ahead(lambda: results.append(program(x))):
            pass
        jax.effects_barrier()
        assert (results[0].shape, runs) == ((3,), [])
        compiled.clear()
        np.testing.assert_array_equal(program(x), 2 * x)
        jax.effects_barrier()
        assert (runs, compiled) == ([1], [])

    def test_errors_are_those_of_the_call(self, caplog):
        caplog.set_level("INFO", "adafuse_jax")

        def refuse(x):
            raise UserError("cannot do this")

        with compiled_ahead(lambda: Program(refuse)(1)):
            pass
        assert "compiled when it is needed, not ahead: cannot do this" in caplog.text
        with pytest.raises(UserError, match="cannot do this"):
            Program(refuse)(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_leaves_in_place_are_those_set_on_a_device(folder, monkeypatch, dtype):
    """On the CPU tensors are copied to the memory of the leaf; elsewhere a program sets them. Casts included."""
    checkpoint = HFCheckpoint.open(folder / "model")
    in_place = load_backbone(checkpoint, dtype)
    monkeypatch.setattr(placement, "_is_on_cpu", lambda leaf: False)
    on_device = load_backbone(checkpoint, dtype, into=empty_backbone(checkpoint, dtype))
    for one, other in zip(jax.tree.leaves(in_place), jax.tree.leaves(on_device), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
