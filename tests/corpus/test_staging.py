"""The staging directory: one owner, no parts of another job, an atomic change from the old dataset to the new."""

from pathlib import Path

import pytest

from distgpt.corpus.preparing import staging
from distgpt.errors import DataError, DirectoryError


def test_one_process_at_a_time_prepares_an_output(tmp_path: Path) -> None:
    with (
        staging.exclusive(tmp_path / "data"),
        pytest.raises(DirectoryError, match="another process is preparing"),
        staging.exclusive(tmp_path / "data"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with staging.exclusive(tmp_path / "data"):
        pass


def test_parts_are_kept_for_the_same_job_and_removed_for_another(tmp_path: Path) -> None:
    for job, kept in (({"a": 1}, False), ({"a": 1}, True), ({"a": 2}, False)):
        with staging.exclusive(tmp_path / "data") as directory:
            (directory / "stdin").touch()
            staging.begin(directory, job)
            assert (directory / "parts" / "000000.part").exists() == kept
            assert (directory / "stdin").exists()
            (directory / "parts" / "000000.part").touch()
            (directory / "dataset" / "half.bin").touch()
    staging.clear_leftovers(tmp_path / "data", {"a": 1})
    assert staging.directory_of(tmp_path / "data").exists()
    staging.clear_leftovers(tmp_path / "data", {"a": 2})
    assert list(tmp_path.iterdir()) == []


def test_bad_data_leave_no_staging_directory(tmp_path: Path) -> None:
    def prepare() -> None:
        with staging.exclusive(tmp_path / "data") as directory:
            staging.begin(directory, {})
            raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        prepare()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_commit_puts_the_new_dataset_in_place_of_the_old(
    atomic: bool, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    output = tmp_path / "data"
    if old:
        output.mkdir()
        (output / "old").touch()
    with staging.exclusive(output) as directory:
        staging.begin(directory, {})
        (directory / "dataset" / "new").touch()
        staging.commit(directory, output)
    assert [path.name for path in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert staging.exchange(tmp_path / "one", tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["two"]
    assert not staging.exchange(tmp_path / "one", tmp_path / "three")


def test_a_replacement_that_was_killed_is_undone(tmp_path: Path) -> None:
    output = tmp_path / "data"
    replaced = staging.directory_of(output) / "replaced"
    replaced.mkdir(parents=True)
    staging.recover(output)
    assert output.is_dir()
    staging.recover(output)
    assert not replaced.exists()
