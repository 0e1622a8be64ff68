"""Programming problems of the accuracy study, and the sandbox that judges answers to them."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from adafuse_jax.core.errors import UserError
from studies.accuracy import sandbox
from studies.accuracy.programs import Problem, outcomes, problems, program_of
from studies.accuracy.sandbox import Job, judge, judge_all, same

PROBLEMS = (*problems("validation"), *problems("test"))


def outcome(program: str, result: object = 1) -> str:
    return judge(Job(program=program, function="f", calls=[[1]], results=[result]))


def test_problems_are_many_and_split_once():
    assert len(problems("test")) == 100
    assert len(problems("validation")) >= 50
    assert len({p.function for p in PROBLEMS}) == len({p.task for p in PROBLEMS}) == len(PROBLEMS)
    for problem in PROBLEMS:
        for program in (problem.right, problem.wrong):
            function = ast.parse(program).body[0]
            assert isinstance(function, ast.FunctionDef)
            assert f"{function.name}({ast.unparse(function.args)})" == problem.signature
        assert len(problem.calls) == len(problem.results) >= 4
        assert len({str(result) for result in problem.results}) > 1, "a constant would pass"


def test_calls_tell_right_from_wrong_solutions():
    """In this process, as these programs are ours."""
    for problem in PROBLEMS:
        for program, passes in ((problem.right, True), (problem.wrong, False)):
            names: dict[str, Any] = {}
            exec(program, names)
            found = [names[problem.function](*copy.deepcopy(list(call))) for call in problem.calls]
            assert same(json.loads(json.dumps(found)), problem.results) == passes, program


@pytest.mark.slow
def test_reference_solutions_pass_and_wrong_ones_fail():
    judged = judge_all([p.job(program) for p in PROBLEMS for program in (p.right, p.wrong)])
    assert [p.function for p, found in zip(PROBLEMS, judged[::2], strict=True) if found != "passed"] == []
    assert [
        p.function for p, found in zip(PROBLEMS, judged[1::2], strict=True) if found not in ("wrong", "error")
    ] == []


def test_pass_at_one_of_replies():
    some = problems("validation")
    fenced = [f"Sure!\n```python\n{p.right}\n```\nIt works.\n```\nnone\n```" for p in some[:2]]
    followed = [f"Here it is:\n{p.right}\nprint(f(3))\n1 /\nThat is all." for p in some[2:4]]
    replies = [*fenced, *followed, some[4].wrong, "I cannot.", "", *("def f(): pass" for _ in some[7:])]
    expected = ["passed"] * 4 + ["wrong"] + ["error"] * (len(some) - 5)
    assert outcomes(replies, "validation") == expected


def test_code_of_a_reply():
    assert program_of("```\na = 1\n```") == "a = 1\n"
    assert program_of("```python\ncut off") == "cut off"
    assert program_of("So:\nfrom math import pi\ndef f(): ...") == "from math import pi\ndef f(): ..."
    assert program_of("defined as such") == program_of("It imports nothing.") == ""
    example = Problem(
        function="f", signature="f(x, y)", task="adds", calls=[["a", True]], results=[None], right="", wrong=""
    )
    assert "For example, f('a', True) is None." in example.question


HARM = {
    "file": "open({path!r}, 'w')",
    "file in the folder": "open('new', 'w')",
    "reading": "open({here!r}).read()",
    "removal": "__import__('os').remove({here!r})",
    "folder": "__import__('os').mkdir({path!r})",
    "command": "__import__('os').execv('/bin/touch', ['touch', {path!r}])",
    "fork": "__import__('os').fork()",
    "thread": "__import__('_thread').start_new_thread(print, ())",
    "signal": "__import__('os').kill(__import__('os').getppid(), 9)",
    "socket": "assert __import__('ctypes').CDLL(None).socket(2, 1, 0) >= 0",
    "limit": "__import__('resource').setrlimit(0, (9, 9))",
    "system call": "assert __import__('ctypes').CDLL(None).unlink({here!r}.encode()) == 0",
}
"""Names of what a program may not do → Python that does it, or raises."""


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_what_a_program_may_not_do_fails(harm: str, tmp_path: Path):
    here = tmp_path / "here"
    here.write_text("stays")
    code = harm.format(path=str(tmp_path / "new"), here=str(here))
    assert outcome(f"import os\ndef f(x):\n    {code}\n    return 1") == "error"
    refused = "(OSError, RuntimeError, AssertionError, ValueError)"
    denied = f"def f(x):\n    try:\n        {code}\n    except {refused}:\n        return 1"
    assert outcome(denied) == "passed", "it failed for another reason than the refusal"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert here.read_text() == "stays"


def test_endless_and_large_programs_are_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert outcome("def f(x):\n    while True: pass") == "stopped"
    assert outcome("while True:\n    try:\n        while True: pass\n    except BaseException: pass") == "stopped"
    assert outcome("def f(x): return 'a' * 10**10") == "stopped"
    assert outcome("def f(x): return 'a' * 10**5") == "stopped"
    assert outcome("import os\ndef f(x):\n    while os.write(2, b'a' * 999): pass") == "error"
    assert outcome("def f(x): return f(x)") == "error"
    assert outcome("def f(x): return 10**400") == "wrong"
    assert outcome("import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return 10**5000") in ("wrong", "stopped")
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 3)
    blocked = "import ctypes\ndef f(x):\n    ctypes.CDLL(None).syscall(202, ctypes.byref(ctypes.c_int(0)), 0, 0, 0)"
    assert outcome(blocked) in ("stopped", "error", "wrong")


def test_a_program_cannot_claim_to_have_passed():
    for trick in (
        "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import os\nos.write(1, b'{\"results\": [1]}')\nos._exit(3)",
        "import json\njson.dumps = lambda x: 'passed'\ndef f(x): return 2",
        "def f(x): return True",
        "def f(x): return '1'",
        "def f(x): return [1]",
    ):
        assert outcome(trick) != "passed"
    assert outcome("def f(x): print('chatter'); return 1.0") == "passed"
    assert outcome("def f(x): return (1, {'a': 1})", [1, {"a": 1}]) == "passed"


def test_equality_of_results():
    assert same([1, {"a": 0.3}], [1.0, {"a": 0.1 + 0.2}])
    for found, expected in ((1, True), (True, 1), (None, 0), ("1", 1), ([1], [1, 2]), ({"a": 1}, {"b": 1}), ({}, [])):
        assert not same(found, expected)
        assert not same(expected, found)


def test_no_program_runs_without_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A child that cannot install its filter, here for want of its machine's system calls, runs nothing."""
    child = tmp_path / "child.py"
    text = sandbox.CHILD.read_text().replace('"x86_64": (', '"none": (').replace('"aarch64": (', '"other": (')
    child.write_text(text)
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(UserError, match=r"cannot be isolated on this machine \(KeyError.*use Linux"):
        outcome("def f(x): return 1")
