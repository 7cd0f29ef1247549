"""Encode the input in units: each becomes one part file."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from distgpt.corpus.preparing import parts
from distgpt.corpus.preparing.scan import Advance, Scan, ScannedPiece, grouped, read_again
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.reading import sources
from distgpt.corpus.reading.reader import open_source
from distgpt.corpus.reading.sources import Piece, Source
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.corpus.tokenizer.base import Tokens
from distgpt.corpus.tokenizer.bpe import BpeTokenizer
from distgpt.corpus.tokenizer.fast import FastEncoder, MismatchError
from distgpt.errors import DataError

CHECKED_CHARACTERS = 2**15  # of each part: a few percent of the time that its encoding takes


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces, together about UNIT_BYTES, either all of validation text that was named or none."""

    index: int
    pieces: list[ScannedPiece]

    @property
    def validates(self) -> bool:
        return self.pieces[0].piece.source.validates

    @property
    def text_bytes(self) -> int:
        return sum(scanned.text_bytes for scanned in self.pieces)


@dataclass(frozen=True)
class EncodeOptions:
    """Options of encoding, the same for all units. `tokenizer`: its file. `fast`: let gigatoken encode.

    `hashes`: the text hash of documents that are longer than a piece, by path.
    """

    tokenizer: Path
    eot_id: int | None
    hashes: Mapping[str, int]
    fast: bool = False


def units_of(found: Scan) -> list[Unit]:
    """Group the pieces of the input into units."""
    by_split = groupby(found.pieces, key=lambda scanned: scanned.piece.source.validates)
    groups = (group for _, pieces in by_split for group in grouped(pieces, lambda scanned: scanned.text_bytes))
    return [Unit(index, pieces) for index, pieces in enumerate(groups)]


def hash_long_documents(found: Scan, workers: Workers) -> dict[str, int]:
    """Return the text hashes of the documents that are longer than a piece, by path. Raises DataError and OSError."""
    firsts = [scanned.piece for scanned in found.pieces if scanned.piece.start == 0]
    long = [piece.source for piece in firsts if piece.source.format == "text" and not piece.last]
    return {long[index].path: value for index, value in workers.run(_hash_document, long)}


def encode(
    units: Sequence[Unit], directory: Path, *, options: EncodeOptions, workers: Workers, advance: Advance
) -> bool:
    """Write the parts of these units; `advance` gets the bytes encoded. Raises DataError, OSError.

    Returns False if gigatoken gave other ids somewhere than the tokenizer: no part can be relied on then.
    """
    runs = [list(group) for _, group in groupby(units, key=_file_key)]
    # A worker that starts inside a compressed file reads it from its beginning: divide one only if workers are idle.
    share = max(workers.count // len(runs), 1)
    tasks = []
    for run in runs:
        size = -(-len(run) // share)
        tasks += [(run[start : start + size], directory, options) for start in range(0, len(run), size)]
    is_right = True
    load_once.cache_clear()  # this process may have encoded with another tokenizer
    is_small = sum(unit.text_bytes for unit in units) <= sources.UNIT_BYTES
    for _, text_bytes in workers.run(encode_units, tasks, here=is_small):
        is_right &= text_bytes is not None
        advance(text_bytes or 0)
    return is_right


def encode_units(task: tuple[Sequence[Unit], Path, EncodeOptions]) -> Iterator[int | None]:
    """Write the part of each unit, and yield its bytes of text; None, and no more, if gigatoken gives other ids."""
    try:
        yield from _encode_units(*task)
    except MismatchError:
        yield None


def _encode_units(units: Sequence[Unit], directory: Path, options: EncodeOptions) -> Iterator[int]:
    tokenizer = load_once(options.tokenizer, options.fast)
    contents = read_again([scanned for unit in units for scanned in unit.pieces])
    for unit in units:
        encoded: list[tuple[parts.Row, Tokens]] = []
        unchecked = CHECKED_CHARACTERS
        for _ in unit.pieces:
            scanned, content = next(contents)
            unchecked = _check(tokenizer, scanned.piece, content.texts, unchecked)
            encoded += _encode_piece(scanned.piece, content.texts, tokenizer, options)
        parts.write_part(directory, unit.index, encoded)
        yield unit.text_bytes


@lru_cache(maxsize=1)
def load_once(path: Path, fast: bool) -> Tokenizer | FastEncoder:
    """Return the tokenizer in the file, or one that encodes as it does."""
    tokenizer = load_tokenizer(path)
    if not fast:
        return tokenizer
    assert isinstance(tokenizer, BpeTokenizer)
    return FastEncoder(tokenizer)


def _hash_document(source: Source) -> Iterator[int]:
    """Yield the text hash of a text file that is too long for one piece."""
    with open_source(source) as reader:
        yield _text_hash(reader.content(piece).texts[0] for piece in reader.pieces())


def _text_hash(pieces: Iterable[str]) -> int:
    """Return a 64-bit hash of a document's UTF-8 text."""
    digest = hashlib.blake2b(digest_size=8)
    for text in pieces:
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "big")


def _file_key(unit: Unit) -> tuple[str, int]:
    """Return a key that is equal for units of one compressed file."""
    source = unit.pieces[0].piece.source
    return ("", unit.index) if source.is_seekable else (source.path, 0)


def _check(tokenizer: Tokenizer | FastEncoder, piece: Piece, texts: Sequence[str], characters: int) -> int:
    """Check the ids of at most `characters` characters; return how many are still to check. Raises DataError."""
    for text in texts:
        if not characters:
            break
        try:
            tokenizer.check(text[:characters])
        except DataError as error:
            raise DataError(f"the tokenizer is wrong for {piece.source.name}: {error}") from None
        characters -= len(text[:characters])
    return characters


def _encode_piece(
    piece: Piece, texts: Sequence[str], tokenizer: Tokenizer | FastEncoder, options: EncodeOptions
) -> Iterator[tuple[parts.Row, Tokens]]:
    """Yield the row and the tokens of each document in a piece."""
    is_text = piece.source.format == "text"
    ends = not is_text or piece.last
    if tokenizer.needs_whole_text and is_text and not (piece.start == 0 and piece.last):
        raise DataError(
            f"{piece.source.name} is a text of more than {sources.UNIT_BYTES / 2**20:.0f} MiB, and this tokenizer "
            f"gives other ids for parts of a text: divide it with --document-separator, or give documents as JSON lines"
        )
    known = options.hashes.get(piece.source.path) if is_text else None
    end_of_text = np.array([options.eot_id] if ends and options.eot_id is not None else [], dtype=tokenizer.dtype)
    for text in filter(None, texts):
        ids = tokenizer.encode(text)
        ids = np.concatenate((ids, end_of_text)) if end_of_text.size else ids
        yield (ids.size, ends, _text_hash([text]) if known is None else known), ids
