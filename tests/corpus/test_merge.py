"""Part files and their merging: each part is read once, whichever way the documents are split."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distgpt.corpus.preparing import parts
from distgpt.corpus.preparing.encode import Encoder, encode_units, units_of
from distgpt.corpus.preparing.merge import merged
from distgpt.corpus.preparing.scan import scan_input
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.reading import sizes
from distgpt.corpus.reading.source import Source
from distgpt.corpus.tokenizer.simple import ByteTokenizer
from distgpt.errors import StorageError


def test_the_table_of_a_part_is_read_without_its_tokens(tmp_path: Path) -> None:
    parts.write_part(tmp_path, 0, [((3, True, 7), np.array([1, 2, 3], dtype=np.uint16))])
    raw = bytearray((tmp_path / "000000.part").read_bytes())
    raw[-33] ^= 1  # the last byte of the tokens
    (tmp_path / "000000.part").write_bytes(raw)
    assert [column.tolist() for column in parts.read_table(tmp_path, 0)] == [[3], [True], [7]]
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
    monkeypatch.setattr(sizes, "UNIT_BYTES", 2**13)
    sources = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        sources.append(Source(str(path), path.name, "text"))
    if val_fraction is None:
        sources[-1] = replace(sources[-1], validates=True)
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer(end_of_text=False).to_json())
    with Workers(1, preload="distgpt.corpus.preparing.encode") as workers:
        found = scan_input(sources, characters=False, workers=workers, advance=lambda count: None)
    units = units_of(found)
    assert len(units) > 5
    list(encode_units((units, tmp_path, Encoder(tmp_path / "tokenizer.json", None, {}))))

    reads = Counter[int]()
    read_part = parts.read_part

    def counted(directory: Path, index: int) -> tuple[parts.Table, np.ndarray]:
        reads[index] += 1
        return read_part(directory, index)

    monkeypatch.setattr(parts, "read_part", counted)
    documents = list(merged(tmp_path, units, documents=found.documents, val_fraction=val_fraction))
    assert reads == dict.fromkeys(range(len(units)), 1)
    assert {part.split for part in documents} == {"train", "val"}
    assert sum(part.tokens.size for part in documents) == sum(map(len, texts))
