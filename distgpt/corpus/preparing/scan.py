"""Read the whole input once: check it, cut it into pieces, count and hash it."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np

from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.reading import sources
from distgpt.corpus.reading.reader import open_source
from distgpt.corpus.reading.sources import BadDocument, Content, Piece, Source, utf8_size
from distgpt.errors import DataError

MAX_PLACES = 10
ON_BAD_HINT = "--on-bad-document=skip leaves such documents out"

T = TypeVar("T")
Advance = Callable[[int], None]
# Pieces of sources that are seekable, or one source that has to be read through.
Work = list[Piece] | Source


class ScannedPiece(NamedTuple):
    """A piece and facts about its content. `characters`: those of its text, sorted, if the scan was asked for them.

    `rows` counts its lines, Parquet rows or documents, including empty ones. `bad`: its first bad documents.
    """

    piece: Piece
    documents: int
    text_bytes: int
    digest: bytes
    characters: str
    rows: int
    bad: list[BadDocument]
    skipped: int
    replaced: int
    separators: int


class BadDocuments(NamedTuple):
    """Counts of bad documents: left out, or read with U+FFFD in them. `places`: the first of both, with the reason."""

    skipped: int
    replaced: int
    places: list[str]


@dataclass(frozen=True)
class Scan:
    """Facts about the whole input. `documents` counts those that are not empty; `fingerprint`: SHA-256 of all content.

    `separators` counts the separators of documents, or lines that look like one if no separator was given.
    """

    pieces: list[ScannedPiece]
    documents: int
    text_bytes: int
    characters: str
    fingerprint: str
    bad: BadDocuments
    separators: int


def scan_input(inputs: Sequence[Source], *, characters: bool, workers: Workers, advance: Advance) -> Scan:
    """Read the whole input; `advance` is called with the bytes read. Raises DataError for bad text or none, OSError."""
    stops = any(source.options.on_bad == "stop" for source in inputs)
    tasks = list(_divide(inputs))
    results: list[list[ScannedPiece]] = [[] for _ in tasks]
    is_small = sum(os.path.getsize(source.path) for source in inputs) <= sources.UNIT_BYTES
    here = is_small and not any(source.compression for source in inputs)
    for index, (scanned, consumed) in workers.run(scan_task, [(work, characters) for work in tasks], here=here):
        results[index].append(scanned)
        advance(consumed)
        if stops and scanned.skipped:
            _raise_if_bad(_scanned_so_far(tasks, results), all_read=False)
    pieces = [scanned for result in results for scanned in result]
    if stops:
        _raise_if_bad(pieces, all_read=True)
    bad = bad_documents(pieces)
    # A text file with a bad piece is left out as a whole.
    left_out = {scanned.piece.source for scanned in pieces if scanned.skipped and scanned.piece.source.format == "text"}
    pieces = [scanned for scanned in pieces if scanned.piece.source not in left_out]
    documents = sum(scanned.documents for scanned in pieces)
    _check_text(inputs, pieces, documents, bad)
    digest = hashlib.sha256()
    for scanned in pieces:
        digest.update(scanned.digest + bytes([scanned.piece.last + 2 * scanned.piece.source.validates]))
    return Scan(
        pieces=pieces,
        documents=documents,
        text_bytes=sum(scanned.text_bytes for scanned in pieces),
        characters="".join(sorted(set().union(*{scanned.characters for scanned in pieces}))),
        fingerprint=digest.hexdigest(),
        bad=bad,
        separators=sum(scanned.separators for scanned in pieces),
    )


def scan_task(task: tuple[Work, bool]) -> Iterator[tuple[ScannedPiece, int]]:
    """Yield each piece of the work, scanned, and the bytes read for it.

    `task`: the work, and whether to collect the characters.
    """
    work, characters = task
    if isinstance(work, Source):
        with open_source(work) as reader:
            before = 0
            for piece in reader.pieces():
                yield scan_piece(reader.content(piece), piece, characters), reader.consumed - before
                before = reader.consumed
        return
    for piece in work:
        with open_source(piece.source) as reader:
            yield scan_piece(reader.content(piece), piece, characters), piece.stop - piece.start


def scan_piece(content: Content, piece: Piece, characters: bool) -> ScannedPiece:
    """Return a piece with the facts about its content."""
    is_text = piece.source.format == "text"
    return ScannedPiece(
        piece=piece,
        documents=int(piece.start == 0) if is_text else sum(text != "" for text in content.texts),
        text_bytes=sum(map(utf8_size, content.texts)),
        digest=content.digest,
        characters=_characters_of("".join(content.texts)) if characters else "",
        rows=len(content.texts),
        bad=content.bad[:MAX_PLACES],
        skipped=sum(not bad.replaced for bad in content.bad),
        replaced=sum(bad.replaced for bad in content.bad),
        separators=content.separators,
    )


def bad_documents(pieces: Sequence[ScannedPiece]) -> BadDocuments:
    """Return the bad documents of these pieces, which must be the first ones of the input."""
    places: list[str] = []
    skipped = replaced = 0
    for source, group in groupby(pieces, key=lambda scanned: scanned.piece.source):
        of_source, here, before = list(group), list[str](), 0
        for scanned in of_source:
            here += [bad.place(source, before) for bad in scanned.bad]
            before += scanned.rows
        # A text file is one document, however many of its pieces are bad.
        most = 1 if source.format == "text" else before
        places += here[:most]
        del places[MAX_PLACES:]
        skipped += min(sum(scanned.skipped for scanned in of_source), most)
        replaced += min(sum(scanned.replaced for scanned in of_source), most)
    return BadDocuments(skipped, replaced, places)


def read_again(pieces: Sequence[ScannedPiece]) -> Iterator[tuple[ScannedPiece, Content]]:
    """Yield the pieces with their content; each file is opened once. Raises DataError if it changed since the scan."""
    for source, group in groupby(pieces, key=lambda scanned: scanned.piece.source):
        with open_source(source) as reader:
            for scanned in group:
                content = reader.content(scanned.piece)
                if content.digest != scanned.digest:
                    raise DataError(f"{source.name} changed while it was read: start again")
                yield scanned, content


def grouped(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Group consecutive items, so that the sizes in a group add up to about UNIT_BYTES."""
    group, total = list[T](), 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= sources.UNIT_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


