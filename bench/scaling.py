"""Benchmark of scaling: bytes sent and step times for several numbers of ranks.

    python bench/scaling.py [bytes] [hosts] [exact] [timings] [--rounds N]

Bytes on the wire
    S: bytes of all parameters in float32; S_b of them are in the blocks, S_r in the root (embeddings, last norm, head).
    n: ranks. A: micro-batches that a rank accumulates in a step. All counts are sums over all ranks.

    A ring all-gather of X bytes sends each of n ranks the n - 1 parts that it does not have, X / n each: (n - 1) X in
    total. A ring all-reduce is a reduce-scatter and an all-gather, (n - 1) X each: 2 (n - 1) X. NCCL's reduce-scatter
    sends (n - 1) X: R = 1. gloo's is a whole all-reduce, so it sends twice as much: R = 2.

    ddp    one all-reduce of the gradients per step:                          2 (n - 1) S
    fsdp   each micro-batch gathers the blocks twice, forward and backward, and the root once, since it stays gathered
           between the two; one reduce-scatter per step:                      (n - 1) (A (2 S_b + S_r) + R S)
    hsdp   n / s groups of s ranks with fsdp in each; then each of the s parts of the gradients is all-reduced over the
           n / s groups:                               (n / s) (s - 1) (A (2 S_b + S_r) + R S) + 2 (n / s - 1) S

    Over the link between two hosts of n / 2 ranks each. A ring in rank order crosses it twice, once in each direction;
    each crossing carries what one rank sends, (n - 1) / n of X:
    fsdp   2 (n - 1) / n (A (2 S_b + S_r) + R S)
    hsdp   with one host per group: only the all-reduce between two groups, 2 S, for any number of ranks per host
    diloco the same, but of weights, and only after every H-th step: 2 S / H

    With parallel.reduction=exact gradients are integers of 8 bytes, twice S. FSDP's reduce-scatter is an all-to-all,
    which sends (n - 1) X with any backend.

    The kernel's counters also include headers, acknowledgements and three scalar reductions per step.

Scaling
    weak     every rank has the same work; ideal: the time of a step does not change
    strong   all ranks share the same work; ideal: n ranks take 1 / n of the time
    Each rank has one core. In each round all numbers of ranks take turns. The figure is the median over the rounds of
    the ratio to one rank in the same round.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distgpt.config import resolve
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.memory import EXACT_SUM_BYTES
from distgpt.distributed.parallelize import build_model, unwrap_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import Runtime, this_rank
from distgpt.machine import available_cpus
from distgpt.model.optim import build_optimizer
from distgpt.planning.traffic import Traffic, gathered_bytes, replica_traffic, shard_traffic
from distgpt.training.step import accumulate_gradients, apply_update

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from tests.hosts.network import INTERFACE, Network, network, reason_to_skip  # noqa: E402

VOCABULARY, BLOCK_SIZE = 512, 64
SHAPE = ("--model.n_layer=4", "--model.n_head=4", "--model.n_embd=128", f"--model.block_size={BLOCK_SIZE}")
WARM_UP_STEPS = 2
BETWEEN_HOSTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"shard": 2},
    "diloco": {"shard": 2, "outer_every": 5},
}
PARTS = ("bytes", "hosts", "exact", "timings")
# bytes of gloo's reduce-scatter, as a multiple of (n - 1) X
R = 2


@dataclass(frozen=True)
class Job:
    """A number of training steps on random tokens.

    `shard`: ranks per group of hsdp or diloco. `outer_every`: H; `steps` is a multiple of it. `interface`: the network
    interface whose bytes are counted.
    """

    strategy: str
    ranks: int
    global_batch: int
    micro_batch: int
    steps: int
    shard: int = 0
    outer_every: int = 1
    interface: str = "lo"
    reduction: str = "default"

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches that a rank accumulates in a step."""
        return self.global_batch // (self.ranks * self.micro_batch)


@dataclass(frozen=True)
class Measured:
    """The result of a job: median seconds per step, bytes per step, and the bytes of the blocks and of the root."""

    seconds: float
    wire_bytes: float
    blocks: int
    root: int


def expected_bytes(job: Job, blocks: int, root: int) -> float:
    """Return the bytes that a step sends, over all ranks."""
    return job.ranks * sum(traffic.rank for traffic in expected_traffic(job, blocks, root, per_node=job.ranks))


