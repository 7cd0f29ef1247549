"""The library: what `import distgpt` offers, and the notebook that shows it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distgpt
from distgpt.cli import sample_options
from distgpt.corpus.shards import Dataset
from distgpt.errors import DataError, StorageError, UsageError
from distgpt.library import as_table
from tests import jobs
from tests.checkpoint.checkpoints import trainee
from tests.test_docs import SMALL

NOTEBOOK = jobs.PROJECT / "docs" / "library.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, distgpt; sys.exit(any(name in sys.modules for name in ('numpy', 'torch', 'distgpt.library')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=jobs.PROJECT).returncode == 0


def test_all_names_are_there_and_no_other() -> None:
    assert all(hasattr(distgpt, name) for name in distgpt.__all__)
    assert not hasattr(distgpt, "train_all")
    assert dir(distgpt) == sorted(distgpt.__all__), "what a prompt completes"


def test_the_command_of_the_same_name_does_not_hide_the_function() -> None:
    from distgpt.prepare import parse

    assert callable(distgpt.prepare)
    assert parse([]).tokenizer == "char"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in one process, with a small model that trains for a few steps in a forked one."""

    def train(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        small = {f"DISTGPT_{key.replace('.', '__').upper()}": value for key, value in values.items()}
        kept = [word for word in command if word.partition("=")[0] not in ("--train.steps", "--eval.every")]
        ended = jobs.run(kept, **small)
        assert ended.code == 0, ended
        return subprocess.CompletedProcess(command, ended.code, ended.stdout, ended.stderr)

    values = dict(setting.split("=") for setting in SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", train)
    names: dict[str, Any] = {}
    for cell in cells():
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    assert "done: step 4 in runs/argparse" in printed
    assert "UsageError: runs/argparse has no checkpoint 7: choose best, newest or a step of 2, 4\n" in printed
    assert names["trained"].step in (2, 4)
    assert names["dataset"].train.tokens > 50_000


def test_the_notebook_shows_what_each_cell_has_printed() -> None:
    for number, cell in enumerate(cells(), 1):
        assert cell["execution_count"] == number
        printed = [output for output in cell["outputs"] if output["output_type"] in ("stream", "execute_result")]
        assert printed, cell["source"]


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("library")
    subject = trainee(run, dataset)
    for step in (1, 2):
        subject.learn()
        subject.checkpointer.save(step, val_loss=float(step))
    subject.checkpointer.require_saved(2)
    return run


@pytest.fixture(scope="module")
def trained(run: Path) -> distgpt.TrainedModel:
    return distgpt.load(run, "best", device="cpu")


def test_a_model_is_loaded_and_writes_what_sample_writes(
    trained: distgpt.TrainedModel, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distgpt import sample

    assert (trained.step, trained.model.training, trained.config.model.n_embd) == (1, False, 16)
    text = trained.generate("abc", tokens=12, seed=3, top_k=5)
    options = ["--checkpoint=1", "--prompt=abc", "--tokens=12", "--seed=3", "--top-k=5"]
    threads = torch.get_num_threads()
    sample.main(*sample_options([str(run), *options]))
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == f"abc{text}\n"
    assert trained.generate("abc", tokens=12, seed=3, top_k=5, stop=text[4]) == text.partition(text[4])[0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tokens": -1}, "tokens is -1: it cannot be negative"),
        ({"seed": -1}, "seed is -1: it must lie between"),
        ({"stop": ""}, "stop has an empty text"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0"),
        ({"prompt": "\u2603"}, r"U\+2603"),
        ({"prompt": "\udcff"}, "udcff"),
    ],
)
def test_a_mistake_is_a_usage_error(trained: distgpt.TrainedModel, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        trained.generate(**options)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no checkpoint"):
        distgpt.load(tmp_path)
    with pytest.raises(DataError, match="is not a dataset"):
        distgpt.open_dataset(str(tmp_path))
    with pytest.raises(StorageError, match="cannot read"):
        distgpt.read_metrics(tmp_path)
    with pytest.raises(UsageError, match="--vocab-size belongs to --tokenizer bpe"):
        distgpt.prepare("in.txt", tmp_path / "out", vocab_size=300)


def test_metrics_are_columns_with_a_row_for_each_step() -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0, "skipped": False},
        {"step": 1, "val_loss": 3.0},
        {"step": 2, "loss": None},
    ]
    table = as_table(lines)
    assert list(table) == ["step", "loss", "skipped", "val_loss"]
    assert table["step"].tolist() == [1, 2]
    assert table["step"].dtype == np.int64
    np.testing.assert_array_equal(table["loss"], [2.0, np.nan])
    np.testing.assert_array_equal(table["val_loss"], [3.0, np.nan])
    np.testing.assert_array_equal(table["skipped"], [0.0, np.nan])
    assert list(as_table([])) == ["step"]
