"""Check that this machine, its data and its run directory are fit to train: `python -m distgpt.doctor [PRESET] ...`.

With --distributed under torchrun, check that the hosts fit together, and name a slow link or host:
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=preflight \
        -m distgpt.doctor --distributed [PRESET] [--section.key=value ...]
The exit code is that of the first failure.
"""

from distgpt import cli

if __name__ == "__main__":
    cli.run("doctor")

import os
import signal
import socket
import sys
import threading
import traceback

from distgpt.config import Config
from distgpt.distributed.runtime import this_rank
from distgpt.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK
from distgpt.preflight.finding import Finding, exit_code
from distgpt.preflight.hosts import MAX_PREFLIGHT_SECONDS, check_hosts
from distgpt.preflight.machine import all_local_devices, check_machine
from distgpt.run.exit_report import write_exit_report
from distgpt.run.outcome import outcome
from distgpt.torchrun import die_with_agent, record_cause


def main(config: Config, distributed: bool) -> int:
    """Print a line for each check and return the exit code. `distributed`: check all hosts together."""
    if distributed:
        return check_together(config)
    findings = []
    for finding in check_machine(config, all_local_devices(this_rank(config.train.device)), thorough=True):
        say(finding)
        findings.append(finding)
    return exit_code(findings)


def check_together(config: Config) -> int:
    """Check all hosts, on each rank, and report the exit code to the launcher, since torchrun turns it into 1."""
    die_with_agent()
    limit = threading.Timer(MAX_PREFLIGHT_SECONDS, give_up)
    limit.daemon = True
    limit.start()
    code = EXIT_OK

    def conclude(failures: list[Finding]) -> None:
        nonlocal code
        code = exit_code(failures)
        report(code, next((f"{failure.check}: {failure.text}" for failure in failures), ""))

    try:
        check_hosts(config, this_rank(config.train.device), say=say, conclude=conclude)
    except Exception as error:
        code, cause = outcome(error)
        if code == EXIT_BUG:
            traceback.print_exc()
        report(code, cause)
    return code


def give_up() -> None:
    """Kill torchrun and its ranks on this host: if the host with the store hangs, calls to the store never end."""
    waited = f"{socket.gethostname()} has waited {MAX_PREFLIGHT_SECONDS:.0f} s for the other hosts"
    cause = f"{waited}: one of them hangs, perhaps {os.environ['MASTER_ADDR']}; run it again to go on"
    report(EXIT_INTERRUPTED, cause)
    print(f"distgpt: {cause}", file=sys.stderr, flush=True)
    # SIGKILL, since torchrun would call that store before it exits. Its ranks die with it.
    os.kill(os.getppid(), signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


def report(code: int, cause: str) -> None:
    """Write a failure to the file of the launcher, if this rank is the first of its host that failed."""
    if code:
        write_exit_report(None, code=code, cause=cause, rank=int(os.environ["RANK"]), step=None)
        record_cause(f"distgpt: error: {cause}")


def say(finding: Finding) -> None:
    """Print a finding on one line."""
    print(finding, flush=True)
