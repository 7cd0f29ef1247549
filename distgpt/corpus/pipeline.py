"""What prepare does with its sources: read them once, encode them into part files, merge the parts in order.

What a part holds depends on the input and the options alone, never on the number of workers, and a part is whole and on
disk before it has its name: a run that was killed goes on with the parts it left.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distgpt.corpus import sources, split
from distgpt.corpus.shards import Documents, SplitName
from distgpt.corpus.sources import Bad, Content, Piece, Source
from distgpt.corpus.tokenizer import BpeTokenizer, CharTokenizer, Tokenizer, describe, load_tokenizer, train_bpe
from distgpt.corpus.workers import Workers
from distgpt.errors import DataError, StorageError
from distgpt.files import write_file

BPE_SAMPLE_BYTES = 256 * 2**20
MAX_PLACES = 10
ON_BAD_HINT = "--on-bad-document=skip leaves such documents out"
PROGRESS_SECONDS = 1.0
DIGEST_BYTES = hashlib.sha256().digest_size
CHECKED_CHARACTERS = 2**15  # of each part: about 3% of the time that its encoding takes

Advance = Callable[[int], None]


class Scanned(NamedTuple):
    """What a piece turned out to hold. `characters`: those of its text, sorted, where they were asked for.

    `rows`: its lines, rows or documents, empty ones too. `bad`: the first of those that are bad.
    """

    piece: Piece
    documents: int
    text_bytes: int
    digest: bytes
    characters: str
    rows: int
    bad: list[Bad]
    skipped: int
    replaced: int
    separators: int


class BadDocuments(NamedTuple):
    """How many documents were left out, how many have U+FFFD for what was bad, and where the first of them are."""

    skipped: int
    replaced: int
    places: list[str]


@dataclass(frozen=True)
class Scan:
    """The whole input, read once: `documents` that are not empty, a SHA-256 as `fingerprint`.

    `bad`: how many documents were left out and how many were mended, and where the first of them are.
    `separators`: lines that stand between documents, or look as if they did where no separator was given.
    """

    pieces: list[Scanned]
    documents: int
    text_bytes: int
    characters: str
    fingerprint: str
    bad: BadDocuments
    separators: int


@dataclass(frozen=True)
class Unit:
    """What becomes one part: consecutive pieces, together about UNIT_BYTES, all named as validation text or none."""

    index: int
    pieces: list[Scanned]

    @property
    def text_bytes(self) -> int:
        return sum(scanned.text_bytes for scanned in self.pieces)


@dataclass(frozen=True)
class Encoder:
    """How a worker encodes. `hashes`: the text hash of documents that are longer than a piece, by path."""

    tokenizer: Path
    eot_id: int | None
    hashes: Mapping[str, int]


class Part(NamedTuple):
    """A part file. One row for each document or piece of one: `sizes` in tokens, whether it `ends`, its text hash."""

    tokens: npt.NDArray[np.uint16]
    sizes: npt.NDArray[np.int64]
    ends: npt.NDArray[np.bool_]
    hashes: npt.NDArray[np.uint64]


def scan(inputs: Sequence[Source], *, characters: bool, workers: Workers, advance: Advance) -> Scan:
    """Read the whole input: check it, cut it, count and hash it. `advance` is told how many bytes of files were read.

    Raises DataError for input that is not text or holds none, OSError for what cannot be read.
    """
    stops = any(source.on_bad == "stop" for source in inputs)
    tasks = list(_scan_tasks(inputs, characters))
    found: list[list[Scanned]] = [[] for _ in tasks]
    for index, (scanned, consumed) in workers.run(scan_task, tasks):
        found[index].append(scanned)
        advance(consumed)
        if stops and scanned.skipped:
            _stop_at_bad(_known(tasks, found), is_all=False)
    pieces = [scanned for task in found for scanned in task]
    if stops:
        _stop_at_bad(pieces, is_all=True)
    bad = bad_documents(pieces)
    # A text file that is left out is so as a whole, whichever of its pieces is bad.
    left_out = {scanned.piece.source for scanned in pieces if scanned.skipped and scanned.piece.source.format == "text"}
    pieces = [scanned for scanned in pieces if scanned.piece.source not in left_out]
    documents = sum(scanned.documents for scanned in pieces)
    if documents == 0 and bad.skipped:
        raise DataError(f"the input holds no text but bad documents, {bad.skipped:,}, the first: {bad.places[0]}")
    if documents == 0:
        names = ", ".join(source.name for source in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
        raise DataError(f"the input holds no text: {names} {'is' if len(inputs) == 1 else 'are'} empty")
    with_text = {scanned.piece.source.validates for scanned in pieces if scanned.documents}
    if any(source.validates for source in inputs) and len(with_text) == 1:
        raise DataError(f"{'--input' if True in with_text else '--val-input'} names no text: all of it is empty")
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


def bad_documents(pieces: Sequence[Scanned]) -> BadDocuments:
    """The bad documents of these pieces, which begin with the first of the input, and the first places."""
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


def check_characters(found: Scan, tokenizer: Tokenizer) -> None:
    """Raise DataError naming the file where a saved char tokenizer lacks a character of the input."""
    lacking = tokenizer.lacks(found.characters) if isinstance(tokenizer, CharTokenizer) else ""
    for scanned in found.pieces if lacking else []:
        if character := next((c for c in lacking if c in scanned.characters), ""):
            raise DataError(
                f"{scanned.piece.source.name} holds the character {describe(character)}, which the saved vocabulary "
                f"lacks (with it, {len(lacking)} of the input's characters)"
            )


def trained_bpe(found: Scan, *, vocab_size: int, workers: Workers, advance: Advance) -> BpeTokenizer:
    """BPE of at most `vocab_size` ids, learned from the corpus, or from pieces spread evenly over a huge one.

    `advance` is told the bytes of text read, and 0 now and then while pairs are merged.
    """
    chosen = []
    passed = taken = 0
    for scanned in found.pieces:
        if taken * found.text_bytes <= passed * BPE_SAMPLE_BYTES:
            chosen.append(scanned)
            taken += scanned.text_bytes
        passed += scanned.text_bytes
    text = ""
    for _, step in workers.run(train_task, [(chosen, vocab_size)]):
        if isinstance(step, str):
            text = step
        else:
            advance(step)
    return BpeTokenizer(text)


def bpe_sample_bytes(found: Scan) -> int:
    """About how much text BPE is learned from."""
    return min(found.text_bytes, BPE_SAMPLE_BYTES)


def units(found: Scan) -> list[Unit]:
    """The pieces put together to what becomes one part each."""
    groups: list[list[Scanned]] = []
    for _, pieces in groupby(found.pieces, key=lambda scanned: scanned.piece.source.validates):
        size = sources.UNIT_BYTES
        for scanned in pieces:
            if size >= sources.UNIT_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(scanned)
            size += scanned.text_bytes
    return [Unit(index, pieces) for index, pieces in enumerate(groups)]


def long_document_hashes(found: Scan, workers: Workers) -> dict[str, int]:
    """The text hashes of the documents that are longer than a piece, by path. Raises DataError and OSError."""
    firsts = [scanned.piece for scanned in found.pieces if scanned.piece.start == 0]
    long = [piece.source for piece in firsts if piece.source.format == "text" and not piece.last]
    return {long[index].path: value for index, value in workers.run(_hash, long)}


def encode(todo: Sequence[Unit], parts: Path, *, encoder: Encoder, workers: Workers, advance: Advance) -> None:
    """Write the parts of these units. `advance` is told the bytes of text encoded.

    Raises DataError where a source changed since it was scanned or the tokenizer gives wrong ids, OSError for what
    cannot be read or written.
    """
    runs = [list(group) for _, group in groupby(todo, key=_read_together)]
    # Every worker that starts within a compressed file reads it from the beginning: only where some would be idle.
    share = max(workers.count // len(runs), 1) if runs else 1
    tasks = [(part, parts, encoder) for run in runs for part in _split(run, share)]
    for _, size in workers.run(encode_units, tasks):
        advance(size)


def is_done(unit: Unit, parts: Path) -> bool:
    """Whether the part of this unit is there and whole."""
    try:
        read_part(parts, unit.index)
    except (OSError, StorageError):
        return False
    return True


def merged(parts: Path, todo: Sequence[Unit], *, documents: int, val_fraction: float | None) -> Iterator[Documents]:
    """All tokens in order, divided into the splits; `val_fraction` is None where validation text is named.

    One document: the last `val_fraction` of its tokens validate. Several: those whose text hash is below that share of
    2^64, or those that `split.nearest` chooses. Raises DataError where nothing can.
    """
    if val_fraction is None:
        return _merged_as_named(parts, todo)
    if documents == 1:
        return _merged_tail(parts, len(todo), val_fraction)
    return _merged_by_hash(parts, len(todo), _chosen(parts, len(todo), val_fraction))


def _merged_as_named(parts: Path, todo: Sequence[Unit]) -> Iterator[Documents]:
    for unit in todo:
        part = read_part(parts, unit.index)
        name: SplitName = "val" if unit.pieces[0].piece.source.validates else "train"
        yield Documents(name, part.tokens, np.cumsum(part.sizes)[part.ends])


def _merged_tail(parts: Path, count: int, val_fraction: float) -> Iterator[Documents]:
    total = sum(int(read_part(parts, index).sizes.sum()) for index in range(count))
    if total < 2:
        raise DataError("the input is a single token: too short to train on one part and validate on another")
    left = min(max(int((1 - val_fraction) * total), 1), total - 1)
    name: SplitName
    for index in range(count):
        tokens = read_part(parts, index).tokens
        for name, piece in (("train", tokens[:left]), ("val", tokens[left:])):
            is_end = piece.size == left if name == "train" else index == count - 1
            if piece.size:
                yield Documents(name, piece, np.array([piece.size] if is_end else [], dtype=np.int64))
        left = max(left - tokens.size, 0)


def _chosen(parts: Path, count: int, val_fraction: float) -> Callable[[split.Hashes], npt.NDArray[np.bool_]]:
    """Tells which of these text hashes are of documents that validate."""
    threshold = split.threshold(val_fraction)
    total = validating = 0
    for index in range(count):
        part = read_part(parts, index)
        total += int(part.sizes.sum())
        validating += int(part.sizes[part.hashes < threshold].sum())
    if split.is_near(validating / total, val_fraction):
        return lambda hashes: hashes < threshold
    # Only few documents, or few long ones among others, are so far from it: their hashes and sizes fit in memory.
    columns = [(part.hashes.copy(), part.sizes) for part in map(partial(read_part, parts), range(count))]
    hashes, sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
    nearest = split.nearest(hashes, sizes, val_fraction)
    return lambda hashes: np.isin(hashes, nearest)


def _merged_by_hash(
    parts: Path, count: int, chosen: Callable[[split.Hashes], npt.NDArray[np.bool_]]
) -> Iterator[Documents]:
    for index in range(count):
        part = read_part(parts, index)
        validates = chosen(part.hashes)
        name: SplitName
        for name, rows in (("train", ~validates), ("val", validates)):
            tokens = part.tokens[np.repeat(rows, part.sizes)]
            if tokens.size:
                yield Documents(name, tokens, np.cumsum(part.sizes[rows])[part.ends[rows]])


@dataclass(frozen=True)
class ScanTask:
    """Pieces of sources that can be read at any place, or one source that has to be read through."""

    pieces: list[Piece]
    source: Source | None
    characters: bool


def _scan_tasks(inputs: Sequence[Source], characters: bool) -> Iterator[ScanTask]:
    batch: list[Piece] = []
    size = 0
    for source in inputs:
        if not source.seekable:
            if batch:
                yield ScanTask(batch, None, characters)
                batch, size = [], 0
            yield ScanTask([], source, characters)
            continue
        with sources.opened(source) as reader:
            for piece in reader.pieces():
                batch.append(piece)
                size += piece.stop - piece.start
                if size >= sources.UNIT_BYTES:
                    yield ScanTask(batch, None, characters)
                    batch, size = [], 0
    if batch:
        yield ScanTask(batch, None, characters)


def _known(tasks: Sequence[ScanTask], found: Sequence[list[Scanned]]) -> list[Scanned]:
    """What was scanned up to the first piece that was not yet: only there line numbers are known."""
    known: list[Scanned] = []
    for task, scanned in zip(tasks, found, strict=True):
        known += scanned
        if len(scanned) < len(task.pieces):
            break
    return known


def _stop_at_bad(pieces: Sequence[Scanned], *, is_all: bool) -> None:
    """Raise DataError where there are bad documents; before all is read, only if there are enough to list."""
    bad = bad_documents(pieces)
    if not bad.places or (len(bad.places) < MAX_PLACES and not is_all):
        return
    if len(bad.places) == 1:
        raise DataError(f"{bad.places[0]} ({ON_BAD_HINT})")
    count = f"{bad.skipped:,}" if is_all else f"{bad.skipped:,} or more"
    raise DataError("\n  ".join((f"{count} documents are bad ({ON_BAD_HINT}):", *bad.places)))


def scan_task(task: ScanTask) -> Iterator[tuple[Scanned, int]]:
    for piece in task.pieces:
        with sources.opened(piece.source) as reader:
            yield scan_piece(reader.content(piece), piece, task.characters), piece.stop - piece.start
    if task.source is not None:
        with sources.opened(task.source) as reader:
            before = 0
            for piece in reader.pieces():
                yield scan_piece(reader.content(piece), piece, task.characters), reader.consumed - before
                before = reader.consumed


def scan_piece(content: Content, piece: Piece, characters: bool) -> Scanned:
    is_text = piece.source.format == "text"
    return Scanned(
        piece=piece,
        documents=int(piece.start == 0) if is_text else sum(text != "" for text in content.texts),
        text_bytes=sum(map(sources.utf8_size, content.texts)),
        digest=content.digest,
        characters=characters_of("".join(content.texts)) if characters else "",
        rows=len(content.texts),
        bad=content.bad[:MAX_PLACES],
        skipped=sum(not bad.replaced for bad in content.bad),
        replaced=sum(bad.replaced for bad in content.bad),
        separators=content.separators,
    )


def characters_of(text: str) -> str:
    """`"".join(sorted(set(text)))` at memory speed."""
    if text.isascii():
        raw = text.encode()
        common = bytes(set(raw[:4096]))
        return "".join(map(chr, sorted({*common, *raw.translate(None, common)})))
    present = np.zeros(0x110000, dtype=np.bool_)
    present[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] = True
    return "".join(map(chr, np.flatnonzero(present).tolist()))


def train_task(task: tuple[Sequence[Scanned], int]) -> Iterator[int | str]:
    """The bytes read since the last time, every second, then the vocabulary."""
    pieces, vocab_size = task
    read = said = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for scanned, content in _contents(pieces):
            yield from content.texts
            read += scanned.text_bytes

    with ThreadPoolExecutor(1) as thread:
        learning = thread.submit(train_bpe, texts(), vocab_size)
        while not wait([learning], timeout=PROGRESS_SECONDS).done:
            now = read
            yield now - said
            said = now
        yield learning.result().to_json()


def _hash(source: Source) -> Iterator[int]:
    yield sources.document_hash(source)


def _read_together(unit: Unit) -> tuple[str, int]:
    """Equal for units that come from one compressed file."""
    source = unit.pieces[0].piece.source
    return ("", unit.index) if source.seekable else (source.path, 0)


def _split(run: Sequence[Unit], count: int) -> list[Sequence[Unit]]:
    size = -(-len(run) // count)
    return [run[start : start + size] for start in range(0, len(run), size)]


def encode_units(task: tuple[Sequence[Unit], Path, Encoder]) -> Iterator[int]:
    run, parts, encoder = task
    tokenizer = _loaded(encoder.tokenizer)
    contents = _contents([scanned for unit in run for scanned in unit.pieces])
    for unit in run:
        rows: list[tuple[int, bool, int]] = []
        tokens: list[npt.NDArray[np.uint16]] = []
        unchecked = CHECKED_CHARACTERS
        for _ in unit.pieces:
            scanned, content = next(contents)
            unchecked = _check(tokenizer, scanned.piece, content.texts, unchecked)
            _encode_piece(scanned.piece, content.texts, tokenizer, encoder, rows, tokens)
        write_part(parts, unit.index, rows, tokens)
        yield unit.text_bytes


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _check(tokenizer: Tokenizer, piece: Piece, texts: Sequence[str], characters: int) -> int:
    """Compare the ids of up to so many characters with the owner library's, gives how many more there may be.

    Raises DataError.
    """
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
    piece: Piece,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    encoder: Encoder,
    rows: list[tuple[int, bool, int]],
    tokens: list[npt.NDArray[np.uint16]],
) -> None:
    end_of_text = np.array([] if encoder.eot_id is None else [encoder.eot_id], dtype=np.uint16)
    for text in texts:
        if not text:
            continue
        ends = piece.source.format != "text" or piece.last
        known = encoder.hashes.get(piece.source.path) if piece.source.format == "text" else None
        ids = tokenizer.encode(text)
        tokens += [ids, end_of_text] if ends else [ids]
        size = ids.size + (end_of_text.size if ends else 0)
        rows.append((size, ends, sources.text_hash(text.encode()) if known is None else known))


def _contents(pieces: Sequence[Scanned]) -> Iterator[tuple[Scanned, Content]]:
    """The pieces with what they hold; each file is opened once. Raises DataError where it is not what was scanned."""
    for _, group in groupby(pieces, key=lambda scanned: scanned.piece.source):
        with ExitStack() as stack:
            reader: sources.Reader | None = None
            for scanned in group:
                reader = reader or stack.enter_context(sources.opened(scanned.piece.source))
                content = reader.content(scanned.piece)
                if content.digest != scanned.digest:
                    raise DataError(f"{scanned.piece.source.name} changed while it was prepared: start again")
                yield scanned, content


def _part_path(parts: Path, index: int) -> Path:
    return parts / f"{index:06d}.part"


def write_part(
    parts: Path, index: int, rows: Sequence[tuple[int, bool, int]], tokens: Sequence[npt.NDArray[np.uint16]]
) -> None:
    """The number of rows, their three columns as uint64, the tokens, a SHA-256 of it all. Raises OSError."""
    table = np.array(rows, dtype="<u8").reshape(len(rows), 3).T
    ids = (piece.astype("<u2", copy=False).data for piece in tokens)
    content = b"".join((len(rows).to_bytes(8, "little"), table.tobytes(), *ids))
    write_file(_part_path(parts, index), content + hashlib.sha256(content).digest())


def read_part(parts: Path, index: int) -> Part:
    """Raises StorageError for a part that is not as it was written, OSError for one that cannot be read."""
    path = _part_path(parts, index)
    content, digest = np.split(np.fromfile(path, dtype=np.uint8), [-DIGEST_BYTES])
    if hashlib.sha256(content.data).digest() != digest.tobytes():
        raise StorageError(f"{path} is damaged: run the same command again, which makes this part anew")
    rows = int(content[:8].view("<u8")[0])
    sizes, ends, hashes = content[8 : 8 + 24 * rows].view("<u8").reshape(3, rows)
    return Part(content[8 + 24 * rows :].view("<u2"), sizes.astype(np.int64), ends.astype(np.bool_), hashes)
