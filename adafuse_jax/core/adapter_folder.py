"""The folder of an adapter: the directory that is given, or the one of a named adapter of PEFT in it."""

from __future__ import annotations

import os
from pathlib import Path

from adafuse_jax.core.errors import UserError, quoted

ADAPTER_CONFIG = "adapter_config.json"


def adapter_folder(directory: str | Path) -> Path:
    """The directory, or its only sub-folder with an adapter_config.json if it has none itself: PEFT saves adapters that have
    names so. Raises `UserError` if there are several."""
    directory = Path(directory).expanduser()
    if not os.path.isdir(directory) or os.path.exists(
        directory / ADAPTER_CONFIG
    ):  # for names that no file can have, too
        return directory
    named = sorted(path.parent for path in directory.glob(f"*/{ADAPTER_CONFIG}"))
    if len(named) > 1:
        names = ", ".join(quoted(path.name) for path in named[:4])
        raise UserError(
            f"{directory}: has no {ADAPTER_CONFIG}, and {len(named)} adapters in its folders ({names}"
            f"{', …' if len(named) > 4 else ''}); give one of them, for instance {named[0]}"
        )
    return named[0] if named else directory
