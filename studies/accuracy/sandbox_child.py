"""Child process of `sandbox`: isolates itself, runs one untrusted program, and writes the results of its calls.

Standard input: JSON {"program", "function", "calls", "seconds", "bytes"}. Standard output: a line "isolated", then a line
of JSON {"results": [...]} or {"error": NAME}. Nothing of the project is imported.

A seccomp filter lets pass the system calls of memory, clocks, random numbers and writing to what is open; all others (files,
processes, sockets, signals) fail with EPERM. So only standard output, a file of the parent, can be written.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import json
import os
import platform
import re
import resource
import struct
import sys
from types import CodeType
from typing import Any

MODULES = (
    "bisect", "calendar", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "operator", "random", "re", "statistics", "string", "textwrap", "time", "typing", "unicodedata",
)  # fmt: skip
"""Modules that a program may import: loaded before files are refused."""
ALLOWED: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "write": 1, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
            "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28, "getpid": 39, "exit": 60,
            "gettimeofday": 96, "getrusage": 98, "gettid": 186, "futex": 202, "restart_syscall": 219,
            "clock_gettime": 228, "clock_getres": 229, "exit_group": 231, "getrandom": 318,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "write": 64, "exit": 93, "exit_group": 94, "futex": 98, "clock_gettime": 113, "clock_getres": 114,
            "sched_yield": 124, "restart_syscall": 128, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
            "getrusage": 165, "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216,
            "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
        },
    ),
}  # fmt: skip
"""Machine → (its AUDIT_ARCH, system calls that pass). The numbers are Linux's."""
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ERRNO_EPERM, ALLOW, KILL = 0x00050001, 0x7FFF0000, 0x80000000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def seccomp_filter(machine: str) -> bytes:
    """BPF program: another architecture's calls kill, those of ALLOWED pass, all others return EPERM."""
    architecture, calls = ALLOWED[machine]
    passing = [
        part
        for number in calls.values()
        for part in (instruction(JUMP_IF_EQUAL, number, 0, 1), instruction(RETURN, ALLOW))
    ]
    return b"".join(
        [
            instruction(LOAD, 4),  # seccomp_data.arch
            instruction(JUMP_IF_EQUAL, architecture, 1, 0),
            instruction(RETURN, KILL),
            instruction(LOAD, 0),  # seccomp_data.nr
            *passing,
            instruction(RETURN, ERRNO_EPERM),
        ]
    )


def isolate(seconds: int, size: int) -> None:
    """Limit processor time, memory and file size, then install the filter. Raises OSError or KeyError if it cannot be."""
    code = seccomp_filter(platform.machine())
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_FSIZE, 1 << 16),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def compiled(text: str) -> CodeType:
    """The longest beginning of the text, in whole lines, that is Python: a reply may end in prose, or be cut off."""
    lines = text.splitlines()
    for end in range(len(lines), 0, -1):
        try:
            return compile("\n".join(lines[:end]), "<program>", "exec")
        except SyntaxError:
            continue
    raise SyntaxError("no line is Python")


def run(text: str, function: str, names: dict[str, Any]) -> None:
    """Execute a program. One that fails after it has defined its function, in an example of its use, is still judged."""
    try:
        exec(compiled(text), names)
    except Exception:
        if function not in names:
            raise


class Nowhere:
    """Output that is dropped."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def main() -> None:
    job = json.loads(sys.stdin.read())
    for name in MODULES:
        if re.search(rf"\b{name}\b", job["program"]):
            importlib.import_module(name)
    isolate(job["seconds"], job["bytes"])
    os.write(1, b"isolated\n")
    sys.stdout = sys.stderr = Nowhere()  # type: ignore[assignment]
    names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    try:
        run(job["program"], job["function"], names)
        found = {"results": [names[job["function"]](*arguments) for arguments in job["calls"]]}
        text = json.dumps(found)
    except BaseException as error:
        text = json.dumps({"error": type(error).__name__})
    os.write(1, text.encode()[: 1 << 16])
    os._exit(0)


if __name__ == "__main__":
    main()
