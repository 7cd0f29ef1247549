"""The preflight on two hosts, each with its own copy of the code and the data."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import jobs
from tests.hosts.conftest import MakeNetwork
from tests.hosts.launching import multinode


def test_another_copy_of_the_code_and_of_the_data_is_refused(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path
) -> None:
    hosts, code, data = make_network(2), tmp_path / "code", tmp_path / "data"
    shutil.copytree(jobs.PROJECT / "distgpt", code / "distgpt")
    (code / "distgpt" / "errors.py").open("a").write("# a change\n")
    shutil.copytree(prepared, data)
    with (data / "train-00000.bin").open("r+b") as shard:
        shard.write(bytes(64))
    arguments = [*jobs.TINY, f"--run.dir={tmp_path / 'run'}"]
    running = multinode(hosts, [*arguments, f"--data.path={prepared}"], on=["n1"])
    running |= multinode(hosts, [*arguments, f"--data.path={data}"], on=["n2"], nodes="2", PYTHONPATH=str(code))
    with ThreadPoolExecutor() as pool:
        endings = list(pool.map(lambda job: job.finish(), running.values()))
    assert [ended.code for ended in endings] == [2, 2], endings
    said = "".join(ended.stdout for ended in endings)
    for check in ("distgpt", "data"):
        [line] = [line for line in said.splitlines() if line.startswith(f"FAIL  same {check} ")]
        assert "n1 has " in line
        assert ", n2 has " in line
    assert said.count("FAIL ") == 2
    assert not (tmp_path / "run").exists()
