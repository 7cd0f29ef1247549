"""Benchmark of the time until a job trains again after SIGKILL of a rank: python bench/recovery.py

Two ranks under torchrun --max-restarts are killed in a step, one after the other. The programs are distgpt.train and a
plain DistributedDataParallel loop that saves with torch.save and resumes, as in torchrun's tutorials. Both train a
model of a few thousand parameters, so a start takes the time of Python, torch and the rendezvous. The figures are
seconds, medians over the kills:

  start     from the launch to the first step
  recovery  from the kill to the next step, whatever its number
  the rest  recovery minus the start of the ranks (a start minus the import of torchrun)
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KILLS = 7
FLAGS = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16", "--train.global_batch=8"),
    *("--train.steps=1000000", "--train.micro_batch=4", "--eval.every=0", "--checkpoint.every=20", "--log.every=1"),
)
PLAIN_LOOP = """
import os, sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
file = sys.argv[1]
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.AdamW(model.parameters())
step = 0
if os.path.exists(file):
    saved = torch.load(file)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step = saved["step"]
    if dist.get_rank() == 0:
        print("going on from step", step, flush=True)
while True:
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    time.sleep(0.01)
    if dist.get_rank() == 0:
        print(f"step {step}", flush=True)
        if step % 20 == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file + ".new")
            os.replace(file + ".new", file)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "text.txt").write_text("To be, or not to be, that is the question. " * 2000)
        (directory / "plain_loop.py").write_text(PLAIN_LOOP)
        flags = (f"--input={directory / 'text.txt'}", f"--output={directory / 'data'}", "--tokenizer=char")
        subprocess.run([sys.executable, "-m", "distgpt.prepare", *flags], check=True, capture_output=True)
        paths = (f"--data.path={directory / 'data'}", f"--run.dir={directory / 'run'}")
        import_seconds = median_import()
        print(f"{'':10}{'start':>8}{'recovery':>10}{'the rest':>10}")
        programs: tuple[tuple[str, list[str], dict[str, str]], ...] = (
            ("distgpt", ["-m", "distgpt.train", *paths, *FLAGS], {}),
            # Without this gloo finds the addresses of the killed ranks in torchrun's store, and most restarts fail.
            (
                "plain loop",
                [str(directory / "plain_loop.py"), str(directory / "saved.pt")],
                {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            ),
        )
        for title, program, variables in programs:
            start, recovery = measure(program, variables)
            print(f"{title:10}{start:8.1f}{recovery:10.1f}{recovery - (start - import_seconds):10.1f}", flush=True)


def measure(program: list[str], variables: dict[str, str]) -> tuple[float, float]:
    """Return the seconds from the launch to the first step, and the median from a kill to the next step."""
    launched = time.perf_counter()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*launcher, f"--max-restarts={KILLS}", *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        text=True,
    ) as job:
        read_lines(job, "step ")
        start = time.perf_counter() - launched
        recoveries = []
        for kill in range(KILLS):
            read_lines(job, "step ", 45)
            killed = time.perf_counter()
            os.kill(rank_of(job.pid, kill % 2), signal.SIGKILL)
            read_lines(job, "going on from ")
            read_lines(job, "step ")
            recoveries.append(time.perf_counter() - killed)
        job.terminate()
        job.communicate()  # reads the rest, since a rank that cannot write to a full pipe does not end
    return start, statistics.median(recoveries)


def read_lines(job: "subprocess.Popen[str]", beginning: str, count: int = 1) -> None:
    """Read until `count` lines start with `beginning`."""
    assert job.stdout is not None
    while count:
        line = job.stdout.readline()
        assert line, "the job ended"
        count -= line.startswith(beginning)


def rank_of(agent: int, rank: int) -> int:
    """Return the process id of a rank, a child of `agent`."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise ProcessLookupError(f"process {agent} has no child with RANK={rank}")


def median_import() -> float:
    """Return the seconds that torchrun needs before it starts the ranks."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch.distributed.run"], check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
