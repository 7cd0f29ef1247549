"""What a stranger on the network gets to see of a job, and what could run his code in it."""

import signal
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from tests import jobs

# Whoever reads a pickle ends, but for torchrun's agent.
NO_PICKLES = """
import pickle, sys
if "torch.distributed.run" not in sys.orig_argv:
    class Reader(pickle.Unpickler):
        def __init__(self, *arguments, **options):
            raise AssertionError("PICKLE READ")
    def loads(*arguments, **options):
        raise AssertionError("PICKLE READ")
    pickle.Unpickler, pickle.loads, pickle._loads = Reader, loads, loads
"""


def test_ranks_read_no_pickle(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_PICKLES)
    run_dir = tmp_path / "run"
    flags = (*jobs.TINY, f"--data.path={prepared}", f"--run.dir={run_dir}", "--parallel.strategy=fsdp")
    for steps in (4, 8):
        command = jobs.torchrun_command(
            2, *flags, f"--train.steps={steps}", "--checkpoint.every=2", "--checkpoint.keep=1"
        )
        ended = jobs.run(command, PYTHONPATH=str(tmp_path))
        assert ended.code == 0, ended
        assert "CHECKPOINT NOT SAVED" not in ended.stdout + ended.stderr
    assert jobs.checkpoints(run_dir)[-1] == "step-00000008"
    ended = jobs.door("evaluate", run_dir, PYTHONPATH=str(tmp_path))
    assert ended.code == 0, ended


def test_a_job_on_one_host_listens_on_loopback_alone(prepared: Path, tmp_path: Path) -> None:
    flags = (*jobs.TINY, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}", "--train.steps=2000")
    job = jobs.Job(["bash", str(jobs.PROJECT / "launch" / "local.sh"), *flags, "--log.every=1"], NPROC_PER_NODE="2")
    job.read_until(" 3/2000")
    found = {process: listening(process) for process in family(job.pid)}
    job.signal(signal.SIGTERM)
    ended = job.finish()
    addresses = [address for of_one in found.values() for address in of_one]
    assert addresses, ended
    assert all(address.is_loopback for address in addresses), found


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    known = [pid]
    for one in known:
        known += [child for child, parent in parents.items() if parent == one]
    return known


def listening(pid: int) -> list[IPv4Address | IPv6Address]:
    """The addresses on which a process takes connections or datagrams; none of one that has ended meanwhile."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            mine.add(str(link.readlink()))
        except OSError:
            continue
    found = []
    for protocol, states in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        try:
            lines = Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == states and f"socket:[{fields[9]}]" in mine:
                raw = fields[1].partition(":")[0]
                words = [int(raw[i : i + 8], 16) for i in range(0, len(raw), 8)]
                found.append(ip_address(struct.pack(f"={len(words)}I", *words)))
    return found
