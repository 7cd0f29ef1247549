"""Check that the weights which init.from names fit the model and the data of a run."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from distgpt.checkpoint.manifest import TOKENIZER, committed
from distgpt.config import Config, ModelConfig, value_text
from distgpt.corpus.shards import Dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.corpus.tokenizer.base import differences
from distgpt.errors import DataError, UsageError
from distgpt.model.gpt import meta_model, with_explicit_sizes
from distgpt.run.paths import RunPaths
from distgpt.weights.files import WeightFiles
from distgpt.weights.names import Layout, layout_of
from distgpt.weights.source import find_state, is_plain, is_weights, model_of_state, parse, read_model

# Keys that decide what the weights compute; the others of model.* only matter in training.
COMPUTED = (
    *("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "position", "norm", "norm_eps", "mlp", "mlp_hidden"),
    *("qkv_bias", "bias", "qk_norm", "tied_head"),
)
# Masks and rotary frequencies, which older files hold as well.
NOT_WEIGHTS = re.compile(r".*\battn\.(bias|masked_bias)|.*\brotary_emb\.inv_freq")


def check_initial_weights(config: Config, dataset: Dataset, rank: int) -> None:
    """Check on rank 0 that the weights which init.from names fit the model and the data. No rank has joined yet.

    A run that has checkpoints goes on from those. Raises UsageError with each difference, DataError if the files
    cannot be read.
    """
    if rank or not config.init.from_ or committed(RunPaths(config.run_dir).checkpoints):
        return
    path, choice = parse(config.init.from_)
    if is_weights(path):
        files, theirs = WeightFiles(path), read_model(path)
        vocab_size = require_shapes(files, theirs, layout_of(plain=is_plain(path)))
        models = list(_model_differences(theirs, config.model))
        vocabularies = list(_vocabulary_differences(path, vocab_size, dataset))
    else:
        state, checkpoint = find_state(path, choice)
        theirs = model_of_state(state, checkpoint)
        models, vocabularies = list(_model_differences(theirs, config.model, "block_size", "vocab_multiple")), []
        if state.tokenizer_sha256 != dataset.meta["tokenizer"]["sha256"] or state.vocab_size != dataset.vocab_size:
            path, vocabularies = checkpoint, list(_vocabulary_differences(checkpoint, state.vocab_size, dataset))
    fixes = ["leave out the presets and keys of model.* that say otherwise"] if models else []
    fixes += [f"prepare the data with --tokenizer {path}"] if vocabularies else []
    if fixes:
        differences = "; ".join([*models, *vocabularies])
        raise UsageError(f"init.from: the weights in {path} do not fit this run: {differences}: {', and '.join(fixes)}")


def require_shapes(files: WeightFiles, model: ModelConfig, layout: Layout) -> int:
    """Raise DataError unless files hold exactly the tensors of a model; return the number of rows of its embedding."""
    if model.n_layer > len(files.names):
        raise DataError(f"{files.directory} has fewer tensors than its config has layers")
    vocab_size = files.shape(files.find(layout("token_embedding.weight", model).names[0]))[0]
    expected = meta_model(replace(model, vocab_multiple=1), vocab_size).state_dict()
    used = {"lm_head.weight"} if model.tied_head else set()
    for name, parameter in expected.items():
        stored = layout(name, model)
        for part, tensor in stored.split(parameter).items():
            found = files.find(part)
            used.add(found)
            if files.shape(found) != tensor.shape:
                shapes = f"{list(files.shape(found))}, and its config makes it {list(tensor.shape)}"
                raise DataError(f"{files.directory} holds {found} as {shapes}")
    others = sorted(name for name in files.names - used if not NOT_WEIGHTS.fullmatch(name))
    if others:
        raise DataError(f"{files.directory} holds {others[0]}, which its model does not have")
    return vocab_size


def _model_differences(theirs: ModelConfig, ours: ModelConfig, *more: str) -> Iterator[str]:
    """Yield each difference between two models because of which one cannot use the weights of the other."""
    then, now = with_explicit_sizes(theirs), with_explicit_sizes(ours)
    names = [*COMPUTED, *more]
    names += ["head_bias"] if not theirs.tied_head else []
    names += ["rope_theta"] if theirs.position == "rope" else []
    for name in names:
        if getattr(then, name) != getattr(now, name):
            yield f"model.{name} is {value_text(getattr(then, name))} there and {value_text(getattr(now, name))} here"
    if theirs.position == "learned" and ours.block_size > theirs.block_size:
        yield f"model.block_size is at most {theirs.block_size} there and {ours.block_size} here"


def _vocabulary_differences(path: Path, vocab_size: int, dataset: Dataset) -> Iterator[str]:
    """Yield each difference between the tokens of a model and of the data.

    A model may have more rows than its tokenizer has ids, to pad them, if the tokenizer says so.
    """
    known = (path / TOKENIZER).is_file()
    if dataset.vocab_size > vocab_size or (dataset.vocab_size != vocab_size and not known):
        yield f"the vocabulary is {vocab_size:,} there and {dataset.vocab_size:,} in {dataset.path}"
    elif known:
        try:
            theirs = load_tokenizer(path / TOKENIZER)
        except DataError as error:
            yield f"the tokenizer there cannot be compared with that of {dataset.path} ({error})"
            return
        yield from differences(theirs, load_tokenizer(dataset.path), dataset.path)
