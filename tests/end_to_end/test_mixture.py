"""A run on a mix of datasets."""

from pathlib import Path

import pytest

from distgpt.corpus.shards import Dataset
from tests import jobs


def test_a_mix_is_trained_on_exactly_after_a_restart_and_each_dataset_is_evaluated(
    dataset: Dataset, other_dataset: Dataset, tmp_path: Path
) -> None:
    a, b = dataset.path, other_dataset.path

    def train(name: str, steps: int, mix: str = f"{a}:3,{b}:1") -> jobs.Ended:
        flags = (f"--data.path={mix}", f"--run.dir={tmp_path / name}", f"--train.steps={steps}", "--eval.every=4")
        return jobs.train(1, *jobs.TINY, *flags)

    whole, first, second = train("whole", 8), train("parts", 4), train("parts", 8)
    assert (whole.code, first.code, second.code) == (0, 0, 0), second
    assert (
        f"data      {a}:0.75,{b}:0.25: 8,000 tokens, vocabulary 31\n          75.0% {a.name}: 4,000 tokens"
        in whole.stdout
    )
    assert jobs.losses(tmp_path / "parts") == jobs.losses(tmp_path / "whole")
    lines = [line for line in jobs.metrics(tmp_path / "parts") if "val_loss" in line]
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        each = line[f"val_loss/{a.name}"], line[f"val_loss/{b.name}"]
        assert line["val_loss"] == pytest.approx(0.75 * each[0] + 0.25 * each[1], rel=1e-9)
        assert each[0] != each[1]
    shown = f"step 8/8 | {a.name} {lines[1][f'val_loss/{a.name}']:.4f} | {b.name} {lines[1][f'val_loss/{b.name}']:.4f}"
    assert shown in second.stdout

    evaluated = jobs.command("evaluate", tmp_path / "parts", "--sequences=30")
    assert f"\n{b.name} | val loss {lines[1][f'val_loss/{b.name}']:.4f}\n" in evaluated.stdout, evaluated
    refused = train("parts", 12, f"{a}:1,{b}:1")
    assert refused.code == 2
    assert " was made by another run: data " in refused.stderr
    assert f" ({a}:3,{b}:1) -> " in refused.stderr
    assert f"({a}:0.5,{b}:0.5); resume with the same values or choose another --run.dir" in refused.stderr
