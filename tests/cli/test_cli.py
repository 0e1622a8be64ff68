"""The frame of the commands: what happens while libraries load, closed and full streams, signals, memory, and bugs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from adafuse_jax.core import cli, runtime
from adafuse_jax.core.cli import BROKEN_PIPE_CODE, run_cli
from adafuse_jax.core.errors import EXIT_CODE, MAX_MESSAGE, UserError

COMMANDS = {
    "adafuse train": ["-m", "adafuse_jax", "train", "--model=m", "--dataset=d", "--output=o"],
    "adafuse decode": ["-m", "adafuse_jax", "decode", "--model=m", "--prompt=Hi"],
    "adafuse evaluate": ["-m", "adafuse_jax", "evaluate", "--model=m", "--dataset=d"],
    "adafuse export": ["-m", "adafuse_jax", "export", "--model=m", "--adapter=a", "--output=o"],
    "train": ["train.py", "--model=m", "--dataset=d", "--output=o"],
    "decode": ["decode.py", "--model=m", "--prompt=Hi"],
    "export": ["-m", "adafuse_jax.export", "--model=m", "--adapter=a", "--output=o"],
    "serve": ["-m", "adafuse_jax.serving", "--model=m"],
    "evaluation": ["-m", "adafuse_jax.evaluation", "--model=m", "--dataset=d"],
    "lm_eval": ["-m", "adafuse_jax.evaluation.lm_eval", "--model=adafuse", "--tasks=t"],
    "demo": ["-m", "examples.skills"],
}
SLEEP = "import time; time.sleep(60)"
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
"""A library that computes for minutes without a look at Python's signals, as XLA's compiler does."""


def start(
    arguments: list[str], folder: Path, jax: str, *, interrupt: signal.Handlers = signal.SIG_DFL, **options
) -> subprocess.Popen[str]:
    """A command in `folder`, with a module in place of JAX that runs the code `jax`. `interrupt`: what SIGINT does to it,
    whatever it does to pytest."""
    (folder / "jax.py").write_text(jax)
    script = [str(tiny.REPOSITORY / arguments[0]), *arguments[1:]] if arguments[0].endswith(".py") else arguments
    path = os.pathsep.join([str(folder), str(tiny.REPOSITORY)])
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [sys.executable, *script], cwd=folder, env=tiny.environment(PYTHONPATH=path), text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupt), **pipes,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """(exit code, stderr); stdout must be empty."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert not out
    return process.returncode, err


@pytest.mark.parametrize("name", COMMANDS)
class TestWhileLibrariesLoad:
    def test_ctrl_c(self, name: str, tmp_path: Path):
        process = start(COMMANDS[name], tmp_path, "import os, time; os.kill(os.getpid(), 2); time.sleep(60)")
        assert finish(process) == (130, "interrupted\n")

    def test_a_broken_library(self, name: str, tmp_path: Path):
        code, err = finish(start(COMMANDS[name], tmp_path, "raise ImportError('libcudart.so:\\nno such file')"))
        assert code == 2
        assert err.splitlines() == [
            "error: a library cannot be imported (ImportError: libcudart.so: no such file); "
            "repair the installation: pip install -e ."
        ]


