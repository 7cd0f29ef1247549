"""The ends of commands: the exit code and the one line on stderr."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distgpt import errors
from distgpt.errors import UsageError
from distgpt.files import user_path

OTHER_RANK = {"RANK": "1", "MASTER_ADDR": "node1"}


def ended(body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose main is `body`, and in which no rank waits for rank 0."""
    quick = "import distgpt.cli; distgpt.cli.RANK_ZERO_SECONDS = 0"
    program = (
        f"from distgpt.cli import *\nfrom distgpt.errors import *\n{quick}\ndef main():\n    {body}\nmain_guard(main)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | variables
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("UsageError", 2),
        ("DataError", 65),
        ("DirectoryError", 73),
        ("StorageError", 74),
        ("Interrupted", 75),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(name: str, code: int) -> None:
    assert getattr(errors, name).code == code
    done = ended(f"raise {name}('do this')")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "distgpt: error: do this\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_mistake_on_one_rank_alone_is_printed(rank: str) -> None:
    done = ended("raise UsageError('do this')", RANK=rank, MASTER_ADDR="node1")
    assert (done.returncode, done.stderr) == (2, "distgpt: error: do this\n")


def test_other_ranks_wait_for_rank_0_to_print() -> None:
    body = "import sys; print('found', file=sys.stderr, flush=True); raise UsageError('do this')"
    program = f"from distgpt.cli import *\nfrom distgpt.errors import *\ndef main():\n    {body}\nmain_guard(main)\n"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | OTHER_RANK) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "found\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.terminate()
        assert process.stderr.read() == ""
        assert process.wait() == -signal.SIGTERM


def test_a_stale_rank_variable_causes_no_wait() -> None:
    program = (
        "from distgpt.cli import *\nfrom distgpt.errors import *\n"
        "def main():\n    raise UsageError('do this')\nmain_guard(main)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"} | {"RANK": "3"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=20)
    assert (done.returncode, done.stderr) == (2, "distgpt: error: do this\n")


def test_the_report_of_torchrun_ends_with_the_cause(tmp_path: Path) -> None:
    """torchrun prints the error file of the rank that failed first at the end of its report."""
    done = ended("raise UsageError('do this')", TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert (done.returncode, done.stderr) == (2, "distgpt: error: do this\n")
    failure = ProcessFailure(local_rank=0, pid=os.getpid(), exitcode=2, error_file=str(tmp_path / "error.json"))
    report = str(ChildFailedError("distgpt.train", {0: failure})).splitlines()
    assert report[-2] == "  traceback : distgpt: error: do this"


@pytest.mark.parametrize("error", ["KeyError", "type('PanicException', (BaseException,), {})"])
def test_a_bug_keeps_its_traceback(error: str) -> None:
    """A panic of a library in Rust is a BaseException."""
    done = ended(f"raise {error}('x')")
    assert done.returncode == 70
    assert "Traceback" in done.stderr


def test_ctrl_c_prints_nothing() -> None:
    done = ended("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (75, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_command_that_has_not_imported_torch(name: str) -> None:
    done = ended(f"import signal; prepare_process(); signal.raise_signal(signal.{name})")
    assert (done.returncode, done.stderr) == (75, "")


def test_an_ignored_signal_stays_ignored() -> None:
    hang_up = "signal.SIGHUP"  # as nohup does
    done = ended(
        f"import signal; signal.signal({hang_up}, signal.SIG_IGN); prepare_process(); signal.raise_signal({hang_up})"
    )
    assert done.returncode == 0


def test_a_character_that_stdout_cannot_encode_is_no_error() -> None:
    done = ended("prepare_process(); print('run_ü')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "run_?\n")


def test_a_full_disk_behind_stdout_is_one_clear_line() -> None:
    with open("/dev/full", "w") as full:
        program = "from distgpt.cli import main_guard\nmain_guard(lambda: print('x' * 10**6, flush=True))\n"
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (74, "distgpt: error: cannot write: No space left on device\n")


def test_a_closed_pipe_prints_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    program = "from distgpt.cli import main_guard\nmain_guard(lambda: print('x' * 10**6, flush=True))\n"
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (74, "")


@pytest.mark.parametrize(("path", "message"), [("a" * 300, "300 characters, more than"), ("a\0b", "a NUL character")])
def test_an_impossible_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        user_path(path)
