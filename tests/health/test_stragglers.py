"""Slow ranks are named from the figures of all ranks; each rank times its own work."""

import time
from collections.abc import Sequence

import pytest
import torch

from distgpt.config import ModelConfig
from distgpt.health import stragglers
from distgpt.health.stragglers import INTERVAL_SECONDS, REMIND_INTERVALS, OwnWorkTimer, StragglerDetector, Work
from distgpt.model.gpt import GPT

HOSTS = ["node0", "node0", "node7", "node7"]


def messages_after(intervals: Sequence[Sequence[float]], hosts: Sequence[str] = HOSTS) -> list[list[str]]:
    """Return the messages after each interval of ten steps, from the own work of each rank in seconds a step."""
    detector = StragglerDetector(hosts)
    return [
        detector.update([Work(own=10 * seconds) for seconds in interval], steps=10, seconds=INTERVAL_SECONDS)
        for interval in intervals
    ]


def test_equally_fast_ranks_are_not_named() -> None:
    assert messages_after([[0.2, 0.21, 0.22, 0.25]] * 10) == [[]] * 10


def test_a_slow_rank_is_named_after_three_intervals_with_its_host() -> None:
    messages = messages_after([[0.2, 0.22, 0.25, 0.41]] * 5)
    assert messages == [
        *([], []),
        [
            "rank 3 on node7 is slow: its own work takes 410 ms a step, the others' median is 220 ms; "
            "data wait 0 ms a step"
        ],
        *([], []),
    ]


def test_the_data_wait_of_a_slow_rank_is_reported() -> None:
    detector = StragglerDetector(["a", "b"])
    messages = []
    for _ in range(3):
        messages = detector.update([Work(30.0, 25.0), Work(1.0, 0.0)], steps=10, seconds=60.0)
    assert messages == [
        "rank 0 on a is slow: its own work takes 3.00 s a step, the others' median is 100 ms; data wait 2.50 s a step"
    ]


def test_a_rank_that_is_slow_to_save_is_named_after_three_intervals_with_saves() -> None:
    detector, even = StragglerDetector(HOSTS), [Work(own=1.0)] * 4
    saves = [Work(own=1.0, save=seconds, saved_bytes=100e6) for seconds in (2.0, 2.1, 6.0, 1.9)]
    messages = [
        detector.update(works, steps=10, seconds=INTERVAL_SECONDS)
        for works in (saves, even, saves, even, saves, even, saves, *[[Work(save=2.0, saved_bytes=1e8)] * 4] * 3)
    ]
    reported = [(at, line) for at, lines in enumerate(messages) for line in lines]
    assert reported == [
        (4, "rank 2 on node7 is slow to save: 6.00 s for its share of checkpoints, 2.00 s at the speed of the others"),
        (
            9,
            "rank 2 on node7 saves as fast as the others again: 2.00 s for its share of checkpoints, "
            "2.00 s at the speed of the others",
        ),
    ]


@pytest.mark.parametrize("other", [Work(save=6.0, saved_bytes=6e8), Work(save=1.0, saved_bytes=1e7), Work()])
def test_a_share_of_another_size_or_none_is_not_slow(other: Work) -> None:
    """A larger share takes longer, a smaller one no less, on the same disk, and a rank without one does not count."""
    detector = StragglerDetector(HOSTS)
    works = [Work(save=1.0, saved_bytes=1e8), other, Work(), Work()]
    assert [detector.update(works, steps=1, seconds=INTERVAL_SECONDS) for _ in range(5)] == [[]] * 5


