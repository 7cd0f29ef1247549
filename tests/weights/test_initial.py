"""A run starts from weights of other programs and of other runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distgpt.checkpoint.reader import load_for_inference
from distgpt.config import Config, resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, UsageError
from distgpt.model.gpt import GPT
from distgpt.weights.files import WeightFiles
from distgpt.weights.fit import check_initial_weights
from distgpt.weights.initial import WeightsReader, load_initial_weights
from distgpt.weights.names import layout_of
from distgpt.weights.source import model_of_start, read_model
from tests.weights.shapes import OTHERS, SHAPES
from tests.weights.test_export import export

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
VOCABULARY = 31  # of the random dataset


def started(config: Config, dataset: Dataset) -> GPT:
    """Return the model of a new run of one process."""
    plan = make_plan(config, Runtime(0, 0, 1, 1, CPU), vocab_size=dataset.vocab_size)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=None)
    check_initial_weights(config, dataset, 0)
    load_initial_weights(config, plan, dataset, model, None)
    assert isinstance(model, GPT)
    return model.eval()


def reader_of(source: Path, config: Config, model: GPT, dataset: Dataset) -> WeightsReader:
    """Return the reader of these weights into a model."""
    files = WeightFiles(source)
    return WeightsReader(files, config.model, layout_of(plain=False), model.state_dict(), vocab_size=dataset.vocab_size)


def config_from(source: Path, run: Path, *arguments: str) -> Config:
    return resolve([f"--init.from={source}", f"--run.dir={run}", *arguments], {}, model_of=model_of_start)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_model_comes_back(
    shape: str, run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path
) -> None:
    """Biases that it did not have are zeros, and any padding of the vocabulary will do."""
    exported = export(run_of(shape), tmp_path / "exported")
    config = config_from(exported, tmp_path / "run", "--model.vocab_multiple=16", "--model.block_size=20")
    model, (former, _, _) = started(config, dataset), load_for_inference(run_of(shape), CPU)
    tokens_BT = torch.randint(0, dataset.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens_BT) - former(tokens_BT)).abs().max() < 1e-6
    assert not model.token_embedding.weight[dataset.vocab_size :].any()


@pytest.mark.parametrize("shape", [*OTHERS, "gpt2"])
def test_any_model_comes_back_from_a_plain_export(
    shape: str, run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path
) -> None:
    exported = export(run_of(shape), tmp_path / "exported", "--format=plain")
    files = {"README.md", "config.toml", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in exported.iterdir()} == files
    model, (former, _, _) = (
        started(config_from(exported, tmp_path / "run"), dataset),
        load_for_inference(run_of(shape), CPU),
    )
    assert model.config == former.config
    tokens_BT = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens_BT), former(tokens_BT))


GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": VOCABULARY}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "vocab_size": VOCABULARY,
}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gpt2 without prefix": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rms_norm_eps=1e-5)),
    "llama with theta": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "qwen3 with wide heads": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=24)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True)
    ),
}


def saved(kind: str, directory: Path, **options: Any) -> Any:
    """Return a random model of transformers, after saving it."""
    torch.manual_seed(4)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory, **options)
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["one file", "sharded"])
def test_a_model_of_transformers_computes_the_same_here(
    kind: str, options: dict[str, Any], dataset: Dataset, tmp_path: Path
) -> None:
    theirs = saved(kind, tmp_path / "theirs", **options)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == bool(options)
    ours = started(config_from(tmp_path / "theirs", tmp_path / "run"), dataset)
    tokens_BT = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours(tokens_BT)
        if kind == "gpt2 without prefix":
            expected = theirs(tokens_BT).last_hidden_state @ theirs.wte.weight.T
        else:
            expected = theirs(tokens_BT).logits
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-5


def test_half_precision_and_left_over_masks_are_read(dataset: Dataset, tmp_path: Path) -> None:
    """OpenAI's own file of GPT-2 holds the causal masks as well."""
    saved("gpt2", tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(file).items()}
    save_file({**tensors, "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8)}, file)
    ours = started(config_from(tmp_path / "theirs", tmp_path / "run"), dataset)
    expected = tensors["transformer.h.1.mlp.c_fc.weight"].float().T
    assert torch.equal(ours.state_dict()["blocks.1.mlp.up.weight"], expected)


def test_a_part_of_a_parameter_is_read_alone(
    run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank with a shard asks for it: the rows of queries, keys and values lie in three tensors."""
    exported = export(run_of("qwen3"), tmp_path / "exported")
    model = started(config_from(exported, tmp_path / "run"), dataset)
    config, read = config_from(exported, tmp_path / "run"), []
    reader = reader_of(exported, config, model, dataset)
    inner = WeightFiles.read

    def counted(self: WeightFiles, name: str, *ranges: range) -> torch.Tensor:
        value = inner(self, name, *ranges)
        read.append(value.numel())
        return value

    monkeypatch.setattr(WeightFiles, "read", counted)
    parameter = "blocks.0.attention.qkv.weight"
    whole = model.state_dict()[parameter]
    columns = range(whole.shape[1])
    for rows in (range(5, 20), range(30, 45), range(64)):
        assert torch.equal(reader.read_parameter(parameter, rows, columns), whole[rows.start : rows.stop])
        assert sum(read) == len(rows) * whole.shape[1]
        read.clear()


def test_another_run_gives_its_weights(run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path) -> None:
    run = run_of("gpt2")
    for source, step in ((str(run), 2), (f"{run}@1", 1), (str(run / "checkpoints" / "step-00000001"), 1)):
        config = resolve([f"--init.from={source}", f"--run.dir={tmp_path}"], {}, model_of=model_of_start)
        model = started(config, dataset)
        expected, _, _ = load_for_inference(run, CPU, str(step))
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--model.n_layer=3"], "model.n_layer is 2 there and 3 here"),
        (["--model.n_head=8", "--model.n_kv_head=8"], "model.n_head is 4 there and 8 here; model.n_kv_head is 2 there"),
        (["--model.qk_norm=false", "--model.norm_eps=1e-4"], "model.norm_eps is 1e-06 there and 0.0001 here; model.qk"),
        (["--model.rope_theta=5"], "model.rope_theta is 10000.0 there and 5.0 here"),
        (["--model.head_bias=true"], "model.head_bias is false there and true here"),
    ],
)
def test_each_key_of_another_model_is_reported(
    arguments: list[str], difference: str, run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path
) -> None:
    for source in (run_of("qwen3"), export(run_of("qwen3"), tmp_path / "exported")):
        with pytest.raises(UsageError) as refused:
            check_initial_weights(config_from(source, tmp_path / "run", *arguments), dataset, 0)
        assert f"init.from: the weights in {source} do not fit this run: {difference}" in str(refused.value)


def test_what_only_matters_in_training_may_differ(
    run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path
) -> None:
    free = ("--model.dropout=0.1", "--model.block_size=16", "--model.loss_chunk=8", "--model.init=normal")
    exported = export(run_of("gpt2"), tmp_path / "exported")
    check_initial_weights(config_from(exported, tmp_path / "run", *free), dataset, 0)
    with pytest.raises(UsageError, match=r"model\.block_size is at most 24 there and 32 here"):
        check_initial_weights(config_from(exported, tmp_path / "run", "--model.block_size=32"), dataset, 0)


def test_another_vocabulary_is_reported(dataset: Dataset, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    exported = export(run_of("gpt2"), tmp_path / "exported")
    config = config_from(exported, tmp_path / "run")
    content = json.loads((exported / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    (exported / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UsageError, match="the tokenizer there cannot be compared with that of"):
        check_initial_weights(config, dataset, 0)
    others = sorted({*vocab, "~"} - {"ü"})
    content["model"]["vocab"] = {character: id_ for id_, character in enumerate(others)}
    (exported / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"token 28 is b'~' there and b'\\xc3\\xa4' in "):
        check_initial_weights(config, dataset, 0)
    (exported / "tokenizer.json").unlink()
    check_initial_weights(config, dataset, 0)  # the sizes agree, and nothing says more
    larger = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "vocab_size": 40}))
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match=f"the vocabulary is 40 there and {VOCABULARY} in "):
        check_initial_weights(config_from(tmp_path / "larger", tmp_path / "run"), dataset, 0)


def test_rows_that_pad_the_vocabulary_are_left_out(
    dataset: Dataset, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As Qwen's: the tokenizer beside the weights has fewer ids than they have rows."""
    larger = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "vocab_size": 40}))
    larger.save_pretrained(tmp_path / "larger")
    exported = export(run_of("gpt2"), tmp_path / "exported")
    shutil.copy(exported / "tokenizer.json", tmp_path / "larger")
    model = started(config_from(tmp_path / "larger", tmp_path / "run", "--model.vocab_multiple=64"), dataset)
    assert torch.equal(model.token_embedding.weight[:VOCABULARY], larger.transformer.wte.weight[:VOCABULARY])
    assert not model.token_embedding.weight[VOCABULARY:].any()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "gpt_neox"}, "is of a model of type 'gpt_neox': distgpt reads gpt2, llama, qwen2, qwen3"),
        ({"num_hidden_layers": "many"}, "model.n_layer is 'many'"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "its rotary frequencies are scaled (llama3)"),
        ({"head_dim": 7}, "rope needs an even head size, but it is 7"),
        ({"attention_bias": True}, "its attention has biases and its feed-forward network has none"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"num_attention_heads": None, "head_dim": None}, "is not valid"),
        ({"num_key_value_heads": 3}, "config.json: model.n_kv_head is 3, which does not divide model.n_head = 4"),
        (
            {"intermediate_size": 64},
            "mlp.up_proj.weight as [48, 32], and its config makes it [64, 32]",
        ),
        ({"num_hidden_layers": 3}, "holds no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "holds model.layers.1.input_layernorm.weight, which its model does not have"),
        ({"num_hidden_layers": 1_000_000}, "has fewer tensors than its config has layers"),
    ],
)
def test_a_model_that_cannot_be_read_is_reported(
    change: dict[str, Any], line: str, dataset: Dataset, tmp_path: Path
) -> None:
    saved("llama", tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((UsageError, DataError)) as refused:
        check_initial_weights(config_from(tmp_path / "theirs", tmp_path / "run"), dataset, 0)
    assert line in str(refused.value)


def test_a_pickle_is_not_read(dataset: Dataset, tmp_path: Path) -> None:
    theirs = saved("gpt2", tmp_path / "theirs")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"no model.safetensors \(pytorch_model.bin is a pickle, which can run code"):
        check_initial_weights(config_from(tmp_path / "theirs", tmp_path / "run"), dataset, 0)


