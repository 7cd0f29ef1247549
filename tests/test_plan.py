"""distgpt.plan as a command."""

import json

from distgpt.planning.devices import DEVICES
from tests import jobs


def test_the_command_prints_a_plan_and_its_figures_as_json() -> None:
    done = jobs.command("plan", "gpt2-1558m", "--nodes", "4", "--device", "h100", "--price", "2.5")
    assert done.code == 0, done
    assert "\n> ddp " in done.stdout
    assert "\nsbatch --nodes=4 --gpus-per-node=8 slurm/train.sh gpt2-1558m \\\n    --parallel" in done.stdout
    done = jobs.command("plan", "--budget", "24gpu-hours", "--device", "4090", "--json")
    assert done.code == 0, done
    figures = json.loads(done.stdout)
    assert figures["optimum"]["preset"] in figures["command"]
    assert figures["best"] in figures["layouts"]
    assert figures["cluster"]["device"]["memory"] == DEVICES["4090"].memory


def test_mistakes_are_one_line() -> None:
    for arguments, error in (
        (("gpt2-124m", "--device=h1000"), "unknown device h1000; did you mean h100?"),
        (("gpt2-124",), "unknown preset gpt2-124: did you mean gpt2-124m?"),
        (("gpt2-124m", "--tokens=many"), "argument --tokens: 'many' is not a positive number"),
        (("gpt2-124m", "--budget=24h"), "argument --budget: '24h' is no budget: write 24gpu-hours or 3gpu-days"),
        (("gpt2-124m", "--mfu=40"), "--mfu is 40: it must be above 0 and at most 1"),
        (("modern-7b", "--device=4090"), "nothing fits: a rank needs at least 120.8 GiB"),
    ):
        done = jobs.command("plan", *arguments)
        assert done.code == 2, done
        assert done.stderr.startswith(f"distgpt: error: {error}"), done
        assert len(done.stderr.splitlines()) == 1, done