def expected_between_two_hosts(job: Job, blocks: int, root: int) -> float:
    """Return the bytes per step over the link between two hosts, both ways. For hsdp and diloco a host is a group."""
    return 2 * sum(traffic.between for traffic in expected_traffic(job, blocks, root, per_node=job.ranks // 2))


def expected_traffic(job: Job, blocks: int, root: int, *, per_node: int) -> tuple[Traffic, Traffic]:
    """Return the traffic of a step in float32 that shards, gathers in each micro-batch and reduces once."""
    exact = job.reduction == "exact"
    total = (blocks + root) * EXACT_SUM_BYTES / 4 if exact else blocks + root
    shards = {"ddp": 1, "fsdp": job.ranks}.get(job.strategy, job.shard)
    gathered = gathered_bytes(blocks, root, micro_batches=job.micro_batches, reshard=True)
    return (
        shard_traffic(gathered + (1 if exact else R) * total, shards=shards, per_node=per_node),
        replica_traffic(total / job.outer_every, ranks=job.ranks, shards=shards, per_node=per_node),
    )


def run(job: Job) -> Measured:
    """Run the job on this machine, one core per rank; as root with a loopback device that nothing else uses."""
    with tempfile.TemporaryDirectory() as directory:
        command = [*torchrun("--standalone", f"--nproc_per_node={job.ranks}"), *worker(job, Path(directory))]
        if job.interface == "lo" and reason_to_skip() is None:
            command = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if shutil.which("taskset") and len(cores) >= job.ranks:
            command = ["taskset", "-c", ",".join(map(str, cores[: job.ranks])), *command]
        done = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        return read_result(Path(directory))


def run_on(hosts: Network, job: Job) -> Measured:
    """Run the job on two hosts with equal numbers of ranks; count at the interface of the first host."""
    with tempfile.TemporaryDirectory() as directory:
        processes = []
        for number, host in enumerate(hosts.hosts):
            agent = torchrun(
                *(f"--nnodes={len(hosts.hosts)}", f"--nproc_per_node={job.ranks // len(hosts.hosts)}"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={hosts.address(hosts.hosts[0])}:29400", "--rdzv-id=bench"),
                *(f"--rdzv-conf=is_host={int(number == 0)}", f"--local-addr={hosts.address(host)}"),
            )
            command = hosts.command(host, *agent, *worker(job, Path(directory)))
            variables = {**environment(), "GLOO_SOCKET_IFNAME": INTERFACE}
            processes.append(subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL))
        codes = [process.wait() for process in processes]
        assert codes == [0] * len(codes), codes
        return read_result(Path(directory))


def torchrun(*flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *flags]


def worker(job: Job, directory: Path) -> list[str]:
    return [__file__, "--worker", json.dumps(asdict(job)), "--result", str(directory / "result.json")]


def read_result(directory: Path) -> Measured:
    return Measured(**json.loads((directory / "result.json").read_text()))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wire_bytes(interface: str) -> int:
    """Return the bytes that an interface has sent and received. On a loopback device these are the same bytes."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            received, sent = (int(counters.split()[index]) for index in (0, 8))
            return sent if interface == "lo" else received + sent
    raise ValueError(f"no interface {interface}")


def work(job: Job, result: Path) -> None:
    """Run one rank of a job and write its result."""
    runtime = this_rank()
    with process_group(runtime, timeout=120):
        measured = measure(job, runtime)
    if runtime.rank == 0:
        result.write_text(json.dumps(asdict(measured)))


def measure(job: Job, runtime: Runtime) -> Measured:
    """Take the steps of distgpt.train on random tokens; time them and count their bytes."""
    batch = (f"--train.global_batch={job.global_batch}", f"--train.micro_batch={job.micro_batch}")
    parallel = (
        f"--parallel.strategy={job.strategy}",
        f"--parallel.shard={job.shard}",
        f"--parallel.outer_every={job.outer_every}",
        f"--parallel.reduction={job.reduction}",
        *("--parallel.reshard=true", "--parallel.reduce=step"),  # as where memory is short
    )
    config = resolve([*SHAPE, *batch, *parallel, "--train.dtype=float32"], {})
    plan = make_plan(config, runtime, vocab_size=VOCABULARY)
    model = build_model(config, plan, vocab_size=VOCABULARY, eot_id=None)
    gradients = gradients_of(model, plan)
    optimizer = build_optimizer(model, config.optim, runtime.device.type, exact=plan.exact)
    outer = OuterOptimizer(unwrap_model(model), config, plan) if plan.strategy == "diloco" else None
    tokens = torch.randint(VOCABULARY, (job.micro_batch, BLOCK_SIZE + 1))
    micro_batches = [(tokens[:, :-1], tokens[:, 1:])] * job.micro_batches
    seconds, before = [], 0
    for step in range(1, WARM_UP_STEPS + job.steps + 1):
        if step == WARM_UP_STEPS + 1:
            if runtime.distributed:
                dist.barrier()
            before = wire_bytes(job.interface)
        started = time.perf_counter()
        losses = accumulate_gradients(gradients, micro_batches, step, seed=config.run.seed)
        grad_norm, _ = gradients.finish(losses, stop=False)
        apply_update(optimizer, grad_norm, clip=config.optim.grad_clip)
        optimizer.zero_grad()
        if outer is not None and step % job.outer_every == 0:
            outer.step()
        if step > WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started)
    if runtime.distributed:
        dist.barrier()
    sent = (wire_bytes(job.interface) - before) / job.steps
    gpt = unwrap_model(model)
    blocks = sum(p.numel() for p in gpt.blocks.parameters()) * 4
    total = sum(p.numel() for p in gpt.parameters()) * 4
    return Measured(statistics.median(seconds), sent, blocks, total - blocks)


def show_bytes(ranks: Sequence[int]) -> None:
    print("\nbytes on the wire per step, counted / formula")
    for n in ranks:
        for strategy, shard in (("ddp", 0), ("fsdp", 0), ("hsdp", 2)):
            if shard >= n:
                continue
            for micro_batches in (1, 2):
                job = Job(strategy, n, 2 * n * micro_batches, micro_batch=2, steps=10, shard=shard)
                measured = run(job)
                show(f"{strategy:7}{n} ranks", job, measured, expected_bytes(job, measured.blocks, measured.root))


def show_between_hosts() -> None:
    if reason := reason_to_skip():
        print(f"\nbetween two hosts: not measured, {reason}")
        return
    print("\nbytes per step between two hosts of two ranks, counted / formula")
    with tempfile.TemporaryDirectory() as directory, network(2, Path(directory)) as hosts:
        for strategy, more in BETWEEN_HOSTS.items():
            for micro_batches in (1, 2):
                job = Job(strategy, 4, 8 * micro_batches, micro_batch=2, steps=10, interface=INTERFACE, **more)
                measured = run_on(hosts, job)
                expected = expected_between_two_hosts(job, measured.blocks, measured.root)
                show(f"{strategy:7}2 x 2 ranks", job, measured, expected)


def show_exact(rounds: int) -> None:
    print(f"\nexact reduction on two ranks against the default, median of {rounds} rounds (lowest to highest)")
    for strategy in ("ddp", "fsdp"):
        for micro_batches in (1, 4):
            jobs = [
                Job(strategy, 2, 2 * 8 * micro_batches, micro_batch=8, steps=15, reduction=reduction)
                for reduction in ("default", "exact")
            ]
            pairs = [[run(job) for job in jobs] for _ in range(rounds)]
            times = [exact.seconds / usual.seconds for usual, exact in pairs]
            sent = [exact.wire_bytes / usual.wire_bytes for usual, exact in pairs]
            spread = f"{min(times):.2f} to {max(times):.2f}"
            print(
                f"{strategy:5} micro-batches: {micro_batches}: {statistics.median(times):.2f} of the time ({spread}), "
                f"{statistics.median(sent):.2f} of the bytes",
                flush=True,
            )


def show(label: str, job: Job, measured: Measured, expected: float) -> None:
    counted = measured.wire_bytes
    label = f"{label}, micro-batches: {job.micro_batches}"
    print(f"{label:36} {counted / 1e6:8.2f} MB / {expected / 1e6:8.2f} MB = {counted / expected:.3f}", flush=True)


def show_timings(ranks: Sequence[int], rounds: int) -> None:
    print(f"\ntime of a step against one rank, median of {rounds} rounds (lowest to highest)")
    for strategy in ("ddp", "fsdp"):
        for mode in ("weak", "strong"):
            ratios: dict[int, list[float]] = {n: [] for n in ranks}
            for _ in range(rounds):
                times = {}
                for n in ranks:
                    total = 8 * n if mode == "weak" else 8 * max(ranks)
                    times[n] = run(Job(strategy, n, total, micro_batch=4, steps=15)).seconds
                for n in ranks:
                    ratios[n].append(times[n] / times[1])
            for n in ranks[1:]:
                median, ideal = statistics.median(ratios[n]), 1.0 if mode == "weak" else 1 / n
                spread = f"{min(ratios[n]):.2f} to {max(ratios[n]):.2f}"
                text = f"{median:.2f} of one rank's time ({spread}), ideal {ideal:.2f}: efficiency {ideal / median:.0%}"
                print(f"{strategy:5} {mode:6} {n} ranks: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the bytes that training sends and how its step time scales.")
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timings (default: 5)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(Job(**json.loads(arguments.worker)), arguments.result)
        return
    cores = available_cpus()
    device = (
        "a separate loopback device"
        if reason_to_skip() is None
        else "the machine's loopback device, with other traffic"
    )
    print(f"{platform.system()} {platform.machine()}, {cores} cores; bytes counted on {device}")
    parts = arguments.parts or PARTS
    if "bytes" in parts:
        show_bytes([2, 4])
    if "hosts" in parts:
        show_between_hosts()
    if "exact" in parts:
        show_exact(arguments.rounds)
    if "timings" in parts:
        show_timings([n for n in (1, 2, 4, 8) if n <= cores], arguments.rounds)


if __name__ == "__main__":
    main()
