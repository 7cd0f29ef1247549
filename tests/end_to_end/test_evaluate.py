"""The command distgpt.evaluate, besides the tests of it in test_sample.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distgpt import evaluate
from distgpt.cli import evaluate_options
from distgpt.errors import DataError, UsageError
from tests import jobs
from tests.end_to_end.conftest import Trained


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Evaluate in this process; return what is printed."""

    def run(*arguments: str | Path) -> str:
        evaluate.main(*evaluate_options([*map(str, arguments)]))
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_two_ranks_print_what_one_process_prints(
    whole: Callable[[str], Trained], prepared: Path, printed: Callable[..., str]
) -> None:
    run = whole("fsdp").run
    arguments = (str(run), "--split=train", "--sequences=13", "--checkpoint=best", "--json")
    ended = jobs.run(jobs.torchrun_command(2, *arguments, module="distgpt.evaluate"))
    assert ended.code == 0, ended
    assert ended.stdout == printed(*arguments)
    found = json.loads(ended.stdout)
    best = min(jobs.val_losses(run).items(), key=lambda item: item[1])[0]
    assert found.items() >= {"step": best, "split": "train", "windows": 13, "block_size": 16}.items()
    assert found["checkpoint"] == str(run / "checkpoints" / f"step-{best:08d}")
    assert (Path(found["data"]), 0 < found["standard_error"] < found["loss"]) == (prepared, True)


@pytest.mark.slow
def test_a_task_is_scored(
    whole: Callable[[str], Trained], printed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"ctx": "a golden", "endings": ["rose", "sea"], "label": 0}
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(line | {"label": label}) + "\n" for label in (0, 1)))
    found = json.loads(printed(whole("fsdp").run, f"--task={task}", "--json"))
    assert found.items() >= {"step": 36, "task": str(task), "questions": 2, "acc": 0.5, "acc_norm": 0.5}.items()
    text = printed(whole("fsdp").run, f"--task={task}")
    error = "(standard error 0.5000)"
    assert text == f"step 36 | acc 0.5000 {error} | acc_norm 0.5000 {error} | 2 questions from {task}\n"
    task.write_text('{"ctx": "\u2603", "endings": ["a", "b"], "label": 0}\n')
    monkeypatch.setattr(evaluate, "load_model", None)  # it is refused before the model is loaded
    with pytest.raises(DataError, match=r"task\.jsonl, line 1: .*U\+2603"):
        printed(whole("fsdp").run, f"--task={task}")


def test_a_task_together_with_data_is_refused() -> None:
    with pytest.raises(UsageError, match="--task reads no data: leave out --data, --split and --sequences"):
        evaluate_options(["run", "--task=file", "--split=train"])
