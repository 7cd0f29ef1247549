"""Between micro-batches, ranks check whether all of them should stop."""

import pytest

from distgpt.distributed.runtime import Runtime
from distgpt.training import step
from distgpt.training.step import StopCheck


class Clock:
    """A time.monotonic that the test moves on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "asked_after"), [(20.0, [1, 2, 3, 4]), (2.0, [1, 3, 5]), (0.01, [1, 501, 1001])])
def test_ranks_check_for_stops_every_few_seconds_counted_in_micro_batches(
    one_process: Runtime, monkeypatch: pytest.MonkeyPatch, seconds: float, asked_after: list[int]
) -> None:
    clock = Clock()
    monkeypatch.setattr(step, "time", clock)
    asked: list[int] = []
    passed = 0

    def requested() -> bool:
        asked.append(passed)
        return len(asked) == len(asked_after)

    stops = StopCheck(requested, one_process, on_wait=lambda seconds: None)
    while True:
        passed += 1
        clock.now += seconds
        if stops.agreed():
            break
    assert asked == asked_after
