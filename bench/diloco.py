"""Benchmark of DiLoCo and DDP over a slow link: time, validation loss, and bytes between the hosts.

    python bench/diloco.py [--steps 400] [--rate 100] [--round-trip 0.05]

Two hosts of one rank each (network namespaces, which need root) are connected by a link with --rate Mbit/s and a round
trip of --round-trip seconds. They train the same model on the same text for the same number of steps with
distgpt.train, with one strategy after the other. The time is that of the steps in metrics.jsonl: without start,
evaluation and saves.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distgpt.telemetry.step_lines import read_lines
from tests.hosts.network import INTERFACE, Network, network, reason_to_skip

SHAPE = (
    *("--model.n_layer=4", "--model.n_head=4", "--model.n_embd=192", "--model.block_size=64", "--model.mlp=gelu"),
    *("--train.global_batch=16", "--train.micro_batch=8", "--train.dtype=float32"),
    *("--optim.lr=1e-3", "--optim.warmup_steps=20", "--optim.schedule=cosine", "--optim.grad_clip=1"),
    *("--eval.every=0", "--eval.sequences=512", "--eval.sample_tokens=0", "--checkpoint.every=0", "--log.every=20"),
)
STRATEGIES = {
    "ddp": ("--parallel.strategy=ddp",),
    **{
        f"diloco, H = {every}": ("--parallel.strategy=diloco", "--parallel.shard=1", f"--parallel.outer_every={every}")
        for every in (10, 50)
    },
}


def train(hosts: Network, arguments: list[str]) -> float:
    """Train to the end on all hosts; return the bytes that went through the first host's port."""
    before, processes = hosts.bytes_through(hosts.hosts[0]), []
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
    for number, host in enumerate(hosts.hosts):
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={len(hosts.hosts)}", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=bench"),
            *(f"--rdzv-endpoint={hosts.address(hosts.hosts[0])}:29400", f"--local-addr={hosts.address(host)}"),
            *(f"--rdzv-conf=is_host={int(number == 0)}", "-m", "distgpt.train", *arguments),
        ]
        quiet = subprocess.DEVNULL
        processes.append(subprocess.Popen(hosts.command(host, *command), env=variables, stdout=quiet, stderr=quiet))
    codes = [process.wait() for process in processes]
    assert codes == [0] * len(codes), codes
    return hosts.bytes_through(hosts.hosts[0]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare DiLoCo and DDP over a slow link.")
    parser.add_argument("--data", default="data/stdlib", help="data directory (default: data/stdlib)")
    parser.add_argument("--steps", type=int, default=400, help="steps, a multiple of 50 (default: 400)")
    parser.add_argument("--rate", type=float, default=100, help="Mbit/s in each direction (default: 100)")
    parser.add_argument("--round-trip", type=float, default=0.05, help="round trip in seconds (default: 0.05)")
    arguments = parser.parse_args()
    if reason := reason_to_skip():
        sys.exit(f"not measured: {reason}")
    print(f"two hosts, {arguments.rate:g} Mbit/s, {1000 * arguments.round_trip:g} ms round trip")
    ddp_seconds = 0.0
    with tempfile.TemporaryDirectory() as directory, network(2, Path(directory)) as hosts:
        hosts.replace_link("n2", megabits=arguments.rate, round_trip=arguments.round_trip)
        for number, (name, strategy) in enumerate(STRATEGIES.items()):
            run = Path(directory) / str(number)
            flags = [f"--data.path={arguments.data}", f"--run.dir={run}", f"--train.steps={arguments.steps}"]
            sent = train(hosts, [*SHAPE, *flags, *strategy])
            lines = read_lines(run / "metrics.jsonl")
            # The first step warms up.
            steps = [line for line in lines if "seconds" in line and line["step"] > 1]
            seconds = statistics.fmean(line["seconds"] for line in steps) * arguments.steps
            ddp_seconds = ddp_seconds or seconds
            (val_loss,) = (line["val_loss"] for line in lines if "val_loss" in line)
            print(
                f"{name:16} {seconds:6.0f} s, {ddp_seconds / seconds:4.1f} times as fast; val loss {val_loss:.4f}; "
                f"{sent / arguments.steps / 1e6:6.2f} MB per step between the hosts",
                flush=True,
            )


if __name__ == "__main__":
    main()
