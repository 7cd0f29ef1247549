"""A pytest plugin: where the time of a full run went, as a table at its end."""

import resource
from collections import defaultdict
from collections.abc import Generator

import pytest

from tests.forking import client

SLOWEST = 10
CPU_SECONDS = "cpu_seconds"  # an attribute of each report
_SECONDS_BEFORE = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Return the CPU seconds that this worker and the processes of its tests have used so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return client.Clock.seconds + sum(usage.ru_utime + usage.ru_stime for usage in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to each report the CPU seconds since the one before, which then come back from whichever worker ran it."""
    report = yield
    now = cpu_seconds()
    report.__dict__[CPU_SECONDS] = now - item.session.stash.get(_SECONDS_BEFORE, 0.0)
    item.session.stash[_SECONDS_BEFORE] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the slowest tests, and the CPU and wall seconds of each directory, summed over the workers."""
    if not config.getoption("numprocesses"):
        return  # no full run
    wall, cpu, tests = defaultdict[str, float](float), defaultdict[str, float](float), defaultdict[str, float](float)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            parts = report.nodeid.split("::")[0].split("/")
            directory = parts[1] if len(parts) > 2 else parts[0]
            wall[directory] += report.duration
            cpu[directory] += report.__dict__[CPU_SECONDS]
            tests[report.nodeid] += report.duration
    terminalreporter.section("where the time went")
    for test, seconds in sorted(tests.items(), key=lambda item: -item[1])[:SLOWEST]:
        terminalreporter.write_line(f"{seconds:7.1f} s  {test}")
    terminalreporter.write_line(f"{'directory':12} {'CPU s':>8} {'wall s':>8}")
    for directory in sorted(wall, key=lambda name: -cpu[name]):
        terminalreporter.write_line(f"{directory:12} {cpu[directory]:8.1f} {wall[directory]:8.1f}")
    terminalreporter.write_line(f"{'all':12} {sum(cpu.values()):8.1f} {sum(wall.values()):8.1f}")