def test_a_save_that_is_over_in_half_a_second_is_not_slow() -> None:
    detector = StragglerDetector(["a", "b"])
    works = [Work(save=0.1, saved_bytes=1e6), Work(save=0.5, saved_bytes=1e6)]
    assert [detector.update(works, steps=1, seconds=INTERVAL_SECONDS) for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("fast", [0, 1])
def test_of_two_ranks_each_is_compared_with_the_other(fast: int) -> None:
    own = [0.5, 0.5]
    own[fast] = 0.2
    named = [line for messages in messages_after([own] * 3, ["a", "b"]) for line in messages]
    assert len(named) == 1
    assert named[0].startswith(f"rank {1 - fast} on ")


def test_two_of_four_can_be_slow() -> None:
    named = messages_after([[0.2, 0.9, 0.2, 0.9]] * 3)[-1]
    assert [line.split(" on ")[0] for line in named] == ["rank 1", "rank 3"]


def test_no_rank_is_slow_if_all_but_one_are() -> None:
    assert messages_after([[0.2, 0.9, 0.9, 0.9]] * 5) == [[]] * 5


def test_one_or_two_slow_intervals_are_ignored() -> None:
    slow, even = [0.2, 0.2, 0.2, 0.9], [0.2, 0.2, 0.2, 0.2]
    assert messages_after([slow, slow, even, slow, slow, even, slow]) == [[]] * 7


def test_differences_of_milliseconds_are_ignored() -> None:
    assert messages_after([[0.002, 0.002, 0.002, 0.011]] * 5) == [[]] * 5
    assert messages_after([[0.002, 0.002, 0.002, 0.013]] * 3)[-1] != []


def test_a_rank_that_keeps_up_again_is_reported_once() -> None:
    slow, even = [0.2, 0.2, 0.2, 0.9], [0.2, 0.2, 0.2, 0.2]
    messages = messages_after([slow] * 4 + [even] * 2 + [slow] + [even] * 5)
    reported = [(index, line.partition(":")[0]) for index, lines in enumerate(messages) for line in lines]
    assert reported == [(2, "rank 3 on node7 is slow"), (9, "rank 3 on node7 keeps up again")]


def test_a_rank_that_stays_slow_is_reported_again_after_a_while() -> None:
    messages = messages_after([[0.2, 0.2, 0.2, 0.9]] * (3 + 2 * REMIND_INTERVALS))
    assert [index for index, lines in enumerate(messages) if lines] == [
        2,
        2 + REMIND_INTERVALS,
        2 + 2 * REMIND_INTERVALS,
    ]


def test_short_log_intervals_are_combined() -> None:
    detector = StragglerDetector(["a", "b"])
    messages = [
        detector.update([Work(own=0.2), Work(own=0.01)], steps=1, seconds=INTERVAL_SECONDS / 4) for _ in range(3 * 4)
    ]
    assert messages[:-1] == [[]] * 11
    assert messages[-1][0].startswith("rank 0 on a is slow: its own work takes 200 ms a step")


def test_one_rank_alone_is_never_slow() -> None:
    assert messages_after([[0.9]] * 5, ["a"]) == [[]] * 5


def test_the_median_of_the_others() -> None:
    for count in range(2, 8):
        for index in range(count):
            ordered = [float(value // 2) for value in range(count)]
            others = ordered[:index] + ordered[index + 1 :]
            assert stragglers.median_without(ordered, ordered[index]) == sorted(others)[(count - 2) // 2]


def test_own_work_ends_with_the_last_gradient_of_the_last_micro_batch() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, tied_head=True), 11)
    model.init_weights(0)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    work = OwnWorkTimer(model, torch.device("cpu"))
    started = time.perf_counter()
    work.begin()
    for _ in range(2):
        time.sleep(0.03)
        model(tokens, tokens).mean().backward()
    computed = time.perf_counter() - started
    time.sleep(0.03)
    work.end()
    own = work.pop_seconds()
    assert 0.06 <= own <= computed
    assert work.pop_seconds() == 0.0
    work.exclude(0.05)
    assert work.pop_seconds() == -0.05, "it waited for the others between two micro-batches"
    for _ in range(2):  # without a backward pass
        work.begin()
        work.end()
    assert work.pop_seconds() == 0.0
