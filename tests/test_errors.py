"""How a door ends: its exit code and its one line on stderr."""

import os
import signal
import subprocess
import sys

import pytest

from distgpt import errors


def ended(body: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A door whose main is `body`."""
    quick = "import distgpt.errors; distgpt.errors.PATIENCE = 0"
    program = f"from distgpt.errors import *\n{quick}\ndef main():\n    {body}\nmain_guard(main)\n"
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
def test_what_a_user_can_act_on_is_one_line_and_an_exit_code(name: str, code: int) -> None:
    assert getattr(errors, name).code == code
    done = ended(f"raise {name}('do this')")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "distgpt: error: do this\n")


def test_only_rank_0_speaks() -> None:
    done = ended("raise UsageError('do this')", RANK="0")
    assert (done.returncode, done.stderr) == (2, "distgpt: error: do this\n")
    done = ended("raise UsageError('do this')", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_another_rank_leaves_rank_0_time_to_speak() -> None:
    body = "import sys; print('found', file=sys.stderr, flush=True); raise UsageError('do this')"
    program = f"from distgpt.errors import *\ndef main():\n    {body}\nmain_guard(main)\n"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "RANK": "1"}) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "found\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.terminate()
        assert process.stderr.read() == ""
        assert process.wait() == -signal.SIGTERM


def test_a_bug_keeps_its_traceback() -> None:
    done = ended("raise KeyError('x')")
    assert done.returncode == 70
    assert "Traceback" in done.stderr


def test_control_c_is_quiet() -> None:
    done = ended("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (75, "")


def test_a_full_disk_behind_stdout_is_one_clear_line() -> None:
    with open("/dev/full", "w") as full:
        program = "from distgpt.errors import main_guard\nmain_guard(lambda: print('x' * 10**6, flush=True))\n"
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (74, "distgpt: error: cannot write: No space left on device\n")


def test_a_reader_that_leaves_is_no_error_to_tell() -> None:
    read, write = os.pipe()
    os.close(read)
    program = "from distgpt.errors import main_guard\nmain_guard(lambda: print('x' * 10**6, flush=True))\n"
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (74, "")
