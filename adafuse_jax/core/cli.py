"""The frame around every command: exit codes, one line for each error, streams that are closed or full, and signals.

    2     bad input, or an environment that the command cannot work in (memory, disk, a broken installation): one line
    130   Ctrl-C, 143 SIGTERM: one line; a second Ctrl-C ends the process at once, also within a compilation
    141   the reader of stdout has gone: no line
    1     a bug: its traceback

Scripts import this module and nothing else before `run_cli`, so that what happens while libraries load is covered too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from adafuse_jax.core.errors import EXIT_CODE, MAX_MESSAGE, UserError, shortened

BROKEN_PIPE_CODE = 128 + signal.SIGPIPE
LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
STDOUT = "<stdout>"
GRACE_SECONDS = 10.0
"""Time from SIGTERM to the end of a process that does not react to it, because a library computes."""


def run_cli(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)`, by default with the process's arguments, and raise `SystemExit` with the code of the module's table.

    Afterwards SIGINT and SIGTERM end the process at once, with that code: neither disturbs the end of the interpreter.
    """
    _occupy_descriptors()
    stdout, stderr = _Stdout(sys.stdout), sys.stderr
    with _Signals() as signals:
        sys.stdout, sys.stderr = stdout, _Stderr(stderr)  # type: ignore[assignment]
        try:
            code = _outcome(main, argv, signals, stdout)
        except KeyboardInterrupt:  # in the handling of another exception
            code = signals.report()
        else:
            signals.code = code
        finally:
            sys.stdout, sys.stderr = stdout.stream, stderr
            if stdout.error is not None:
                _discard(stdout.stream)
            try:
                sys.stderr.flush()
            except (OSError, ValueError):
                _discard(sys.stderr)
    sys.exit(code)


def _outcome(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None, signals: _Signals, stdout: _Stdout
) -> int:
    try:
        if stdout.stream is None:
            raise UserError("stdout is closed; redirect it to a file, or to /dev/null")
        try:
            code = main(sys.argv[1:] if argv is None else argv)
        except SystemExit as end:
            code = end.code  # type: ignore[assignment] # a message, too
        stdout.flush()
        if stdout.error is not None:  # argparse ignores it
            raise stdout.error
    except BaseException as error:
        signals.ending = True
        if signals.received or isinstance(error, KeyboardInterrupt):  # an error after a signal is its consequence
            return signals.report()
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE_CODE
        message = message_of(error)
        if message is None:
            raise
        _print_error(f"error: {shortened(message, MAX_MESSAGE)}")
        return EXIT_CODE
    if isinstance(code, str):
        _print_error(code)
        return 1
    return code or 0


def message_of(error: BaseException) -> str | None:
    """The line for an error that the user or the machine causes; None for a bug."""
    reason = shortened(str(error), 200)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"the host has too little memory ({reason or 'an allocation failed'}); lower the sizes that the flags ask for"
    if isinstance(error, RecursionError):
        return f"an input is nested too deeply ({_place(error)}); simplify it"
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] not in ("adafuse_jax", "pallas_kernels"):
        return f"a library cannot be imported ({type(error).__name__}: {reason}); repair the installation: pip install -e ."
    if isinstance(error, OSError) and error.strerror:
        if error.filename == STDOUT:
            return f"stdout: cannot be written ({error.strerror}); free space, or redirect it to another file"
        if error.errno == errno.ENOMEM:
            return f"the host has too little memory ({reason}); lower the sizes that the flags ask for"
        named = next((name for name in (error.filename, error.filename2) if isinstance(name, str)), None)
        where = f"{shortened(named, 200)}: " if named else ""
        return f"{where}{error.strerror} ({_place(error)}); check the file, its permissions and its disk"
    return None


def _place(error: BaseException) -> str:
    """Module and line that raised: `json.scanner, line 66`."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return type(error).__name__
    return f"{traceback.tb_frame.f_globals.get('__name__', '?')}, line {traceback.tb_lineno}"


def _occupy_descriptors() -> None:
    """Open /dev/null as each of the file descriptors 0, 1 and 2 that is closed: a file opened later would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


class _Stdout:
    """A stdout whose errors carry its name, and are remembered where the caller ignores them."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        with self._named():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._named():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = STDOUT
            self.error = error
            raise


class _Stderr:
    """A stderr whose errors end nothing: a full disk for the log, or a reader that goes, would end a run of days."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _discard(stream: Any) -> None:
    """Discard the buffer of a stream that cannot be written, so that its flush at the interpreter's end succeeds."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is full or closed: the exit code remains
        print(text, file=sys.stderr, flush=True)


class _Signals:
    """Context in which the first Ctrl-C or SIGTERM raises `KeyboardInterrupt` in the main thread, and `received` is the
    signal; while a library is imported they end the process.

    Python runs its handlers between two bytecodes only; a compilation is one. So a thread reads every signal as it comes:
    it ends the process at the second Ctrl-C, and `GRACE_SECONDS` after a SIGTERM that nothing reacted to.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.ending = False
        self.code = 1
        self._numbers: list[int] = []

    def __enter__(self) -> _Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._numbers = [n for n in LINES if signal.getsignal(n) is not signal.SIG_IGN]  # nohup, and & in scripts
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._timer = threading.Timer(GRACE_SECONDS, _end_now, (signal.SIGTERM,))
        self._timer.daemon = True
        threading.Thread(target=self._watch, args=(self._reader,), daemon=True).start()
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._numbers:
            signal.signal(number, self._raise)
        return self

    def __exit__(self, *exception: object) -> None:
        code = self.code
        for number in self._numbers:
            signal.signal(number, lambda *_: os._exit(code))
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            self._timer.cancel()
            os.close(self._writer)

    def report(self) -> int:
        """Print the line of the signal; the exit code."""
        self.ending = True
        number = self.received or signal.SIGINT
        _print_error(LINES[signal.Signals(number)])
        self.code = 128 + number
        return self.code

    def _raise(self, number: int, frame: Any) -> None:
        if self.ending:
            return
        if _is_importing(frame):  # compiled modules print the traceback of an exception that they meet
            _end_now(signal.Signals(number))
        self.received = number
        raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        interrupts = 0
        for number in _bytes_of(reader):
            interrupts += number == signal.SIGINT
            if interrupts == 2:
                _end_now(signal.SIGINT, quiet=self.ending)  # its line has been printed
            if number == signal.SIGTERM and signal.getsignal(number) == self._raise and not self._timer.is_alive():
                with contextlib.suppress(RuntimeError):  # it has been started before, and has been cancelled
                    self._timer.start()


def _bytes_of(reader: int) -> Iterator[int]:
    """Bytes written to a pipe, until its other end is closed."""
    while data := os.read(reader, 64):
        yield from data
    os.close(reader)


def _is_importing(frame: Any) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _end_now(number: signal.Signals, *, quiet: bool = False) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"" if quiet else f"{LINES[number]}\n".encode())
    os._exit(128 + number)
