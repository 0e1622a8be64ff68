"""Files of encoded examples: what is written is read, and a disk that keeps only a part of it is an error."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from adafuse_jax.data.chat import Chunk
from adafuse_jax.data.example_files import read_examples, read_rows, write_examples, write_plan
from adafuse_jax.data.packing import plan


def chunk(*lengths: int) -> Chunk:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    return Chunk(
        tokens=tokens, loss_mask=tokens % 3 == 0, lengths=np.asarray(lengths, np.int64), counts=Counter(), refusals=[]
    )  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    chunks = [chunk(3, 2), chunk(), chunk(4)]
    lengths = write_examples(tmp_path / "a", chunks)
    write_plan(tmp_path / "a", plan(lengths, 5))
    expected = [row for one in chunks for row in one.rows()]
    for ours, theirs in zip(read_examples(tmp_path / "a"), expected, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.loss_mask, theirs.loss_mask)
    rows = read_rows(tmp_path / "a", 5).rows()
    np.testing.assert_array_equal(rows.tokens, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]])


@pytest.mark.parametrize("what", ["examples", "a plan"])
@pytest.mark.parametrize("examples", [100, 100_000])
def test_a_full_disk_is_an_error(tmp_path, what, examples):
    """Also of so few bytes that they stay in a buffer until the file is closed."""
    full = chunk(*[1] * examples)
    lengths = write_examples(tmp_path / "a", [full])
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (examples * 2, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_plan(tmp_path / "a", plan(lengths, 1)) if what == "a plan" else write_examples(tmp_path / "b", [full])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))


def test_a_file_that_lost_bytes_is_an_error(tmp_path):
    def chunks() -> Iterator[Chunk]:
        yield chunk(100_000)
        os.truncate(tmp_path / "a" / "tokens.int32", 8)

    with pytest.raises(OSError, match=r"tokens\.int32 has other bytes"):
        write_examples(tmp_path / "a", chunks())
