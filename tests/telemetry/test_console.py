"""The console: plain lines in a log file, lines above a bar on a terminal, no output on other ranks."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import closing
from dataclasses import replace

import pytest

from distgpt.telemetry import console
from distgpt.telemetry.console import Console
from distgpt.telemetry.metrics import StepFigures
from distgpt.units import duration

FIGURES = StepFigures(
    step=1,
    loss=2.3456,
    lr=3e-4,
    grad_norm=0.81,
    loss_z=None,
    grad_norm_z=None,
    skipped=False,
    tokens=100,
    tokens_per_second=12345.0,
    mfu=None,
    seconds=0.123,
    memory_bytes=2**30,
    data_wait=0.0,
    checkpoint_stall=0.0,
)


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with closing(Console(5000, 0, True)) as console:
        console.advance()
        console.train(replace(FIGURES, step=100, mfu=0.412))
        console.train(replace(FIGURES, step=5000))
        console.train(replace(FIGURES, step=200, loss_z=2.9, grad_norm_z=-3.21, skipped=True))
        console.evaluation(500, val_loss=1.6543, val_bits_per_byte=2.387, best=True)
        console.evaluation(500, val_loss=1.6543, val_bits_per_byte=2.387, best=False)
        console.message("hello")
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "step  100/5000 | loss 2.3456 | lr 3.00e-04 | norm 0.81 | 123 ms | 12.3k tok/s | mfu 41.2% | eta 10m03s",
        "step 5000/5000 | loss 2.3456 | lr 3.00e-04 | norm 0.81 | 123 ms | 12.3k tok/s | eta 0s",
        "step  200/5000 | loss 2.3456 | lr 3.00e-04 | norm 0.81 (z -3.2) | 123 ms | 12.3k tok/s | eta 9m50s"
        " | update skipped",
        "step  500/5000 | val loss 1.6543 | ppl 5.23 | 2.39 bits/byte | best",
        "step  500/5000 | val loss 1.6543 | ppl 5.23 | 2.39 bits/byte",
        "hello",
    ]
    assert output.err == "", "there is no bar without a terminal"


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (100, "step  100/5000 | loss 2.3456 | lr 3.00e-04 | norm 0.81 | 12.3k tok/s | mfu 41.2% | eta 10m03s"),
        (80, "step  100/5000 | loss 2.3456 | norm 0.81 | 12.3k tok/s | mfu 41.2% | eta 10m03s"),
        (70, "step  100/5000 | loss 2.3456 | norm 0.81 | 12.3k tok/s | eta 10m03s"),
    ],
)
def test_a_line_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, line: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    Console(5000, 0, True).train(replace(FIGURES, step=100, mfu=0.412))
    assert capsys.readouterr().out == f"{line}\n"


def test_the_beginning_of_a_sample_is_shown_and_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Console(5000, 0, True).sample(250, "for the king\n\n\tcaf\u00e9\x1b[2J\r\udcff" + "x" * 200 + "\n" * 20 + "the end")
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["step  250/5000 | sample, whole in samples.jsonl:", "    for the king", "    "]
    assert shown[3].startswith(
        "        caf\u00e9\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}x"
    )
    assert len(shown[3]) == 80
    assert len(shown) == 9


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Console(10, 0, False)) as console:
        console.advance()
        console.train(FIGURES)
        console.message("hello")
    assert capsys.readouterr() == ("", "")


def test_a_nan_loss_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    figures = replace(FIGURES, loss=float("nan"), seconds=float("inf"), tokens_per_second=0.0)
    Console(10, 0, True).train(figures)
    assert capsys.readouterr().out == "step  1/10 | loss nan | lr 3.00e-04 | norm 0.81 | inf s | 0.00 tok/s | eta ?\n"


def output_on_a_terminal(program: str) -> str:
    """Return all output of a program on a terminal with 120 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    subprocess.run([sys.executable, "-c", program], stdout=theirs, stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    screen = os.read(ours, 100_000).decode()
    os.close(ours)
    return screen


def test_a_terminal_gets_a_bar_below_the_lines() -> None:
    program = """
from contextlib import closing
from distgpt.telemetry.console import Console
from distgpt.telemetry.metrics import StepFigures
from distgpt.units import duration
with closing(Console(20, 5, True)) as console:
    for step in range(6, 8):
        console.advance()
        console.train(StepFigures(step, 2.5, 3e-4, 0.8, None, None, False, 100, 999.4e3, None, 1.0, 2**30, 0.0, 0.0))
"""
    screen = output_on_a_terminal(program)
    written = [part for part in re.split(r"[\r\n]+", screen) if part.strip()]
    assert sum(part.startswith("step ") for part in written) == 2
    assert any(re.search(r"35% \|.*\| 7/20, loss 2\.5000 \| 999k tok/s \| eta 13s", part) for part in written)
    assert screen.rstrip(" ").endswith("\r"), "the bar is removed at the end"


def test_the_bar_moves_by_micro_batch() -> None:
    program = """
import time
from contextlib import closing
from distgpt.telemetry.console import Console
with closing(Console(2, 0, True)) as console:
    for done in (1, 2, 3):
        console.micro_batch(done, 4)
        time.sleep(0.2)  # a bar is redrawn at most every 0.1 s
    console.advance()
    time.sleep(0.2)
    console.advance()
"""
    screen = output_on_a_terminal(program)
    for part in ("0% |", "| 0/2", "25% |", "| 0/2, micro-batch 2/4", "38% |", "| 0/2, micro-batch 3/4"):
        assert part in screen


def test_a_long_step_prints_its_finished_micro_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Console(20, 4, True)
    quiet.micro_batch(1, 8)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(console, "QUIET_SECONDS", 0)
    quiet.micro_batch(2, 8)
    assert capsys.readouterr().out == "step  5/20 | micro-batch 2/8\n"
    Console(20, 4, False).micro_batch(2, 8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (273_600, "3d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
