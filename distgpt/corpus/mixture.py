"""The data of a run: one dataset, or several that are mixed by weight."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from distgpt.config import shares_of
from distgpt.corpus.order import SHARE_UNITS
from distgpt.corpus.shards import Dataset, Part, Split, SplitName, open_dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.corpus.tokenizer.base import differences
from distgpt.errors import UsageError


def open_data(data_path: str) -> Dataset:
    """Open what data.path names, see shares_of(). Raises DataError, UsageError if the datasets do not fit together."""
    shares = shares_of(data_path)
    if len(shares) == 1:
        if "," in data_path and not Path(data_path).exists():
            raise UsageError(f"no data in {data_path}: to mix several, give each a weight, as in data/a:0.7,data/b:0.3")
        return open_dataset(Path(data_path))
    datasets = [open_dataset(Path(path)) for path, _ in shares]
    for number, dataset in enumerate(datasets):
        _require_same_tokenizer(datasets[0], dataset)
        for earlier in datasets[:number]:
            if earlier.fingerprint == dataset.fingerprint:
                raise UsageError(f"{earlier.path} and {dataset.path} are the same data: name it once, with one weight")
    weights = [share for _, share in shares]
    lines = [f"{d.fingerprint} {round(share * SHARE_UNITS)}" for d, share in zip(datasets, weights, strict=True)]
    return Dataset(
        path=datasets[0].path,
        meta=datasets[0].meta,
        vocab_size=datasets[0].vocab_size,
        # A single document has no end-of-text token.
        eot_id=next((dataset.eot_id for dataset in datasets if dataset.eot_id is not None), None),
        fingerprint=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        train=_mixed("train", datasets, weights),
        val=_mixed("val", datasets, weights),
        mixed=tuple(datasets),
    )


def _mixed(name: SplitName, datasets: Sequence[Dataset], weights: Sequence[float]) -> Split:
    splits = [dataset.train if name == "train" else dataset.val for dataset in datasets]
    parts = (
        Part(shown, f"{name} split of {dataset.path}", split.parts[0].lengths, share)
        for shown, dataset, split, share in zip(_names(datasets), datasets, splits, weights, strict=True)
    )
    return Split(name, tuple(shard for split in splits for shard in split.shards), tuple(parts))


def _names(datasets: Sequence[Dataset]) -> Iterator[str]:
    """Yield the names of the directories or, if two are equal, their paths."""
    names = [dataset.path.name for dataset in datasets]
    return (dataset.path.name if len(set(names)) == len(names) else str(dataset.path) for dataset in datasets)


def _require_same_tokenizer(first: Dataset, other: Dataset) -> None:
    if first.meta["tokenizer"]["sha256"] != other.meta["tokenizer"]["sha256"]:
        theirs, ours = load_tokenizer(first.path), load_tokenizer(other.path)
        found = "; ".join(differences(theirs, ours, other.path)) or "their tokens are equal, but not their files"
        raise UsageError(
            f"{other.path} has another tokenizer than {first.path} ({found}): "
            f"prepare it again with --tokenizer {first.path}"
        )
