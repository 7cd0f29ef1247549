"""Sample number -> place in the corpus: a pure function of (seed, epoch, index), in O(1) state and memory.

A window is block_size + 1 tokens of one shard: the inputs and, one token later, the targets. An epoch visits every
window once, in the order of a keyed permutation. Its windows are shifted by a random amount per shard, so that the
boundaries fall elsewhere in the next epoch. Nothing here knows of ranks, and to resume is to ask for another number.

In a mix of several datasets, each is read in the order that it has alone, and has epochs of its own.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distgpt.errors import DataError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

# splitmix64 (Steele, Lea and Flood, 2014)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)

# Three rounds leave visible structure for small n, six do not.
ROUNDS = 6

# The purpose of a hash is part of its input, so that two purposes share no random bits.
PERMUTATION, SHIFT, MIX = 1, 2, 3

# Shares of a mix are whole multiples of 1 / SHARE_UNITS, so that counting samples is exact.
SHARE_UNITS = 2**30


class Permutation:
    """A keyed permutation of [0, n): a Feistel network over Z_a x Z_b, applied again until the result is below n.

    n is at most 2^62. `key` holds one word for all indices, or one per index.
    """

    def __init__(self, n: int, key: Words) -> None:
        self.n = n
        self.key = key
        # a * b >= n exceeds n by less than a, about sqrt(n): the network is seldom applied twice.
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)

    def __call__(self, indices: Ints) -> Ints:
        """Return the images of `indices`, one-dimensional, each in [0, n)."""
        keys = np.broadcast_to(self.key, indices.shape)
        images = self._network(indices.astype(np.uint64), keys)
        while (outside := np.flatnonzero(images >= np.uint64(self.n))).size:
            images[outside] = self._network(images[outside], keys[outside])
        return images.astype(np.int64)

    def _network(self, indices: Words, keys: Words) -> Words:
        left, right = np.divmod(indices, np.uint64(self._b))
        for pair in range(ROUNDS // 2):
            left = _add_modulo(left, _scrambled(right + keys + _word(2 * pair) * GOLDEN), self._a)
            right = _add_modulo(right, _scrambled(left + keys + _word(2 * pair + 1) * GOLDEN), self._b)
        return left * np.uint64(self._b) + right


class Order:
    """The start of every sequence of a training run, for shards of these lengths in tokens.

    `windows` is the number of windows in an epoch. Sample k, counted over all steps and ranks, belongs to epoch
    k // windows. Raises DataError if no shard holds a window.
    """

    def __init__(self, shard_lengths: Sequence[int], *, block_size: int, seed: int, split: str = "train split") -> None:
        usable = np.array(shard_lengths, dtype=np.int64) - 1
        per_shard = np.where(usable >= block_size, np.maximum(1, usable // block_size - 1), 0)
        self.windows = int(per_shard.sum())
        if not self.windows:
            raise no_window_error(shard_lengths, block_size, split)
        self.block_size = block_size
        self.seed = seed
        self.shards = len(shard_lengths)
        self._ends = np.cumsum(per_shard)
        self._begins = self._ends - per_shard
        self._shifts = np.maximum(0, usable - per_shard * block_size) + 1

    def starts(self, sample_numbers: Ints) -> tuple[Ints, Ints]:
        """Return the shard and the token offset of each sample's window, for a one-dimensional array of numbers."""
        epochs, indices = np.divmod(sample_numbers, self.windows)
        windows = Permutation(self.windows, _hash(self.seed, PERMUTATION, epochs))(indices)
        shards = np.searchsorted(self._ends, windows, side="right")
        random = _hash(self.seed, SHIFT, epochs, shards)
        shifts = (random % self._shifts[shards].astype(np.uint64)).astype(np.int64)
        return shards, shifts + (windows - self._begins[shards]) * self.block_size


