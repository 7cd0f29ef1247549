"""NUMA_BINDING: what torchrun is told, and what is refused. A fake numactl says whether it works."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from torch.distributed.run import get_args_parser

from distgpt.errors import UsageError
from distgpt.launch import local, multinode, slurm
from distgpt.launch.settings import NUMA_BINDINGS, numa_options
from tests.launch.launching import launch

WORKS = "exit 0"
REFUSED = "echo 'libnuma: not permitted' >&2; echo usage >&2; exit 1"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("NUMA_BINDING", "node")
    install_numactl(tmp_path, WORKS, monkeypatch)


def install_numactl(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numactl = directory / "numactl"
    numactl.write_text(f"#!/bin/sh\n{script}\n")
    numactl.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


@pytest.mark.parametrize("binding", NUMA_BINDINGS)
@pytest.mark.usefixtures("two_gpus")
def test_torchrun_gets_a_binding_that_it_knows(binding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMA_BINDING", binding)
    options = numa_options(2)
    assert get_args_parser().parse_args([*options, "script.py"]).numa_binding == binding


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_is_bound_by_default(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMA_BINDING", raising=False)
    if value is not None:
        monkeypatch.setenv("NUMA_BINDING", value)
    assert numa_options(2) == []


@pytest.mark.usefixtures("two_gpus")
def test_an_unknown_binding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMA_BINDING", "yes")
    with pytest.raises(UsageError, match=r"NUMA_BINDING=yes: it must be node, socket, exclusive or core-complex"):
        numa_options(1)


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match=r"needs a GPU for each rank \(ranks: 3, GPUs: 2\): unset it"):
        numa_options(3)


@pytest.mark.usefixtures("two_gpus")
def test_a_numactl_that_is_missing_or_refused_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_numactl(tmp_path, REFUSED, monkeypatch)
    with pytest.raises(
        UsageError, match=r"not work here \(exit code 1: libnuma: not permitted\): install it, let the container"
    ):
        numa_options(2)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"NUMA_BINDING=node needs the program numactl, .*No such file"):
        numa_options(2)


def test_without_gpus_it_is_one_line_before_torchrun_starts(prepared: Path, tmp_path: Path) -> None:
    flags = (f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}")
    done = launch(tmp_path, "local.sh", "quickstart", *flags, NUMA_BINDING="node", CUDA_VISIBLE_DEVICES="")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == (
        "distgpt: error: NUMA_BINDING=node needs a GPU for each rank (ranks: 1, GPUs: 0): unset it\n"
    )


@pytest.mark.usefixtures("two_gpus")
def test_each_launcher_passes_it_on(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    class Recorder:
        """In place of a Supervisor: each torchrun succeeds."""

        signalled, ended_unsaved = None, False

        def __init__(self, timeout: float) -> None:
            pass

        def run(self, command: Sequence[str], env: object, while_joining: object = None) -> int:
            commands.append(list(command))
            return 0

    def execute(program: str, command: list[str], env: object) -> NoReturn:
        commands.append(command)
        raise SystemExit

    for launcher in (local, multinode):
        monkeypatch.setattr(launcher, "Supervisor", Recorder)
    monkeypatch.setattr(multinode, "require_free_ports", lambda settings, address: None)
    monkeypatch.setattr(os, "execve", execute)
    variables = {"HEAD": "127.0.0.1:29500", "NODES": "1", "SLURM_NNODES": "1", "RENDEZVOUS_ID": "1"}
    variables |= {"RENDEZVOUS_ENDPOINT": "/store", "DISTGPT_EXIT_FILE": str(tmp_path / "exit.json")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = [f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}"]
    assert local.main(arguments) == 0
    assert multinode.main(arguments) == 0
    with pytest.raises(SystemExit):
        slurm.run_on_this_node("distgpt.train", arguments)
    assert len(commands) == 4  # of several hosts, the preflight and the training
    assert all({"--nproc_per_node=2", "--numa-binding=node"} <= set(command) for command in commands)
