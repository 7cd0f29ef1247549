"""The lines before the first step: epochs, warm-up, and values that differ when a run is resumed."""

import pytest

from distgpt.config import Config, from_dict, resolve, to_dict
from distgpt.corpus.shards import Part, Split
from distgpt.training.summary import changes, epochs, learning_rate_jump, warnings

BATCH = ("--train.global_batch=8", "--model.block_size=32")


def split_of(tokens: int) -> Split:
    return Split("train", (), (Part("", "", (tokens,)),))


def config(*arguments: str) -> Config:
    return resolve([*BATCH, *arguments], {})


def test_more_than_ten_epochs_give_a_warning() -> None:
    run = config("--train.steps=1000")
    assert epochs(run, split_of(25_600).parts[0]) == 10
    assert list(warnings(run, split_of(25_600), None)) == []
    (line,) = warnings(run, split_of(2_000), None)
    assert line == (
        "the run reads its 2,000 training tokens 128 times (epochs), and little is learned after 10: "
        "use --train.steps=77 or more text"
    )
    assert list(warnings(config("--train.steps=77"), split_of(2_000), None)) == []  # its advice gives no warning


def test_each_dataset_of_a_mix_has_epochs_of_its_own() -> None:
    parts = (Part("a", "", (20_000,), 0.5), Part("b", "", (1_000,), 0.5))
    (line,) = warnings(config("--train.steps=100"), Split("train", (), parts), None)
    assert line.startswith("the run reads its 1,000 training tokens of b 12.8 times (epochs)")
    assert list(warnings(config("--train.steps=77"), Split("train", (), parts), None)) == []


def test_a_warm_up_longer_than_the_run_gives_a_warning() -> None:
    assert list(warnings(config("--optim.warmup_steps=2", "--train.steps=3"), split_of(10**9), None)) == []
    (line,) = warnings(config("--optim.warmup_steps=2000", "--train.steps=3"), split_of(10**9), None)
    assert line == (
        "optim.warmup_steps is 2,000 and the run has 3 steps: the learning rate ends at 4.50e-07 and never reaches "
        "optim.lr = 3.00e-04; warm up for fewer steps"
    )


def test_every_key_that_differs_at_resume_is_listed() -> None:
    then = config("--run.dir=a", "--model.bias=true", "--optim.schedule=cosine")
    now = config("--run.dir=b", "--run.fresh", "--model.bias=false", "--optim.lr=0.5", "--log.every=1")
    assert changes(then, now) == [
        "model.bias true -> false",
        "optim.lr 0.0003 -> 0.5",
        "optim.schedule cosine -> constant",
        "log.every 10 -> 1",
    ]
    assert changes(then, from_dict(to_dict(then), source="train.json")) == []


COSINE = ("--optim.schedule=cosine", "--optim.lr=1e-2", "--optim.warmup_steps=5")


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        (COSINE, COSINE, None),
        ((*COSINE, "--train.steps=20"), (*COSINE, "--train.steps=21"), None),  # from one low rate to another
        (
            (*COSINE, "--train.steps=20"),
            (*COSINE, "--train.steps=40"),
            "from 0.00e+00 to 5.92e-03 at step 21/40: the cosine schedule of 20 steps had lowered it, and one of 40 "
            "has not; to extend a run without a jump, use a higher optim.min_lr, or optim.schedule=wsd and a "
            "checkpoint before its decay",
        ),
        (
            ("--train.steps=40",),
            ("--train.steps=42", "--optim.lr=0.5", "--optim.beta1=0.5"),
            "from 3.00e-04 to 5.00e-01 at step 21/42: to avoid that, keep optim.lr=0.0003",
        ),
        (("--train.steps=40",), ("--train.steps=42", "--optim.lr=6e-4"), None),
        (
            ("--optim.warmup_steps=100",),
            ("--optim.warmup_steps=100", "--optim.lr=1e-4"),
            "from 5.94e-05 to 2.08e-05 at step 21/5000: to avoid that, keep optim.lr=0.0003",
        ),
    ],
)
def test_a_learning_rate_that_jumps_at_resume_gives_a_warning(
    then: tuple[str, ...], now: tuple[str, ...], expected: str | None
) -> None:
    line = learning_rate_jump(config(*then), config(*now), 20)
    assert line == (expected and f"the learning rate jumps {expected}")


def test_a_warm_up_may_double_the_rate_from_its_first_step_to_its_second() -> None:
    then, now = (config("--optim.warmup_steps=9", f"--train.steps={steps}") for steps in (20, 40))
    assert learning_rate_jump(then, now, 1) is None
