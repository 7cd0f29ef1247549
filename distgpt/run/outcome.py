"""The exit code and the message for the exception that ended a run. Imports no torch."""

import os
import re

from distgpt.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_IO, EXIT_USAGE, DistgptError
from distgpt.run.exit_report import EXIT_FILE_VARIABLE
from distgpt.torchrun import print_cause

# Parts of CUDA's messages about a broken or lost GPU. A restart may help, and launchers give up if it does not.
LOST_DEVICE_SIGNS = ("ECC", "unspecified launch failure", "unknown error", "busy or unavailable", "hardware", "NVLink")


def say_end(code: int, cause: str) -> None:
    """Print why a run ended, as the last line of this process."""
    if code == EXIT_INTERRUPTED and EXIT_FILE_VARIABLE in os.environ:
        # The launcher says itself whether it restarts. When a host joins, torchrun restarts the ranks silently.
        cause = without_advice(cause)
    print_cause(f"distgpt: {cause}" if code == EXIT_INTERRUPTED else f"distgpt: error: {cause}")


def without_advice(cause: str) -> str:
    """Return a cause without the advice to run it again: a launcher does that by itself."""
    return re.sub("[,:] run it again to go on$", "", cause)


def outcome(error: BaseException, *, training: bool = True) -> tuple[int, str]:
    """Return the exit code and the message for `error`. `training`: the run had started to train."""
    if isinstance(error, DistgptError):
        return error.code, str(error)
    text = str(error)
    first_line = next(iter(text.splitlines()), type(error).__name__)
    if _is_lost_peer(error, training):
        # Without the source location at the start and the advice at the end of gloo's message.
        what = re.sub(r"^\[[^]]*\] ", "", first_line).split(". ")[0]
        return EXIT_INTERRUPTED, f"lost contact with the other ranks ({what}): run it again to go on"
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if out_of_memory or "DefaultCPUAllocator" in text or "CUDA error: out of memory" in text:
        return EXIT_USAGE, f"out of memory ({first_line}): lower train.micro_batch or shard with parallel.strategy=fsdp"
    if first_line.startswith("CUDA error") and any(sign in first_line for sign in LOST_DEVICE_SIGNS):
        return EXIT_INTERRUPTED, f"{first_line}: run it again to go on"
    if "InvalidCxxCompiler" in text:
        return EXIT_USAGE, "torch.compile found no C++ compiler that works: install g++, or set train.compile=false"
    if "Failed to find C compiler" in text:
        return EXIT_USAGE, "torch.compile found no C compiler for Triton: install gcc, or set train.compile=false"
    if isinstance(error, OSError):
        return EXIT_IO, f"{error.strerror or first_line}{f': {error.filename}' if error.filename else ''}"
    return EXIT_BUG, f"{type(error).__name__}: {first_line}"


def _is_lost_peer(error: BaseException, training: bool) -> bool:
    """Tell whether a collective failed because another rank is gone. gloo raises a plain RuntimeError then.

    In training, every error of gloo means that. Before, it may also mean a wrong interface or hostname.
    """
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    signs: tuple[str, ...] = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
    )
    if training:
        signs = (*signs, "gloo")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
