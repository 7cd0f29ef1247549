"""Merging reads each part once; the validation split is near the share asked for, for any documents."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distgpt.corpus.preparing import copies, parts
from distgpt.corpus.preparing.encode import EncodeOptions, Unit, encode_units, units_of
from distgpt.corpus.preparing.merge import choose_validation, is_near, merge_parts
from distgpt.corpus.preparing.scan import ScannedPiece, scan_input
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.reading import sources
from distgpt.corpus.reading.sources import Piece, Source
from distgpt.corpus.tokenizer.simple import ByteTokenizer
from distgpt.errors import DataError, StorageError


def test_the_table_of_a_part_is_read_without_its_tokens(tmp_path: Path) -> None:
    parts.write_part(tmp_path, 0, [((3, True, 7), np.array([1, 2, 3], dtype=np.uint16))])
    raw = bytearray((tmp_path / "000000.part").read_bytes())
    raw[-33] ^= 1  # the last byte of the tokens
    (tmp_path / "000000.part").write_bytes(raw)
    assert parts.read_table(tmp_path, 0).tolist() == [(3, True, 7)]
    with pytest.raises(StorageError, match=r"000000\.part is damaged"):
        parts.read_part(tmp_path, 0)


@pytest.mark.parametrize(
    ("texts", "val_fraction"),
    [
        (["one document " * 9_000], 0.1),
        ([f"document {number} " * 90 for number in range(90)], 0.5),
        (["the longest document " * 4_000, "another one"], 0.1),  # far from the share: documents are chosen one by one
        (["training " * 9_000, "validation " * 900], None),
    ],
    ids=["one document", "by hash", "one by one", "named validation text"],
)
def test_merging_reads_each_part_once(
    texts: list[str], val_fraction: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 2**13)
    inputs = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        inputs.append(Source(str(path), path.name, "text"))
    if val_fraction is None:
        inputs[-1] = replace(inputs[-1], validates=True)
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer(end_of_text=False).to_json())
    with Workers(1) as workers:
        found = scan_input(inputs, characters=False, workers=workers, advance=lambda count: None)
    units = units_of(found)
    assert len(units) > 5
    list(encode_units((units, tmp_path, EncodeOptions(tmp_path / "tokenizer.json", None, {}))))

    reads = Counter[int]()
    read_part = parts.read_part

    def counted(directory: Path, index: int) -> tuple[parts.Table, np.ndarray]:
        reads[index] += 1
        return read_part(directory, index)

    monkeypatch.setattr(parts, "read_part", counted)
    documents = list(merge_parts(tmp_path, units, documents=found.documents, val_fraction=val_fraction))
    assert reads == dict.fromkeys(range(len(units)), 1)
    assert {part.split for part in documents} == {"train", "val"}
    assert sum(part.tokens.size for part in documents) == sum(map(len, texts))


def share(sizes: list[int], fraction: float, seed: int) -> float:
    """Return the share of all tokens that is for validation, with random hashes."""
    hashes = np.array([random.Random(f"{seed} {i}").getrandbits(64) for i in range(len(sizes))], dtype=np.uint64)
    chosen = np.isin(hashes, choose_validation(hashes, np.array(sizes), fraction))
    assert 0 < chosen.sum() < len(sizes)
    return float(np.array(sizes)[chosen].sum() / sum(sizes))


@pytest.mark.parametrize("seed", range(8))
def test_few_documents_give_the_nearest_share_whatever_their_hashes(seed: int) -> None:
    assert share([976, 24], 0.1, seed) == 0.024  # train.txt and valid.txt
    assert share([60, 40], 0.4, seed) == 0.4
    assert share([50, 50], 0.1, seed) == 0.5
    assert share([20, 120, 860], 0.1, seed) in (0.12, 0.14)
    assert share([50, 50], 0.9, seed) == 0.5
    assert share([10] * 30, 0.1, seed) == 0.1
    assert share([970] + [1] * 30, 0.1, seed) == 0.03


def test_validation_gets_more_than_half_only_if_asked_for() -> None:
    for seed in range(200):
        source = random.Random(seed)
        sizes = [source.choice([1, 10, 100, 1000]) * source.randrange(1, 20) for _ in range(source.randrange(2, 9))]
        assert share(sizes, source.uniform(0.01, 0.5), seed) <= 0.5


def test_documents_with_the_same_text_stay_together() -> None:
    hashes = np.array([7, 5, 7, 7], dtype=np.uint64)
    assert choose_validation(hashes, np.array([1, 2, 1, 1]), 0.3).tolist() == [5]
    with pytest.raises(DataError, match="all documents of the input hold the same text"):
        choose_validation(hashes[[0, 2, 3]], np.array([1, 1, 1]), 0.1)


def test_near_is_within_a_factor_of_two_on_both_sides() -> None:
    assert all(is_near(share, 0.1) for share in (0.05, 0.1, 0.2))
    assert not any(is_near(share, 0.1) for share in (0.0, 0.049, 0.21, 0.976, 1.0))
    assert is_near(0.501, 0.5)
    assert not any(is_near(share, 0.5) for share in (0.2, 0.95))
    assert not is_near(0.51, 0.4)


def test_copies_are_found_however_many_hashes_are_compared_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    hashes = [draw.randrange(40) * 2**50 for _ in range(100)]
    units = []
    for index in range(10):
        # The last part validates. A document of two rows goes on from part 4 in part 5.
        rows = [(1, True, value) for value in hashes[10 * index : 10 * index + 10]]
        rows += [(1, False, hashes[50])] if index == 4 else []
        parts.write_part(tmp_path, index, [(row, np.zeros(1, dtype=np.uint16)) for row in rows])
        piece = Piece(Source("", "", "jsonl", validates=index == 9), 0, 1, last=True)
        units.append(Unit(index, [ScannedPiece(piece, 10, 10, b"", "", 10, [], 0, 0, 0)]))
    order = [*range(90, 100), *range(90)]
    first = {hashes[number]: number for number in reversed(order)}
    for pass_documents in (1000, 7):
        monkeypatch.setattr(copies, "PASS_DOCUMENTS", pass_documents)
        found = copies.find_copies(tmp_path, units, advance=lambda count: None)
        assert [number for number in range(100) if not found.is_copy[number]] == sorted(first.values())
    reader = copies.PartReader(tmp_path, found)
    tables = [reader.part(index)[0] for index in range(10)]
    is_kept = not found.is_copy[50]
    assert [row[1] for row in tables[4].tolist()].count(False) == is_kept
    assert sum(len(table) for table in tables) == len(first) + is_kept
