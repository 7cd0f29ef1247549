"""A pytest plugin: after a full run, print a table of where the time went."""

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
    """Add to each report the CPU seconds since the one before. Reports, and so these, come back from the workers."""
    report = yield
    now = cpu_seconds()
    report.__dict__[CPU_SECONDS] = now - item.session.stash.get(_SECONDS_BEFORE, 0.0)
    item.session.stash[_SECONDS_BEFORE] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the slowest tests, and the CPU and wall seconds of each directory, summed over the workers."""
    if not config.getoption("workers"):
        return  # no full run
    wall, cpu = defaultdict[str, float](float), defaultdict[str, float](float)
    tests: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            parts = report.nodeid.split("::")[0].split("/")
            directory = parts[1] if len(parts) > 2 else parts[0]
            used = report.__dict__.get(CPU_SECONDS, 0.0)  # a worker that died sends none
            wall[directory] += report.duration
            cpu[directory] += used
            tests[report.nodeid] = (tests[report.nodeid][0] + report.duration, tests[report.nodeid][1] + used)
    terminalreporter.section("where the time went")
    rows = [(directory, wall[directory], cpu[directory]) for directory in sorted(wall, key=lambda name: -cpu[name])]
    rows.append(("all", sum(wall.values()), sum(cpu.values())))
    rows += [(test, *tests[test]) for test in sorted(tests, key=lambda name: tests[name], reverse=True)[:SLOWEST]]
    terminalreporter.write_line(f"{'wall s':>8} {'CPU s':>8}")
    for name, wall_seconds, seconds in rows:
        terminalreporter.write_line(f"{wall_seconds:8.1f} {seconds:8.1f}  {name}")
