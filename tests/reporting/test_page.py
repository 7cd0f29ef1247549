"""The page about runs: it has what the run directories hold, whatever state they are in, and runs no text as code."""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distgpt.cli import report_options
from distgpt.config import resolve, to_toml
from distgpt.errors import DataError, StorageError, UsageError
from distgpt.report import main
from distgpt.reporting.curves import MAX_POINTS, curve
from distgpt.reporting.page import build_page
from distgpt.reporting.record import Exit, read_run
from distgpt.reporting.timeline import UNKNOWN, timeline
from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
from distgpt.telemetry.goodput import Line, time_spent

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- {{ 7 * 7 }}"
KINDS = ("training, each step", "training", "validation", "validation on books")
DONE = {"code": 0, "cause": "done", "step": 40, "time": "2026-11-28T20:00:00+0000"}


class Elements(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.text = self.data = self.policy = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self._inside = "data" if ("id", "data") in attributes else tag
        if ("http-equiv", "Content-Security-Policy") in attributes:
            self.policy = str(dict(attributes)["content"])

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        if self._inside == "data":
            self.data += text
        elif self._inside == "script":
            self.scripts.append(text)
        elif self._inside != "style":
            self.text += text


def step_line(step: int) -> dict[str, Any]:
    figures = {
        "loss": 4 - step / 40,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 5e4,
        "mfu": 0.4,
        "seconds": 0.1,
    }
    return {"step": step, **figures, "memory_bytes": 2**30, "tokens": 100 * step}


def json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def make_run(directory: Path, *options: str, ended: Mapping[str, Any] | None = DONE) -> Path:
    """Write a run of 40 steps with an evaluation, a sample and a kill at step 20."""
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(to_toml(resolve(["--train.steps=40", *options], {})))
    steps = [step_line(step) for step in range(1, 41)]
    validation = [{"step": 20, "val_loss": 3.75}, {"step": 40, "val_loss": 3.25, "val_loss/books": 3.5}]
    (directory / "metrics.jsonl").write_text(json_lines([*steps, *validation]))
    (directory / "samples.jsonl").write_text(json_lines([{"step": 40, "text": "once upon a time"}]))
    lines = [
        Line(1, at=1000.0, step=0),
        Line(1, at=1030.0, step=20, start=10.0, steps=20.0),
        Line(2, at=1040.0, step=10),
        Line(2, at=1080.0, step=40, start=10.0, steps=30.0, end="done"),
    ]
    (directory / "goodput.jsonl").write_text(json_lines([asdict(line) for line in lines]))
    if ended is not None:
        (directory / "exit.json").write_text(json.dumps(ended))
    return directory


def test_a_page_has_the_curves_the_figures_and_what_was_written(tmp_path: Path) -> None:
    page = Elements(build_page([read_run(make_run(tmp_path / "mine"))]))
    charts = {chart["title"]: chart for chart in json.loads(page.data)}
    assert list(charts) == [
        *("Loss", "Learning rate", "Gradient norm", "Throughput", "MFU", "Time of a step", "Memory of rank 0"),
    ]
    _, training, validation, books = charts["Loss"]["curves"]
    assert (books["label"], books["y"]) == ("validation on books", [3.5])
    assert training["x"] == list(range(1, 41))
    assert (validation["x"], validation["y"]) == ([20, 40], [3.75, 3.25])
    assert charts["MFU"]["curves"][0]["y"][0] == 40.0
    for text in ("mine", "done", "3.2500", "lowest, at step 40", "once upon a time", UNKNOWN, "repeated", "recovery"):
        assert text in page.text, text


def test_runs_are_compared_by_the_keys_that_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, f"--optim.lr={lr}") for name, lr in (("a", 0.125), ("b", 0.25))]
    page = build_page([read_run(run) for run in runs])
    [row] = [row for row in page.split("<tr") if row.startswith(' class="differs"')]
    assert [text in row for text in ("optim.lr", "0.125", "0.25", "0.0003")] == [True] * 4
    labels = [line["label"] for line in json.loads(Elements(page).data)[0]["curves"]]
    assert labels == [f"{run}, {kind}" for run in "ab" for kind in KINDS]


def test_text_of_files_is_shown_and_neither_runs_nor_breaks_the_page(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "|")
    hostile = make_run(tmp_path / name, f"--data.path={HOSTILE}", ended={"code": 65, "cause": HOSTILE})
    (hostile / "samples.jsonl").write_text(json_lines([{"step": 40, "text": f"{HOSTILE}\udcff\0"}]))
    plain = Elements(build_page([read_run(make_run(tmp_path / "plain")), read_run(make_run(tmp_path / "other"))]))
    found = Elements(build_page([read_run(hostile), read_run(tmp_path / "plain")]))
    assert found.names.count("script") == plain.names.count("script") == 3
    assert set(found.names) <= set(plain.names)
    assert found.text.count(HOSTILE) >= 3, "sample, cause and key"
    assert json.loads(found.data)[0]["curves"][0]["label"] == f"{name}, training, each step"
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in found.scripts]
    assert "default-src 'none';" in found.policy
    assert found.policy.endswith("script-src " + " ".join(f"'sha256-{code}'" for code in hashes)), "and no other script"


