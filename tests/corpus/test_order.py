"""The data order is a permutation that is a pure function of (seed, epoch, index)."""

from collections import Counter

import numpy as np
import pytest

from distgpt.corpus.order import MixedOrder, Order, Permutation, evaluation_windows
from distgpt.errors import DataError


def key(number: int) -> np.ndarray:
    return np.array([number * 0x2545F4914F6CDD1D % 2**64], dtype=np.uint64)


@pytest.mark.parametrize("n", [*range(1, 70), 101, 127, 128, 1009, 4096, 65_537, 100_003])
def test_permutation_is_a_bijection(n: int) -> None:
    for k in range(3):
        assert np.array_equal(np.sort(Permutation(n, key(k))(np.arange(n))), np.arange(n))


def test_small_permutations_all_occur() -> None:
    for n, permutations in ((2, 2), (3, 6), (4, 24)):
        found = Counter(tuple(Permutation(n, key(k))(np.arange(n)).tolist()) for k in range(1, 1201))
        assert len(found) == permutations
        assert max(found.values()) < 2 * 1200 / permutations


def test_a_key_for_each_index_equals_one_key_at_a_time() -> None:
    indices, keys = np.arange(50), np.arange(50, dtype=np.uint64) // np.uint64(10)
    together = Permutation(50, keys)(indices)
    apart = [Permutation(50, keys[i : i + 1])(indices[i : i + 1])[0] for i in range(50)]
    assert together.tolist() == apart


def test_permutation_of_a_huge_range_stays_in_it_and_has_no_duplicates() -> None:
    n = 10**13 + 7
    images = Permutation(n, key(5))(np.arange(n - 20_000, n))
    assert len(np.unique(images)) == 20_000
    assert images.min() >= 0
    assert images.max() < n


def test_order_looks_random() -> None:
    n = 20_000
    image = Permutation(n, key(1))(np.arange(n))
    differences = Counter(np.diff(image).tolist())
    assert max(differences.values()) < 12, "an arithmetic progression repeats its difference"
    neighbours = np.corrcoef(image[:-1], image[1:])[0, 1]
    assert abs(neighbours) < 0.03
    cells = np.histogram2d(np.arange(n), image, bins=20)[0]
    chi_square = ((cells - n / 400) ** 2 / (n / 400)).sum()
    # 361 degrees of freedom: mean 361, standard deviation 27
    assert 220 < chi_square < 520
    other = Permutation(n, key(2))(np.arange(n))
    assert (image == other).sum() < 10


LENGTHS = (1000, 3, 257, 17, 16, 5000)


