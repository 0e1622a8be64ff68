"""One server for all tests of this folder; tests that end or fill a server start their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import KEY, Expected, ServerProcess, write_adapters


@pytest.fixture(scope="session")
def adapters(stories260k_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(stories260k_dir, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def flags(stories260k_dir: Path, adapters: dict[str, Path]) -> list[Any]:
    """Model and adapters of a server of four slots, in float32."""
    named = [f"{name}={directory}" for name, directory in adapters.items()]
    return ["--model", stories260k_dir, "--adapters", *named, "--dtype", "float32", "--no-warm-up", "--max-slots", 4,
            "--max-experts", 16]  # fmt: skip


@pytest.fixture(scope="session")
def server(flags: list[Any], adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Adapters may be loaded from the folder of the three."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "key").write_text(f"{KEY}\n")
    more = ["--max-queue", 96, "--api-key-file", folder / "key", "--adapter-folders", adapters["tales"].parent]
    with ServerProcess([*flags, *more], folder / "log", key=KEY) as process:
        yield process
        assert process.terminate() == 0
        assert not process.faults()


@pytest.fixture(scope="session")
def expected(stories260k_dir: Path, adapters: dict[str, Path]) -> Expected:
    return Expected(stories260k_dir, adapters)
