"""Say what a run will take before it starts: `python -m distgpt.plan PRESET [--section.key=value ...] [--nodes N] ...`.

Memory of a rank by part for each strategy, bytes sent, time, MFU, GPU-hours, cost, checkpoint size; for a budget
the compute-optimal size; and the command to start. Nothing is trained, and no GPU is needed.
"""

from distgpt import cli

if __name__ == "__main__":
    cli.run("plan")

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict

from distgpt.config import preset_names, resolve
from distgpt.errors import UsageError
from distgpt.planning.devices import device_named
from distgpt.planning.forecast import explain_no_fit, forecast, optimum
from distgpt.planning.layouts import make_cluster
from distgpt.planning.text import describe
from distgpt.weights.source import model_of_start


def main(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Print the plan. Raises UsageError, after the figures, if the run fits in no layout."""
    name = options.device.lower()
    device = device_named(name)
    config = resolve(arguments, os.environ, model_of=model_of_start)
    cluster = make_cluster(
        name,
        device,
        config,
        nodes=options.nodes,
        per_node=options.gpus_per_node or device.per_node,
        network=options.network,
        mfu=options.mfu,
    )
    named = any(word in preset_names() or word.endswith(".toml") for word in arguments)
    if options.budget is not None and not named:
        arguments = [optimum(options.budget, cluster).preset, *arguments]
        config = resolve(arguments, os.environ, model_of=model_of_start)
    plan = forecast(config, cluster, arguments, tokens=options.tokens, budget=options.budget, price=options.price)
    if options.json:
        print(json.dumps(asdict(plan), indent=2))
    else:
        print(describe(config, plan, price=options.price))
    if plan.best is None:
        raise UsageError(explain_no_fit(config, plan))
