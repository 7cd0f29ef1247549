"""A pytest plugin: the order of the tests, and with --workers=N, N forks of this process that run them.

They are forked when all tests are collected, so that torch is imported and the tests are collected once, and not by
each worker. A worker takes tests from a queue by scope, see scope_of; it takes the next scope when it begins the last
test of the one before.
"""

import atexit
import gc
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import pytest

from tests.forking import client

# The longest tests come first, so that no worker still runs one when the others are idle.
LONGEST = (
    *("slurm", "hosts/test_multinode.py::test_a_host_joins", "storms/test_stops.py", "hosts/test_multinode.py"),
    *("end_to_end/test_resume.py", "end_to_end/test_train.py", "storms/test_save_kills.py", "storms/test_kills.py"),
    *(
        "storms/test_signals.py",
        "end_to_end",
        "test_docs.py",
        "test_scaling.py",
        "hosts",
        "test_prepare_tasks.py",
        "test_doctor.py",
    ),
    *("health/test_watchdog.py", "launch", "storms"),
)
# Files whose tests need not run in one worker.
SPLIT_BY_TEST = (
    "hosts/test_multinode.py",
    "storms/test_stops.py",
    "end_to_end/test_resume.py",
    "end_to_end/test_train.py",
)


def scope_of(item: pytest.Item) -> str:
    """Return what must run in one worker together: all of tests/slurm, a file, or one test of SPLIT_BY_TEST.

    The tests of a file share trained runs, those of slurm/ a cluster.
    """
    inside = item.nodeid.removeprefix("tests/")
    if inside.startswith("slurm/"):
        return "slurm"
    return inside if inside.startswith(SPLIT_BY_TEST) else inside.split("::")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, help="run the tests in so many forks of this process")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("workers"):
        client.server()  # for all workers; it imports torch while this process collects the tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def position(item: pytest.Item) -> int:
        scope = scope_of(item)
        return next((index for index, name in enumerate(LONGEST) if scope.startswith(name)), len(LONGEST))

    items.sort(key=position)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    count = session.config.getoption("workers")
    if not count or session.testsfailed or session.config.option.collectonly:
        return None  # pytest's own loop does the rest
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # noqa: SLF001 (one for all workers)
    scopes = [list(items) for _, items in itertools.groupby(session.items, key=scope_of)]
    queue, fill = os.pipe()
    os.write(fill, b"".join(number.to_bytes(2) for number in range(len(scopes))))
    os.close(fill)
    gc.freeze()  # otherwise a collection in a worker visits all objects of torch, and copies their pages
    workers = {}
    for _ in range(count):
        reports, theirs = Pipe(duplex=False)
        workers[reports] = _fork(session, _taken(scopes, queue), theirs)
    os.close(queue)
    _pass_on_reports(session, workers)
    return True


def _taken(scopes: list[list[pytest.Item]], queue: int) -> Iterator[pytest.Item]:
    """Yield the tests of each scope whose number this worker gets from the queue."""
    while number := os.read(queue, 2):
        yield from scopes[int.from_bytes(number)]


def _fork(session: pytest.Session, items: Iterator[pytest.Item], reports: Connection) -> int:
    """Fork a worker that runs `items`; return its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        reports.close()
        return pid
    code = 1
    try:
        _restart_capture(session.config)
        session.config.pluginmanager.register(_Reporter(session.config, reports))
        try:
            for item, following in itertools.pairwise(itertools.chain(items, [None])):
                assert item is not None
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            session.config.hook.pytest_sessionfinish(session=session, exitstatus=pytest.ExitCode.OK)
        code = 0
    except BaseException as error:
        if not isinstance(error, BrokenPipeError | KeyboardInterrupt):  # the parent has ended the run
            traceback.print_exc()
    finally:
        with suppress(OSError):
            reports.send(None)  # a process that a test left behind may keep the pipe open
        atexit._run_exitfuncs()  # noqa: SLF001
        os._exit(code)


def _restart_capture(config: pytest.Config) -> None:
    """Capture into files of this worker, and drop what pytest itself prints: the parent prints that."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    capture.start_global_capturing()
    capture.suspend_global_capture()


class _Reporter:
    """Sends the parent each call of a hook that it has to make as well, as (name, arguments)."""

    def __init__(self, config: pytest.Config, reports: Connection) -> None:
        self._config, self._reports = config, reports

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._reports.send(("pytest_runtest_logstart", {"nodeid": nodeid, "location": location}))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._reports.send(("pytest_runtest_logfinish", {"nodeid": nodeid, "location": location}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._reports.send(("pytest_runtest_logreport", {"report": data}))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str, nodeid: str) -> None:
        if when == "runtest":  # those of the collection are known
            found = warning_message
            copy = warnings.WarningMessage(str(found.message), found.category, found.filename, found.lineno)
            arguments = {"warning_message": copy, "when": when, "nodeid": nodeid, "location": None}
            self._reports.send(("pytest_warning_recorded", arguments))


def _pass_on_reports(session: pytest.Session, workers: dict[Connection, int]) -> None:
    """Call the hooks that the workers send until all have ended. A worker that dies fails its test."""
    hooks, running = session.config.hook, dict[Connection, dict[str, Any]]()
    terminal: Any = session.config.pluginmanager.getplugin("terminalreporter")
    terminal.showfspath = False  # tests of several files end in turn
    try:
        while workers:
            for reports in wait(list(workers)):
                assert isinstance(reports, Connection)
                try:
                    message = reports.recv()
                except EOFError:
                    message = None
                if message is None:
                    _, status = os.waitpid(workers.pop(reports), 0)
                    if status:
                        _fail(session, running.get(reports, {"nodeid": "no test", "location": ("", None, "")}), status)
                    continue
                name, arguments = message
                if name == "pytest_runtest_logstart":
                    running[reports] = arguments
                if name == "pytest_runtest_logreport":
                    data = arguments["report"]
                    arguments["report"] = hooks.pytest_report_from_serializable(config=session.config, data=data)
                if name == "pytest_warning_recorded":
                    hooks.pytest_warning_recorded.call_historic(kwargs=arguments)
                else:
                    getattr(hooks, name)(**arguments)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
    finally:
        for reports, pid in workers.items():
            reports.close()  # the worker ends with its next report
            os.waitpid(pid, 0)


def _fail(session: pytest.Session, test: dict[str, Any], status: int) -> None:
    """Report that a worker died in `test`, and ran no further ones of its scope."""
    cause = f"the worker died with {os.waitstatus_to_exitcode(status)}; it ran no further tests of this scope"
    report = pytest.TestReport(test["nodeid"], test["location"], {}, "failed", cause, "call")
    session.config.hook.pytest_runtest_logreport(report=report)
