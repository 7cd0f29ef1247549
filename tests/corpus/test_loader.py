"""Batches: the same for any number of ranks and any first step, equal to the tokens on disk."""

import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import distgpt.corpus.loader as loader_module
from distgpt.corpus.loader import EvaluationBatches, Loader, WindowReader
from distgpt.corpus.order import Ints, Order
from distgpt.corpus.shards import Split, TokenMap
from distgpt.errors import DataError, StorageError
from tests import jobs

CPU = torch.device("cpu")
T = 16


@pytest.fixture(params=[loader_module.READ_WHOLE_BYTES, 0], ids=["whole", "by window"])
def read_whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that is read into memory as a whole, and one that is too large for that."""
    monkeypatch.setattr(loader_module, "READ_WHOLE_BYTES", request.param)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return split_of("uint16", tmp_path)


def split_of(dtype: str, folder: Path) -> Split:
    """Return two shards and one that is too short for a window, with tokens above 2^15, or 2^16 if they fit."""
    generator = np.random.default_rng(0)
    shards = []
    for number, length in enumerate((2000, 10, 700)):
        path = folder / f"train-{number:05d}.bin"
        generator.integers(0, {"uint16": 2**16, "uint32": 2**20}[dtype], length).astype(dtype).tofile(path)
        shards.append(np.memmap(path, dtype=dtype, mode="r"))
    return Split("train", tuple(shards))


def path_of(shard: TokenMap) -> Path:
    assert shard.filename is not None
    return Path(shard.filename)


def loader(split: Split, *, micro_batch: int = 2, rank: int = 0, world_size: int = 1, start_step: int = 0) -> Loader:
    return Loader(
        split,
        block_size=T,
        global_batch=16,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        seed=7,
        device=CPU,
        start_step=start_step,
    )


def steps(split: Split, count: int, **options: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    with closing(loader(split, **options)) as batches:
        return [batches.next_step() for _ in range(count)]


@pytest.mark.usefixtures("read_whole")
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_batches_hold_the_tokens_of_their_windows(dtype: str, tmp_path: Path) -> None:
    split = split_of(dtype, tmp_path)
    with closing(loader(split, micro_batch=4)) as batches:
        for step in range(30):
            micro_batches = batches.next_step()
            assert [x.shape for x, _ in micro_batches] == [(4, T)] * 4
            x, y = (torch.cat(part) for part in zip(*micro_batches, strict=True))
            assert x.dtype == y.dtype == torch.int64
            for row, (shard, offset) in enumerate(zip(*batches.places(step), strict=True)):
                window = split.shards[shard][offset : offset + T + 1].astype(np.int64)
                assert np.array_equal(x[row], window[:-1])
                assert np.array_equal(y[row], window[1:])
    assert all(part.is_contiguous() for part in micro_batches[-1])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_micro_batches_of_a_step_are_the_same_for_any_number_of_ranks(split: Split, world_size: int) -> None:
    alone = steps(split, 5)
    ranks = [steps(split, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):
        together = [micro_batch for rank in ranks for micro_batch in rank[step]]
        assert len(together) == len(alone[step]) == 8
        assert all(
            torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(together, alone[step], strict=True)
        )


def test_starting_at_a_step_gives_the_batches_of_a_loader_from_the_start(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = steps(split, 40)
    # Other chunks of prefetching must not matter either.
    monkeypatch.setattr(loader_module, "CHUNK_TOKENS", 3 * 16 * (T + 1))
    for start in (1, 13, 39):
        for resumed, original in zip(steps(split, 40 - start, start_step=start), straight[start:], strict=True):
            assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, original, strict=True))


def test_an_epoch_holds_every_window_once(split: Split) -> None:
    with closing(loader(split)) as batches:
        assert isinstance(batches.order, Order)
        windows = batches.order.windows
        places = [place for step in range(-(-windows // 16)) for place in zip(*batches.places(step), strict=True)]
    assert len(set(places[:windows])) == windows


def test_sample_numbers_of_the_ranks_make_up_the_step(split: Split) -> None:
    numbers = []
    for rank in range(4):
        with closing(loader(split, rank=rank, world_size=4)) as batches:
            numbers += batches.sample_numbers(10).tolist()
    assert numbers == list(range(160, 176))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of windows of each read, in order."""
    read, done = WindowReader.read, list[int]()

    def counted(reader: WindowReader, shards: Ints, offsets: Ints, tokens: NDArray[np.uint16]) -> None:
        read(reader, shards, offsets, tokens)
        done.append(len(offsets))

    monkeypatch.setattr(WindowReader, "read", counted)
    return done


