"""The ports and messages of a job that others on the network could reach or forge."""

import signal
from pathlib import Path

from tests import jobs
from tests.strangers import listening

# Every process that reads a pickle exits, except torchrun's agent.
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
    for steps, variables in ((4, {}), (8, {"PYTHONPATH": str(tmp_path)})):
        command = jobs.torchrun_command(
            2, *flags, f"--train.steps={steps}", "--checkpoint.every=2", "--checkpoint.keep=1"
        )
        ended = jobs.run(command, **variables)
        assert ended.code == 0, ended
    assert "going on from step 4" in ended.stdout
    assert "CHECKPOINT NOT SAVED" not in ended.stdout + ended.stderr
    assert jobs.checkpoints(run_dir)[-1] == "step-00000008"
    ended = jobs.command("evaluate", run_dir, PYTHONPATH=str(tmp_path))
    assert ended.code == 0, ended


def test_a_job_on_one_host_listens_on_loopback_alone(prepared: Path, tmp_path: Path) -> None:
    flags = (*jobs.TINY, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}", "--train.steps=2000")
    script = str(jobs.PROJECT / "launch" / "local.sh")
    job = jobs.Job(["bash", script, *flags, "--log.every=1"], **jobs.NOT_FORKED, NPROC_PER_NODE="2")
    job.read_until(" 3/2000")
    found = {process: listening(process) for process in family(job.pid)}
    job.signal(signal.SIGTERM)
    ended = job.finish()
    addresses = [address for of_one in found.values() for address in of_one]
    assert addresses, ended
    assert all(address.is_loopback for address in addresses), found


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
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
