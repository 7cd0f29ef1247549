"""launch/quickstart.sh in an empty directory, with a smaller model and fewer steps."""

from pathlib import Path

from tests import jobs
from tests.launch.launching import launch

SMALL = (
    *("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16"),
    *("--train.steps=4", "--train.global_batch=8", "--optim.warmup_steps=0"),
    *("--eval.every=2", "--eval.sequences=8", "--eval.sample_tokens=0", "--log.every=1", "--checkpoint.every=2"),
)


def test_from_nothing_to_a_sample_and_again(tmp_path: Path) -> None:
    run = 'a "quoted" run'
    first = launch(tmp_path, "quickstart.sh", *SMALL, f"--run.dir={run}")
    assert first.code == 0, first
    assert (tmp_path / "data" / "stdlib" / "meta.json").exists()
    _, _, written = first.stdout.partition("--- what it writes ---\n")
    assert written.startswith("def ")
    assert f"\nloss curve: {run}/plots/loss.png\n" in written
    picture = tmp_path / run / "plots" / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")

    drawn = picture.stat().st_mtime_ns
    again = launch(tmp_path, "quickstart.sh", *SMALL, f"--run.dir={run}", **jobs.environment(FORK_COMMANDS="1"))
    assert again.code == 0, again
    assert f"nothing to do: {run} is at step 4 of 4" in again.stdout
    assert picture.stat().st_mtime_ns == drawn
    assert again.stdout.partition("--- what it writes ---\n")[2] == written


def test_what_only_asks_makes_nothing(tmp_path: Path) -> None:
    shown = launch(tmp_path, "quickstart.sh", "--run.dir=", "--print-config")
    assert shown.code == 0, shown
    assert shown.stdout.startswith('[run]\ndir = ""\n')
    for option in ("--help", "--help=log"):
        asked = launch(tmp_path, "quickstart.sh", option)
        assert "--log.every=STEPS" in asked.stdout
    mistaken = launch(tmp_path, "quickstart.sh", "--train.step=5")
    assert (mistaken.code, len(mistaken.error_lines)) == (2, 1), mistaken
    assert list(tmp_path.iterdir()) == []
