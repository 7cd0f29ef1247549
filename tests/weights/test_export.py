"""Exported models compute in transformers what they compute here."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import SafetensorError

from distgpt.checkpoint.choice import choose
from distgpt.checkpoint.reader import load_for_inference, read_tensors
from distgpt.cli import export_options
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.errors import DirectoryError, StorageError, UsageError
from distgpt.export import main, require_standard
from distgpt.model.generate import Sampling, generate
from distgpt.weights import writer
from distgpt.weights.architectures import architecture_of
from distgpt.weights.files import WeightFiles
from tests import jobs
from tests.weights.shapes import CLASSES, SHAPES

# Bytes that pad the embedding of 31 tokens to 64 rows of 32 values.
PADDING = (64 - 31) * 32 * 4

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


def export(run: Path, output: Path, *options: str) -> Path:
    main(*export_options([str(run), str(output), *options]))
    return output


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_logits_and_text(
    shape: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_of(shape)
    ours, _, _ = load_for_inference(run, CPU)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "exported"))
    assert type(theirs).__name__ == CLASSES[shape.split()[0]]
    tokens_BT = torch.randint(0, ours.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = ours(tokens_BT), theirs.eval()(tokens_BT).logits
    assert expected.std() > 0.05, "the logits say nothing"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
    prompts = tokens_BT[:, :4]
    texts: list[list[int]] = prompts.tolist()
    generators = [torch.Generator()] * len(texts)
    for row, token in generate(ours, texts, max_tokens=20, sampling=Sampling(temperature=0.0), generators=generators):
        texts[row].append(token)
    assert theirs.generate(prompts, max_new_tokens=20, do_sample=False).tolist() == texts
    assert len({token for text in texts for token in text[4:]}) > 3, texts


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["seed"], "model.head_bias is true, and no output projection there has a bias"),
        (["quickstart"], "model.mlp is relu2, and Llama and Qwen have swiglu"),
        (["gpt2-124m", "--model.qk_norm=true"], "model.qk_norm is true, and GPT-2 has none"),
        (["gpt2-124m", "--model.mlp=relu2"], "model.mlp is relu2, and GPT-2 has gelu or relu"),
        (["modern-1b", "--model.norm=layernorm"], "model.norm is layernorm, and Llama and Qwen have rmsnorm"),
        (["modern-1b", "--model.qkv_bias=true"], "model.qk_norm is true together with biases, and Qwen3 has none"),
    ],
)
def test_a_model_without_a_standard_architecture_is_refused_with_the_reason(arguments: list[str], reason: str) -> None:
    with pytest.raises(UsageError) as refused:
        require_standard(resolve(arguments, {}))
    assert reason in str(refused.value)
    assert "--format=plain writes its weights as they are" in str(refused.value)


@pytest.mark.parametrize(
    ("preset", "architecture"),
    [("gpt2-124m", "gpt2"), ("gpt2-1558m", "gpt2"), ("modern-125m", "qwen3"), ("modern-7b", "qwen3")],
)
def test_the_presets_have_standard_architectures(preset: str, architecture: str) -> None:
    assert architecture_of(resolve([preset], {}).model) == architecture


def test_a_large_model_is_written_in_several_files(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is read from the checkpoint and written before the next one."""
    whole = export(run_of("qwen3"), tmp_path / "whole")
    read: list[int] = []

    def counted(tensors: dict[str, Any], *arguments: Any, **options: Any) -> None:
        read.append(sum(tensor.nbytes for tensor in tensors["model"].values()))
        read_tensors(tensors, *arguments, **options)

    monkeypatch.setattr(writer, "FILE_BYTES", 20_000)
    monkeypatch.setattr(writer, "read_tensors", counted)
    parts = export(run_of("qwen3"), tmp_path / "parts")
    files = sorted(file.name for file in parts.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(read):05d}.safetensors" for number in range(1, len(read) + 1)]
    assert len(read) > 2
    assert max(read) <= 20_000 + PADDING
    one, several = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (whole, parts))
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_the_files_say_what_the_model_is(run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path) -> None:
    exported = export(run_of("qwen3"), tmp_path / "exported", "--checkpoint=1")
    assert {file.name for file in exported.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert len({stat.S_IMODE(file.stat().st_mode) for file in exported.iterdir()}) == 1
    card = (exported / "README.md").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert f"| parameters | {theirs.num_parameters():,} |" in card
    assert f"| training | 1 steps of 64 sequences: {64 * 24:,} tokens seen |" in card
    assert "| validation loss | 4.0000 nats per token (perplexity 54.60) |" in card
    assert dataset.fingerprint[:12] in card
    assert "license:" not in card.split("---")[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "über\n\n ab"
    assert tokenizer(text).input_ids == load_tokenizer(dataset.path).encode(text).tolist()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2", "qwen3"])
def test_llama_cpp_knows_every_tensor(shape: str, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Its converter renames tensors by the map of the package gguf, and refuses a model with another one."""
    names = WeightFiles(export(run_of(shape), tmp_path / "exported")).names
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, shape.upper()), 2)
    assert [name for name in names if known.get_name(name, (".weight", ".bias")) is None] == []


def test_the_config_has_what_the_converter_of_llama_cpp_reads(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """It reads these keys without a default: conversion/gpt2.py, and set_gguf_parameters of the base class."""
    gpt2 = json.loads((export(run_of("gpt2"), tmp_path / "gpt2") / "config.json").read_text())
    assert (gpt2["n_ctx"], gpt2["n_embd"], gpt2["n_head"], gpt2["n_layer"]) == (24, 32, 4, 2)
    assert gpt2["layer_norm_epsilon"] == 1e-5
    qwen3 = json.loads((export(run_of("qwen3"), tmp_path / "qwen3") / "config.json").read_text())
    assert (qwen3["max_position_embeddings"], qwen3["hidden_size"], qwen3["intermediate_size"]) == (24, 32, 128)
    assert (qwen3["num_attention_heads"], qwen3["num_key_value_heads"], qwen3["head_dim"]) == (4, 2, 8)
    assert (qwen3["rope_theta"], qwen3["rms_norm_eps"], qwen3["num_hidden_layers"]) == (10000.0, 1e-6, 2)


def test_an_export_replaces_only_an_export(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run, output = run_of("gpt2"), tmp_path / "exported"
    output.mkdir()
    export(run, output)  # an empty directory is free
    with pytest.raises(DirectoryError, match="is not empty: choose another directory, or --overwrite it"):
        export(run, output)
    export(run, output, "--overwrite", "--checkpoint=1")
    assert "1 steps" in (output / "README.md").read_text()
    (output / "thesis.tex").touch()
    with pytest.raises(DirectoryError, match=r"holds thesis\.tex, which no export wrote"):
        export(run, output, "--overwrite")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exported"]


def test_an_export_does_not_replace_one_that_ends_while_it_runs(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = run_of("llama"), tmp_path / "exported"

    def choose_late(path: Path, which: str) -> Path:
        monkeypatch.setattr("distgpt.export.choose", choose)
        with pytest.raises(DirectoryError, match="another process is preparing"):
            export(run, output)
        return choose(path, which)

    monkeypatch.setattr("distgpt.export.choose", choose_late)
    export(run, output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_an_export_that_fails_leaves_the_former_one(
    run_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = export(run_of("gpt2"), tmp_path / "exported")
    before = jobs.contents(output)

    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot write .*model.safetensors .*bytes are free.*: .*No space left"):
        export(run_of("qwen3"), output, "--overwrite")
    assert jobs.contents(output) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exported"]
