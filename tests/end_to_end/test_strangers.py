"""The ports and messages of a job that others on the network could reach or forge."""

import signal
import sys
from pathlib import Path

from tests import jobs
from tests.forking.relay import RELAY
from tests.strangers import listening

# A command in which every reading of a pickle fails, also through a name that a module imported or a class made of it.
NO_PICKLES = """
import pickle, runpy, sys
from multiprocessing.reduction import ForkingPickler

def refuse(*arguments, **options):
    raise AssertionError("PICKLE READ")

class Reader(pickle._Unpickler):
    __init__ = refuse

replaced = {pickle.Unpickler: Reader, pickle._Unpickler: Reader, pickle.loads: refuse, pickle.load: refuse}
replaced |= {pickle._loads: refuse, pickle._load: refuse}
made_of_it = [pickle.Unpickler, pickle._Unpickler]
for one in made_of_it:
    made_of_it += one.__subclasses__()
for one in made_of_it[1:]:
    one.__init__ = refuse
for module in list(sys.modules.values()):
    for name, value in list(vars(module).items()):
        if type(value) in (type(pickle.loads), type(refuse), type) and value in replaced:
            setattr(module, name, replaced[value])
ForkingPickler.loads = refuse
runpy.run_module("distgpt.COMMAND", run_name="__main__", alter_sys=True)
"""


def test_ranks_read_no_pickle(prepared: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    scripts = {name: tmp_path / f"{name}.py" for name in ("train", "evaluate")}
    for name, script in scripts.items():
        script.write_text(NO_PICKLES.replace("COMMAND", name))
    flags = (*jobs.TINY, f"--data.path={prepared}", f"--run.dir={run_dir}", "--parallel.strategy=fsdp")
    for steps in (4, 8):
        every = (f"--train.steps={steps}", "--checkpoint.every=2", "--checkpoint.keep=1")
        ended = jobs.run(jobs.torchrun_command(2, *flags, *every, script=scripts["train"]))
        assert ended.code == 0, ended
    assert "going on from step 4" in ended.stdout
    assert "CHECKPOINT NOT SAVED" not in ended.stdout + ended.stderr
    assert jobs.checkpoints(run_dir)[-1] == "step-00000008"
    ended = jobs.run([sys.executable, str(scripts["evaluate"]), str(run_dir)])
    assert ended.code == 0, ended


def test_a_job_on_one_host_listens_on_loopback_alone(prepared: Path, tmp_path: Path) -> None:
    flags = (*jobs.TINY, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}", "--train.steps=2000")
    script = str(jobs.PROJECT / "launch" / "local.sh")
    job = jobs.Job(["bash", script, *flags, "--log.every=1"], NPROC_PER_NODE="2", **jobs.FORKED_LAUNCHER)
    job.read_until(" 3/2000")
    processes = [pid for pid, its in jobs.environments().items() if its.get(RELAY) == str(job.pid)]
    found = {process: listening(process) for process in processes}
    job.signal(signal.SIGTERM)
    ended = job.finish()
    assert len(found) >= 4, found  # the launcher, torchrun and two ranks
    addresses = [address for of_one in found.values() for address in of_one]
    assert addresses, ended
    assert all(address.is_loopback for address in addresses), found