class MixedOrder:
    """The same for several datasets with these shares of the sequences. Shards are numbered over all datasets.

    The number that sample k has in its dataset is the count of samples before k that belong to the dataset. It is
    computed, not counted, so that a run can start anywhere, and each dataset is read in its own order without gaps.
    """

    def __init__(self, orders: Sequence[Order], shares: Sequence[float], *, seed: int) -> None:
        first_shards = np.cumsum([0, *(order.shards for order in orders)])
        self._datasets: list[tuple[Order, int, _Share]] = []
        left = 1.0
        # Of the samples that are left, the dataset with the smallest share is the next to take its own. So no share is
        # more than half of them, which leaves room to place its samples at random.
        for index in sorted(range(len(orders)), key=lambda i: shares[i]):
            is_last = len(self._datasets) == len(orders) - 1
            share = _Share(SHARE_UNITS if is_last else max(1, round(shares[index] / left * SHARE_UNITS)), seed, index)
            self._datasets.append((orders[index], int(first_shards[index]), share))
            left -= shares[index]

    def starts(self, sample_numbers: Ints) -> tuple[Ints, Ints]:
        """Return the shard and the token offset of each sample's window, for a one-dimensional array of numbers."""
        shards, offsets = np.empty_like(sample_numbers), np.empty_like(sample_numbers)
        rows, numbers = np.arange(len(sample_numbers)), sample_numbers
        for order, first_shard, share in self._datasets:
            before = share.taken(numbers)
            takes = share.taken(numbers + 1) > before
            own_shards, offsets[rows[takes]] = order.starts(before[takes])
            shards[rows[takes]] = own_shards + first_shard
            rows, numbers = rows[~takes], (numbers - before)[~takes]
        return shards, offsets


class _Share:
    """A share of a sequence of samples, in units of 1 / SHARE_UNITS: which of them belong to it.

    The samples are divided into strata, from each of which one sample is taken at a random place (stratified sampling).
    The place is drawn from the first part of the stratum alone, so that two strata never take the same sample.
    """

    def __init__(self, units: int, seed: int, index: int) -> None:
        self._units, self._seed, self._index = units, seed, index

    def taken(self, numbers: Ints) -> Ints:
        """Return how many of the first `numbers` samples belong to the share: within 1 of the exact share."""
        if self._units == SHARE_UNITS:
            return numbers
        whole, rest = np.divmod(numbers % SHARE_UNITS * self._units, SHARE_UNITS)
        strata = numbers // SHARE_UNITS * self._units + whole
        random = _hash(self._seed, MIX, self._index, strata) >> np.uint64(32)
        place = (random * np.uint64(SHARE_UNITS - self._units)) >> np.uint64(32)
        return strata + (place < rest.astype(np.uint64))


def evaluation_windows(
    shard_lengths: Sequence[int], block_size: int, sequences: int, split: str = "val split"
) -> tuple[Ints, Ints]:
    """Return the shards and offsets of at most `sequences` windows that do not overlap, spread evenly over the split.

    Nothing is random: the windows are always the same. Raises DataError if no shard holds a window.
    """
    per_shard = np.maximum(0, np.array(shard_lengths, dtype=np.int64) - 1) // block_size
    available = int(per_shard.sum())
    if not available:
        raise no_window_error(shard_lengths, block_size, split)
    count = min(sequences, available)
    windows = np.arange(count, dtype=np.int64) * available // count
    ends = np.cumsum(per_shard)
    shards = np.searchsorted(ends, windows, side="right")
    return shards, (windows - (ends - per_shard)[shards]) * block_size


def no_window_error(shard_lengths: Sequence[int], block_size: int, split: str) -> DataError:
    """Return the error for a split without a window. It states the length and the block size that would fit."""
    longest = max(shard_lengths, default=0)
    has = f"the {split} has {sum(shard_lengths):,} tokens"
    if len(shard_lengths) > 1:
        has += f" in {len(shard_lengths)} shards of at most {longest:,}"
    if longest < 2:
        return DataError(f"{has}: there is nothing to predict, give prepare more text")
    more = "prepare it again with a larger --val-fraction" if split.startswith("val") else "give prepare more text"
    return DataError(
        f"{has}, and one window of model.block_size = {block_size} takes {block_size + 1:,}: "
        f"use a model.block_size of at most {longest - 1}, or {more}"
    )


def _scrambled(words: Words) -> Words:
    """Apply splitmix64's output function, a bijection of 64-bit words: each input bit affects every output bit."""
    words = words + GOLDEN
    words = (words ^ (words >> np.uint64(30))) * MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * MULTIPLIER_2
    return words ^ (words >> np.uint64(31))


def _word(number: int) -> Words:
    # An array, since a numpy scalar warns where these sums and products wrap around.
    return np.array([number % 2**64], dtype=np.uint64)


def _hash(*parts: int | Ints) -> Words:
    """Return a pseudo-random word for each element of the parts, which are broadcast."""
    state = _word(0)
    for part in parts:
        state = _scrambled(state ^ (_word(part) if isinstance(part, int) else part.astype(np.uint64)))
    return state


def _add_modulo(half: Words, random: Words, modulus: int) -> Words:
    # The upper 32 random bits, scaled to [0, modulus) by a multiplication: a third of the time of a remainder.
    half = half + (((random >> np.uint64(32)) * np.uint64(modulus)) >> np.uint64(32))
    return np.where(half >= np.uint64(modulus), half - np.uint64(modulus), half)
