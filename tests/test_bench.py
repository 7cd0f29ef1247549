"""bench/: what the benchmarks measure and write, on a small model."""

import argparse
import importlib
import re
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from distgpt.config import resolve
from distgpt.model.gpt import GPT
from tests import jobs


@pytest.fixture(autouse=True)
def bench_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import from bench/, as a benchmark does when it runs."""
    monkeypatch.syspath_prepend(jobs.PROJECT / "bench")


def test_a_section_of_results_is_replaced_or_added(tmp_path: Path) -> None:
    file, results = tmp_path / "RESULTS.md", importlib.import_module("results")
    file.write_text("# Results\n\nAbout.\n\n## A\n\nold\n\n### A part\n\nold\n\n## B\n\nkept\n")
    results.write_section("A", "new", file)
    results.write_section("C", "| a |\n|---|\n", file)
    assert file.read_text() == "# Results\n\nAbout.\n\n## A\n\nnew\n\n## B\n\nkept\n\n## C\n\n| a |\n|---|\n"
    results.write_section("C", "last", file)
    assert file.read_text().endswith("## B\n\nkept\n\n## C\n\nlast\n")


def test_both_ways_of_sampling_are_timed() -> None:
    sampling = importlib.import_module("sampling")
    model = GPT(resolve(["quickstart"], {}).model, sampling.VOCAB, sampling.EOT)
    model.init_weights(0)
    ways = {
        "nanoGPT's": partial(sampling.recomputing, model.eval(), torch.float32),
        "ours": partial(sampling.caching, model, torch.float32, 2),
    }
    rates = sampling.measure(ways, range(2, 8, 4), 2, time.perf_counter)
    assert [len(rate) for rate in rates.values()] == [2, 2]
    arguments = argparse.Namespace(preset="quickstart", tokens=8, rounds=2, threads=1, clock="wall")
    text = sampling.report(rates, arguments)
    assert re.search(r"^\| nanoGPT's \| [\d.]+ \| 1\.0 \| 1\.0 to 1\.0 \|$", text, re.MULTILINE)
    assert re.search(r"^\| ours \| [\d.]+ \| [\d.]+ \| [\d.]+ to [\d.]+ \|$", text, re.MULTILINE)


def test_learning_is_reported_and_drawn(tmp_path: Path) -> None:
    shakespeare = importlib.import_module("shakespeare")
    long = {f"seed {seed}": (1000.0, {100: 1.8, 200: 1.46 + seed / 100}) for seed in (1, 2, 3)}
    text = shakespeare.report(long, {"the preset": (300.0, {200: 1.7})}, 70_000.0)
    assert "| seed 2 | 1,000 | 1.4800 |" in text
    assert "Mean 1.4800, from 1.4700 to 1.4900." in text
    assert "70,000 CPU seconds (one step, multiplied): 70 times as long" in text
    assert text.endswith("| the preset | 300 | 1.7000 |")
    shakespeare.draw(long, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
