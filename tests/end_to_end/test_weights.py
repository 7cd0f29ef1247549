"""Whole runs that start from weights of transformers and of other runs, and their export."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import jobs
from tests.end_to_end.conftest import ARGUMENTS, RANKS, Trained, tiny
from tests.once import made_once

# A step that changes no weight: its learning rate is far below the precision of float32.
STILL = ("--optim.lr=1e-30", "--train.steps=1", "--parallel.outer_every=1", "--model.dropout=0.0", "--eval.every=1")


@pytest.fixture(scope="module")
def gpt2(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of the shape of jobs.TINY, saved by transformers in several files."""
    transformers = pytest.importorskip("transformers")

    def save(directory: Path) -> None:
        vocab_size = json.loads((prepared / "meta.json").read_text())["vocab_size"]
        torch.manual_seed(2)
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=vocab_size)
        transformers.GPT2LMHeadModel(config).save_pretrained(directory, max_shard_size="8KB")

    return made_once(tmp_path_factory, "random-gpt2", save)


@pytest.mark.parametrize("strategy", ["single", "fsdp", "diloco"])
def test_a_run_starts_from_weights_of_transformers_and_reads_them_once(
    gpt2: Path, prepared: Path, tmp_path: Path, strategy: str
) -> None:
    """Every strategy saves what it has read. A run that goes on has no need of the directory."""
    source, run = shutil.copytree(gpt2, tmp_path / "gpt2"), tmp_path / "run"
    arguments = [*tiny(prepared, run), *ARGUMENTS[strategy], f"--init.from={source}", *STILL]
    ended = jobs.train(RANKS[strategy], *arguments)
    assert ended.code == 0, ended
    assert f"starting from the weights in {source}" in ended.stdout
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(gpt2).state_dict()
    ours = jobs.tensors(run / "checkpoints" / "step-00000001")
    for name, expected in (
        ("token_embedding.weight", theirs["transformer.wte.weight"]),
        ("position_embedding.weight", theirs["transformer.wpe.weight"][:16]),
        ("blocks.0.attention.qkv.weight", theirs["transformer.h.0.attn.c_attn.weight"].T),
        ("blocks.1.mlp.down.weight", theirs["transformer.h.1.mlp.c_proj.weight"].T),
    ):
        assert torch.equal(ours[f"model.{name}"], expected), name
    if strategy == "single":
        replayed = jobs.command("replay", run, "--step=1")
        assert "from      the initial weights" in replayed.stdout, replayed
        [loss] = re.findall(r"replayed  loss (\S+)", replayed.stdout)
        assert float(loss) == pytest.approx(jobs.losses(run)[1], rel=1e-5)
    shutil.rmtree(source)
    again = jobs.train(RANKS[strategy], *arguments, "--train.steps=2")
    assert again.code == 0, again
    assert "going on from step 1" in again.stdout
    assert "starting from the weights" not in again.stdout


def test_a_run_starts_from_another_run(whole: Callable[[str], Trained], prepared: Path, tmp_path: Path) -> None:
    """What two ranks have sharded starts one process, as a new run: at step 1, with new moments."""
    source = whole("fsdp")
    ended = jobs.train(1, *tiny(prepared, tmp_path), f"--init.from={source.run}@36", *STILL)
    assert ended.code == 0, ended
    assert f"starting from the weights of step 36 in {source.run}" in ended.stdout
    first = jobs.tensors(tmp_path / "checkpoints" / "step-00000001")
    then = jobs.tensors(source.last)
    model = [name for name in then if name.startswith("model.")]
    assert [name for name in model if not torch.equal(first[name], then[name])] == []
    assert not any(torch.equal(first[name], then[name]) for name in then if "exp_avg_sq" in name)


def test_weights_of_another_shape_are_one_line(gpt2: Path, prepared: Path, tmp_path: Path) -> None:
    ended = jobs.torchrun(2, *tiny(prepared, tmp_path), f"--init.from={gpt2}", "--model.n_layer=3")
    assert len(ended.error_lines) == 1, ended
    assert ended.traceback == []
    assert f"the weights in {gpt2} do not fit this run: model.n_layer is 2 there and 3 here" in ended.error_lines[0]
    assert jobs.exit_report(tmp_path)["code"] == 2


def test_what_two_ranks_have_sharded_is_exported(whole: Callable[[str], Trained], tmp_path: Path) -> None:
    source = whole("fsdp")
    done = jobs.command("export", source.run, tmp_path / "plain", "--format=plain")
    assert (done.code, done.stderr) == (0, ""), done
    assert done.stdout == f"wrote step 36 of {source.run} to {tmp_path / 'plain'}\n"
    saved = jobs.tensors(source.last)
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    assert exported.keys() == {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in exported.items())


def test_a_model_without_a_standard_architecture_is_one_line(whole: Callable[[str], Trained], tmp_path: Path) -> None:
    done = jobs.command("export", whole("fsdp").run, tmp_path / "exported")
    assert (done.code, done.stdout, len(done.error_lines)) == (2, "", 1), done
    assert "model.head_bias is true, and no output projection there has a bias" in done.stderr
    assert list(tmp_path.iterdir()) == []
