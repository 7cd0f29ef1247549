"""Input files that are named by a URL. The file systems of the tests are in memory."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distgpt.corpus.reading import remote
from distgpt.errors import DataError, DistgptError, StorageError, UsageError

FILES = {
    "corpus/README.md": b"about",
    "corpus/.gitattributes": b"",
    "corpus/settings.json": b'{"text": ""}',
    "corpus/data/a.jsonl.gz": b"aa",
    "corpus/data/b.parquet": b"bbb",
    "corpus/c.txt": b"cccc",
}


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/{name}", content)
    yield system
    system.rm("/", recursive=True)


class Unreachable(fsspec.AbstractFileSystem):  # type: ignore[misc]
    protocol = "unreachable"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        raise ConnectionError("[Errno -2] Name or service not known\nand more")


fsspec.register_implementation("unreachable", Unreachable)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://corpus", ["c.txt", "data/a.jsonl.gz", "data/b.parquet"]),
        ("memory://corpus/data", ["data/a.jsonl.gz", "data/b.parquet"]),
        ("memory://corpus/*.[mj]*", ["README.md", "settings.json"]),
        ("memory://corpus/**/*.parquet", ["data/b.parquet"]),
        ("memory://corpus/c.txt", ["c.txt"]),
    ],
)
@pytest.mark.usefixtures("memory")
def test_a_url_names_a_file_a_pattern_or_the_text_of_a_folder(url: str, expected: list[str]) -> None:
    found = remote.find(url)
    assert [file.url for file in found] == [f"memory:///corpus/{name}" for name in expected]
    assert [file.size for file in found] == [len(FILES[f"corpus/{name}"]) for name in expected]


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://corpus/none.txt", DataError, "no such input: memory://corpus/none.txt"),
        ("memory://corpus/*.zip", DataError, "no such input: memory://corpus/*.zip: no file matches"),
        (
            "s3://bucket/a.txt",
            UsageError,
            's3://bucket/a.txt needs a package (Install s3fs to access S3): pip install "',
        ),
        ("hq://datasets/a", UsageError, "hq://datasets/a: no such protocol; for example hf://"),
        (
            "unreachable://host/a.txt",
            StorageError,
            "cannot read unreachable://host/a.txt ([Errno -2] Name or service not known): check the network",
        ),
    ],
)
@pytest.mark.usefixtures("memory")
def test_what_cannot_be_listed_is_an_error_of_one_line(
    url: str, kind: type[DistgptError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(kind) as caught:
        remote.find(url)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_download_goes_on_with_the_files_that_are_there(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_file = MemoryFileSystem.open

    def counting(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        opened.append(path.removeprefix("/corpus/"))
        if path.endswith("b.parquet") and len(opened) == 2:
            raise ConnectionError("reset by peer")
        return open_file(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", counting)
    files, counts = remote.find("memory://corpus/data"), list[int]()
    with pytest.raises(StorageError, match="reset by peer"):
        remote.download(files, tmp_path / "remote", advance=counts.append)
    remote.download(files, tmp_path / "remote", advance=counts.append)
    assert opened == ["data/a.jsonl.gz", "data/b.parquet", "data/b.parquet"]
    assert counts == [2, 2, 3]

    memory.pipe("/corpus/data/a.jsonl.gz", b"aaaa")  # another version of the file
    files = remote.find("memory://corpus/data")
    remote.download(files, tmp_path / "remote", advance=counts.append)
    assert opened[4:] == ["data/a.jsonl.gz"]  # after the one that wrote it
    names = [file.local_name for file in files]
    assert sorted(path.name for path in (tmp_path / "remote").iterdir()) == sorted(names)
    assert [(tmp_path / "remote" / name).read_bytes() for name in names] == [b"aaaa", b"bbb"]
    assert names[0].endswith("-a.jsonl.gz")

    with pytest.raises(StorageError, match=r"b\.parquet was cut short: 3 of 9 bytes"):
        remote.download([files[1]._replace(size=9, version="x")], tmp_path / "remote", advance=counts.append)
