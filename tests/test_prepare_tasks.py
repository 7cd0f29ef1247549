"""`python -m distgpt.prepare --task I/N`: several processes, on one host or many, write the bytes of one."""

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import jobs

# With DIES_AFTER set, the process kills itself while it learns a vocabulary, once the file of this name exists.
DIES_LEARNING = """
import os, signal, time
from distgpt.corpus.preparing import vocabulary

def die(*arguments, **options):
    while not os.path.exists(os.environ["DIES_AFTER"]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if "DIES_AFTER" in os.environ:
    vocabulary.learn_bpe = die
"""

# With WAITS_FOR set, the process waits after it has read the input, until the file of this name exists.
WAITS_SCANNED = """
import os, time
from distgpt.corpus.preparing import scan

scan_input = scan.scan_input

def slow(*arguments, **options):
    found = scan_input(*arguments, **options)
    print("scanned", flush=True)
    while not os.path.exists(os.environ["WAITS_FOR"]):
        time.sleep(0.01)
    return found

if "WAITS_FOR" in os.environ:
    scan.scan_input = slow
"""


@pytest.fixture
def options(corpus: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(jobs.SMALL_UNITS)
    text = corpus.read_text()[:600_000]
    for index in range(3):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{index}.txt").write_text(text[index * 200_000 : (index + 1) * 200_000])
    return ["--input", str(tmp_path / "texts"), "--tokenizer", "bpe", "--vocab-size", "300", "--workers", "1"]


def test_tasks_write_the_bytes_of_one_process_in_parallel_and_one_after_another(
    options: list[str], tmp_path: Path
) -> None:
    program = [sys.executable, str(tmp_path / "program.py")]
    alone = jobs.run([*program, *options, "--output", str(tmp_path / "alone")])
    assert alone.code == 0, alone
    at_once = [
        subprocess.Popen(
            [*program, *options, "--output", str(tmp_path / "at-once"), "--task", f"{task}/3"],
            stdout=subprocess.PIPE,
            text=True,
            env=jobs.environment(),
        )
        for task in range(3)
    ]
    said = [process.communicate()[0] for process in at_once]
    assert [process.returncode for process in at_once] == [0, 0, 0]
    assert sum("prepared    " in output for output in said) == 1
    in_turn = [
        jobs.run([*program, *options, "--output", str(tmp_path / "in-turn"), "--task", f"{task}/2"]) for task in (1, 0)
    ]
    assert in_turn[0].stdout == f"task 1 of 2 is done; the last of the others writes {tmp_path / 'in-turn'}\n"
    assert "prepared    " in in_turn[1].stdout
    for name in ("at-once", "in-turn"):
        assert jobs.contents(tmp_path / name) == jobs.contents(tmp_path / "alone")
        assert not (tmp_path / f"{name}.partial").exists()
    late = jobs.run([*program, *options, "--output", str(tmp_path / "in-turn"), "--task", "0/2"])
    assert (late.code, "already prepared" in late.stdout) == (0, True)


def test_tasks_of_another_job_are_refused_and_use_no_parts(options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    program = [sys.executable, str(tmp_path / "program.py"), *options, "--output", str(output)]
    assert jobs.run([*program, "--task", "0/2"]).code == 0
    for held in (True, False):
        with (tmp_path / "out.partial" / "lock").open() as lock:
            if held:
                fcntl.flock(lock, fcntl.LOCK_SH)
            other = jobs.run([*program, "--task", "1/2", "--val-fraction", "0.2"])
        line = f"distgpt: error: {output}.partial is for another input or other options: finish that job or remove it"
        assert (other.code, other.error_lines) == (73, [line])
    last = jobs.run([*program, "--task", "1/2"])
    assert "prepared    " in last.stdout, last


@jobs.linux_only
def test_a_task_that_is_killed_while_it_learns_the_vocabulary_leaves_that_to_the_next(
    options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(DIES_LEARNING + jobs.SMALL_UNITS)
    command = [sys.executable, str(tmp_path / "program.py"), *options, "--output", str(tmp_path / "out")]
    first = subprocess.Popen([*command, "--task", "0/2"], env=jobs.environment(DIES_AFTER=str(tmp_path / "second")))
    jobs.poll((tmp_path / "out.partial" / "job.json").exists)
    second = subprocess.Popen([*command, "--task", "1/2"], env=jobs.environment(), stdout=subprocess.PIPE, text=True)
    jobs.poll(lambda: waits_for_a_lock(second.pid))
    (tmp_path / "second").touch()
    assert first.wait() == -signal.SIGKILL
    said, _ = second.communicate()
    assert (second.returncode, "task 1 of 2 is done" in said) == (0, True), said
    again = jobs.run([*command, "--task", "0/2"])
    assert "prepared    " in again.stdout, again


def test_a_task_whose_share_others_did_meanwhile_reports_the_output(options: list[str], tmp_path: Path) -> None:
    """Slurm may start a task again while its first attempt is still running."""
    output, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(WAITS_SCANNED + jobs.SMALL_UNITS)
    command = [sys.executable, str(program), *options, "--output", str(output)]
    waiting = subprocess.Popen(
        [*command, "--task", "0/2"],
        env=jobs.environment(WAITS_FOR=str(tmp_path / "go")),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "scanned\n"
    for task in ("1/2", "0/2"):
        assert jobs.run([*command, "--task", task]).code == 0
    assert output.exists()
    (tmp_path / "go").touch()
    said, _ = waiting.communicate()
    assert (waiting.returncode, "already prepared" in said) == (0, True), said
    assert not (tmp_path / "out.partial").exists()


@jobs.linux_only
def test_a_task_that_waits_for_a_commit_finds_the_output(options: list[str], tmp_path: Path) -> None:
    output, staged = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, str(tmp_path / "program.py"), *options]
    assert jobs.run([*command, "--output", str(tmp_path / "alone")]).code == 0
    staged.mkdir()
    lock = staged / "lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        task = subprocess.Popen(
            [*command, "--output", str(output), "--task", "0/2"],
            env=jobs.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        jobs.poll(lambda: waits_for_a_lock(task.pid))
        (tmp_path / "alone").rename(output)
        lock.unlink()
        staged.rmdir()
    said, _ = task.communicate()
    assert (task.returncode, "already prepared" in said) == (0, True), said
    assert not staged.exists()


@pytest.mark.parametrize("task", ["3/3", "1", "-1/2", "a/b"])
def test_a_task_is_a_number_below_another(task: str, tmp_path: Path) -> None:
    done = jobs.command("prepare", "--input", "x", "--output", tmp_path / "out", f"--task={task}")
    assert (done.code, done.error_lines) == (
        2,
        [
            f"distgpt: error: argument --task: {task} is not I/N with I from 0 to N - 1 (--help shows the options)",
        ],
    )


def test_tasks_cannot_overwrite_or_read_standard_input(tmp_path: Path) -> None:
    for flags in (["--overwrite", "--input", "x"], ["--input", "-"]):
        done = jobs.command("prepare", *flags, "--output", tmp_path / "out", "--task", "0/2")
        assert (done.code, done.error_lines) == (
            2,
            ["distgpt: error: --task cannot be combined with --overwrite or standard input"],
        )


def waits_for_a_lock(pid: int) -> bool:
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(line[1] == "->" and line[5] == str(pid) for line in locks)
