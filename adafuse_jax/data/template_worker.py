"""The process that renders chat templates: other people's programs, so their time and their memory have bounds.

One JSON object a line on stdin, one line back on stdout:

    {"template": TEXT, "limits": {"seconds", "bytes"}}                  the template from here on; no answer
    {"variables", "date", "conversations": [{"tools", "characters", "parts": [{"messages", "add_generation_prompt"}, …]}, …]}
        → a list with an answer for each: {"texts": [TEXT, …]}, or {"error": TEXT, "part": which}

A part that takes longer ends the process with SIGPROF, even inside one operation like 10**10**10; one that needs more memory
is an error, or ends it. The environment has what transformers gives templates (`transformers.utils.chat_template_utils`):
importing that would take seconds, and jinja2 takes a twentieth of one. Run as a file, so that no package is imported.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what is inside."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class TemplateDict:
    """`dict(…)` and `dict.fromkeys(…)`, without the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class TemplateNamespace(jinja2.utils.Namespace):
    """`namespace(…)` whose names cannot begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} cannot be an attribute of a namespace")


def raise_exception(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own, without HTML escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": raise_exception, "dict": TemplateDict(), "namespace": TemplateNamespace}
    return sandbox


def rendered(template: jinja2.Template, variables: dict[str, Any], date: datetime, characters: int) -> str:
    """The text, at most so many characters of it: more is a `MemoryError`."""
    pieces, size = [], 0
    for piece in template.generate(**variables, strftime_now=lambda form: date.strftime(form)):
        size += len(piece)
        if size > characters:
            raise MemoryError
        pieces.append(piece)
    return "".join(pieces)


def answer(
    source: str, conversation: dict[str, Any], variables: dict[str, Any], date: datetime, seconds: float
) -> dict[str, Any]:
    texts: list[str] = []
    variables |= {"tools": conversation["tools"]}
    try:
        for part in conversation["parts"]:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            template = _compiled(source)
            texts.append(rendered(template, variables | part, date, conversation["characters"]))
    except MemoryError:
        return {"error": "writes or needs too much text", "part": len(texts)}
    except RecursionError:
        return {"error": "calls itself too often", "part": len(texts)}
    except Exception as error:  # a template raises anything
        return {"error": f"{error}" or type(error).__name__, "part": len(texts)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"texts": texts}


_cache: dict[str, jinja2.Template] = {}


def _compiled(source: str) -> jinja2.Template:
    """The compiled template; the time limit covers this too, as jinja2 computes constant expressions while compiling."""
    if source not in _cache:
        _cache.clear()
        _cache[source] = environment().from_string(source)
    return _cache[source]


def main() -> None:
    source, limits = "", {"seconds": 1.0, "bytes": 0}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        if "template" in request:
            source, limits = request["template"], request["limits"]
            continue
        answers, written = [], len(line)
        date = datetime.fromisoformat(request["date"])
        for conversation in request["conversations"]:
            # What is given and what may be written are in memory a few times, in up to four bytes a character.
            _limit_memory(limits["bytes"] + 16 * (written + conversation["characters"]))
            answers.append(answer(source, conversation, request["variables"], date, limits["seconds"]))
            written += sum(map(len, answers[-1].get("texts", ())))
        _limit_memory(resource.RLIM_INFINITY)
        print(json.dumps(answers), flush=True)


def _limit_memory(size: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size if most == resource.RLIM_INFINITY else min(size, most), most))


if __name__ == "__main__":
    main()
