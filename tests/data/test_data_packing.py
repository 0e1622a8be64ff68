"""Packing keeps every example whole and apart; batches are a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import jax
import numpy as np
import pytest

from adafuse_jax.core.errors import UserError
from adafuse_jax.data.batches import BLOCK, Batch, Batches, shares_of
from adafuse_jax.data.chat import Encoded
from adafuse_jax.data.packing import OPEN_ROWS, Rows, pack


def examples(lengths, first_token: int = 1) -> list[Encoded]:
    """Examples with tokens that occur nowhere else and random masks."""
    rng, out, token = np.random.default_rng(0), [], first_token
    for length in lengths:
        out.append(Encoded(np.arange(token, token + length, dtype=np.int32), rng.random(length) < 0.5))
        token += length
    return out


def segments(rows: Rows):
    """(tokens, mask, positions) of every segment, in order."""
    for row in range(len(rows)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = rows.segment_ids[row] == segment
            yield rows.tokens[row, here], rows.loss_mask[row, here], rows.positions[row, here]


LENGTHS = np.random.default_rng(1).integers(2, 60, 500).tolist()


class TestPack:
    @pytest.mark.parametrize("packing", [True, False])
    def test_every_example_is_there_once_whole_and_in_its_own_segment(self, packing):
        given = examples(LENGTHS)
        by_first = {int(e.tokens[0]): e for e in given}
        rows = pack(given, 100, packing=packing)
        for tokens, mask, positions in segments(rows):
            example = by_first.pop(int(tokens[0]))
            np.testing.assert_array_equal(tokens, example.tokens)
            np.testing.assert_array_equal(mask[1:], example.loss_mask[1:])
            np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        assert not by_first

    @pytest.mark.parametrize("packing", [True, False])
    def test_nothing_is_predicted_across_a_boundary(self, packing):
        given = [Encoded(e.tokens, np.ones(len(e.tokens), bool)) for e in examples(LENGTHS)]
        rows = pack(given, 100, packing=packing)
        before = np.pad(rows.segment_ids, ((0, 0), (1, 0)))[:, :-1]
        assert (rows.loss_mask == ((rows.segment_ids != 0) & (rows.segment_ids == before))).all()

    def test_layout(self):
        rows = pack(examples([5, 4, 3, 6]), 10)
        assert rows.segment_ids.tolist() == [[1] * 5 + [2] * 4 + [0], [1] * 3 + [2] * 6 + [0]]
        assert rows.tokens.tolist() == [[*range(1, 10), 0], [*range(10, 19), 0]]
        assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0], [0, 1, 2, 0, 1, 2, 3, 4, 5, 0]]
        assert [a.dtype for a in (rows.tokens, rows.loss_mask, rows.segment_ids, rows.positions)] == [
            np.int32, np.bool_, np.int32, np.int32,
        ]  # fmt: skip

    def test_padding_is_inert(self):
        rows = pack(examples(LENGTHS), 100)
        padding = rows.segment_ids == 0
        assert padding.any()
        assert not rows.loss_mask[padding].any()
        assert not rows.positions[padding].any()
        assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding only at the end"

    def test_waste_is_small_and_the_window_bounded(self):
        rows = pack(examples(LENGTHS), 100)
        assert (rows.segment_ids == 0).mean() < 0.08
        many = pack(examples([60] * (3 * OPEN_ROWS)), 100)
        assert len(many) == 3 * OPEN_ROWS

    def test_deterministic(self):
        first, second = pack(examples(LENGTHS), 100), pack(examples(LENGTHS), 100)
        np.testing.assert_array_equal(first.tokens, second.tokens)

    @pytest.mark.parametrize(("longest", "max_length", "width"), [(3, 1000, 64), (65, 1000, 128), (65, 100, 100)])
    def test_width_without_packing(self, longest, max_length, width):
        rows = pack(examples([2, longest]), max_length, packing=False)
        assert rows.tokens.shape == (2, width)

    def test_errors(self):
        with pytest.raises(UserError, match="no examples left"):
            pack([], 10)
        with pytest.raises(ValueError, match="11 tokens"):
            pack(examples([11]), 10)


def rows_of(count: int, first: int = 1, length: int = 4) -> Rows:
    return pack(examples([length] * count, first), length)


def drawn(batches: Batches, steps) -> list[int]:
    """The first token of every row, which names the row."""
    return [int(t) for step in steps for t in batches.at(step).tokens[..., 0].ravel()]


class TestOnePool:
    def test_every_row_once_an_epoch_in_an_order_of_its_own(self):
        batches = Batches((rows_of(37),), seed=3, batch_size=3, grad_accum=2)
        order = drawn(batches, range(37))
        epochs = [order[i : i + 37] for i in range(0, 37 * 6, 37)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(1, 149, 4))
        assert len({tuple(e) for e in epochs}) == 6

    def test_random_access(self):
        batches = Batches((rows_of(37),), seed=3, batch_size=4)
        alone = Batches((rows_of(37),), seed=3, batch_size=4).at(1234)
        drawn(batches, [5, 900, 0])
        for name in ("tokens", "loss_mask", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(batches.at(1234), name), getattr(alone, name))

    def test_seed_matters(self):
        assert drawn(Batches((rows_of(37),), seed=3, batch_size=4), range(5)) != drawn(
            Batches((rows_of(37),), seed=4, batch_size=4), range(5)
        )

    def test_shapes_and_micro_batches(self):
        batch = Batches((rows_of(50),), seed=0, batch_size=3, grad_accum=2).at(0)
        assert {a.shape for a in jax.tree.leaves(batch)} == {(2, 3, 4)}
        assert isinstance(jax.tree.map(lambda a: a + 0, batch), Batch)
        flat = Batches((rows_of(50),), seed=0, batch_size=6).at(0)
        np.testing.assert_array_equal(batch.tokens.reshape(1, 6, 4), flat.tokens)

    def test_some_rows_of_every_micro_batch(self):
        batches = Batches((rows_of(17), rows_of(5, first=1001)), seed=3, batch_size=4, grad_accum=2, epochs=1)
        for step in range(batches.total_steps):
            whole = batches.at(step)
            for rows in (range(0, 1), range(1, 4)):
                part = batches.at(step, rows)
                for name in ("tokens", "loss_mask", "segment_ids", "positions"):
                    np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:, rows.start : rows.stop])

    def test_all_arrays_come_from_the_same_row(self):
        rows = pack(examples(LENGTHS), 100)
        batch = Batches((rows,), seed=1, batch_size=5).at(7)
        for i in range(5):
            row = next(r for r in range(len(rows)) if (rows.tokens[r] == batch.tokens[0, i]).all())
            np.testing.assert_array_equal(batch.segment_ids[0, i], rows.segment_ids[row])
            np.testing.assert_array_equal(batch.loss_mask[0, i], rows.loss_mask[row])
            np.testing.assert_array_equal(batch.positions[0, i], rows.positions[row])

    def test_fewer_rows_than_a_batch_go_on_with_the_next_epoch(self):
        batches = Batches((rows_of(3),), seed=0, batch_size=8)
        assert batches.steps_per_epoch == 1
        counts = Counter(drawn(batches, range(3)))
        assert set(counts.values()) == {8}

    @pytest.mark.parametrize("accum", [1, 4])
    @pytest.mark.parametrize("count", [3, 9, 10, 64])
    @pytest.mark.parametrize("epochs", [0.5, 1, 3, 2.5, 0.01, 1 / 3])
    def test_epochs_give_every_row_exactly_so_many_times(self, count: int, accum: int, epochs: float):
        """Epochs may be a fraction: half of the rows (rounded up) once more. Only the last batch is padded, at its
        end."""
        batches = Batches((rows_of(count),), seed=1, batch_size=8, grad_accum=accum, epochs=epochs)
        assert batches.total_steps is not None
        order = drawn(batches, range(batches.total_steps))
        wanted = max(1, math.ceil(epochs * count - 1e-6))
        assert len(order) == batches.total_steps * 8 * accum
        assert len(order) - wanted < 8 * accum
        assert set(order[wanted:]) <= {0}
        counts = Counter(order[:wanted])
        assert 0 not in counts
        assert sum(counts.values()) == wanted
        assert set(counts.values()) <= {math.floor(epochs), math.ceil(epochs)}
        if epochs == 3:
            assert set(counts.values()) == {3}
            assert len(counts) == count
        without = Batches((rows_of(count),), seed=1, batch_size=8, grad_accum=accum)
        assert drawn(without, range(batches.total_steps))[:wanted] == order[:wanted], "the order is that of --steps"

    def test_rows_of_padding_are_of_no_segment_and_no_target(self):
        batch = Batches((rows_of(3),), seed=1, batch_size=8, epochs=1).at(0)
        real = batch.segment_ids[0].any(-1)
        assert real.tolist() == [True] * 3 + [False] * 5
        for name in ("tokens", "loss_mask", "segment_ids", "positions"):
            assert not getattr(batch, name)[0, 3:].any()
            assert getattr(batch, name).dtype == getattr(rows_of(3), name).dtype

    def test_rounding_of_epochs_adds_no_row(self):
        """0.1 + 0.2 epochs of 10 rows are 3.0000000000000004."""
        assert Batches((rows_of(10),), seed=1, batch_size=1, epochs=0.1 + 0.2).total_rows == 3

    def test_several_sources_without_weights_are_one_pool(self):
        batches = Batches((rows_of(10), rows_of(30, first=1001)), seed=0, batch_size=5)
        assert batches.steps_per_epoch == 8
        order = drawn(batches, range(8))
        assert len(set(order)) == 40
        assert any(t > 1000 for t in order[:10])
        assert any(t < 1000 for t in order[-20:])

    def test_sources_of_different_lengths_are_padded(self):
        batches = Batches((rows_of(4, length=4), rows_of(4, first=1001, length=6)), seed=0, batch_size=8)
        batch = batches.at(0)
        assert batch.tokens.shape == (1, 8, 6)
        short = batch.tokens[0, :, 0] < 1000
        assert (batch.segment_ids[0][short][:, 4:] == 0).all()
        assert not batch.loss_mask[0][short][:, 4:].any()


class TestMixture:
    def test_shares(self):
        assert shares_of([1, 1, 1]) == (334, 333, 333)
        assert shares_of([0.5, 0.25, 0.25]) == (500, 250, 250)
        assert shares_of([3, 1]) == (750, 250)
        assert sum(shares_of([0.7, 0.11, 13.1, 5.77])) == BLOCK
        with pytest.raises(UserError, match="dataset 2"):
            shares_of([1, 1e-6])

    def test_proportions_are_exact_in_every_block(self):
        batches = Batches((rows_of(90), rows_of(7, first=1001)), seed=5, batch_size=10, weights=(0.3, 0.7))
        for block in range(3):
            sources = [t > 1000 for t in drawn(batches, range(block * 100, block * 100 + 100))]
            assert sum(sources) == 700
        orders = [[t > 1000 for t in drawn(batches, range(b * 100, b * 100 + 100))] for b in range(2)]
        assert orders[0] != orders[1], "every block has an order of its own"
        early = sum(t > 1000 for t in drawn(batches, range(10)))
        assert 50 < early < 90, "the sources are mixed within a block"

    def test_every_source_walks_its_own_epochs(self):
        batches = Batches((rows_of(90), rows_of(7, first=1001)), seed=5, batch_size=10, weights=(0.3, 0.7))
        order = drawn(batches, range(250))
        for size, mine in ((90, [t for t in order if t < 1000]), (7, [t for t in order if t > 1000])):
            for start in range(0, len(mine) - size + 1, size):
                assert len(set(mine[start : start + size])) == size

    def test_epochs_are_as_many_rows_in_all(self):
        batches = Batches((rows_of(90), rows_of(7, first=1001)), seed=5, batch_size=10, weights=(0.3, 0.7), epochs=2)
        assert (batches.total_rows, batches.total_steps) == (194, 20)
        order = drawn(batches, range(20))
        assert sum(t > 0 for t in order) == 194
        assert order[:194] == drawn(dataclasses.replace(batches, epochs=None), range(20))[:194]

    def test_random_access(self):
        def make() -> Batches:
            return Batches((rows_of(90), rows_of(7, first=1001)), seed=5, batch_size=7, weights=(0.3, 0.7))

        forward = [drawn(make(), [step]) for step in range(300)]
        batches = make()
        for step in reversed(range(300)):
            assert drawn(batches, [step]) == forward[step]

    def test_weights_for_some_only_are_refused(self):
        with pytest.raises(UserError, match="give each a weight"):
            Batches((rows_of(3), rows_of(3)), seed=0, batch_size=1, weights=(1.0, None))
        assert Batches((rows_of(3), rows_of(3)), seed=0, batch_size=1, weights=(None, None)).weights is None

    @pytest.mark.parametrize("bad", [{"batch_size": 0}, {"grad_accum": 0}, {"seed": -1}, {"rows": ()}, {"epochs": 0.0}])
    def test_bad_sizes(self, bad):
        with pytest.raises(ValueError, match="must be positive"):
            Batches(**({"rows": (rows_of(3),), "seed": 0, "batch_size": 1} | bad))
