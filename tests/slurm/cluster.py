"""A real Slurm on this machine: a controller and several nodes, which are child processes of the test."""

import ctypes
import getpass
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from distgpt.torchrun import PR_SET_PDEATHSIG
from tests import jobs

NODES = ("n1", "n2", "n3", "n4", "n5")
RANKS_PER_NODE = 2
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
DAEMONS = ("munged", "slurmctld", "slurmd")
# Two partitions over the same nodes: a job in `urgent` takes them from one in `main`, which has a while to save.
CONFIG = """\
ClusterName=distgpt-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Without munge whoever reaches a port could run commands as this user.
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until a credential of its last attempt has expired.
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=30
JobRequeue=1
FirstJobId={first_job}
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={n} RealMemory=8000 Gres=gpu:{n}\n"


class Cluster:
    """The cluster, and the commands that a user runs on it in the directory `work`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.work = root / "work"
        self._conf = root / "slurm.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for directory in (self.work, root / "state", root / "spool"):
            directory.mkdir()
        self._configure()

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
        options = [f"--{option}={self.root}/munge.{name}" for option, name in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        assert _happens((self.root / "munge.socket").exists)
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self._conf))
        for node in NODES:
            self.power_on(node)

    def stop(self) -> None:
        """Cancel all jobs, wait until their processes are gone, and end the daemons."""
        self.command("scancel", f"--user={getpass.getuser()}")
        assert _happens(lambda: not self.command("squeue", "--noheader"))
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(timeout=60)

    def power_on(self, node: str, *, blind_to: Path | None = None) -> None:
        """Start a node and wait until it is idle. In place of `blind_to` it sees another, empty directory."""
        command = ["slurmd", "-D", "-N", node, "-f", str(self._conf)]
        if blind_to:
            hide = 'mount -t tmpfs distgpt-test "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hide, str(blind_to), *command]
        self._daemon(node, *command)
        assert _happens(lambda: re.search(r"State=IDLE\b(?![+*])", self.command("scontrol", "show", "node", node)))

    def power_off(self, node: str) -> None:
        """Kill all processes on a node at once, as a power failure does."""
        daemon = self._processes.pop(node)
        known = {"SLURMD_NODENAME": node, "SLURM_CONF": str(self._conf)}
        tasks = [pid for pid, variables in jobs.environments().items() if known.items() <= variables.items()]
        # Each slurmstepd is the parent of a task; it has none of its environment. A forked torchrun has another parent.
        keepers = {parent for pid in tasks if _name(parent := int(jobs.stat_of(pid)[1])) == "slurmstepd"}
        daemon.kill()
        daemon.wait()
        for pid in [*keepers, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self, *command: str, **variables: str) -> str:
        """Return the output of a command."""
        done = subprocess.run(
            command,
            cwd=self.work,
            env=self._environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: str | Path, **variables: str) -> str:
        """Submit a job and return its id."""
        return self.command("sbatch", "--parsable", *map(str, arguments), **variables).strip()

    def show(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        shown = self.command("scontrol", "show", "job", job)
        comment = dict(re.findall(r"^ *(Comment)=(.*?) *$", shown, re.MULTILINE))
        return dict(re.findall(r"(\w+)=(\S+)", shown)) | comment

    def wait_for(self, job: str, what: Callable[[], object]) -> None:
        """Wait until `what()` is true, and show the job if that never happens."""
        assert _happens(what), f"it did not happen: {self.show(job)}\n{self.log(job)}"

    def end_of(self, job: str) -> dict[str, str]:
        """Wait until the job has ended and is not requeued; return the fields of `scontrol show job`."""
        self.wait_for(job, lambda: self.ended(job))
        return self.show(job)

    def ended(self, job: str) -> bool:
        """Tell whether the job has ended and is not requeued."""
        return self.show(job)["JobState"] in ENDED

    def log(self, job: str) -> str:
        """Return the output of the batch script, of all attempts."""
        path = self.work / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def tasks(self, job: str) -> dict[int, dict[str, str]]:
        """Return the environment of each process of a job on its nodes, by process id."""
        known = {"SLURM_CONF": str(self._conf), "SLURM_JOB_ID": job}
        found = jobs.environments()
        return {pid: its for pid, its in found.items() if "SLURM_STEP_NODELIST" in its and known.items() <= its.items()}

    def _configure(self) -> None:
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        freezer = os.access("/sys/fs/cgroup/freezer", os.W_OK)
        config = CONFIG.format(
            host=host,
            port=ports[0],
            user=getpass.getuser(),
            root=self.root,
            proctrack="proctrack/cgroup" if freezer else "proctrack/linuxproc",
            # A step of an older cluster that is still dying could take a job of the same id with it.
            first_job=random.randrange(1000, 60_000_000),
        )
        nodes = [
            NODE.format(name=n, host=host, port=p, n=RANKS_PER_NODE) for n, p in zip(NODES, ports[1:], strict=True)
        ]
        self._conf.write_text(config + "".join(nodes))
        # Files that stand for GPUs are enough to schedule by.
        for gpu in range(RANKS_PER_NODE):
            (self.root / f"gpu{gpu}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-{RANKS_PER_NODE - 1}]\n")
        (self.root / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
        )
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _daemon(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.output").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_end_with_parent,
            )

    def _environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in jobs.environment().items() if not name.startswith(("SLURM", "SBATCH"))}
        path = f"{kept['PATH']}:/usr/sbin:/sbin"
        return {**kept, "PATH": path, "SLURM_CONF": str(self._conf), **variables}


def _happens(what: Callable[[], object]) -> bool:
    """Tell whether `what()` becomes true in time. Polls less often than jobs.poll: most probes start a process."""
    deadline = time.monotonic() + 400
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
