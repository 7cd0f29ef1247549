"""Write the files of a dataset: hash them on the way, and flush them to the disk."""

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distgpt.corpus.order import Ints
from distgpt.corpus.shards import FORMAT, META, SPLITS, VERSION, Shard, SplitName
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.corpus.tokenizer.base import Tokens
from distgpt.corpus.tokenizer.loading import FILE_NAME as TOKENIZER
from distgpt.files import sync, write_file

TOKENS_PER_LOOKUP = 2**14


@dataclass(frozen=True)
class Documents:
    """Consecutive tokens of one split. `ends`: the offsets in `tokens` at which a document ends, ascending.

    Tokens after the last end belong to a document that goes on in the next Documents of the split.
    """

    split: SplitName
    tokens: Tokens
    ends: Ints


def write_dataset(
    directory: Path,
    documents: Iterable[Documents],
    *,
    tokenizer: Tokenizer,
    eot_id: int | None,
    shard_tokens: int | None,
    about: Mapping[str, Any],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Write a dataset into an empty directory, flush it to the disk and return its meta.json.

    A shard ends with the document that fills `shard_tokens`. `about`: more entries for meta.json. `advance` is called
    with the number of bytes written. Raises OSError.
    """
    token_bytes = tokenizer.token_bytes()
    with ExitStack() as open_files:
        writers = {name: _SplitWriter(directory / name, token_bytes, shard_tokens, open_files) for name in SPLITS}
        for batch in documents:
            writers[batch.split].append(batch.tokens, batch.ends)
            advance(batch.tokens.nbytes)
        for writer in writers.values():
            writer.end_shard()
    shards = {name: [asdict(shard) for shard in writer.shards] for name, writer in writers.items()}
    tokenizer_json = tokenizer.to_json().encode()
    write_file(directory / TOKENIZER, tokenizer_json)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": eot_id,
        "tokenizer": {"kind": tokenizer.kind, "sha256": hashlib.sha256(tokenizer_json).hexdigest()},
        "splits": shards,
        **about,
    }
    if all(len(shards[name]) == 1 for name in SPLITS) and tokenizer.dtype == np.uint16:
        _add_for_nanogpt(directory, tokenizer)
    sync(directory)
    write_file(directory / META, (json.dumps(meta, indent=2) + "\n").encode())
    return meta


def _add_for_nanogpt(directory: Path, tokenizer: Tokenizer) -> None:
    """Add the names under which nanoGPT's train.py and sample.py look for tokens and vocabulary. Raises OSError."""
    with suppress(OSError):  # not every file system has hard links
        for name in SPLITS:
            os.link(directory / f"{name}-00000.bin", directory / f"{name}.bin")
    texts = tokenizer.token_texts()
    ids = {text: id_ for id_, text in reversed(list(enumerate(texts)))}
    content = {"vocab_size": tokenizer.vocab_size, "itos": dict(enumerate(texts)), "stoi": ids}
    write_file(directory / "meta.pkl", pickle.dumps(content, protocol=4))


class _SplitWriter:
    """Writes one split, and starts a new shard after the document that fills one. `shards`: the finished ones."""

    def __init__(self, stem: Path, token_bytes: Ints, shard_tokens: int | None, open_files: ExitStack) -> None:
        self.shards: list[Shard] = []
        self._stem, self._token_bytes, self._open_files = stem, token_bytes, open_files
        self._shard_tokens = sys.maxsize if shard_tokens is None else shard_tokens
        self._shard: _ShardWriter | None = None

    def append(self, tokens: Tokens, ends: Ints) -> None:
        while tokens.size:
            shard = self._shard or _ShardWriter(f"{self._stem}-{len(self.shards):05d}", self._open_files)
            last = int(np.searchsorted(ends, self._shard_tokens - shard.tokens))  # the document that fills the shard
            fills_shard = last < ends.size
            stop = int(ends[last]) if fills_shard else tokens.size
            shard.append(tokens[:stop], ends[: last + 1], self._text_bytes(tokens[:stop]))
            tokens, ends = tokens[stop:], ends[last + 1 :] - stop
            self._shard = shard
            if fills_shard:
                self.end_shard()

    def _text_bytes(self, tokens: Tokens) -> int:
        """Return the bytes of text in these tokens, looked up in pieces that fit into the processor's cache."""
        pieces = (tokens[start : start + TOKENS_PER_LOOKUP] for start in range(0, tokens.size, TOKENS_PER_LOOKUP))
        return sum(int(self._token_bytes.take(piece).sum()) for piece in pieces)

    def end_shard(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.finish())
            self._shard = None


class _ShardWriter:
    """Writes one .bin and its .idx."""

    def __init__(self, stem: str, open_files: ExitStack) -> None:
        self._bin, self._idx = (_HashedFile(Path(stem + suffix), open_files) for suffix in (".bin", ".idx"))
        self._idx.write(np.zeros(1, dtype="<u8"))
        self.tokens = self._documents = self._bytes = 0

    def append(self, tokens: Tokens, ends: Ints, text_bytes: int) -> None:
        self._bin.write(tokens)
        self._idx.write((ends + self.tokens).astype("<u8"))
        self.tokens += tokens.size
        self._documents += ends.size
        self._bytes += text_bytes

    def finish(self) -> Shard:
        return Shard(
            file=self._bin.path.name,
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            sha256=self._bin.finish(),
            index=self._idx.path.name,
            index_sha256=self._idx.finish(),
        )


class _HashedFile:
    """A file that is hashed while it is written. If `finish` is never called, `open_files` closes it."""

    def __init__(self, path: Path, open_files: ExitStack) -> None:
        self.path = path
        self._file = open_files.enter_context(path.open("wb"))
        self._digest = hashlib.sha256()

    def write(self, array: npt.NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array).data
        self._file.write(raw)
        self._digest.update(raw)

    def finish(self) -> str:
        """Flush the file to the disk, close it and return its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()
