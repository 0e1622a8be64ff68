"""Fixtures that several test files share: the folder of real data and the two real models built from it."""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import pytest
from chats import chatml, plain  # noqa: F401 - fixtures
from mistakes import finished_run, folder, good_folder, refused  # noqa: F401 - fixtures
from random_models import models  # noqa: F401 - a fixture

FAST_COMPILATION = os.environ.get("JAX_PLATFORMS") == "cpu"
CACHE = Path.home() / ".cache" / "adafuse-jax-tests"
MAX_PROGRAM_BYTES = 2**30
MAX_MAPS = 25_000
"""Memory maps of this process at which it drops its compiled programs. Linux ends a process that needs more than 65,530; a
test file makes up to 16,000."""


def set_compilation(**settings: Any) -> None:
    """Options of JAX by their names, in this process and in the scripts that tests start."""
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def compile_anew(**settings: Any) -> None:
    """`set_compilation`, without the programs of this process, whose keys lack the options, and without the real models that
    no test needs any more: models are in cycles."""
    jax.clear_caches()
    gc.collect()
    set_compilation(**settings)


def pytest_configure(config: pytest.Config) -> None:
    """Set JAX's compilation: on the CPU most time goes to compiling programs that run once, so most of XLA's
    optimisations are off, and a program is compiled once per machine, whichever worker, script or session needs it."""
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not programs:
        programs = str(CACHE / "programs")
        if size_of(programs) > MAX_PROGRAM_BYTES:
            shutil.rmtree(programs, ignore_errors=True)
    set_compilation(jax_compilation_cache_dir=programs, jax_persistent_cache_min_compile_time_secs=0.0)
    if FAST_COMPILATION:
        set_compilation(jax_disable_most_optimizations=True)
    set_caches(config)
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_finish() -> None:
    """Take modules and tests, which are never garbage, out of Python's collections, which are rarer than by default, as one
    tracing of a model makes many objects: they took a sixth of the time of the tests."""
    gc.collect()
    gc.freeze()


def set_caches(config: pytest.Config) -> None:
    """Give the session, all its workers and scripts, a data cache of its own; other libraries keep their caches."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    os.environ.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
    own = tempfile.TemporaryDirectory(prefix="adafuse-tests-")
    config.add_cleanup(own.cleanup)
    os.environ["XDG_CACHE_HOME"] = own.name


def size_of(directory: str) -> int:
    """Bytes of the files in a directory; another session may remove some of them meanwhile."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total


@pytest.fixture
def optimised() -> None:
    """Compile the programs of a test as for a user."""


@pytest.fixture(autouse=True)
def real_models_are_optimised(request: pytest.FixtureRequest) -> None:
    """Compile tests of real models as for a user: they compute for longer than they compile. Fixtures of a module are made
    before, with most optimisations off."""
    optimised = not {"smollm2_dir", "stories260k_dir", "packaged_dir", "optimised"}.isdisjoint(request.fixturenames)
    if FAST_COMPILATION and optimised == jax.config.values["jax_disable_most_optimizations"]:
        compile_anew(jax_disable_most_optimizations=not optimised)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are dropped between two test files once they take many memory maps: those of the whole suite take
    more than a process may have, and the one that does not fit crashes it."""
    yield
    if FAST_COMPILATION and not jax.config.values["jax_disable_most_optimizations"]:
        compile_anew(jax_disable_most_optimizations=True)
    if num_maps() > MAX_MAPS:
        jax.clear_caches()
        gc.collect()


def num_maps() -> float:
    """Memory maps of this process; infinite where the system does not tell."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return math.inf


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def default_signals():
    """A test that calls `run_cli`, which leaves signals to the end of the process, leaves pytest's to the next test."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The `shared` folder beside the repository, with real data, models and tools. Without it the tests that need it are
    skipped, or fail if REQUIRE_SHARED is set."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "assets").is_dir():
        (pytest.fail if os.environ.get("REQUIRE_SHARED") else pytest.skip)("no ../shared folder")
    return path


def built_model(shared: Path, name: str, tool: str, *arguments: str, python: str | Path = sys.executable) -> Path:
    """CACHE/name, made once per machine by `tool`, given `arguments` and the directory. The rename makes a half-built one
    impossible."""
    out = CACHE / name
    if out.is_dir():
        return out
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{name}-") as scratch:
        built = Path(scratch) / name
        done = subprocess.run([python, shared / "tools" / tool, *arguments, built], capture_output=True, text=True)
        if done.returncode:
            pytest.fail(f"{tool} failed: {done.stderr[-500:]}")
        try:
            os.rename(built, out)
        except OSError:
            if not out.is_dir():  # another session may have been first
                raise
    return out


@pytest.fixture(scope="session")
def stories260k_dir(shared_dir: Path) -> Path:
    """A Hugging Face directory of stories260K (float32, no chat template, BOS added by the tokenizer)."""
    return built_model(shared_dir, "stories260k", "stories260k_hf.py")


@pytest.fixture(scope="session")
def smollm2_dir(shared_dir: Path) -> Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct (bfloat16, ChatML, no BOS of its own)."""
    return built_model(shared_dir, "smollm2", "smollm2_hf.py")


@pytest.fixture(scope="session")
def packaged_dir(shared_dir: Path) -> Callable[[str], Path]:
    """Hugging Face directories of the models that `packaged_hf.py` builds, by name. It needs PyTorch, which is in the
    environment of `make goldens`."""
    python = Path(__file__).resolve().parents[1] / ".venv-torch" / "bin" / "python"

    def directory(name: str) -> Path:
        if not (CACHE / name).is_dir() and not python.exists():
            pytest.skip(f"{name} is not built; `make goldens` builds it")
        return built_model(shared_dir, name, "packaged_hf.py", name, python=python)

    return directory