class TestAdafuse:
    """The program that is installed, and its five commands."""

    @pytest.mark.parametrize(
        ("words", "fault"), [([], "a command is missing"), (["chat"], "unknown command 'chat'"), (["-x"], "unknown")]
    )
    def test_without_a_command(self, words: list[str], fault: str, tmp_path: Path):
        code, err = finish(start(["-m", "adafuse_jax", *words], tmp_path, ""))
        assert code == 2
        assert err.startswith(f"error: {fault}")
        assert err.endswith("; give one of train, decode, evaluate, export, serve; see --help\n")

    @pytest.mark.parametrize(
        ("arguments", "program"),
        [
            (["-m", "adafuse_jax"], "adafuse"),
            (["-m", "adafuse_jax", "train"], "adafuse train"),
            (["-m", "adafuse_jax", "decode"], "adafuse decode"),
            (["-m", "adafuse_jax", "evaluate"], "adafuse evaluate"),
            (["-m", "adafuse_jax", "export"], "adafuse export"),
            (["-m", "adafuse_jax", "serve"], "adafuse serve"),
            (["train.py"], "train.py"),
            (["decode.py"], "decode.py"),
            (["-m", "adafuse_jax.evaluation"], "python -m adafuse_jax.evaluation"),
            (["-m", "adafuse_jax.export"], "python -m adafuse_jax.export"),
        ],
    )
    def test_help_names_the_program(self, arguments: list[str], program: str):
        done = subprocess.run(
            [sys.executable, *arguments, "--help"], capture_output=True, text=True, cwd=tiny.REPOSITORY,
            env=tiny.environment(COLUMNS="200"),
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        words = done.stdout.split()
        assert " ".join(words).startswith(f"usage: {program} {'COMMAND' if program == 'adafuse' else '[-h]'}")

    def test_installed_from_a_clone(self, tmp_path: Path):
        """The two packages and the program, without examples, benchmarks and studies."""
        clone, target = tmp_path / "clone", tmp_path / "target"
        for folder in ("adafuse_jax", "pallas_kernels", "examples"):
            shutil.copytree(tiny.REPOSITORY / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE", "train.py", "decode.py"):
            shutil.copy(tiny.REPOSITORY / name, clone)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(clone)], check=True, timeout=120)
        assert {path.name for path in target.iterdir() if path.is_dir() and path.suffix != ".dist-info"} == {
            "adafuse_jax", "pallas_kernels", "bin",
        }  # fmt: skip
        for words, code in ((["--help"], 0), (["export", "--model=m"], 2)):
            done = subprocess.run(
                [target / "bin" / "adafuse", *words], capture_output=True, text=True, cwd=tmp_path,
                env=tiny.environment(PYTHONPATH=str(target)),
            )  # fmt: skip
            assert done.returncode == code, done.stderr
            assert done.stdout.count("\n  ") == (5 if code == 0 else 0)


