"""Check and time distgpt on one GPU, in at most 10 minutes.

    python bench/gpu.py [PART ...] [--minutes 10] [--smoke]

Each part runs in a process of its own, and prints as it goes. A part that fails, hangs or runs out of time does not end
the others. The parts, the most important first:

    environment   versions, driver, compiler, memory
    agreement     losses on the CPU, on the GPU, with DDP and with FSDP in a group of one; a step waits for nothing
    documents     a document mask by blocks and as a whole: the same losses, ms, tokens/s, MFU and memory
    checkpoints   saved in the background under load, saved synchronously, and resumed: equal bit for bit
    endings       SIGTERM saves and exits with 75; the same command goes on
    throughput    ms, tokens/s, MFU and peak memory of the presets, against the memory that is planned
    peer          the same of a loop like nanoGPT's, which compiles the whole model and reads the loss of logged steps
    profile       one step: the share of time in which the GPU is idle, and the kernels that take most
    loss          the head with the loss: eager, compiled, in chunks
    decode        tokens per second of sampling with a KV cache

It needs torch, numpy, orjson and tomli_w, no network and no data. --smoke runs all of it with tiny models on any
machine, to show that it works; its figures mean nothing.
"""

import argparse
import gc
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.profiler import ProfilerActivity, profile

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from distgpt.config import Config, resolve  # noqa: E402
from distgpt.corpus.shard_writer import Documents, write_dataset  # noqa: E402
from distgpt.corpus.tokenizer.simple import ByteTokenizer  # noqa: E402
from distgpt.distributed.device import missing_for_triton  # noqa: E402
from distgpt.distributed.gradients import gradients_of  # noqa: E402
from distgpt.distributed.memory import MemoryModel  # noqa: E402
from distgpt.distributed.parallelize import autocast, build_model, unwrap_model  # noqa: E402
from distgpt.distributed.plan import Plan, make_plan  # noqa: E402
from distgpt.distributed.process_group import init_process_group  # noqa: E402
from distgpt.distributed.runtime import Runtime, this_rank  # noqa: E402
from distgpt.model.generate import Sampling, generate  # noqa: E402
from distgpt.model.gpt import GPT, Head  # noqa: E402
from distgpt.model.optim import build_optimizer  # noqa: E402
from distgpt.telemetry.peaks import device_peak_flops  # noqa: E402
from distgpt.training.figures import FigureReader, not_finite  # noqa: E402
from distgpt.training.step import accumulate_gradients, apply_update  # noqa: E402

