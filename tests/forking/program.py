"""Make a forked process behave as if it had been started by `python -m MODULE`, `python -c CODE` or `python FILE`."""

import atexit
import ctypes
import importlib
import io
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PRODUCT = "distgpt"
LAUNCHER = f"{PRODUCT}.launch"
COMMANDS = ("train", "evaluate", "sample", "replay", "verify", "doctor", "prepare", "export")
# Modules that the commands import late; torch imports its compiler when the first model is made.
COMPILER = "torch._dynamo"
IMPORTED_LATE = (
    *("torch.distributed.run", COMPILER),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "tokenizers", "tiktoken"),
)


def import_packages(late: Sequence[str] = IMPORTED_LATE) -> None:
    """Import the commands, and all that they import."""
    for name in (*(f"{PRODUCT}.{command}" for command in COMMANDS), *late):
        importlib.import_module(name)


def _forget_product() -> None:
    """Drop distgpt's own modules, so that they are imported anew: a script may change one before another imports it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PRODUCT]:
        del sys.modules[name]


def is_python(command: Sequence[str]) -> bool:
    """Return True if `command` is this Python with -m MODULE, -c CODE or a file, possibly after -u."""
    first = command[1] if len(command) > 1 else "-"
    return command[0] == sys.executable and (first in ("-m", "-c", "-u") or not first.startswith("-"))


def run(command: Sequence[str], *, env: Mapping[str, str], cwd: str | None) -> NoReturn:
    """Run `command` in this process and end it. The standard streams are file descriptors 0, 1 and 2."""
    code = 1
    try:
        unbuffered, arguments = command[1] == "-u", list(command[2 if command[1] == "-u" else 1 :])
        _reset_process(env, cwd, unbuffered=unbuffered or "PYTHONUNBUFFERED" in env)
        _customize(env)
        code = _run(arguments)
    finally:
        os._exit(code)


def _reset_process(env: Mapping[str, str], cwd: str | None, *, unbuffered: bool) -> None:
    """Give this process the environment, directory, signals, files and streams of one that was just started."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 2**17 else 2**17)
    os.environ.clear()
    os.environ.update(env)
    _show_environment(env)
    if cwd:
        os.chdir(cwd)
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (for the life of the process)
    sys.stdout = _stream(1, "strict", unbuffered=unbuffered)
    sys.stderr = _stream(2, "backslashreplace", unbuffered=unbuffered)


def _customize(env: Mapping[str, str]) -> None:
    """Run the first sitecustomize of PYTHONPATH, as Python does."""
    for entry in filter(None, env.get("PYTHONPATH", "").split(":")):
        if (file := Path(entry) / "sitecustomize.py").exists():
            try:
                runpy.run_path(str(file))
            except Exception:
                traceback.print_exc()  # Python goes on after this error too
            break


def _show_environment(env: Mapping[str, str]) -> None:
    """Write `env` to where /proc/PID/environ reads it, as ranks do to find each other; drop what does not fit.

    That is the memory of the server's own environment, whose size client.ENVIRONMENT_BYTES extends. Nothing else reads
    it, since os.environ was set anew.
    """
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    variables = b""
    for variable in sorted((f"{name}={value}".encode() + b"\0" for name, value in env.items()), key=len):
        if len(variables) + len(variable) < end - start:
            variables += variable
    ctypes.memmove(start, variables.ljust(end - start, b"\0"), end - start)


def _stream(number: int, errors: str, *, unbuffered: bool) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    lines = number == 2 or os.isatty(number)
    buffer = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, "utf-8", errors, line_buffering=lines, write_through=unbuffered)


def _run(arguments: list[str]) -> int:
    """Run the module, code or file and what Python does at its end; return the exit code."""
    try:
        if arguments[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = arguments[1:]
            sys.modules.pop(arguments[1], None)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            _forget_product()
            sys.path.insert(0, os.getcwd())
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            _forget_product()
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        code: object = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        if code is not None:
            print(code, file=sys.stderr)
        code = 0 if code is None else 1
    with suppress(BaseException):
        # As Python does before it ends: wait for threads, then do what was registered.
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
        atexit._run_exitfuncs()  # noqa: SLF001
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code & 255