def test_a_run_in_progress_with_a_line_half_written_and_no_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ended=None)
    (run / "metrics.jsonl").write_text(json_lines([step_line(1), step_line(2)]) + '{"step": 3, "loss": 2.')
    (run / "samples.jsonl").unlink()
    lock = RunLock(RunPaths(run))
    lock.renew_in_background(lambda message: None, every=0.01)
    record = read_run(run)
    page = Elements(build_page([record]))
    lock.release()
    assert (record.state, read_run(run).state) == ("running", "killed")
    assert [one["label"] for one in json.loads(page.data)[0]["curves"]] == ["training, each step", "training"]
    assert "2of 40" in page.text
    assert "No text is recorded." in page.text


def test_a_run_that_has_only_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("not [ toml")
    page = Elements(build_page([read_run(tmp_path)]))
    assert [chart["curves"] for chart in json.loads(page.data)] == [[]]
    assert "No time is recorded yet." in page.text


def test_damaged_checkpoints_are_listed_with_their_damage(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run") / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    [saved] = read_run(checkpoint).checkpoints  # a checkpoint stands for its run
    assert (saved.step, saved.damage) == (40, "manifest.json is missing")
    assert "manifest.json is missing" in build_page([read_run(tmp_path / "run")])


def test_a_path_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").touch()
    (tmp_path / "file").touch()
    for path, what in (("gone", "does not exist"), ("data", "is prepared data"), ("file", "is a file"), ("", "no run")):
        with pytest.raises(DataError, match=what):
            read_run(tmp_path / path)


def test_the_timeline_has_the_parts_of_the_goodput_and_the_causes(tmp_path: Path) -> None:
    lines = read_run(make_run(tmp_path / "run")).goodput
    exits = [Exit(75, "SIGTERM", at=1031.0), Exit(2, "a typing mistake", at=1033.0), Exit(0, "done", at=1081.0)]
    stretches, [stop] = timeline(lines, exits, "done")
    spent = time_spent(lines)
    for part, seconds in spent.seconds.items():
        assert sum(s.seconds for s in stretches if s.part == part) == pytest.approx(seconds), part
    assert stretches[-1].begin + stretches[-1].seconds == pytest.approx(spent.total)
    assert (stop.state, stop.causes, stop.lost_steps, stop.pause) == (
        *("interrupted", ("SIGTERM", "a typing mistake")),
        *(10, 10.0),
    )
    assert (stop.begin, stop.step) == (30.0, 20)
    _, stops = timeline(lines[:2], [], "killed")
    assert [(one.causes, one.lost_steps) for one in stops] == [((UNKNOWN,), None)]
    assert timeline(lines[:2], [], "running")[1] == []


def test_a_long_run_has_short_curves_that_keep_their_extremes() -> None:
    lines = [{"step": step, "loss": 9.0 if step == 54321 else step / 1e5} for step in range(100_000)]
    drawn = curve(lines, "loss")
    assert len(drawn["x"]) <= MAX_POINTS + 2
    assert (drawn["x"][0], drawn["x"][-1], max(drawn["y"])) == (0, 99_999, 9.0)
    many = [Line(1, at=float(t), step=t, steps=float(t)) for t in range(10_000)]
    assert len(timeline(many, [], "running")[0]) <= 260


def test_the_command_writes_the_page_without_torch(tmp_path: Path) -> None:
    run, output = make_run(tmp_path / "run"), tmp_path / "page.html"
    program = (
        "import sys, runpy; sys.argv[0] = 'report'\ntry: runpy.run_module('distgpt.report', run_name='__main__')\n"
    )
    program += "except SystemExit as end: sys.exit(end.code or 3 * ('torch' in sys.modules))"
    command = [sys.executable, "-c", program, str(run), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {output}: open it in a browser\n"
    assert output.read_text().startswith("<!doctype html>")
    assert output.stat().st_size < 150_000


def test_a_page_that_cannot_be_written_and_a_missing_run_are_errors(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(StorageError, match="cannot write"):
        main(*report_options([str(run), f"--output={tmp_path / 'gone' / 'page.html'}"]))
    with pytest.raises(UsageError, match="RUN"):
        report_options([])
