"""A checkpoint that is not whole is found, whatever is wrong with it."""

import os
import random
from pathlib import Path

import pytest

from distgpt.cluster.manifest import committed, damage
from tests.cluster.checkpoints import FILES, flip_bit, newest


def test_a_whole_checkpoint_has_no_damage(saved: Path) -> None:
    assert damage(newest(saved)) == []


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
    problems = damage(newest(run))
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
        assert damage(newest(run)), f"a flipped bit in {name} was not found"
        file.write_bytes(whole)
    assert damage(newest(run)) == []


def test_ranks_share_the_work_of_looking(run: Path) -> None:
    for name in FILES[:-1]:
        with (newest(run) / name).open("ab") as stream:
            stream.write(b"\n")
    found = [damage(newest(run), rank, 3) for rank in range(3)]
    assert sorted(problem.split()[0] for share in found for problem in share) == sorted(FILES[:-1])
    assert max(map(len, found)) < 4


def test_the_newest_comes_first_and_what_is_no_checkpoint_not_at_all(tmp_path: Path) -> None:
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