@pytest.mark.parametrize("damage", ["cut", "header", "outside"])
def test_damaged_files_are_reported(damage: str, dataset: Dataset, tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "theirs", max_shard_size="8KB")
    config = config_from(tmp_path / "theirs", tmp_path / "run")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = tmp_path / "theirs" / content["weight_map"]["transformer.wte.weight"]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    else:
        content["weight_map"]["transformer.wte.weight"] = "../model.safetensors"
        index.write_text(json.dumps(content))
    with pytest.raises(DataError, match=str(index if damage == "outside" else file)):
        check_initial_weights(config, dataset, 0)


def test_files_that_become_unreadable_are_reported(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("gpt2", tmp_path / "theirs")

    def fail(self: WeightFiles, name: str, *ranges: range) -> torch.Tensor:
        raise SafetensorError("I/O error: Stale file handle")

    monkeypatch.setattr(WeightFiles, "read", fail)
    with pytest.raises(DataError, match="theirs cannot be read: I/O error: Stale file handle"):
        started(config_from(tmp_path / "theirs", tmp_path / "run"), dataset)


def test_a_config_that_is_a_pipe_is_reported_without_waiting_for_its_writer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DataError, match=r"config.json is not a file$"):
        read_model(tmp_path)


def test_a_path_without_weights_is_reported(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    for source, line in (
        (f"{run_of('gpt2')}@7", r"init.from: \S+ has no checkpoint 7: choose best, newest or a step of 1, 2$"),
        (tmp_path / "nowhere", "there is no directory"),
        (f"{tmp_path / 'nowhere'}@5", "there is no directory"),
        (tmp_path, "holds no checkpoint"),
    ):
        with pytest.raises((UsageError, DataError), match=line):
            config_from(Path(source), tmp_path / "run")
