"""The place of a process by torchrun's environment, and the error for stale variables of another job."""

import pytest

from distgpt.errors import UsageError
from distgpt.torchrun import VARIABLES, Place, place_in_job


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def place(monkeypatch: pytest.MonkeyPatch, variables: str) -> Place:
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    return place_in_job()


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch, "") == Place(0, 0, 1, 1)
    assert place(monkeypatch, "RANK=0 WORLD_SIZE=1") == Place(0, 0, 1, 1)


def test_a_launcher_gives_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29500"
    assert place(monkeypatch, variables) == Place(5, 1, 8, 4)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ("RANK=3 WORLD_SIZE=8", "RANK WORLD_SIZE"),
        ("WORLD_SIZE=2", "WORLD_SIZE"),
        ("LOCAL_RANK=1", "LOCAL_RANK"),
        ("RANK=0 WORLD_SIZE=8 MASTER_PORT=1", "RANK WORLD_SIZE"),
    ],
)
def test_stale_variables_without_a_launcher_are_one_line(
    variables: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        place(monkeypatch, variables)
    said = str(caught.value)
    assert "but no launcher started this process" in said
    assert said.endswith(f": unset {names}, or start it with torchrun")


@pytest.mark.parametrize(
    "variables",
    [
        "RANK=x WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=1",
        "RANK=-1",
        "RANK=2 WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=1",
        "WORLD_SIZE=0 MASTER_ADDR=node1 MASTER_PORT=1",
    ],
)
def test_numbers_of_no_rank_are_one_line(variables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"the environment has .*: unset .*, or start it with torchrun"):
        place(monkeypatch, variables)