def _divide(inputs: Sequence[Source]) -> Iterator[Work]:
    """Divide the input into the work of tasks."""
    for is_seekable, group in groupby(inputs, key=lambda source: source.is_seekable):
        if is_seekable:
            yield from grouped(_pieces_of(group), lambda piece: piece.stop - piece.start)
        else:
            yield from group


def _pieces_of(inputs: Iterable[Source]) -> Iterator[Piece]:
    for source in inputs:
        with open_source(source) as reader:
            yield from reader.pieces()


def _scanned_so_far(tasks: Sequence[Work], results: Sequence[list[ScannedPiece]]) -> list[ScannedPiece]:
    """Return the pieces before the first that is not yet scanned: only their line numbers are known."""
    known: list[ScannedPiece] = []
    for work, scanned in zip(tasks, results, strict=True):
        known += scanned
        if isinstance(work, list) and len(scanned) < len(work):
            break
    return known


def _raise_if_bad(pieces: Sequence[ScannedPiece], *, all_read: bool) -> None:
    """Raise DataError if there are bad documents; while input is still unread, only if MAX_PLACES can be listed."""
    bad = bad_documents(pieces)
    if not bad.places or (len(bad.places) < MAX_PLACES and not all_read):
        return
    if len(bad.places) == 1:
        raise DataError(f"{bad.places[0]} ({ON_BAD_HINT})")
    count = f"{bad.skipped:,}" if all_read else f"{bad.skipped:,} or more"
    raise DataError("\n  ".join((f"{count} documents are bad ({ON_BAD_HINT}):", *bad.places)))


def _check_text(inputs: Sequence[Source], pieces: Sequence[ScannedPiece], documents: int, bad: BadDocuments) -> None:
    """Raise DataError if the input, or one of its two parts if validation text is named, holds no text."""
    if documents == 0 and bad.skipped:
        raise DataError(f"the input holds no text but {bad.skipped:,} bad documents, the first: {bad.places[0]}")
    if documents == 0:
        names = ", ".join(source.name for source in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
        raise DataError(f"the input holds no text: {names} {'is' if len(inputs) == 1 else 'are'} empty")
    with_text = {scanned.piece.source.validates for scanned in pieces if scanned.documents}
    if any(source.validates for source in inputs) and len(with_text) == 1:
        raise DataError(f"{'--input' if True in with_text else '--val-input'} names no text: all of it is empty")


def _characters_of(text: str) -> str:
    """Return `"".join(sorted(set(text)))`, computed much faster."""
    if text.isascii():
        raw = text.encode()
        common = bytes(set(raw[:4096]))
        return "".join(map(chr, sorted({*common, *raw.translate(None, common)})))
    present = np.zeros(0x110000, dtype=np.bool_)
    present[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    return "".join(map(chr, np.flatnonzero(present).tolist()))
