"""The batches of a rank: a thread reads them ahead as they are stored. They are widened on a GPU, or by the thread.

Shapes: T = block_size, B sequences of a micro-batch.

Rank r of R takes the contiguous slice [r G/R, (r+1) G/R) of each global batch of G sequences, and cuts it into
micro-batches in order. So the j-th micro-batch of a step is the same for any R.
"""

import mmap
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from distgpt.corpus.order import Ints, MixedOrder, Order, evaluation_windows
from distgpt.corpus.shards import Part, Split, TokenMap, mapping_of
from distgpt.errors import StorageError

MicroBatch = tuple[Tensor, Tensor]

# The thread prepares whole steps in chunks of at most about this size: the overhead of numpy and of Python's lock
# (the GIL) is paid once a chunk, and the kernel gets all its reads at once.
CHUNK_TOKENS = 2**19
CHUNK_STEPS = 64
CHUNKS_AHEAD = 2

# A split of at most this size is read into the page cache at the start, a larger one window by window.
READ_WHOLE_BYTES = 2**28


class Loader:
    """The training batches of one rank from `start_step` on. Call close() at the end.

    The order is a pure function of (seed, step): a loader that starts at a step gives the same batches as one that
    started at 0 and has reached that step. Raises DataError if the split holds no window of block_size + 1 tokens.
    """

    def __init__(
        self,
        split: Split,
        *,
        block_size: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        start_step: int,
    ) -> None:
        assert global_batch % (micro_batch * world_size) == 0, (global_batch, micro_batch, world_size)
        orders = [Order(part.lengths, block_size=block_size, seed=seed, split=part.split) for part in split.parts]
        shares = [part.share for part in split.parts]
        self.order = orders[0] if len(orders) == 1 else MixedOrder(orders, shares, seed=seed)
        self._windows = WindowReader(split, block_size + 1)
        self._global_batch, self._micro_batch, self._rank = global_batch, micro_batch, rank
        self._rank_batch = global_batch // world_size
        self._device = device
        self._steps_per_chunk = min(CHUNK_STEPS, max(1, CHUNK_TOKENS // (self._rank_batch * (block_size + 1))))
        self._wait = 0.0
        self._step_to_fetch = start_step
        self._ready: deque[MicroBatch] = deque()
        self._chunks: deque[Future[Tensor | MicroBatch]] = deque()
        self._thread = ThreadPoolExecutor(1, "loader", initializer=use_device, initargs=(device,))
        for _ in range(CHUNKS_AHEAD):
            self._fetch_next_chunk()

    def next_step(self) -> list[MicroBatch]:
        """Return the micro-batches (x_BT, y_BT) of the next step for gradient accumulation, int64 on the device.

        Raises StorageError if the data cannot be read any more.
        """
        if not self._ready:
            started = time.perf_counter()
            chunk = self._chunks.popleft().result()
            self._wait += time.perf_counter() - started
            self._fetch_next_chunk()
            parts = _inputs_and_targets(chunk, self._device) if isinstance(chunk, Tensor) else chunk
            x, y = (torch.split(part, self._micro_batch) for part in parts)
            self._ready.extend(zip(x, y, strict=True))
        return [self._ready.popleft() for _ in range(self._rank_batch // self._micro_batch)]

    def pop_data_wait(self) -> float:
        """Return the seconds that next_step waited for the thread since the last call; reset the counter."""
        wait, self._wait = self._wait, 0.0
        return wait

    def sample_numbers(self, step: int, steps: int = 1) -> Ints:
        """Return the numbers of this rank's sequences in `steps` steps from `step` on, counted over the whole run."""
        first = np.arange(step, step + steps, dtype=np.int64) * self._global_batch + self._rank * self._rank_batch
        return (first[:, None] + np.arange(self._rank_batch)).ravel()

    def places(self, step: int) -> tuple[Ints, Ints]:
        """Return the shard and the token offset of each window that this rank reads in `step`."""
        return self.order.starts(self.sample_numbers(step))

    def close(self) -> None:
        """End the thread and drop the batches that it has prepared."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch_next_chunk(self) -> None:
        self._chunks.append(self._thread.submit(self._read_chunk, self._step_to_fetch))
        self._step_to_fetch += self._steps_per_chunk

    def _read_chunk(self, step: int) -> Tensor | MicroBatch:
        """Return `_steps_per_chunk` steps: on a CPU as int64, else as stored, [sequences, T + 1]. Runs in the thread.

        numpy only: a torch operation here would start a second pool of OpenMP threads beside the one that trains.
        """
        shards, offsets = self.order.starts(self.sample_numbers(step, self._steps_per_chunk))
        shape, pinned = (len(offsets), self._windows.length), self._device.type == "cuda"
        tokens = torch.empty(shape, dtype=self._windows.dtype, pin_memory=pinned)
        self._windows.read(shards, offsets, tokens.numpy())
        return _inputs_and_targets(tokens, self._device) if self._device.type == "cpu" else tokens


class EvaluationBatches:
    """The fixed validation windows, in micro-batches dealt out to the ranks in turn, the same for any world size.

    `parts` has the windows of each dataset. Of a mix, each has about its share of the windows.

    Every iteration gives the same (indices, x_BT, y_BT); `indices` are the numbers of the windows, int64 [B]. A sharded
    model needs every rank in each forward pass, so all ranks get the same number of batches: a rank that has none left
    gets the last batch with all indices -1, which it computes but does not count. The last batch may be smaller than
    the others. Raises DataError if the split holds no window of block_size + 1 tokens.
    """

    def __init__(
        self,
        split: Split,
        *,
        block_size: int,
        sequences: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.parts: list[tuple[slice, Part]] = []
        places: list[tuple[Ints, Ints]] = []
        first_shard = first = 0
        for part in split.parts:
            count = max(1, round(sequences * part.share))
            shards, offsets = evaluation_windows(part.lengths, block_size, count, part.split)
            places.append((shards + first_shard, offsets))
            self.parts.append((slice(first, first + len(offsets)), part))
            first_shard, first = first_shard + len(part.lengths), first + len(offsets)
        self._shards, self._offsets = (np.concatenate(values) for values in zip(*places, strict=True))
        self._reader = WindowReader(split, block_size + 1)
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._device = device

    @property
    def windows(self) -> int:
        """The number of windows, over all ranks."""
        return len(self._offsets)

    def __len__(self) -> int:
        """The number of batches that each rank gets."""
        return -(-self._batches // self._world_size)

    def __iter__(self) -> Iterator[tuple[Ints, Tensor, Tensor]]:
        for turn in range(len(self)):
            batch = turn * self._world_size + self._rank
            first = min(batch, self._batches - 1) * self._micro_batch
            indices = np.arange(first, min(first + self._micro_batch, self.windows), dtype=np.int64)
            tokens = torch.empty((len(indices), self._reader.length), dtype=self._reader.dtype)
            self._reader.read(self._shards[indices], self._offsets[indices], tokens.numpy())
            x_BT, y_BT = _inputs_and_targets(tokens, self._device)
            yield (indices if batch < self._batches else np.full_like(indices, -1)), x_BT, y_BT

    @property
    def _batches(self) -> int:
        return -(-self.windows // self._micro_batch)


class WindowReader:
    """Reads windows of `length` tokens from the memory-mapped shards of a split."""

    def __init__(self, split: Split, length: int) -> None:
        self.length = length
        # Every id fits int32, which torch knows better than uint32.
        self.dtype = torch.uint16 if split.shards[0].itemsize == 2 else torch.int32
        self._shards = split.shards
        self._files = [_stat(shard) for shard in split.shards]
        self._views = [sliding_window_view(np.asarray(s), length) if len(s) >= length else None for s in split.shards]
        self._read_whole = split.bytes <= READ_WHOLE_BYTES
        if self._read_whole:
            for shard in split.shards:
                mapping_of(shard).madvise(mmap.MADV_WILLNEED)

    def read(self, shards: Ints, offsets: Ints, tokens: NDArray[np.integer[Any]]) -> None:
        """Copy the windows at these places into `tokens` [windows, length]. Raises StorageError."""
        parts = [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]
        for shard, rows in parts:
            _check_length(self._shards[shard], self._files[shard])
            if not self._read_whole:
                self._prefetch(shard, offsets[rows])
        for shard, rows in parts:
            view = self._views[shard]
            assert view is not None, "the order takes no window from a shard that is shorter"
            # One fancy-indexed copy releases the interpreter's lock once, not once for each window.
            tokens[rows if len(parts) > 1 else slice(None)] = view[offsets[rows]]

    def _prefetch(self, shard: int, offsets: Ints) -> None:
        """Have the kernel read these windows ahead, all at once: a cold file is then read 16 times as fast."""
        itemsize = self._shards[shard].itemsize
        pages = offsets * itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        ends = (offsets + self.length) * itemsize
        mapping = mapping_of(self._shards[shard])
        for page, end in zip(pages.tolist(), ends.tolist(), strict=True):
            mapping.madvise(mmap.MADV_WILLNEED, page, end - page)


def _check_length(shard: TokenMap, mapped: os.stat_result | None) -> None:
    """Raise StorageError if the file was cut short since it was mapped: touching its end would kill the process.

    A file that was removed, or replaced by another, stays whole behind its mapping.
    """
    now = _stat(shard)
    if now and mapped and os.path.samestat(now, mapped) and now.st_size < shard.nbytes:
        raise StorageError(f"{shard.filename} was cut short in use: {now.st_size:,} of {shard.nbytes:,} bytes are left")


def _stat(shard: TokenMap) -> os.stat_result | None:
    """Return the status of the file at a shard's path; None if there is none any more. Raises StorageError."""
    assert shard.filename is not None
    try:
        return os.stat(shard.filename)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {shard.filename}: {error.strerror}") from error


def _inputs_and_targets(tokens: Tensor, device: torch.device) -> MicroBatch:
    """Return inputs and targets, int64 [sequences, T] each on the device, of tokens [sequences, T + 1]."""
    if device.type != "cuda":
        # torch would use several threads here, and on a busy machine wait for one that gets no core. An Apple GPU has
        # no uint16, and takes a copy from memory that is not pinned.
        array = tokens.numpy()
        x_BT, y_BT = (torch.from_numpy(part.astype(np.int64)) for part in (array[:, :-1], array[:, 1:]))
        return x_BT.to(device), y_BT.to(device)
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1].long(), tokens[:, 1:].long()


def use_device(device: torch.device) -> None:
    """Make `device` that of a new thread.

    It would be on device 0: pinning memory there would open a context on it for every rank of the host.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
