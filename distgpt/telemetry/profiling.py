"""A profile of some steps on rank 0: a trace for Perfetto, the memory of a GPU, and the operators that took longest."""

import gzip
import os
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from distgpt.config import ProfileConfig
from distgpt.run.session import RunSession
from distgpt.usage import columns, wrapped

TOP_OPERATORS = 10
# Allocations and frees of which a snapshot of a GPU's memory keeps the stacks.
MEMORY_EVENTS = 100_000


def profiled(
    steps: range,
    config: ProfileConfig,
    session: RunSession,
    device: torch.device,
    *,
    pausing: Callable[[Literal["other"]], AbstractContextManager[None]],
) -> Generator[int, None, None]:
    """Yield the steps of a run, and trace those that the config names. Close it, so that a run that stops writes them.

    One step before them warms the profiler up, if there is one. `pausing` wraps the work of the profiler between steps.
    """
    first, last = max(config.range.start, steps.start), min(config.range.stop, steps.stop)
    if session.rank or first >= last:
        yield from steps
        return
    on_gpu, warm_up = device.type == "cuda", first > steps.start

    yield from range(steps.start, first - warm_up)
    with warnings.catch_warnings(action="ignore"):  # it warns if there is no warm-up, as in a run that begins here
        plan = schedule(wait=0, warmup=int(warm_up), active=last - first, repeat=1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints lines on stderr
    if on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=plan,
        on_trace_ready=lambda done: session.say(_write(done, session, f"steps-{first}-{last - 1}", on_gpu=on_gpu)),
        acc_events=True,
    ) as profiler:
        for step in range(first - warm_up, last):
            yield step
            with pausing("other"):
                profiler.step()  # after the last one, it calls _write()
    yield from range(last, steps.stop)


def _write(profiler: profile, session: RunSession, name: str, *, on_gpu: bool) -> str:
    """Write the files of a profile; return the text that names them."""
    directory = session.paths.profile
    trace, memory = directory / f"{name}.json.gz", directory / f"{name}-memory.pickle"
    try:
        session.require_owned()
        directory.mkdir(exist_ok=True)
        _write_trace(profiler, trace)
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(memory))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the profile was not written: {error}"
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
    files = f"profile   open {trace} at https://ui.perfetto.dev"
    files += f", and {memory} at https://pytorch.org/memory_viz" if on_gpu else ""
    return "\n".join([wrapped(files), *operator_lines(profiler, on_gpu=on_gpu)])


def _write_trace(profiler: profile, trace: Path) -> None:
    """Write the trace in Chrome's format, which torch writes uncompressed, and compress it."""
    with tempfile.TemporaryDirectory(dir=trace.parent) as scratch:
        raw, packed = Path(scratch, "trace.json"), Path(scratch, trace.name)
        profiler.export_chrome_trace(str(raw))
        packed.write_bytes(gzip.compress(raw.read_bytes(), compresslevel=3))
        os.replace(packed, trace)


def operator_lines(profiler: profile, *, on_gpu: bool) -> list[str]:
    """Return a table of the operators that took longest by themselves, without those that they call."""
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and not event.key.startswith("ProfilerStep")
    }
    total = sum(microseconds for microseconds, _ in times.values()) or 1.0
    top = sorted(times.items(), key=lambda item: item[1], reverse=True)[:TOP_OPERATORS]
    lines = [f"  {'GPU' if on_gpu else 'CPU'} time  share    calls  operator, without those that it calls"]
    for name, (microseconds, count) in top:
        lines.append(f"{microseconds / 1e3:7,.1f} ms {microseconds / total:6.1%} {count:8,}  {name}"[: columns()])
    return lines
