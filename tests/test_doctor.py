"""The output and the exit code of python -m distgpt.doctor."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
from tests import jobs

# The doctor with a short limit.
HASTY = """
import os, sys
from distgpt import config
from distgpt.preflight import hosts
hosts.MAX_PREFLIGHT_SECONDS = 2.0
from distgpt import doctor
sys.exit(doctor.main(config.resolve(sys.argv[1:], os.environ), distributed=True))
"""


def checks(ended: jobs.Ended) -> dict[str, str]:
    """Return the level of each check, in the order of output."""
    return {line[6:21].strip(): line[:5].strip() for line in ended.stdout.splitlines()}


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


@pytest.fixture
def data(prepared: Path) -> str:
    return f"--data.path={prepared}"


def test_a_fit_machine(data: str, tmp_path: Path) -> None:
    done = jobs.command("doctor", *jobs.TINY, data, f"--run.dir={tmp_path / 'deep' / 'run'}")
    assert done.code == 0, done
    assert set(checks(done).values()) <= {"ok", "warn"}
    expected = ["python", "torch", "devices", "batch", "shared memory", "data", "windows", "run directory", "disk"]
    assert list(checks(done)) == [*expected, "memory"]
    assert "all checksums match" in done.stdout
    assert files(tmp_path) == []


def test_the_first_failure_gives_the_code(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", prepared, copy], check=True)
    shard = copy / "val-00000.bin"
    shard.write_bytes(b"\1\0" * (shard.stat().st_size // 2))
    (tmp_path / "run").write_text("in the way")
    done = jobs.command("doctor", *jobs.TINY, f"--data.path={copy}", f"--run.dir={tmp_path / 'run'}")
    assert done.code == 65, done
    assert {name for name, level in checks(done).items() if level == "FAIL"} == {"data", "run directory", "disk"}
    assert f"{shard} is damaged" in done.stdout


def test_a_run_directory_in_use(data: str, tmp_path: Path) -> None:
    lock = RunLock(RunPaths(tmp_path))
    before = files(tmp_path)
    done = jobs.command("doctor", *jobs.TINY, data, f"--run.dir={tmp_path}")
    assert done.code == 73, done
    assert "is in use by pid" in done.stdout
    assert files(tmp_path) == before
    lock.release()


def test_no_data(tmp_path: Path) -> None:
    done = jobs.command("doctor", *jobs.TINY, f"--data.path={tmp_path / 'none'}", f"--run.dir={tmp_path}")
    assert done.code == 65, done
    assert "FAIL  data           no prepared data in" in done.stdout
    assert "python -m distgpt.prepare" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--optim.lrr=1"], {}, "did you mean optim.lr?"),
        (["--distributed"], {}, "--distributed needs torchrun"),
        ([], {"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "under torchrun, add --distributed"),
    ],
)
def test_a_mistyped_command(arguments: list[str], variables: dict[str, str], message: str) -> None:
    done = jobs.command("doctor", *arguments, **variables)
    assert done.code == 2
    (line,) = done.error_lines
    assert message in line


def test_help_imports_no_torch() -> None:
    done = jobs.run([sys.executable, "-X", "importtime", "-m", "distgpt.doctor", "--help"])
    assert done.code == 0
    assert "--distributed" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


def test_distributed_on_one_host(data: str, tmp_path: Path) -> None:
    """Two ranks under torchrun: the links inside of the host, and the exit code in the launcher's file."""
    report = tmp_path / "exit.json"
    common = ["--distributed", *jobs.TINY, data, f"--run.dir={tmp_path / 'run'}"]

    def doctor(*extra: str) -> jobs.Ended:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return jobs.run([*torchrun, "-m", "distgpt.doctor", *common, *extra], DISTGPT_EXIT_FILE=str(report))

    done = doctor()
    assert done.code == 0, done
    assert checks(done)["all-reduce"] == "ok"
    assert "rank 0 -> " in done.stdout or "rank 1 -> " in done.stdout
    assert not report.exists()
    assert not (tmp_path / "run").exists()

    done = doctor("--train.global_batch=7", "--train.micro_batch=0")
    assert done.code == 1
    assert json.loads(report.read_text())["code"] == 2
    assert "FAIL  batch          train.global_batch 7 does not divide over 2 ranks" in done.stdout


@jobs.linux_only
def test_the_host_that_has_the_store_hangs(data: str, tmp_path: Path) -> None:
    """The ranks wait for it in a call without a limit. Their torchrun would do so too, after their end."""
    (tmp_path / "hasty.py").write_text(HASTY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def host(number: int) -> jobs.Job:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=hang"]
        torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
        torchrun += [f"--rdzv-conf=is_host={int(number == 0)}", str(tmp_path / "hasty.py")]
        return jobs.Job([*torchrun, *jobs.TINY, data], DISTGPT_EXIT_FILE=str(tmp_path / f"exit-{number}.json"))

    first, second = host(0), host(1)
    jobs.poll(lambda: jobs.ranks_of(first.pid) and jobs.ranks_of(second.pid))
    os.kill(first.pid, signal.SIGSTOP)
    assert first.finish().code == -signal.SIGKILL
    report = json.loads((tmp_path / "exit-0.json").read_text())
    assert report["code"] == 75
    assert "one of them hangs, perhaps 127.0.0.1" in report["cause"]
    # The host that gives up first ends the store, which the other may notice before its own limit.
    assert second.finish().code in (-signal.SIGKILL, 1)
