"""The time of a run: each second counts once, over several attempts, incomplete lines and clocks set back."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from distgpt.files import process_age
from distgpt.telemetry import goodput
from distgpt.telemetry.goodput import Goodput, Line, read_goodput, time_spent


def owned() -> None:
    """Pass: no other job owns this run directory."""


def test_the_last_line_of_an_attempt_counts() -> None:
    lines = [
        Line(1, at=1000.0, step=0),
        Line(1, at=1010.0, step=1, start=10.0),
        Line(1, at=1040.0, step=30, start=10.0, steps=20.0, data_wait=1.0, checkpoint=4.0, evaluation=5.0),
        Line(1, at=1041.0, step=30, start=10.0, steps=20.0, data_wait=1.0, checkpoint=4.0, evaluation=5.0, other=1.0),
    ]
    spent = time_spent(lines)
    assert spent.seconds == {
        "start": 10.0,
        "steps": 20.0,
        "data_wait": 1.0,
        "checkpoint": 4.0,
        "evaluation": 5.0,
        "other": 1.0,
        "repeated": 0.0,
        "recovery": 0.0,
    }
    assert (spent.total, spent.attempts, spent.failures) == (41.0, 1, 0)
    assert spent.goodput == pytest.approx(20 / 41)


def test_no_lines_give_no_time() -> None:
    assert time_spent([]).total == 0.0
    assert time_spent([]).goodput == 0.0


def test_steps_after_the_checkpoint_are_repeated_and_the_pause_is_recovery() -> None:
    lines = [
        Line(1, at=1000.0, step=0),
        Line(1, at=1010.0, step=1, start=10.0),
        Line(1, at=1020.0, step=11, start=10.0, steps=10.0),
        Line(1, at=1040.0, step=21, start=10.0, steps=30.0),  # killed
        Line(2, at=1100.0, step=16),  # resumes in the middle of the last ten steps, which took 20 s
        Line(2, at=1115.0, step=17, start=15.0),
        Line(2, at=1145.0, step=47, start=15.0, steps=30.0, end="done"),
    ]
    spent = time_spent(lines)
    assert spent.seconds["repeated"] == pytest.approx(10.0)
    assert spent.seconds["steps"] == pytest.approx(30.0 + 30.0 - 10.0)
    assert spent.seconds["start"] == 25.0
    assert spent.seconds["recovery"] == 60.0
    assert spent.total == pytest.approx(145.0), "from the first process to the last line"
    assert (spent.attempts, spent.failures) == (2, 1)


def test_going_back_twice_also_repeats_steps_of_the_first_attempt() -> None:
    lines = [
        *(Line(1, at=0.0, step=0), Line(1, at=50.0, step=50, steps=50.0)),
        *(Line(2, at=50.0, step=40), Line(2, at=70.0, step=60, steps=20.0)),
        *(Line(3, at=70.0, step=30), Line(3, at=71.0, step=31, steps=1.0)),
    ]
    spent = time_spent(lines)
    # Steps 41 to 50 of the first attempt, then its steps 31 to 40 and all 20 of the second attempt.
    assert spent.seconds["repeated"] == pytest.approx(10.0 + 10.0 + 20.0)
    assert spent.seconds["steps"] == pytest.approx(31.0)
    assert spent.failures == 2


def test_going_back_within_an_attempt_repeats_steps() -> None:
    lines = [
        *(Line(1, at=0.0, step=0), Line(1, at=50.0, step=50, steps=50.0)),
        *(Line(1, at=50.0, step=30, steps=50.0), Line(1, at=60.0, step=40, steps=60.0)),
    ]
    assert time_spent(lines).seconds["repeated"] == pytest.approx(20.0)
    assert time_spent(lines).seconds["steps"] == pytest.approx(40.0)


def test_a_checkpoint_newer_than_the_last_line_repeats_nothing() -> None:
    lines = [Line(1, at=0.0, step=0), Line(1, at=5.0, step=5, steps=5.0), Line(2, at=9.0, step=7)]
    assert time_spent(lines).seconds["repeated"] == 0.0


def test_an_interrupted_attempt_is_no_failure_and_repeats_nothing() -> None:
    lines = [
        *(Line(1, at=0.0, step=0), Line(1, at=9.0, step=9, steps=9.0, end="interrupted")),
        *(Line(2, at=19.0, step=9), Line(2, at=20.0, step=10, steps=1.0)),
    ]
    spent = time_spent(lines)
    assert (spent.failures, spent.seconds["repeated"], spent.seconds["recovery"]) == (0, 0.0, 10.0)
    assert spent.seconds["steps"] == 10.0


def test_time_between_done_and_the_next_attempt_does_not_count() -> None:
    lines = [Line(1, at=5.0, step=5, steps=5.0, end="done"), Line(2, at=90000.0, step=5)]
    assert time_spent(lines).total == 5.0


def test_a_clock_set_back_makes_no_negative_pause() -> None:
    lines = [Line(1, at=5000.0, step=5, steps=5.0), Line(2, at=1000.0, step=5), Line(2, at=1001.0, step=6, start=1.0)]
    spent = time_spent(lines)
    assert spent.seconds["recovery"] == 0.0
    assert spent.total == 6.0


def test_a_late_line_of_a_replaced_attempt_counts_for_that_attempt() -> None:
    lines = [Line(1, at=0.0, step=0), Line(2, at=5.0, step=0), Line(1, at=8.0, step=0, start=8.0), Line(2, 9.0, 0, 4.0)]
    spent = time_spent(lines)
    assert (spent.attempts, spent.seconds["start"], spent.seconds["recovery"]) == (2, 12.0, 0.0)


def test_the_attempt_number_grows_after_a_late_line_of_an_earlier_attempt(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    lines = [Line(1, at=0.0, step=0), Line(2, at=60.0, step=0), Line(1, at=70.0, step=1, start=1.0)]
    path.write_text("".join(f"{json.dumps(asdict(line))}\n" for line in lines))
    current = Goodput(path, start_step=0, require_owned=owned)
    current.write()
    assert read_goodput(path)[-1].attempt == 3
    assert current.so_far().attempts == 3


def test_the_pause_is_known_without_the_first_line_of_an_attempt() -> None:
    lines = [Line(1, at=10.0, step=5, steps=5.0), Line(2, at=30.0, step=6, start=8.0, steps=2.0)]
    assert time_spent(lines).seconds["recovery"] == pytest.approx(10.0)


@pytest.mark.parametrize("bad", ['{"attempt": 1, "at"', '{"attempt": 1}', "\0\0\0", "[1]", '"x"', "7", "\udcff"])
def test_incomplete_or_foreign_lines_are_left_out_and_terminated(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "goodput.jsonl"
    first = Line(1, at=5.0, step=5, steps=5.0)
    path.write_bytes(f"{json.dumps(asdict(first))}\n{bad}".encode(errors="surrogateescape"))
    assert read_goodput(path) == [first]
    Goodput(path, start_step=3, require_owned=owned).write()
    lines = read_goodput(path)
    assert [(line.attempt, line.step) for line in lines] == [(1, 5), (2, 3), (2, 3)]
    assert lines[1].spent == 0.0


def test_a_line_with_null_for_a_number_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    path.write_text(json.dumps(asdict(Line(1, at=5.0, step=5)) | {"steps": None}) + "\n")
    assert read_goodput(path) == []


def test_a_missing_file_is_an_empty_run(tmp_path: Path) -> None:
    assert read_goodput(tmp_path / "goodput.jsonl") == []


def test_an_attempt_killed_in_its_first_step_counts_as_start(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    Goodput(path, start_step=0, require_owned=owned).write()
    first, again = read_goodput(path)[-1], Goodput(path, start_step=0, require_owned=owned)
    assert first.start == pytest.approx(process_age(), abs=1.0)
    assert again.so_far().seconds["start"] == pytest.approx(first.start + process_age(), abs=1.0)


def test_every_second_counts_since_the_process_began(tmp_path: Path) -> None:
    path = tmp_path / "goodput.jsonl"
    current = Goodput(path, start_step=10, require_owned=owned)
    current.write()
    current.step(11, data_wait=0.5)
    for step in range(12, 15):
        time.sleep(0.02)
        current.step(step, data_wait=0.005)
    time.sleep(0.02)
    evaluated = current.charge("evaluation")
    current.charge("checkpoint")
    current.charge("other")
    current.write(end="done")
    spent = current.so_far()
    assert spent.seconds["evaluation"] == evaluated >= 0.02
    assert spent.seconds["data_wait"] == pytest.approx(0.015), "the data wait of the first step belongs to the start"
    assert spent.seconds["steps"] >= 0.06 - 0.015
    assert spent.total == pytest.approx(process_age(), rel=0.01)
    written = time_spent(read_goodput(path))
    assert written.seconds == pytest.approx(spent.seconds, abs=1e-3)
    assert (written.attempts, read_goodput(path)[-1].step, read_goodput(path)[-1].end) == (1, 14, "done")


def test_lines_are_written_when_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "goodput.jsonl"
    monkeypatch.setattr(goodput, "LINE_SECONDS", 3600.0)
    monkeypatch.setattr(goodput, "LINE_SHARE", 1.0)
    current = Goodput(path, start_step=0, require_owned=owned)
    for step in range(1, 100):
        current.write()
        current.step(step, data_wait=0.0)
    assert len(read_goodput(path)) == 2, "the opening line and the first one, not one for each step"
    monkeypatch.setattr(goodput, "LINE_SECONDS", 0.0)
    again = Goodput(path, start_step=99, require_owned=owned)
    for _ in range(3):
        again.write()
    assert len(read_goodput(path)) == 2 + 4


def test_a_suspended_owner_writes_no_line_after_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The takeover happens right after the owner has checked that the run directory is still its own."""
    path, after_takeover = tmp_path / "goodput.jsonl", list[bytes]()
    monkeypatch.setattr(goodput, "LINE_SECONDS", 0.0)

    def take_over_if_suspended() -> None:
        if suspended:
            Goodput(path, start_step=1, require_owned=owned).write()
            after_takeover.append(path.read_bytes())

    suspended = False
    earlier = Goodput(path, start_step=0, require_owned=take_over_if_suspended)
    earlier.write()
    suspended = True
    earlier.write()
    assert after_takeover == [path.read_bytes()]


def test_the_next_line_makes_up_for_one_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "goodput.jsonl"
    current = Goodput(path, start_step=0, require_owned=owned)
    with pytest.raises(OSError, match="No such file"):
        current.write()
    path.parent.mkdir()
    current.step(1, data_wait=0.0)
    current.write(end="failed")
    assert [line.step for line in read_goodput(path)] == [0, 1]
    assert time_spent(read_goodput(path)).total == pytest.approx(current.so_far().total, abs=0.01)


def test_the_age_of_a_process_includes_the_start_of_the_interpreter() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    program = "import time; time.sleep(0.5); from distgpt.files import process_age; print(process_age())"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - started + 0.02
