"""Sources: the files that are input, the places where they are cut, the messages for damaged input."""

import errno
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from distgpt.corpus.preparing import scan
from distgpt.corpus.reading import json_text, sources, streams
from distgpt.corpus.reading.finding import Finder, standard_library
from distgpt.corpus.reading.reader import open_source
from distgpt.corpus.reading.sources import OnBad, Piece, ReadOptions, Source
from distgpt.corpus.reading.streams import checked_encoding, zstd_chunks
from distgpt.corpus.tokenizer.bpe import train_bpe
from distgpt.errors import DataError, UsageError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}

DEFAULTS = ReadOptions()
STDIN = Source("/nowhere", "standard input", "text")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 5_000)
    monkeypatch.setattr(streams, "WINDOW_BYTES", 512)


def find(*inputs: Path | str, options: ReadOptions = DEFAULTS, excluded: Sequence[Path] = ()) -> list[Source]:
    return Finder(options, stdin=STDIN, excluded=excluded).find([str(value) for value in inputs])


def read(source: Source) -> list[tuple[Piece, list[str]]]:
    with open_source(source) as reader:
        return [(piece, reader.content(piece).texts) for piece in reader.pieces()]


def texts_of(source: Source) -> list[str]:
    return [text for _, texts in read(source) for text in texts]


def bad_places(source: Source) -> list[str]:
    with open_source(source) as reader:
        pieces = [scan.scan_piece(reader.content(piece), piece, False) for piece in reader.pieces()]
    return scan.bad_documents(pieces).places


def prose(seed: int, words: int) -> str:
    source = random.Random(seed)
    pool = ["the", "don't", "naïve", "日本語", "x=1;", "\n", "\n\n", "   ", "\r\n", "\u3000", "a\xa0b"]
    return " ".join(source.choice(pool) for _ in range(words))


def test_a_folder_gives_its_texts_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b.jsonl.gz", "a/p.parquet", "a/.hidden.txt", ".git/x.txt", "c.bin", "d.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find(tmp_path)
    assert [Path(source.path).relative_to(tmp_path).as_posix() for source in found] == [
        *("a/b.jsonl.gz", "a/p.parquet", "a/z.md", "b.txt"),
    ]
    assert [(source.format, source.compression) for source in found] == [
        *(("jsonl", ".gz"), ("parquet", ""), ("text", ""), ("text", "")),
    ]