class TestSignals:
    def run(
        self, folder: Path, code: str, *numbers: int, grace_seconds: float = cli.GRACE_SECONDS
    ) -> tuple[int, str, float]:
        """(exit code, stderr, seconds from the last signal to the end) of a command that runs `code` and gets signals."""
        (folder / "code.py").write_text(f"open('begun', 'w').close()\n{code}")
        frame = (
            f"from adafuse_jax.core import cli; cli.GRACE_SECONDS = {grace_seconds}; "
            "cli.run_cli(lambda argv: exec(open('code.py').read(), {}))"
        )
        process = start(["-c", frame], folder, "")
        while not (folder / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        for number in numbers:
            time.sleep(0.3)
            process.send_signal(number)
        begun = time.monotonic()
        return *finish(process), time.monotonic() - begun

    @pytest.mark.parametrize("code", ["import time; time.sleep(60)", BUSY])
    def test_a_second_ctrl_c_ends_at_once(self, tmp_path: Path, code: str):
        code, err, seconds = self.run(tmp_path, f"try:\n    {code}\nfinally:\n    {BUSY}", signal.SIGINT, signal.SIGINT)
        assert (code, err) == (130, "interrupted\n")
        assert seconds < 2

    def test_a_second_ctrl_c_while_the_interpreter_ends(self, tmp_path: Path):
        code = f"import atexit, time\natexit.register(lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 2**22))\n{SLEEP}"
        status, err, _ = self.run(tmp_path, f"import hashlib\n{code}", signal.SIGINT, signal.SIGINT)
        assert (status, err) == (130, "interrupted\n")

    def test_sigterm_runs_the_cleanup(self, tmp_path: Path):
        code = "import time\ntry:\n    time.sleep(60)\nfinally:\n    open('cleaned', 'w').close()"
        assert self.run(tmp_path, code, signal.SIGTERM)[:2] == (143, "terminated\n")
        assert (tmp_path / "cleaned").exists()

    def test_sigterm_ends_what_does_not_react(self, tmp_path: Path):
        code, err, seconds = self.run(tmp_path, BUSY, signal.SIGTERM, grace_seconds=1)
        assert (code, err) == (143, "terminated\n")
        assert 0.9 < seconds < cli.GRACE_SECONDS

    def test_an_error_after_ctrl_c_is_its_consequence(self, tmp_path: Path):
        code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemError('wrapped')"
        assert self.run(tmp_path, code, signal.SIGINT)[:2] == (130, "interrupted\n")

    def test_a_background_job_ignores_ctrl_c(self, tmp_path: Path):
        """nohup and `&` in scripts start a command with SIGINT ignored."""
        code = "import os, time; os.kill(os.getpid(), 2); time.sleep(0.2); raise ImportError('went on')"
        ignoring = start(COMMANDS["decode"], tmp_path, code, interrupt=signal.SIG_IGN)
        status, err = finish(ignoring)
        assert (status, "went on" in err) == (2, True)


HELP = ["decode.py", "--help"]
NO_MODEL = ["decode.py", "--prompt=Hi"]


def shell(redirection: str, arguments: list[str], unbuffered: str) -> subprocess.CompletedProcess[str]:
    """A command with the shell's redirections."""
    command = f"{sys.executable} {tiny.REPOSITORY}/{' '.join(arguments)} {redirection}"
    environment = tiny.environment(PYTHONUNBUFFERED=unbuffered)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("unbuffered", ["", "1"])
class TestStreams:
    @pytest.mark.parametrize(
        ("redirection", "arguments", "line"),
        [
            (">/dev/full", HELP, "error: stdout: cannot be written (No space left on device); free space"),
            (">&-", HELP, "error: stdout is closed; redirect it"),
            (">&- <&-", HELP, "error: stdout is closed; redirect it"),
            ("<&-", NO_MODEL, "error: --model is required"),
            ("2>&-", NO_MODEL, None),
            ("2>/dev/full", NO_MODEL, None),
            ("<&- >&- 2>&-", HELP, None),
        ],
    )
    def test_one_line(self, redirection: str, arguments: list[str], line: str | None, unbuffered: str):
        done = shell(redirection, arguments, unbuffered)
        assert (done.returncode, done.stdout) == (2, "")
        assert [text[: len(line or "")] for text in done.stderr.splitlines()] == ([] if line is None else [line])

    @pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2> >(exit)"])
    def test_lines_that_nobody_gets_end_nothing(self, redirection: str, unbuffered: str, tmp_path: Path):
        (tmp_path / "lines.py").write_text(
            "import sys, time\n"
            "from tqdm import tqdm\n"
            "from adafuse_jax.core.cli import run_cli\n"
            "def main(argv):\n"
            "    for _ in range(3):\n"
            "        print('a line' * 5000, file=sys.stderr, flush=True)\n"
            "        tqdm.write('another', file=sys.stderr)\n"
            "        time.sleep(0.1)\n"
            "    print('done')\n"
            "run_cli(main)\n"
        )
        environment = tiny.environment(PYTHONUNBUFFERED=unbuffered, PYTHONPATH=str(tiny.REPOSITORY))
        command = ["bash", "-c", f"{sys.executable} {tmp_path}/lines.py {redirection}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert (done.returncode, done.stdout) == (0, "done\n")

    def test_a_reader_that_goes_is_no_error(self, unbuffered: str):
        done = shell("| true; exit ${PIPESTATUS[0]}", HELP, unbuffered)
        assert (done.returncode, done.stderr) == (BROKEN_PIPE_CODE, "")


def test_a_closed_stdin_is_no_prompt(tmp_path: Path):
    folder = tiny.write_folder(tmp_path)
    done = shell("<&-", ["decode.py", f"--model={folder}/model", "--max-new-tokens=1"], "")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: stdin is closed; give --prompt or --prompts-file\n"


@pytest.fixture
def outcome(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """(exit code, stderr) of a command that raises an exception, run in this process."""

    def run(error: BaseException) -> tuple[object, str]:
        def main(argv: object) -> int:
            raise error

        with pytest.raises(SystemExit) as end:
            run_cli(main, [])
        out, err = capfd.readouterr()
        assert out == ""
        return end.value.code, err

    return run


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (UserError("x" * 9999), "…"),
            (
                MemoryError("Unable to allocate 1.00 EiB for an array"),
                "the host has too little memory (Unable to allocate",
            ),
            (MemoryError(), "the host has too little memory (an allocation failed)"),
            (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
            (PermissionError(errno.EACCES, "Permission denied", "/secret"), "/secret: Permission denied"),
            (OSError(errno.ENAMETOOLONG, "File name too long", "y" * 9999), "File name too long"),
            (OSError(errno.ENOMEM, "Cannot allocate memory"), "too little memory"),
            (OSError(errno.ELOOP, "Too many levels of symbolic links", "/loop"), "/loop: Too many levels"),
        ],
    )
    def test_of_the_user_or_the_machine_is_one_line(self, outcome: Callable, error: BaseException, expected: str):
        code, err = outcome(error)
        assert code == 2
        assert err.startswith("error: ")
        assert expected in err
        assert err.count("\n") == 1
        assert len(err) <= len("error: \n") + MAX_MESSAGE

    @pytest.mark.parametrize(
        "error", [ValueError("bug"), KeyError("bug"), ImportError("bug", name="adafuse_jax.nothing")]
    )
    def test_a_bug_has_its_traceback(self, error: Exception):
        def main(argv: object) -> int:
            raise error

        with pytest.raises(type(error), match="bug"):
            run_cli(main, [])

    def test_exit_codes(self, outcome: Callable):
        assert outcome(SystemExit(3)) == (3, "")
        assert outcome(SystemExit(None)) == (0, "")
        assert outcome(SystemExit("a message")) == (1, "a message\n")
        assert outcome(BrokenPipeError()) == (BROKEN_PIPE_CODE, "")


class TestMemory:
    def test_of_the_host(self):
        with (
            pytest.raises(UserError, match=r"the host has too little memory \(.*EiB.*\); lower --x"),
            runtime.memory_errors("lower --x"),
        ):
            raise MemoryError("Unable to allocate 1.00 EiB for an array")

    def test_of_the_device(self):
        import jax.numpy as jnp

        with pytest.raises(UserError, match=r"too little memory \(.*; lower --x"), runtime.memory_errors("lower --x"):
            jnp.zeros((2**20, 2**20, 8)).block_until_ready()


def test_warnings_and_log_lines_are_one_line():
    code = (
        "import logging, warnings; from adafuse_jax.core import runtime; runtime.set_up()\n"
        "warnings.warn('first\\nsecond'); logging.getLogger('library').error('one\\ntwo %s', 'x' * 9999)\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.getLogger('library').exception('failed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=tiny.environment())
    first, second, third = done.stderr.splitlines()
    assert first == "warning: first second (UserWarning)"
    assert second.startswith("one two xxx")
    assert len(second) <= runtime.MAX_LOG_LINE
    assert third == "failed"


def test_devices_that_cannot_be_used(tmp_path):
    folder = tiny.write_folder(tmp_path)
    environment = tiny.environment(JAX_PLATFORMS="no_such_platform")
    done = tiny.run_script("decode", tiny.decode_flags(folder), env=environment)
    assert done.returncode == EXIT_CODE, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no device can be used (")
    assert "no_such_platform" in line
    missing = tiny.run_script("decode", ["--model", "/nowhere", "--prompt", "Hi"], env=environment)
    assert "no such model directory" in missing.stderr


def test_a_broken_cache_of_programs_is_one_line(tmp_path):
    code = (
        "from adafuse_jax.core import runtime; runtime.set_up(); import jax; from pathlib import Path\n"
        "def run(): jax.clear_caches(); [jax.jit(lambda x, i=i: x + i)(i) for i in (1.0, 2, True)]\n"
        f"run(); [file.write_bytes(b'broken') for file in Path({str(tmp_path)!r}).iterdir()]; run()\n"
    )
    environment = tiny.environment() | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: reading the cache of compiled programs failed (")
    assert len(line) <= 400


def test_without_a_home_programs_are_not_cached():
    code = (
        "import os, pwd\n"
        "def missing(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = missing\n"
        "from adafuse_jax.core import runtime; runtime.set_up(); import jax; print(jax.config.jax_compilation_cache_dir)"
    )
    unset = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in tiny.environment().items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr
    assert done.stderr.startswith("no home directory: compiled programs are not cached")


def test_the_package_loads_no_library():
    code = (
        "import sys; import adafuse_jax.core.cli; before = {'jax', 'numpy', 'yaml', 'transformers'} & set(sys.modules)\n"
        "import adafuse_jax; names = [getattr(adafuse_jax, name).__name__ for name in adafuse_jax.__all__]\n"
        "import json; print(json.dumps([sorted(before), names == adafuse_jax.__all__, 'AdaFuse' in dir(adafuse_jax)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=tiny.environment())
    assert json.loads(done.stdout) == [[], True, True]