@pytest.mark.parametrize("block_size", [1, 7, 16, 100])
def test_each_epoch_visits_every_window_once(block_size: int) -> None:
    order = Order(LENGTHS, block_size=block_size, seed=3)
    boundaries = []
    for epoch in range(3):
        shards, offsets = order.starts(np.arange(order.windows) + epoch * order.windows)
        inputs = Counter[tuple[int, int]]()
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            assert offset >= 0
            assert offset + block_size < LENGTHS[shard], "a window reaches beyond its shard"
            inputs.update((shard, position) for position in range(offset, offset + block_size))
        assert len(inputs) == order.windows * block_size, "two windows overlap"
        for shard, length in enumerate(LENGTHS):
            own = np.sort(offsets[shards == shard])
            usable = length - 1
            assert len(own) == (max(1, usable // block_size - 1) if usable >= block_size else 0)
            assert np.all(np.diff(own) == block_size)
        boundaries.append(sorted(zip(shards.tolist(), offsets.tolist(), strict=True)))
    if block_size > 1:
        assert boundaries[0] != boundaries[1] != boundaries[2], "the boundaries must move from epoch to epoch"


def test_over_the_epochs_windows_start_at_every_offset() -> None:
    order = Order([41], block_size=10, seed=0)
    first_starts = {int(order.starts(np.arange(order.windows) + e * order.windows)[1].min()) for e in range(300)}
    assert order.windows == 3
    assert first_starts == set(range(11))


def test_order_is_a_function_of_the_number_alone() -> None:
    order = Order(LENGTHS, block_size=16, seed=1337)
    numbers = np.arange(7 * order.windows)
    shards, offsets = order.starts(numbers)
    picked = np.array([5, 3 * order.windows + 1, 6, 0])
    again = Order(LENGTHS, block_size=16, seed=1337).starts(picked)
    assert np.array_equal(again[0], shards[picked])
    assert np.array_equal(again[1], offsets[picked])
    other = Order(LENGTHS, block_size=16, seed=1338).starts(numbers)
    assert not np.array_equal(other[1], offsets)


def test_order_never_changes() -> None:
    """A release with other values would break the exact resume of every run in progress."""
    shards, offsets = Order((1000, 500), block_size=10, seed=1337).starts(np.array([0, 1, 2, 145, 146, 10**12]))
    assert shards.tolist() == [0, 0, 0, 0, 0, 0]
    assert offsets.tolist() == [782, 372, 582, 472, 855, 560]


def test_evaluation_windows_are_fixed_and_evenly_spread_and_do_not_overlap() -> None:
    shards, offsets = evaluation_windows((1000, 3, 500), 10, 20)
    assert len(offsets) == 20
    positions = offsets + np.array([0, 1000, 1003])[shards]
    gaps = np.diff(positions)
    assert gaps.min() >= 10
    assert positions[0] == 0
    assert gaps.max() <= 90
    assert positions[-1] > 1350
    everything = evaluation_windows((1000, 3, 500), 10, 10**9)
    assert len(everything[0]) == 99 + 49
    assert len(set(zip(*map(np.ndarray.tolist, everything), strict=True))) == 148
    assert (everything[1] + 10 < np.array([1000, 3, 500])[everything[0]]).all()


def test_a_split_without_a_window_is_an_error_with_the_size_that_fits() -> None:
    with pytest.raises(DataError, match=r"train split has 100 tokens.*takes 257.*at most 99") as caught:
        Order((100,), block_size=256, seed=0)
    assert caught.value.code == 65
    with pytest.raises(DataError, match=r"val split has 150 tokens in 2 shards.*at most 99, .*larger --val-fraction$"):
        evaluation_windows((100, 50), 256, 8)
    with pytest.raises(DataError, match="nothing to predict"):
        Order((), block_size=4, seed=0)
    assert Order((100,), block_size=99, seed=0).windows == 1


MIXES = [(0.7, 0.3), (0.5, 0.5), (0.01, 0.99), (0.2, 0.5, 0.3), (1 / 3, 1 / 3, 1 / 3)]


@pytest.mark.parametrize("shares", MIXES, ids=str)
def test_each_dataset_of_a_mix_is_read_in_its_own_order_and_has_its_share_of_each_stretch(
    shares: tuple[float, ...],
) -> None:
    orders = [Order([400 * (2 + i), 900], block_size=10, seed=5) for i in range(len(shares))]
    count = 3000
    shards, offsets = MixedOrder(orders, shares, seed=5).starts(np.arange(count))
    for number, (order, share) in enumerate(zip(orders, shares, strict=True)):
        own = shards // 2 == number
        assert np.abs(np.cumsum(own) - share * np.arange(1, count + 1)).max() < 2
        alone = order.starts(np.arange(own.sum()))
        assert np.array_equal(shards[own] % 2, alone[0])
        assert np.array_equal(offsets[own], alone[1])


def test_the_order_of_a_mix_is_a_function_of_the_number_and_looks_random() -> None:
    orders = [Order([length], block_size=10, seed=1) for length in (5000, 3000)]
    mixed = MixedOrder(orders, (31 / 32, 1 / 32), seed=1)
    shards, offsets = mixed.starts(np.arange(3200))
    picked = np.array([2999, 0, 1234, 5])
    again = mixed.starts(picked)
    assert np.array_equal(again[0], shards[picked])
    assert np.array_equal(again[1], offsets[picked])
    # No rank gets all samples of the smaller dataset: they fall on every place in a batch of 32.
    assert len(set((np.flatnonzero(shards == 1) % 32).tolist())) > 24
    assert not np.array_equal(MixedOrder(orders, (31 / 32, 1 / 32), seed=2).starts(np.arange(3200))[0], shards)


def test_the_order_of_a_mix_never_changes() -> None:
    orders = [Order(lengths, block_size=10, seed=1337) for lengths in ((1000, 500), (700,))]
    shards, offsets = MixedOrder(orders, (0.7, 0.3), seed=1337).starts(np.array([0, 1, 2, 3, 145, 10**12]))
    assert shards.tolist() == [0, 2, 0, 0, 0, 1]
    assert offsets.tolist() == [782, 72, 372, 582, 632, 231]
