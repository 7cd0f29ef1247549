"""The figures of a plan as people read them, in at most 80 columns."""

import textwrap
from collections.abc import Iterator

from distgpt.config import Config
from distgpt.distributed.memory import USABLE_SHARE
from distgpt.planning.devices import LINK_EFFICIENCY
from distgpt.planning.forecast import TOKENS_PER_PARAMETER, Forecast
from distgpt.planning.layouts import GIB, Layout
from distgpt.suggestion import WIDTH, wrapped_command
from distgpt.telemetry.console import step_time
from distgpt.units import count_text, duration, scaled_text, size_text

INDENT = 13
PARTS = {
    "weights": "weight",
    "gradients": "grad",
    "optimizer": "optim",
    "activations": "activ",
    "logits": "logits",
    "buffers": "buffer",
}
# Narrower models do not keep a GPU busy, so the MFU is not that of the sources.
USUAL_WIDTH = 512


def describe(config: Config, plan: Forecast, *, price: float | None) -> str:
    """Describe a plan in a few tables. `price`: of a GPU-hour."""
    blocks = (_run(config, plan), _memory(plan), _time(plan), _recommended(config, plan, price), _assumed(config, plan))
    return "\n\n".join("\n".join(lines) for lines in map(list, blocks) if lines)


def _run(config: Config, plan: Forecast) -> Iterator[str]:
    cluster, length = plan.cluster, config.model.block_size
    nodes = f" in {cluster.nodes:,} nodes of {cluster.per_node}" if cluster.nodes > 1 else ""
    speed = f"{cluster.dtype} at {scaled_text(cluster.peak, 'flops')}FLOP/s"
    yield _row("model", f"{plan.parameters:,} parameters, vocabulary {plan.vocab_size:,}")
    yield _row("", f"{scaled_text(plan.flops_per_token, 'flops')}FLOPs a token, forward and backward")
    yield _row("devices", f"{cluster.ranks:,} x {cluster.name}{nodes}")
    yield _row("", f"each with {_number(cluster.memory / GIB)} GiB, {speed}")
    yield _row(
        "batch", f"{config.train.global_batch:,} sequences of {length:,} = {plan.tokens_per_step:,} tokens a step"
    )
    ratio = f"{_number(plan.tokens / plan.parameters)} for each parameter"
    yield _row("length", f"{plan.steps:,} steps = {scaled_text(plan.tokens)} tokens, {ratio}")
    if optimum := plan.optimum:
        flops = f"{optimum.flops:.1e}".replace("e+", "e")
        yield _row("budget", f"buys {flops} FLOPs, for which the compute-optimal size is")
        size = f"{scaled_text(optimum.parameters)} parameters on {scaled_text(optimum.tokens)} tokens"
        yield _row("", f"{size}; nearest preset: {optimum.preset}")


def _memory(plan: Forecast) -> Iterator[str]:
    name, unit = ("GiB", GIB) if max(layout.memory.total for layout in plan.layouts) >= GIB else ("MiB", 2**20)
    yield f'Memory of a rank in {name} for a micro-batch of "batch" sequences; "largest" is the'
    yield "most that fit (recompute: with parallel.activation_checkpoint)"
    yield f"{'':{INDENT}}" + "".join(f"{h:>7}" for h in (*PARTS.values(), "total")) + f"{'batch':>7}{'largest':>9}"
    for layout in plan.layouts:
        sizes = [*(getattr(layout.memory, part) for part in PARTS), layout.memory.total]
        row = "".join(f"{_number(size / unit):>7}" for size in sizes)
        yield f"{_name(layout, plan)}{row}{layout.micro_batch:>7}{layout.largest_micro_batch or 'none':>9}"


def _time(plan: Forecast) -> Iterator[str]:
    most = max(max(layout.bytes_within_node, layout.bytes_between_nodes) for layout in plan.layouts)
    name, unit = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    heads = ["batch x acc", "step", "MFU", "all steps"]
    title = "Time"
    if most:
        heads += [f"{name} within", f"{name} between"]
        title += f", and the {name} that a step sends: a rank within its node, a node to others"
    yield title
    yield f"{'':{INDENT}}" + "".join(f"{head:>11}" for head in heads)
    for layout in plan.layouts:
        cells = [
            f"{layout.micro_batch} x {layout.accumulation}",
            step_time(layout.step_seconds),
            f"{layout.mfu:.1%}",
            duration(plan.steps * layout.step_seconds),
        ]
        if most:
            cells += [_number(sent / unit) for sent in (layout.bytes_within_node, layout.bytes_between_nodes)]
        yield _name(layout, plan) + "".join(f"{cell:>11}" for cell in cells)


def _recommended(config: Config, plan: Forecast, price: float | None) -> Iterator[str]:
    if plan.best is None or plan.command is None or plan.gpu_hours is None or plan.seconds is None:
        return
    recompute = ", recomputing activations" if plan.best.activation_checkpoint else ""
    yield _row("recommended", f"{plan.best.strategy}{recompute}: {_time_and_cost(plan, price)}")
    most = config.checkpoint.keep + 2
    yield _row("checkpoint", f"{size_text(plan.checkpoint_bytes)}, up to {most} at a time on the disk")
    yield ""
    yield wrapped_command(plan.command, indent=4)


def _time_and_cost(plan: Forecast, price: float | None) -> str:
    hours = f"{count_text(plan.gpu_hours or 0.0)} {'CPU' if plan.cluster.name == 'cpu' else 'GPU'}-hours"
    cost = "" if plan.cost is None else f", {plan.cost:,.2f} at {price:g} each"
    return f"{duration(plan.seconds or 0.0)}, {hours}{cost}"


def _assumed(config: Config, plan: Forecast) -> Iterator[str]:
    cluster, device = plan.cluster, plan.cluster.device
    narrow = ", less for one as narrow as this" if config.model.n_embd < USUAL_WIDTH and cluster.name != "cpu" else ""
    given = "" if cluster.mfu != device.mfu else f" ({device.mfu_from}{narrow}); --mfu=M"
    yield "Assumed"
    yield from _note(f"an MFU of {cluster.mfu:.0%} without recomputing and waiting{given}")
    if cluster.ranks > 1:
        links = f"{device.link:,} GB/s in a node" + f", {device.network:,} Gbit/s out of it" * (cluster.nodes > 1)
        yield from _note(f"links of {links} ({device.links_from}), {LINK_EFFICIENCY:.0%} of it usable; --network=GBIT")
    yield from _note(
        f"{USABLE_SHARE:.0%} of the memory usable, fused kernels without compilation; weights, gradients and optimizer "
        "are counted, the rest follows from shapes"
    )
    if plan.optimum:
        yield from _note(
            f"{TOKENS_PER_PARAMETER} tokens a parameter as the compute-optimal size, with C = 6 N D "
            "(Hoffmann et al. 2022, Chinchilla)"
        )


def _name(layout: Layout, plan: Forecast) -> str:
    """Return the first cell of a row, which marks the recommended layout."""
    name = "  recompute" if layout.activation_checkpoint else layout.strategy
    return f"{'>' if layout is plan.best else ' '} {name:{INDENT - 2}}"


def _number(value: float) -> str:
    """Return a number in at most six characters."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.{1 if value >= 100 else 2}f}"


def _row(label: str, text: str) -> str:
    return f"{label:{INDENT}}{text}"


def _note(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
