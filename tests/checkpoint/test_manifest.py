"""Any damage of a checkpoint is found."""

import errno
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest

from distgpt.checkpoint.manifest import committed, find_damage, read_state
from distgpt.errors import DataError, StorageError
from tests.checkpoint.checkpoints import FILES, flip_bit, newest


def test_a_whole_checkpoint_has_no_damage(saved: Path) -> None:
    assert find_damage(newest(saved)) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["shortened", "emptied", "lengthened", "deleted", "directory"])
def test_a_file_that_is_not_whole_is_found(run: Path, name: str, harm: str) -> None:
    file = newest(run) / name
    match harm:
        case "shortened":
            os.truncate(file, file.stat().st_size - 1)
        case "emptied":
            os.truncate(file, 0)
        case "lengthened":
            with file.open("ab") as stream:
                stream.write(b"\n")
        case _:
            file.unlink()
            if harm == "directory":
                file.mkdir()
    problems = find_damage(newest(run))
    assert len(problems) == 1
    assert name in problems[0]
    assert "\n" not in problems[0]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_wherever_it_is(run: Path, name: str) -> None:
    draw = random.Random(name)
    file = newest(run) / name
    whole = file.read_bytes()
    for _ in range(50):
        flip_bit(file, draw)
        assert find_damage(newest(run)), f"a flipped bit in {name} was not found"
        file.write_bytes(whole)
    assert find_damage(newest(run)) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("number", "damaged"), [(errno.EIO, True), (errno.ESTALE, False), (errno.EMFILE, False)])
def test_a_file_that_cannot_be_read_now_is_not_reported_as_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, damaged: bool
) -> None:
    """A bad sector is damage. A server that is down, or too many open files, is not."""
    opened = io.open

    def failing(file: Any, *rest: Any, **named: Any) -> Any:
        if Path(file).name == name:
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *rest, **named)

    monkeypatch.setattr(io, "open", failing)  # what Path.open calls
    if damaged:
        assert name in find_damage(newest(run))[0]
    else:
        with pytest.raises(StorageError, match=f"^cannot read .*/{name}: {os.strerror(number)}$"):
            find_damage(newest(run))


def test_a_state_that_does_not_match_the_manifest_is_not_read(run: Path) -> None:
    file = newest(run) / "train.json"
    whole, draw = file.read_bytes(), random.Random(0)
    assert read_state(newest(run)).step == 2
    for _ in range(100):
        flip_bit(file, draw)
        with pytest.raises(DataError):
            read_state(newest(run))
        file.write_bytes(whole)


def test_ranks_share_the_verification(run: Path) -> None:
    for name in FILES[:-1]:
        with (newest(run) / name).open("ab") as stream:
            stream.write(b"\n")
    found = [find_damage(newest(run), rank, 3) for rank in range(3)]
    assert sorted(problem.split()[0] for share in found for problem in share) == sorted(FILES[:-1])
    assert max(map(len, found)) < 4


def test_checkpoints_are_listed_newest_first_without_other_directories(tmp_path: Path) -> None:
    for name in (
        "step-00000009",
        "step-100000000",
        "step-00000010",
        "step-old",
        "step-00000009.bak",
        ".staging-step-9",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000011").write_text("a file")
    assert [found.name for found in committed(tmp_path)] == ["step-100000000", "step-00000010", "step-00000009"]
    assert committed(tmp_path / "none") == []