GIB = 2**30
CPU = torch.device("cpu")
TINY = ("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=32")
# In a row: preset, sequences per micro-batch, compiled.
ROWS: tuple[tuple[str, int, bool], ...] = (
    ("gpt2-124m", 16, True),
    ("gpt2-124m", 16, False),
    ("gpt2-1558m", 8, True),
    ("modern-1b", 4, True),
    ("gpt2-124m", 32, True),
    ("gpt2-124m", 64, True),
    ("gpt2-350m", 16, True),
)
TRAIN = [sys.executable, "-m", "distgpt.train"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so many minutes (default: 10)")
    parser.add_argument("--smoke", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"unknown part {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if options.run:
        PARTS[options.run][0](Bench(smoke=options.smoke))
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    results = [run_part(part, deadline, smoke=options.smoke) for part in options.parts or PARTS]
    print("\n| part | result |\n|---|---|\n" + "\n".join(results), flush=True)
    return int(any("FAILED" in result for result in results))


def run_part(part: str, deadline: float, *, smoke: bool) -> str:
    """Run a part in a process of its own, and return the row of its result."""
    started, limit = time.monotonic(), min(PARTS[part][1] * (10 if smoke else 1), deadline - time.monotonic())
    if limit < 5:
        return f"| {part} | not run: no time left |"
    print(f"\n## {part}", flush=True)
    command = [sys.executable, __file__, "--run", part, *(["--smoke"] if smoke else [])]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        result = f"ok, {time.monotonic() - started:.0f} s" if code == 0 else f"FAILED with {code}"
    except subprocess.TimeoutExpired:
        result = f"FAILED: not done after {limit:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"| {part} | {result} |"


class Bench:
    """The device under test, and how large things are."""

    def __init__(self, *, smoke: bool) -> None:
        self.smoke = smoke
        self.runtime = this_rank()
        self.device = self.runtime.device
        self.on_gpu = self.device.type == "cuda"
        if not self.on_gpu and not smoke:
            raise SystemExit("no GPU: --smoke runs everything with tiny models on a CPU")
        if self.on_gpu:
            torch.cuda.set_device(self.device)

    def config(self, preset: str, *arguments: str) -> Config:
        """Resolve a preset, or a tiny model in its place."""
        tiny = TINY if self.smoke else ()
        return resolve([preset, *tiny, "--model.dropout=0", *arguments], {})

    @property
    def vocabulary(self) -> int:
        return 512 if self.smoke else 50_257

    def batches(self, config: Config, count: int, sequences: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return the same random micro-batches on every device."""
        draw = torch.Generator().manual_seed(0)
        shape = (count, sequences, config.model.block_size + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=draw).to(device)
        return [(t[:, :-1], t[:, 1:]) for t in tokens]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Raise RuntimeError if the host waits for the GPU."""
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")

    def median_seconds(self, action: Callable[[], object], *, least: float = 2.0) -> float:
        """Return the median time of an action, after two to warm up, over at least 3 and so many seconds."""
        times: list[float] = []
        ended = time.perf_counter() + (0.0 if self.smoke else least)
        for count in range(10**6):
            self.synchronize()
            started = time.perf_counter()
            action()
            self.synchronize()
            if count >= 2:
                times.append(time.perf_counter() - started)
            else:
                ended = max(ended, time.perf_counter() + (0.0 if self.smoke else least))
            if len(times) >= 3 and time.perf_counter() > ended:
                break
        return statistics.median(times)

    @contextmanager
    def peak_memory(self) -> Iterator[Callable[[], float]]:
        """Yield a function that returns the peak GiB since now. What was allocated is freed at the end."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / GIB if self.on_gpu else 0.0
        gc.collect()
        torch.compiler.reset()
        if self.on_gpu:
            torch.cuda.empty_cache()


class Trainee:
    """A model and what distgpt.train does in a step."""

    def __init__(self, bench: Bench, config: Config, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.model = build_model(config, plan, vocab_size=bench.vocabulary, eot_id=0)
        self.optimizer = build_optimizer(self.model, config.optim, plan.runtime.device.type)
        self.gradients = gradients_of(self.model, plan)
        self.reader = FigureReader(plan.runtime, at_once=False)
        self.steps = 0

    def step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.steps += 1
        losses = accumulate_gradients(self.gradients, micro_batches, self.steps, seed=0)
        norm, figures = self.gradients.finish(losses, stop=False)
        self.reader.add(self.steps, figures, lr=0.0)
        apply_update(self.optimizer, norm, clip=self.config.optim.grad_clip, skip=not_finite(figures))
        self.optimizer.zero_grad()


def environment(bench: Bench) -> None:
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} CPUs"
    )
    print(f"for Triton: {missing_for_triton() or 'a C compiler and Python.h are here'}")
    if bench.on_gpu:
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        peak = device_peak_flops(bench.device, torch.bfloat16)
        print(
            f"{name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free, peak {(peak or 0) / 1e12:.0f} TFLOP/s (0: unknown)"
        )
        print(f"cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]


def agreement(bench: Bench) -> None:
    """Raise SystemExit if losses differ by more than rounding."""
    store, steps = dist.HashStore(), 2 if bench.smoke else 30
    init_process_group(bench.runtime, store, 60)
    batch: list[str] = [*TINY, "--train.global_batch=8", "--train.micro_batch=4", "--train.compile=false"]
    batch += ["--optim.grad_clip=1", "--optim.lr=1e-3"]
    on_cpu, worst = Runtime(0, 0, 1, 1, CPU), 0.0
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 1e-2)):
        for dropout in (0.0, 0.1):
            config = resolve([*batch, f"--train.dtype={dtype}", f"--model.dropout={dropout}"], {})
            reference = None if dropout else losses(bench, config, on_cpu, "single", steps)
            for strategy in ("single", "ddp", "fsdp"):
                found = losses(bench, config, bench.runtime, strategy, steps)
                reference = reference or found
                difference = max(abs(a - b) for a, b in zip(found, reference, strict=True))
                worst = max(worst, difference / tolerance)
                where = f"{dtype}, dropout {dropout}, {strategy} on {bench.device.type}"
                print(f"{where}: {difference:.1e} from {'one device' if dropout else 'the CPU'}, at most {tolerance}")
    if bench.on_gpu:
        config = resolve([*batch, "--train.dtype=bfloat16", "--model.dropout=0.1"], {})
        for strategy in ("single", "ddp", "fsdp"):
            losses(bench, config, bench.runtime, strategy, 5, forbid_waits=True)
            print(f"{strategy}: no step waits for the GPU")
    dist.destroy_process_group()
    if worst > 1:
        raise SystemExit("losses differ")


def losses(
    bench: Bench, config: Config, runtime: Runtime, strategy: str, steps: int, *, forbid_waits: bool = False
) -> list[float]:
    """Train some steps and return their losses. `forbid_waits`: raise RuntimeError if the host waits for the GPU."""
    plan = replace(make_plan(config, runtime, vocab_size=bench.vocabulary), strategy=strategy)
    trainee = Trainee(bench, config, plan)
    batches = bench.batches(config, 2, 4, runtime.device)
    trainee.step(batches)  # the first one sets up what later ones use
    with bench.no_waits() if forbid_waits else nullcontext():
        for _ in range(steps - 1):
            trainee.step(batches)
    return [figures.loss for figures in trainee.reader.take(now=True)]


def documents(bench: Bench) -> None:
    """Raise SystemExit if FlexAttention and SDPA with the whole mask give different losses, or if one waits."""
    print("| micro-batch x tokens | attention | ms | tokens/s | MFU | peak GiB |\n|---|---|---|---|---|---|")
    differences: list[float] = []
    # The second length is no multiple of FlexAttention's blocks.
    for sequences, tokens in ((2, 32), (2, 31)) if bench.smoke else ((16, 1024), (2, 8191)):
        options = ("--model.document_mask", f"--model.block_size={tokens}", f"--train.micro_batch={sequences}")
        batch = (f"--train.global_batch={4 * sequences}", "--train.dtype=bfloat16", "--optim.lr=1e-4")
        config = bench.config("modern-125m", *options, *batch, f"--train.compile={str(bench.on_gpu).lower()}")
        batches = bench.batches(config, 4, sequences, bench.device)
        for x, _ in batches:
            x[x % 256 == 0] = 0  # one token in 256 ends a document
        found = []
        for by_blocks in (True, False):
            with bench.peak_memory() as peak:
                trainee = Trainee(bench, config, make_plan(config, bench.runtime, vocab_size=bench.vocabulary))
                unwrap_model(trainee.model).blocks_are_compiled = by_blocks and bench.on_gpu
                for _ in range(3):
                    trainee.step(batches)
                found.append([figures.loss for figures in trainee.reader.take(now=True)])
                with bench.no_waits():
                    trainee.step(batches)
                flops = unwrap_model(trainee.model).flops_per_token()
                seconds = bench.median_seconds(lambda: trainee.step(batches), least=1.0) / 4  # noqa: B023
                cells = row(bench, seconds, sequences * tokens, flops)
                attention = "FlexAttention" if by_blocks else "whole mask"
                print(f"| {sequences} x {tokens} | {attention} | {cells} | {peak():.1f} |", flush=True)
        differences += [abs(a - b) for a, b in zip(*found, strict=True)]
    print(f"losses differ by {max(differences):.1e}, at most 0.01")
    if not all(difference <= 0.01 for difference in differences):  # NaN is not
        raise SystemExit("losses differ")


def checkpoints(bench: Bench) -> None:
    """Raise SystemExit if weights or moments differ in a bit."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tokens(directory / "data")
        options = [*tiny_run(directory), "--train.steps=20", "--train.deterministic", "--checkpoint.keep=9"]
        saved = {"sync": ("--checkpoint.every=10", "--checkpoint.async_save=false"), "async": ("--checkpoint.every=5",)}
        for run, how in saved.items():
            command([*TRAIN, *options, *how, f"--run.dir={directory / run}"])
        (directory / "resumed" / "checkpoints").mkdir(parents=True)
        half = Path("checkpoints", "step-00000010")
        shutil.copytree(directory / "async" / half, directory / "resumed" / half)
        command([*TRAIN, *options, *saved["sync"], f"--run.dir={directory / 'resumed'}"])
        last = Path("checkpoints", "step-00000020")
        sums = {run: (hash_of(directory / run / half), hash_of(directory / run / last)) for run in (*saved, "resumed")}
    for run, (at_10, at_20) in sums.items():
        print(f"{run:8} step 10 {at_10[:16]}  step 20 {at_20[:16]}")
    if len(set(sums.values())) > 1:
        raise SystemExit("checkpoints differ")


def endings(bench: Bench) -> None:
    """Raise SystemExit if SIGTERM does not save, or the run does not go on."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tokens(directory / "data")
        arguments = [*TRAIN, *tiny_run(directory), f"--run.dir={directory / 'run'}", "--checkpoint.every=0"]
        process = subprocess.Popen([*arguments, "--train.steps=100000"], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step") and " | loss " in line:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        saved = sorted(path.name for path in (directory / "run" / "checkpoints").iterdir())
        print(f"SIGTERM: exit code {process.wait()}, {', '.join(saved)}")
        if process.returncode != 75 or not saved:
            raise SystemExit("the run was not saved")
        steps = int(saved[-1].removeprefix("step-")) + 3
        print(command([*arguments, f"--train.steps={steps}"]).splitlines()[-1])


def throughput(bench: Bench) -> None:
    print("| preset | micro-batch | compiled | ms | tokens/s | MFU | peak GiB | planned |")
    print("|---|---|---|---|---|---|---|---|")
    for preset, sequences, compiled in [("gpt2-124m", 2, False)] if bench.smoke else ROWS:
        try:
            with bench.peak_memory() as peak:
                print(
                    f"| {preset} | {sequences} | {compiled} | {time_preset(bench, preset, sequences, compiled, peak)} |"
                )
        except torch.OutOfMemoryError:
            print(f"| {preset} | {sequences} | {compiled} | out of memory |")
        sys.stdout.flush()


def time_preset(bench: Bench, preset: str, sequences: int, compiled: bool, peak: Callable[[], float]) -> str:
    """Return ms of a micro-batch, in steps of four, tokens/s, MFU, peak memory, and the planned memory."""
    compiles = str(compiled and bench.on_gpu).lower()
    options = (f"--train.micro_batch={sequences}", f"--train.global_batch={4 * sequences}", "--train.dtype=bfloat16")
    config = bench.config(preset, *options, f"--train.compile={compiles}")
    plan = make_plan(config, bench.runtime, vocab_size=bench.vocabulary)
    trainee = Trainee(bench, config, plan)
    batches = bench.batches(config, 4, sequences, bench.device)
    flops = unwrap_model(trainee.model).flops_per_token()
    seconds = bench.median_seconds(lambda: trainee.step(batches)) / 4
    planned = MemoryModel(config, bench.vocabulary, 2).need(sequences, shards=1) / GIB
    return f"{row(bench, seconds, sequences * config.model.block_size, flops)} | {peak():.1f} | {planned:.1f}"


def row(bench: Bench, seconds: float, tokens: int, flops: float) -> str:
    """Return ms, tokens/s and MFU of so many seconds for a micro-batch."""
    rate = tokens / seconds
    peak_flops = device_peak_flops(bench.device, torch.bfloat16)
    utilization = "unknown" if peak_flops is None else f"{rate * flops / peak_flops:.1%}"
    return f"{seconds * 1e3:.1f} | {rate:,.0f} | {utilization}"


class Peer(nn.Module):
    """GPT-2 as a plain script writes it, after nanoGPT: tied head, vocabulary padded to 50,304, mean loss."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        m = config.model
        self.heads, self.layers = m.n_head, nn.ModuleList()
        self.tokens, self.positions = nn.Embedding(vocabulary, m.n_embd), nn.Embedding(m.block_size, m.n_embd)
        for _ in range(m.n_layer):
            sizes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
            layer = {name: nn.Linear(a * m.n_embd, b * m.n_embd) for name, (a, b) in sizes.items()}
            self.layers.append(nn.ModuleDict({**layer, "ln1": nn.LayerNorm(m.n_embd), "ln2": nn.LayerNorm(m.n_embd)}))
        self.ln, self.head = nn.LayerNorm(m.n_embd), nn.Linear(m.n_embd, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        B, T = x.shape
        h = self.tokens(x) + self.positions(torch.arange(T, device=x.device))
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](layer["ln1"](h)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            h = h + layer["out"](a)
            h = h + layer["down"](F.gelu(layer["up"](layer["ln2"](h)), approximate="tanh"))
        logits = self.head(self.ln(h))
        return F.cross_entropy(logits.view(B * T, -1), y.flatten())


def peer(bench: Bench) -> None:
    print("| loop | micro-batch | ms | tokens/s | MFU | peak GiB |\n|---|---|---|---|---|---|")
    config = bench.config("gpt2-124m")
    flops = GPT(config.model, bench.vocabulary).flops_per_token()
    for sequences in (4,) if bench.smoke else (16, 64):
        with bench.peak_memory() as peak:
            model = Peer(config, 512 if bench.smoke else 50_304).to(bench.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
            compiled = torch.compile(model) if bench.on_gpu else model
            batches = bench.batches(config, 4, sequences, bench.device)

            def step() -> None:
                for x, y in batches:  # noqa: B023 (it is called within this round)
                    with autocast(bench.device, torch.bfloat16):
                        loss = compiled(x, y) / len(batches)  # noqa: B023
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # noqa: B023
                optimizer.step()  # noqa: B023
                optimizer.zero_grad()  # noqa: B023
                loss.item()

            seconds = bench.median_seconds(step) / 4
            cells = row(bench, seconds, sequences * config.model.block_size, flops)
            print(f"| like nanoGPT's | {sequences} | {cells} | {peak():.1f} |", flush=True)


def profile_step(bench: Bench) -> None:
    sequences = 2 if bench.smoke else 16
    batch = (f"--train.micro_batch={sequences}", f"--train.global_batch={4 * sequences}", "--train.dtype=bfloat16")
    config = bench.config("gpt2-124m", *batch)
    trainee = Trainee(bench, config, make_plan(config, bench.runtime, vocab_size=bench.vocabulary))
    batches = bench.batches(config, 4, sequences, bench.device)
    for _ in range(3):
        trainee.step(batches)
    bench.synchronize()
    activities = [ProfilerActivity.CUDA] if bench.on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        for _ in range(2):
            trainee.step(batches)
        bench.synchronize()
        seconds = time.perf_counter() - started
    time_of = {
        e.key: e.self_device_time_total if bench.on_gpu else e.self_cpu_time_total for e in recorded.key_averages()
    }
    busy = sum(time_of.values()) / 1e6
    print(f"two steps: {seconds * 1e3:.1f} ms, {max(0.0, 1 - busy / seconds):.1%} of it without a kernel")
    for name in sorted(time_of, key=lambda key: time_of[key], reverse=True)[:12]:
        print(f"{time_of[name] / 1e6 / busy:6.1%}  {name[:100]}")


def loss(bench: Bench) -> None:
    print("| head and loss | ms | peak GiB |\n|---|---|---|")
    config = bench.config("gpt2-124m")
    tokens, width = (256 if bench.smoke else 16384), config.model.n_embd
    for name, chunk, compiles in (("eager", 0, False), ("compiled", 0, True), ("eager, chunks of 2,048", 2048, False)):
        with bench.peak_memory() as peak:
            head = Head(replace(config.model, loss_chunk=chunk), bench.vocabulary, bench.vocabulary).to(bench.device)
            weight = torch.randn(bench.vocabulary, width, device=bench.device, requires_grad=True)
            x = torch.randn(1, tokens, width, device=bench.device, requires_grad=True)
            y = torch.zeros(1, tokens, dtype=torch.int64, device=bench.device)
            if compiles and bench.on_gpu:
                head.compile()

            def both() -> None:
                with autocast(bench.device, torch.bfloat16):
                    mean = head(x, y, weight).mean()  # noqa: B023 (it is called within this round)
                mean.backward()

            print(f"| {name} | {bench.median_seconds(both, least=1.0) * 1e3:.2f} | {peak():.1f} |", flush=True)


def decode(bench: Bench) -> None:
    config, count = bench.config("gpt2-124m"), 16 if bench.smoke else 256
    model = GPT(config.model, bench.vocabulary)
    model.init_weights(0)
    model.to(bench.device)

    def sample() -> None:
        with autocast(bench.device, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            list(generate(model, [[1]], max_tokens=count, sampling=Sampling(), generators=[generator]))

    print(f"{count / bench.median_seconds(sample):,.0f} tokens/s, one text of {count} tokens")


def write_tokens(directory: Path) -> None:
    """Write a dataset of random bytes."""
    directory.mkdir()
    draw = np.random.default_rng(0)
    train, val = (draw.integers(0, 256, tokens, dtype=np.uint16) for tokens in (200_000, 10_000))
    write_dataset(
        directory,
        [Documents("train", train, np.array([len(train)])), Documents("val", val, np.array([len(val)]))],
        tokenizer=ByteTokenizer(end_of_text=False),
        eot_id=None,
        shard_tokens=None,
        about={},
        advance=lambda written: None,
    )


def tiny_run(directory: Path) -> list[str]:
    """Return the options of a small run with dropout and accumulation."""
    batch = ("--train.global_batch=16", "--train.micro_batch=4", "--model.dropout=0.1", "--optim.grad_clip=1")
    return [*TINY, *batch, f"--data.path={directory / 'data'}", "--eval.every=0", "--eval.sample_tokens=0"]


def command(arguments: Sequence[str]) -> str:
    """Run a command to its end and return what it printed. Raises SystemExit with its errors if it fails."""
    done = subprocess.run(arguments, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def hash_of(checkpoint: Path) -> str:
    """Return a hash of all tensors of a checkpoint, read by torch's own loader."""
    index = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sorted(index.items())
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # it says that it reads as one process
        dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    digest = hashlib.sha256()
    for name, tensor in found.items():
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Each with the seconds that it may take.
PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "environment": (environment, 40),
    "agreement": (agreement, 90),
    "documents": (documents, 150),
    "checkpoints": (checkpoints, 100),
    "endings": (endings, 60),
    "throughput": (throughput, 240),
    "peer": (peer, 90),
    "profile": (profile_step, 60),
    "loss": (loss, 45),
    "decode": (decode, 45),
}

if __name__ == "__main__":
    sys.exit(main())
