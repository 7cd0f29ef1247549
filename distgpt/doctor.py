"""Is this machine, its data and the run directory fit to train? `python -m distgpt.doctor [PRESET] [--key=value ...]`.

With --distributed under torchrun: do the hosts fit together, and which link or host is slow?
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=preflight \
        -m distgpt.doctor --distributed [PRESET] [--section.key=value ...]
The exit code is that of the first failure.
"""

import os
import sys

from distgpt.cli import enter, main_guard
from distgpt.config import Config, config_from_command_line
from distgpt.errors import UsageError

FLAG = "--distributed"
ABOUT = (
    "Check that this machine, the data and the run directory are fit to train, a line a check, with the fix.\n"
    f"{FLAG}, under torchrun: check as well that all hosts fit together, and name the slow link or host."
)


def parse(arguments: list[str]) -> tuple[Config, bool]:
    """The config, and whether to look at all hosts. Raises UsageError."""
    distributed = FLAG in arguments
    config = config_from_command_line([a for a in arguments if a != FLAG], prog="distgpt.doctor", about=ABOUT)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if distributed and not under_torchrun:
        raise UsageError(f"{FLAG} needs torchrun: torchrun --nproc_per_node=2 -m distgpt.doctor {FLAG}")
    if under_torchrun and not distributed:
        raise UsageError(f"under torchrun, add {FLAG}")
    return config, distributed


if __name__ == "__main__":
    # Before torch, which takes seconds to import: --help and a mistyped key answer at once.
    enter()
    CONFIG, DISTRIBUTED = main_guard(lambda: parse(sys.argv[1:]))

import signal
import socket
import threading
import traceback

from distgpt.distributed.runtime import this_rank
from distgpt.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK
from distgpt.preflight.finding import Finding, exit_code
from distgpt.preflight.hosts import LONGEST_SECONDS, check_hosts
from distgpt.preflight.machine import all_local_devices, check_machine
from distgpt.run.exit_report import write_exit_report
from distgpt.run.outcome import outcome
from distgpt.torchrun import die_with_agent, record_cause


def main(config: Config, *, distributed: bool) -> int:
    """Print what is found; the exit code."""
    if distributed:
        return together(config)
    findings = []
    for finding in check_machine(config, all_local_devices(this_rank()), thorough=True):
        say(finding)
        findings.append(finding)
    return exit_code(findings)


def together(config: Config) -> int:
    """One rank of all; whatever it ends with is told to this host's launcher, since torchrun flattens it to 1."""
    die_with_agent()
    limit = threading.Timer(LONGEST_SECONDS, give_up)
    limit.daemon = True
    limit.start()
    code = EXIT_OK

    def conclude(failures: list[Finding]) -> None:
        nonlocal code
        code = exit_code(failures)
        report(code, next((f"{failure.check}: {failure.text}" for failure in failures), ""))

    try:
        check_hosts(config, this_rank(), say=say, conclude=conclude)
    except Exception as error:
        code, cause = outcome(error)
        if code == EXIT_BUG:
            traceback.print_exc()
        report(code, cause)
    return code


def give_up() -> None:
    """End this host's part: where the host that has torchrun's store hangs, every call to it waits without a limit."""
    waited = f"{socket.gethostname()} has waited {LONGEST_SECONDS:.0f} s for the other hosts"
    cause = f"{waited}: one of them hangs, perhaps {os.environ['MASTER_ADDR']}; run it again to go on"
    report(EXIT_INTERRUPTED, cause)
    print(f"distgpt: {cause}", file=sys.stderr, flush=True)
    # torchrun as well, which would call that store before it ends. Its ranks end with it.
    os.kill(os.getppid(), signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


def report(code: int, cause: str) -> None:
    """What stands in the launcher's file afterwards, if this rank is the first of its host that failed."""
    if code:
        write_exit_report(None, code=code, cause=cause, rank=int(os.environ["RANK"]), step=None)
        record_cause(f"distgpt: error: {cause}")


def say(finding: Finding) -> None:
    """One line."""
    print(finding, flush=True)


if __name__ == "__main__":
    sys.exit(main_guard(lambda: main(CONFIG, distributed=DISTRIBUTED)))