def test_the_data_wait_is_counted_once(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read = WindowReader.read

    def slow_read(reader: WindowReader, shards: Ints, offsets: Ints, tokens: NDArray[np.uint16]) -> None:
        time.sleep(0.1)
        read(reader, shards, offsets, tokens)

    monkeypatch.setattr(WindowReader, "read", slow_read)
    with closing(loader(split)) as batches:
        batches.next_step()
        assert 0.05 < batches.pop_data_wait() < 5
        assert batches.pop_data_wait() == 0


def test_the_thread_stops_reading_when_enough_is_ready(
    split: Split, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_TOKENS", 1)
    with closing(loader(split)) as batches:
        jobs.poll(lambda: len(reads) >= loader_module.CHUNKS_AHEAD)
        time.sleep(0.2)
        assert len(reads) == loader_module.CHUNKS_AHEAD
        batches.next_step()
        jobs.poll(lambda: len(reads) > loader_module.CHUNKS_AHEAD)
        time.sleep(0.2)
        assert len(reads) == loader_module.CHUNKS_AHEAD + 1


@pytest.mark.usefixtures("read_whole")
def test_a_file_cut_short_while_training_is_a_storage_error(
    split: Split, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_TOKENS", 1)
    with closing(loader(split)) as batches:
        batches.next_step()
        jobs.poll(lambda: len(reads) == loader_module.CHUNKS_AHEAD + 1)
        path_of(split.shards[0]).write_bytes(b"")
        for _ in range(loader_module.CHUNKS_AHEAD):
            batches.next_step()
        with pytest.raises(StorageError, match=r"train-00000\.bin was cut short"):
            batches.next_step()


@pytest.mark.usefixtures("read_whole")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_removed_or_replaced_while_training_does_no_harm(
    replaced: bool, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(split, 8)
    monkeypatch.setattr(loader_module, "CHUNK_TOKENS", 1)
    with closing(loader(split)) as batches:
        for shard in split.shards:
            path_of(shard).unlink()
            if replaced:  # by a smaller dataset, as prepare --overwrite does
                (tmp_path / "new").touch()
                (tmp_path / "new").rename(path_of(shard))
        for step in expected:
            assert torch.equal(batches.next_step()[0][0], step[0][0])


def test_a_corpus_shorter_than_a_window_is_a_data_error(split: Split) -> None:
    with pytest.raises(DataError, match="train split has 10 tokens"):
        loader(Split("train", split.shards[1:2]))


def test_close_ends_the_thread(split: Split) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        with closing(loader(split)) as batches:
            batches.next_step()
    # Threads that other tests left may end meanwhile.
    assert set(threading.enumerate()) <= before


def test_an_interpreter_exits_although_its_loader_was_never_closed(tmp_path: Path) -> None:
    np.zeros(1000, dtype=np.uint16).tofile(tmp_path / "train-00000.bin")
    program = """
import sys, numpy as np, torch
from distgpt.corpus.loader import Loader
from distgpt.corpus.shards import Split, TokenMap
split = Split("train", (np.memmap(sys.argv[1], dtype=np.uint16, mode="r"),))
batches = Loader(split, block_size=16, global_batch=4, micro_batch=4, rank=0, world_size=1, seed=0,
                 device=torch.device("cpu"), start_step=0)
batches.next_step()
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "train-00000.bin")], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def evaluation(split: Split, rank: int, world_size: int, sequences: int = 50) -> EvaluationBatches:
    return EvaluationBatches(
        split,
        block_size=T,
        sequences=sequences,
        micro_batch=4,
        rank=rank,
        world_size=world_size,
        device=CPU,
    )


@pytest.mark.usefixtures("read_whole")
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 20])
def test_evaluation_computes_the_same_batches_for_any_number_of_ranks(split: Split, world_size: int) -> None:
    alone = evaluation(split, 0, 1)
    assert alone.windows == 50
    expected = {indices[0]: (indices, x, y) for indices, x, y in alone}
    assert sorted(i for indices, _, _ in expected.values() for i in indices) == list(range(50))
    found = {}
    for rank in range(world_size):
        batches = evaluation(split, rank, world_size)
        given = list(batches)
        assert len(given) == len(batches) == -(-13 // world_size)
        for indices, x, y in given:
            assert x.shape == y.shape == (len(indices), T)
            if indices[0] >= 0:
                assert indices[0] not in found
                found[indices[0]] = (indices, x, y)
    assert found.keys() == expected.keys()
    for first, (indices, x, y) in expected.items():
        assert np.array_equal(found[first][0], indices)
        assert torch.equal(found[first][1], x)
        assert torch.equal(found[first][2], y)


def test_evaluation_can_be_repeated_and_takes_all_windows_of_a_short_split(split: Split) -> None:
    batches = evaluation(split, 0, 1, sequences=10**6)
    assert batches.windows == 1999 // T + 699 // T
    first, second = ([x for _, x, _ in batches] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
