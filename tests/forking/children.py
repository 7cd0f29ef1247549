"""Make a launcher fork its torchrun, and torchrun its ranks, so that none of them imports torch again."""

import os
import select
import signal
import subprocess
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.forking import program, threads

TORCHRUN = "torch.distributed.run"
_Popen = subprocess.Popen


class ForkedChild:
    """A fork of this process that runs a command, with the methods of Popen that torchrun and the launchers use."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], prepare: Callable[[], None]) -> None:
        self.returncode: int | None = None
        # No handler of this process may run in the child.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = threads.fork_while_others_sleep()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            self._ended = os.pidfd_open(self.pid)
            return
        try:
            # At its end, the child must not remove the temporary directories of this process.
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # noqa: SLF001
            prepare()
            program.run(args, env=env, cwd=os.getcwd())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self._ended)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            select.select([self._ended], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("fork", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._ended, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_rank(
    args: Sequence[str], *, env: Mapping[str, str], stdout: Any, stderr: Any, start_new_session: bool
) -> Any:
    """Replace Popen in torchrun."""
    if not program.is_python(args):
        return _Popen(args, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session)

    def prepare() -> None:
        os.setsid()
        for number, stream in ((1, stdout), (2, stderr)):
            if stream is not None:
                os.dup2(stream.fileno(), number)

    return ForkedChild(args, env, prepare)


class _TorchrunPopen(_Popen):  # type: ignore[type-arg]
    """Replaces Popen in a launcher."""

    def __new__(cls, args: Sequence[str], **options: Any) -> Any:
        if TORCHRUN not in args:
            return super().__new__(cls)

        def prepare() -> None:
            os.setpgid(0, 0)
            options["preexec_fn"]()
            subprocess.Popen = _Popen  # type: ignore[misc]

        return ForkedChild(args, options["env"], prepare)


def fork_children(command: Sequence[str]) -> None:
    """Replace Popen, so that this process forks its children when it runs `command`."""
    if TORCHRUN in command or program.LAUNCHER in command:
        subprocess_handler.Popen = _start_rank  # type: ignore[assignment, misc]
    if program.LAUNCHER in command:
        subprocess.Popen = _TorchrunPopen  # type: ignore[assignment, misc]
