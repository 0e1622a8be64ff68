"""The two files of an adapter directory, this project's or PEFT's: their names, and reading and writing them whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from adafuse_jax.checkpoints.safetensors_files import write_tensors
from adafuse_jax.core.adapter_folder import ADAPTER_CONFIG
from adafuse_jax.core.atomic_files import new_directory, sha256, write_json
from adafuse_jax.core.errors import UserError
from adafuse_jax.core.tables import Table

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_CONFIG, "adapter_model.safetensors"
DIGEST = "weights_sha256"
"""Key of adapter_config.json, absent in adapters of earlier versions: a safetensors file has no checksum of its own."""
MAX_SIZE = 2**20
"""Largest rank, and largest number of experts, that adapter_config.json may have."""


def write_adapter_files(
    out: Path,
    table: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    metadata: dict[str, str],
    replace: bool = False,
    with_digest: bool = False,
) -> None:
    """The two files as the directory `out`; `with_digest` adds the weights' to the table. Raises as `new_directory`."""
    with new_directory(out, replace=replace, keep_others=True) as partial:
        write_tensors(partial / WEIGHTS_FILE, tensors, metadata=metadata)
        write_json(partial / CONFIG_FILE, table | ({DIGEST: sha256(partial / WEIGHTS_FILE)} if with_digest else {}))


def read_adapter_table(directory: Path) -> Table:
    """adapter_config.json: of train.py, or of PEFT."""
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such adapter directory; give one that train.py wrote")
    if os.path.exists(directory / "config.json") and not os.path.exists(directory / CONFIG_FILE):
        raise UserError(f"{directory}: is a whole model, not an adapter; give it as --model, without --adapter")
    return Table.read(directory / CONFIG_FILE, advice="give a complete adapter, or restore the file")
