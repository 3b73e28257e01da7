"""Which examples form an update, and packing: properties that hold for every input, and small cases by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stepkto.base.packing import pack, plan_updates, share_out


@pytest.mark.parametrize(("units", "batch", "epochs"), [(10, 4, 3), (8, 4, 2), (3, 8, 2), (1, 1, 5), (257, 64, 1)])
def test_an_epoch_is_a_permutation_in_batches(units: int, batch: int, epochs: int) -> None:
    updates = plan_updates(units, batch, epochs, seed=5)
    per_epoch = -(-units // batch)
    assert len(updates) == epochs * per_epoch
    for epoch in range(epochs):
        mine = updates[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(unit for update in mine for unit in update) == list(range(units))
        assert [len(update) for update in mine[:-1]] == [batch] * (per_epoch - 1)
        assert len(mine[-1]) == units - batch * (per_epoch - 1)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = plan_updates(50, 50, 3, seed=1)
    assert plan_updates(50, 50, 3, seed=1) == first
    assert len({tuple(update) for update in first}) == 3
    assert all(a != b for a, b in zip(first, plan_updates(50, 50, 3, seed=2), strict=True))
    assert [unit for update in plan_updates(50, 7, 1, seed=1) for unit in update] == list(first[0])
    assert plan_updates(50, 50, 1, seed=1) == first[:1]
    assert list(first[0]) != list(range(50))


def test_the_order_does_not_touch_pythons_random_state() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    plan_updates(20, 4, 2, seed=0)
    assert random.random() == expected


def test_max_updates_cuts_the_plan() -> None:
    whole = plan_updates(10, 4, 3, seed=5)
    assert plan_updates(10, 4, 3, seed=5, max_updates=4) == whole[:4]
    assert plan_updates(10, 4, 3, seed=5, max_updates=100) == whole


# --- packing -------------------------------------------------------------------------------------------------


def test_first_fit_decreasing_by_hand() -> None:
    """Bins of 10, largest first: 6 | 5 | 4 joins the 6 | 4 joins the 5 | 2 fits neither | 1 joins 5 and 4."""
    assert pack([4, 6, 2, 5, 1, 4], capacity=10) == [[1, 0], [3, 5, 4], [2]]
    assert pack([], capacity=10) == []
    assert pack([10, 10], capacity=10) == [[0], [1]]


def test_an_item_larger_than_a_bin() -> None:
    assert pack([10], capacity=10) == [[0]]
    with pytest.raises(ValueError, match="item 2 has size 11, a bin holds 10"):
        pack([1, 2, 11], capacity=10)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 200))
def test_every_item_once_and_no_bin_too_full(sizes: list[int], capacity: int) -> None:
    bins = pack(sizes, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in members) for members in bins]
    assert all(0 < load <= capacity for load in loads)
    # First fit leaves at most one bin half empty: two such bins would have been one.
    assert sum(2 * load <= capacity for load in loads) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_padding_share_of_typical_lengths(seed: int) -> None:
    """Log-normal lengths of 32 to 384 tokens, 512 examples: at most 8% of the packed room is empty."""
    rng = random.Random(seed)
    sizes = [min(384, max(32, round(rng.lognormvariate(5.0, 0.6)))) for _ in range(512)]
    bins = pack(sizes, capacity=4096)
    assert 1 - sum(sizes) / (4096 * len(bins)) <= 0.08


# --- sharing out ---------------------------------------------------------------------------------------------


def test_sharing_out_by_hand() -> None:
    """Bins of 9, 7, 5, 4 and 1 on two ranks, three each: 9 | 7, then 5 to the lighter, 4 to the other, then 1."""
    sizes = [9, 7, 5, 4, 1]
    assert share_out([[0], [1], [2], [3], [4]], sizes, ranks=2) == [[[0], [3], []], [[1], [2], [4]]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.integers(1, 4))
def test_ranks_get_the_same_number_of_bins(sizes: list[int], ranks: int, multiple: int) -> None:
    bins = pack(sizes, 50)
    shares = share_out(bins, sizes, ranks, multiple)
    assert len(shares) == ranks
    counts = {len(share) for share in shares}
    assert len(counts) == 1
    count = counts.pop()
    assert count > 0
    assert count % multiple == 0
    # no more than it takes: one multiple less would not hold all the bins
    assert (count - multiple) * ranks < max(len(bins), 1)
    assert sorted(members for share in shares for members in share if members) == sorted(bins)


def test_nothing_to_share_still_gives_every_rank_a_micro_batch() -> None:
    assert share_out([], [], ranks=3, multiple=2) == [[[], []]] * 3
