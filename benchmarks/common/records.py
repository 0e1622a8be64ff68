"""Records of measurements, as JSON: each names the device, the versions, the commit and the command that made it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_ERROR = 300
"""Characters of the text of an error in a record."""


def command_line(module: str, argv: Sequence[str] | None = None) -> str:
    """`python -m module` with its flags, by default those of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def commit() -> str | None:
    """The commit of this clone, with `-dirty` after it if files that git tracks have changed; None without git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def facts() -> dict[str, Any]:
    """Device and JAX of this process, and the commit."""
    import jax

    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}


def write_json(path: Path, record: Any) -> None:
    """Write `record` to `path`; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def first_line(error: Exception) -> str:
    """Type and first line of an error, for a row that could not be measured."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:MAX_ERROR]