def test_links_to_folders_are_followed_and_every_folder_is_entered_once(tmp_path: Path) -> None:
    for name in ("in/own/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for link, target in (("first", "../elsewhere"), ("second", "../elsewhere"), ("own/loop", ".."), ("own/self", ".")):
        (tmp_path / "in" / link).symlink_to(target)
    found = [Path(source.path).relative_to(tmp_path).as_posix() for source in find(tmp_path / "in")]
    assert found == ["in/first/b.txt", "in/own/a.txt"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open/a.txt", "locked/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scandir = os.scandir

    def scandir_without_permission(path: str) -> Any:
        if Path(path).name == "locked":  # permissions do not stop root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_without_permission)
    with pytest.raises(PermissionError, match=r"locked"):
        find(tmp_path)


@pytest.mark.parametrize("values", [["."], ["*"], ["**/*"], ["a.txt", "b", "out", "out.partial"]])
def test_the_output_is_not_input(values: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b/c.txt", "out/meta.json", "out/d.txt", "out.partial/parts/e.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    outputs = [tmp_path / "out", tmp_path / "out.partial"]
    found = find(*values, excluded=outputs)
    assert [source.path for source in found] == ["a.txt", "b/c.txt"]
    with pytest.raises(DataError, match=r"--input names no file but the output: out$"):
        find("out", excluded=outputs)
    with pytest.raises(DataError, match=r"out\* holds no text"):
        find("out*", excluded=outputs)


def test_a_pattern_may_match_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").touch()
    assert [Path(source.path).name for source in find(tmp_path / "*")] == ["one.txt"]


@pytest.mark.parametrize("value", ["pipe.txt", "", "*"])
def test_a_pipe_among_the_files_is_refused(value: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt is neither a file nor a folder: pipe it in with --input -"):
        find(tmp_path / value)


def test_an_empty_input_is_not_the_current_folder() -> None:
    with pytest.raises(UsageError, match="an --input is empty"):
        find("")


def test_a_file_named_twice_is_read_once_and_a_pattern_takes_any_ending(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt", "three.log"):
        (tmp_path / name).write_text(name)
    found = find(tmp_path / "two.txt", tmp_path / "t*", "-", tmp_path)
    assert [Path(source.path).name for source in found] == ["two.txt", "three.log", "nowhere", "one.txt"]


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (lambda path: None, DataError, "no such input"),
        (lambda path: path.mkdir(), DataError, r"holds no text.*\.txt"),
        (lambda path: path.with_suffix(".tar.gz").touch(), UsageError, "unpack it first"),
    ],
)
def test_input_that_is_missing_or_not_text_is_an_error(
    make: Callable[[Path], None], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    make(tmp_path / "input")
    with pytest.raises(error, match=reason):
        find(tmp_path / ("input.tar.gz" if (tmp_path / "input.tar.gz").exists() else "input"))


@pytest.mark.usefixtures("small_units")
def test_pieces_do_not_depend_on_compression_and_encode_as_the_whole_text(tmp_path: Path) -> None:
    text = prose(1, 20_000)
    raw = text.encode()
    (tmp_path / "t.txt").write_bytes(raw)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(raw[:30_000]) + gzip.compress(raw[30_000:]))
    (tmp_path / "t.txt.zst").write_bytes(zstandard.compress(raw[:30_000]) + zstandard.compress(raw[30_000:]))
    read_all = [read(source) for source in find(tmp_path / "t.txt", tmp_path / "t.txt.gz", tmp_path / "t.txt.zst")]
    pieces = read_all[0]
    assert len(pieces) > 15
    assert "".join(texts[0] for _, texts in pieces) == text
    assert max(piece.stop - piece.start for piece, _ in pieces) < 6_000
    assert [piece.last for piece, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    for other in read_all[1:]:
        assert [(piece.start, piece.stop, texts) for piece, texts in other] == [
            (piece.start, piece.stop, texts) for piece, texts in pieces
        ]
    tokenizer = train_bpe([text], 500)
    whole = np.concatenate([tokenizer.encode(texts[0]) for _, texts in pieces])
    assert np.array_equal(whole, tokenizer.encode(text))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_without_a_space_is_cut_between_characters(suffix: str, tmp_path: Path) -> None:
    text = "語" * 30_000
    path = tmp_path / f"long.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    pieces = read(find(path)[0])
    assert "".join(texts[0] for _, texts in pieces) == text
    assert len(pieces) > 3


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_are_cut_at_line_ends_and_can_be_read_from_any_piece(suffix: str, tmp_path: Path) -> None:
    texts = [f"{index} ünïcode " * (index % 40) for index in range(500)]
    raw = "\n".join(json.dumps({"text": text, "other": 1}) for text in texts).encode()
    path = tmp_path / f"lines.jsonl{suffix}"
    pack = PACK[suffix]
    path.write_bytes(pack(raw))
    pieces = read(find(path)[0])
    assert len(pieces) > 10
    assert [text for _, found in pieces for text in found] == texts
    with open_source(find(path)[0]) as reader:
        for piece, found in pieces[5::3]:
            assert reader.content(piece).texts == found


@pytest.mark.usefixtures("small_units")
def test_parquet_is_read_in_pieces_across_row_groups_and_from_any_of_them(tmp_path: Path) -> None:
    texts = [f"row {index} " * (index % 30) for index in range(700)]
    table = pyarrow.table({"id": range(700), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=150, use_dictionary=False)
    source = find(tmp_path / "t.parquet", options=ReadOptions("body"))[0]
    pieces = read(source)
    assert len(pieces) > 8
    assert [text for _, found in pieces for text in found] == texts
    assert [piece.last for piece, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    for first in (1, 4, len(pieces) - 1):
        with open_source(source) as reader:
            assert [reader.content(piece).texts for piece, _ in pieces[first:]] == [
                found for _, found in pieces[first:]
            ]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_byte_order_mark_is_dropped_at_the_start_and_kept_elsewhere(suffix: str, kind: str, tmp_path: Path) -> None:
    mark, text = "\ufeff", prose(2, 3_000) + " \ufeff " + prose(3, 3_000)
    raw = (
        text if kind == "txt" else "\n".join(json.dumps({"text": word}, ensure_ascii=False) for word in text.split(" "))
    )
    pack = PACK[suffix]
    (tmp_path / f"plain.{kind}{suffix}").write_bytes(pack(raw.encode()))
    (tmp_path / f"marked.{kind}{suffix}").write_bytes(pack((mark + raw).encode()))
    plain, marked = (
        [text for _, texts in read(find(tmp_path / f"{name}.{kind}{suffix}")[0]) for text in texts]
        for name in ("plain", "marked")
    )
    assert "".join(marked) == "".join(plain)
    assert marked[0][:1] == plain[0][:1] != mark
    assert "".join(marked).count(mark) == 1


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.jsonl"])
def test_a_byte_order_mark_alone_is_an_empty_file(name: str, tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    (tmp_path / name).write_bytes(gzip.compress(mark) if name.endswith(".gz") else mark)
    assert read(find(tmp_path / name)[0]) == []


def test_zstandard_is_read_in_small_chunks_at_any_compression_ratio(tmp_path: Path) -> None:
    (tmp_path / "t.txt.zst").write_bytes(zstandard.compress(b"a b " * 2**24))
    with open(tmp_path / "t.txt.zst", "rb") as file:
        sizes = [len(chunk) for chunk in zstd_chunks(find(tmp_path / "t.txt.zst")[0], file)]
    assert sum(sizes) == 2**26
    assert max(sizes) < 2**24


@pytest.mark.usefixtures("small_units")
def test_pieces_of_parquet_are_cut_by_the_size_of_decoded_text(tmp_path: Path) -> None:
    texts = ["long " * 100, "", "日本" * 100] * 200
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "t.parquet", use_dictionary=True)
    pieces = read(find(tmp_path / "t.parquet")[0])
    assert [text for _, found in pieces for text in found] == texts
    assert max(sum(len(text.encode()) for text in found) for _, found in pieces) < 6_000
    assert max(len(found) for _, found in pieces) < 5_000 / 64


def test_parquet_without_rows_is_empty(tmp_path: Path) -> None:
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(tmp_path / "none.parquet", schema).close()
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "one.parquet")
    for name in ("none.parquet", "one.parquet"):
        assert read(find(tmp_path / name)[0]) == []


def test_the_offset_of_a_bad_byte_includes_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    [place] = bad_places(find(tmp_path / "bad.txt")[0])
    assert "bad.txt is not UTF-8: byte 5" in place


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_offset_of_a_byte_that_is_not_utf8_is_reported(suffix: str, tmp_path: Path) -> None:
    raw = b"words and words\n" * 2_000
    raw = raw[:20_123] + b"\xff" + raw[20_123:]
    path = tmp_path / f"bad.txt{suffix}"
    pack = PACK[suffix]
    path.write_bytes(pack(raw))
    [place] = bad_places(find(path)[0])
    assert f"bad.txt{suffix} is not UTF-8: byte 20,123" in place


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', r"line 412: not UTF-8, byte 13 of the line"),
        (b'{"text": "open', r"line 412: not JSON"),
        (b'["text"]', r"line 412: not a JSON object but list"),
        (b'{"body": "x", "id": 1}', r"line 412: no key 'text' \(there are: body, id\); --text-key"),
        (b'{"text": 7}', r"line 412: 'text' is not a string but int"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(suffix: str, line: bytes, reason: str, tmp_path: Path) -> None:
    lines = [b'{"text": "fine and dandy"}'] * 411 + [line] + [b"", b'{"text": "fine"}'] * 50
    raw = b"\n".join(lines)
    path = tmp_path / f"bad.jsonl{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    [place] = bad_places(find(path)[0])
    assert re.search(rf"bad\.jsonl.*{reason}", place)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("keep", [-5, 40])
def test_a_compressed_file_cut_short_is_noticed(pack: Callable[[bytes], bytes], keep: int, tmp_path: Path) -> None:
    packed = pack(random.Random(1).randbytes(3_000).hex().encode())
    path = tmp_path / ("t.txt.gz" if pack is gzip.compress else "t.txt.zst")
    path.write_bytes(packed[:keep])
    with pytest.raises(DataError, match=r"t\.txt\.\w+: damaged or cut short"):
        read(find(path)[0])


@pytest.mark.parametrize("name", ["t.txt.gz", "t.txt.zst", "t.parquet"])
def test_a_file_whose_content_does_not_match_its_suffix_is_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("plain words")
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        read(find(tmp_path / name)[0])


def test_parquet_without_the_column_or_with_a_null_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), path)
    with pytest.raises(DataError, match=r"no column 'text' \(there are: body\)"):
        read(find(path)[0])
    [place] = bad_places(find(path, options=ReadOptions("body"))[0])
    assert place.endswith("row 2: 'body' is not a string but NoneType")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "indented objects"])
def test_json_is_read_in_every_layout(layout: str, suffix: str, tmp_path: Path) -> None:
    records = [{"text": f'{index} "ünï" {{[ \\ ' * (index % 60), "other": [{"}": "{"}]} for index in range(300)]
    raw = {
        "lines": "\n".join(map(json.dumps, records)),
        "array": json.dumps(records),
        "indented array": json.dumps(records, indent=1),
        "indented objects": "\n".join(json.dumps(record, indent=1) for record in records),
    }[layout]
    (tmp_path / f"in.json{suffix}").write_bytes(PACK[suffix](raw.encode()))
    [source] = find(tmp_path)
    pieces = read(source)
    assert len(pieces) > 10
    assert [text for _, texts in pieces for text in texts] == [record["text"] for record in records]
    assert bad_places(source) == []
    with open_source(source) as reader:
        for piece, found in pieces[5::3]:
            assert reader.content(piece).texts == found


def test_a_string_longer_than_a_window_does_not_hide_the_end_of_its_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "WINDOW_BYTES", 32)
    monkeypatch.setattr(sources, "UNIT_BYTES", 10)
    texts = ["}{" * 100, "\\" * 77, "short", '"' * 40]
    (tmp_path / "in.json").write_text(json.dumps([{"text": text} for text in texts]))
    assert [text for _, found in read(find(tmp_path)[0])[:4] for text in found] == texts


def test_array_entries_that_are_not_good_objects_are_reported(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('[{"text": "a"}, {"text": null}, {"text": "b')
    assert [place.partition("in.json, ")[2] for place in bad_places(find(tmp_path / "in.json")[0])] == [
        "object 2: 'text' is not a string but NoneType",
        "object 3: not JSON (Unterminated string starting at: line 1 column 10 (char 9))",
    ]


def test_an_array_of_strings_is_reported(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('["one", "two"]')
    assert bad_places(find(tmp_path / "in.json")[0])[0].endswith("object 1: not a JSON object but str")


def test_a_file_of_another_name_that_holds_json_is_read_as_json(tmp_path: Path) -> None:
    for name in ("part-00000", "dump.log", "c4.gz"):
        raw = b'{"text": "one"}\n{"text": "two"}\n'
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        assert texts_of(find(tmp_path / name)[0]) == ["one", "two"]
    for text in ('{"text": "a story about JSON"}', '{"text": 1}\n{"text": "2"}', '{"text": "a story"}\nof JSON'):
        (tmp_path / "story.txt").write_text(text)
        assert find(tmp_path / "story.txt")[0].format == "text"
    (tmp_path / "export.txt").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert texts_of(find(tmp_path / "export.txt", options=ReadOptions("body"))[0]) == ["one", "two"]


def test_json_of_a_folder_that_is_damaged_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.json.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"b\.json\.gz: damaged or cut short"):
        list(map(read, find(tmp_path)))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv.gz"])
def test_a_table_is_refused_with_a_command_that_converts_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text,id\n")
    with pytest.raises(UsageError, match=r"is a table: convert it.*csv\.DictReader.*> \S*/t\.jsonl"):
        find(tmp_path / name)


def test_the_command_that_converts_a_table_works(tmp_path: Path) -> None:
    (tmp_path / "my t.v1.tsv").write_text('text\tid\n"two\nlines"\t1\n')
    with pytest.raises(UsageError) as refused:
        find(tmp_path / "my t.v1.tsv")
    command = str(refused.value).partition("unpacked: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert texts_of(find(tmp_path / "my t.v1.jsonl")[0]) == ["two\nlines"]


def test_files_of_a_folder_that_are_not_text_are_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "book.epub", "other.epub", "README", "x.tar.gz", ".hidden", "t.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    finder = Finder(ReadOptions(), stdin=STDIN)
    assert [Path(source.path).name for source in finder.find([str(tmp_path)])] == ["a.txt"]
    assert Counter(finder.ignored.values()) == {
        ".epub": 2,
        "": 1,
        ".tar.gz": 1,
        ".csv": 1,
        ".json": 1,
        "link to nothing": 1,
    }


def test_a_folder_of_json_without_the_key_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"körper": "one"}')
    with pytest.raises(DataError, match=r"holds no text.*has the key 'text': --text-key names another"):
        find(tmp_path)
    assert texts_of(find(tmp_path, options=ReadOptions("körper"))[0]) == ["one"]


def test_a_dangling_link_is_left_out_of_a_folder_and_an_error_if_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to("nowhere.txt")
    for value in (tmp_path, tmp_path / "*.txt"):
        assert [Path(source.path).name for source in find(value)] == ["a.txt"]
    with pytest.raises(DataError, match=r"no such input: .*b\.txt is a link to nowhere\.txt, which is not there"):
        find(tmp_path / "b.txt")


def test_nan_in_another_field_does_not_make_a_document_bad(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "score": NaN}\n{"other": "\\ud83d", "text": "b"}\n')
    [source] = find(tmp_path)
    assert texts_of(source) == ["a", "b"]
    assert bad_places(source) == []


@pytest.mark.parametrize(
    ("on_bad", "texts"),
    [("skip", ["", "", "", "good"]), ("replace", ["", "cut \ufffd", "caf\ufffd", "good"])],
)
def test_a_bad_document_is_skipped_or_replaced(on_bad: OnBad, texts: list[str], tmp_path: Path) -> None:
    lines = [b'{"text": null}', rb'{"text": "cut \ud83d"}', b'{"text": "caf\xe9"}', b'{"text": "good"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    [source] = find(tmp_path, options=ReadOptions(on_bad=on_bad))
    assert texts_of(source) == texts
    assert [place.partition("in.jsonl, ")[2] for place in bad_places(source)] == [
        "line 1: 'text' is not a string but NoneType",
        "line 2: 'text' holds a lone surrogate (U+D83D)",
        "line 3: not UTF-8, byte 13 of the line (invalid continuation byte)",
    ]


def test_parquet_reads_bytes_and_columns_in_structs(tmp_path: Path) -> None:
    rows = [{"text": b"caf\xc3\xa9"}, {"text": b"caf\xe9"}, None]
    kind = pyarrow.struct([("text", pyarrow.binary())])
    table = pyarrow.table({"meta": pyarrow.array(rows, kind), "a.b": ["x", "y", "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    [source] = find(tmp_path, options=ReadOptions("meta.text"))
    assert texts_of(source) == ["café", "", ""]
    assert [place.partition("t.parquet, ")[2] for place in bad_places(source)] == [
        "row 2: not UTF-8, byte 3 of the text (unexpected end of data)",
        "row 3: 'meta.text' is not a string but NoneType",
    ]
    assert texts_of(find(tmp_path, options=ReadOptions("a.b"))[0]) == ["x", "y", "z"]
    with pytest.raises(DataError, match=r"no column 'meta\.body'"):
        read(find(tmp_path, options=ReadOptions("meta.body"))[0])


def test_nested_keys_and_keys_with_dots_are_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"meta": {"text": "a"}}\n{"meta.text": "b"}\n{"meta": 1}\n')
    [source] = find(tmp_path, options=ReadOptions("meta.text"))
    assert texts_of(source) == ["a", "b", ""]
    assert "line 3: no key 'meta.text' (there are: meta)" in bad_places(source)[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_utf16_is_recognised(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes('{"text": "some words"}'.encode(encoding))
    [place] = bad_places(find(tmp_path / name)[0])
    assert f"UTF-16, not UTF-8: use --encoding {encoding} if all of the input is" in place


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "shift-jis"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_in_another_encoding_is_read(suffix: str, encoding: str, tmp_path: Path) -> None:
    text = ("café" if encoding == "cp1252" else "日本語") + " words and\n" * 3_000
    (tmp_path / f"t.txt{suffix}").write_bytes(PACK[suffix](text.encode(encoding)))
    [source] = find(tmp_path, options=ReadOptions(encoding=encoding))
    assert len(read(source)) > 3
    assert "".join(texts_of(source)) == text
    (tmp_path / f"t.txt{suffix}").write_bytes(PACK[suffix](b"good \x81"))
    if encoding != "utf-16":
        assert bad_places(source) == [f"{source.name} is not {encoding}"]


@pytest.mark.parametrize(
    ("encoding", "raw", "reason"),
    [
        ("utf-7", b"half +2AA- a character", "is not utf-7"),
        ("unicode_escape", rb"half \ud800 a character", "is not unicode-escape"),
        ("utf-16", b"no mark ", "is not utf-16 (without a byte order mark: utf-16-le or utf-16-be)"),
    ],
)
def test_text_that_an_encoding_cannot_decode_is_a_bad_document(
    encoding: str, raw: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_bytes(raw)
    usual = checked_encoding(encoding)
    [source] = find(tmp_path, options=ReadOptions(encoding=usual))
    assert bad_places(source) == [f"{source.name} {reason}"]


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("between", ["\n<|endoftext|>\n", "<|endoftext|>", "\r\n<|endoftext|>\r\n"])
def test_a_separator_splits_a_text_file_into_documents(between: str, suffix: str, tmp_path: Path) -> None:
    stories = [prose(seed, 1 + 29 * seed).strip() or "x" for seed in range(80)]
    (tmp_path / f"t.txt{suffix}").write_bytes(PACK[suffix](between.join(stories).encode()))
    [source] = find(tmp_path, options=ReadOptions(separator="<|endoftext|>"))
    pieces = read(source)
    assert len(pieces) > 10
    assert [text for _, texts in pieces for text in texts] == stories
    with open_source(source) as reader:
        assert sum(reader.content(piece).separators for piece, _ in pieces) == 79


def test_the_standard_library_comes_without_its_tests() -> None:
    found = standard_library()
    names = [Path(source.path).name for source in found]
    assert "argparse.py" in names
    assert len(found) > 400
    assert not any({"test", "tests", "site-packages"} & set(Path(source.path).parts) for source in found)
    assert found == sorted(found, key=lambda source: Path(source.path).parts)


@pytest.mark.parametrize("raw", [b"", b"\n", b"a", b"a\n", b"a\n\n", b"\n\na", b"a\r\nb"])
def test_a_line_end_after_the_last_line_begins_no_other_line(raw: bytes) -> None:
    assert list(json_text.split_lines(raw)) == raw.removesuffix(b"\n").split(b"\n")
