"""The save interval, against worked examples, and when a save is due."""

import math
from typing import Literal

import pytest

from distgpt.checkpoint.interval import (
    DAY,
    HOUR,
    PRIOR_SECONDS_PER_SAVE,
    SaveInterval,
    best_interval,
    seconds_between_failures,
)


@pytest.mark.parametrize(
    ("cost", "between_failures", "expected"),
    [
        (1.0, DAY, 415.69),  # sqrt(172800)
        (30.0, 6 * HOUR, 1138.42),  # sqrt(1296000)
        (0.5, 100.0, 10.0),
        (0.0, DAY, 0.0),
        (600.0, 30 * DAY, HOUR),  # sqrt(3.1e9) is half a day: never less than once an hour
    ],
)
def test_worked_examples(cost: float, between_failures: float, expected: float) -> None:
    assert best_interval(cost=cost, between_failures=between_failures) == pytest.approx(expected, abs=0.01)


def test_the_best_interval_loses_the_least() -> None:
    """Of each second, cost / interval is spent on saves, and interval / (2 between_failures) is repeated."""

    def lost(interval: float) -> float:
        return 5.0 / interval + interval / (2 * 7200.0)

    best = best_interval(cost=5.0, between_failures=7200.0)
    assert all(lost(best) < lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


@pytest.mark.parametrize(
    ("seconds", "failures", "hosts", "expected"),
    [
        (0.0, 0, 1, DAY),
        (0.0, 0, 8, DAY / 8),
        (3 * DAY, 0, 1, 4 * DAY),  # without failures, fewer are expected
        (3 * DAY, 1, 1, 2 * DAY),
        (HOUR, 9, 24, HOUR / 5),
    ],
)
def test_measurements_outweigh_the_prior(seconds: float, failures: int, hosts: int, expected: float) -> None:
    assert seconds_between_failures(seconds=seconds, failures=failures, hosts=hosts) == pytest.approx(expected)


def test_a_save_costs_the_stall_and_the_slower_steps() -> None:
    saves = SaveInterval("auto", start_step=0, best_val_loss=None)
    assert (saves.seconds_per_save, saves.seconds_per_step) == (PRIOR_SECONDS_PER_SAVE, 0.0)
    for _ in range(6):
        saves.record_step(0.2, writing=False)
    for _ in range(2):
        saves.record_save(1, stalled=0.3)
        saves.record_step(0.5, writing=True)
    assert saves.seconds_per_save == pytest.approx(0.3 + 0.3)
    assert saves.seconds_per_step == pytest.approx((6 * 0.2 + 2 * 0.5) / 8)


def test_the_best_interval_in_steps() -> None:
    saves = SaveInterval("auto", start_step=0, best_val_loss=None)
    saves.record_step(0.1, writing=False)
    saves.record_save(1, stalled=0.5)
    assert saves.best_steps(100.0) == 100  # 10 seconds
    assert saves.best_steps(1e-6) == 1


def test_faster_steps_during_a_save_do_not_lower_its_cost() -> None:
    saves = SaveInterval("auto", start_step=0, best_val_loss=None)
    saves.record_save(1, stalled=0.3)
    saves.record_step(0.2, writing=False)
    saves.record_step(0.1, writing=True)
    assert saves.seconds_per_save == 0.3


def test_without_an_undisturbed_step_only_the_stall_counts() -> None:
    saves = SaveInterval("auto", start_step=0, best_val_loss=None)
    saves.record_save(1, stalled=0.3)
    saves.record_step(9.0, writing=True)
    assert saves.seconds_per_save == 0.3


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 9]), (0, [])])
def test_a_fixed_interval_counts_from_the_start_of_the_run(every: int, expected: list[int]) -> None:
    saves = SaveInterval(every, start_step=2, best_val_loss=None)
    assert not saves.adopt(1)
    assert [step for step in range(1, 11) if saves.is_due(step)] == expected


def test_auto_counts_from_the_last_save_and_adopts_only_noticeable_changes() -> None:
    saves = SaveInterval("auto", start_step=100, best_val_loss=None)
    assert not any(saves.is_due(step) for step in range(101, 1000)), "nothing is known yet"
    assert saves.adopt(8)
    assert [step for step in range(101, 110) if saves.is_due(step)] == [108, 109]
    saves.record_save(110, stalled=0.1)
    assert [step for step in range(111, 120) if saves.is_due(step)] == [118, 119]
    assert not saves.adopt(9)
    assert not saves.adopt(7)
    assert saves.adopt(10)
    assert not saves.is_due(118)
    assert saves.adopt(1)
    assert saves.is_due(111)


@pytest.mark.parametrize("every", [0, 1000, "auto"])
def test_a_save_is_due_at_each_new_best_evaluation(every: Literal["auto"] | int) -> None:
    saves = SaveInterval(every, start_step=2, best_val_loss=3.0)
    found = {4: 3.5, 6: 2.5, 8: 2.5, 10: math.nan, 12: 2.0}
    assert [step for step, loss in found.items() if saves.record_evaluation(step, loss)] == [6, 12]
    saves = SaveInterval(every, start_step=2, best_val_loss=3.0)
    due = []
    for step, loss in found.items():
        saves.record_evaluation(step, loss)
        due += [step] if saves.is_due(step) else []
    assert due == [6, 12]
