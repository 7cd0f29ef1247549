"""Files that --input names by a URL: hf://, s3://, https:// and whatever else fsspec knows."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from distgpt.corpus.reading import formats
from distgpt.errors import DISK_FULL, DataError, DistgptError, StorageError, UsageError

CHUNK_BYTES = 2**25  # of one request
# Of a folder, only these: repositories hold descriptions and settings as well.
FOLDER_SUFFIXES = (*formats.PROSE_SUFFIXES, ".jsonl", ".ndjson", ".parquet")


class RemoteFile(NamedTuple):
    """A remote file. `version` differs if the file may have changed; `size` is None if it is unknown."""

    url: str
    size: int | None
    version: str

    @property
    def path(self) -> Path:
        """The path in the URL, whose suffix tells the format."""
        return Path(urlsplit(self.url).path)

    @property
    def local_name(self) -> str:
        """The name of a download of this version."""
        return f"{self.version[:16]}-{self.path.name}"


def is_url(value: str) -> bool:
    """Return True for PROTOCOL://..."""
    return re.match(r"[a-z][a-z0-9+.-]*://", value) is not None


def find(url: str) -> list[RemoteFile]:
    """Return the files that a URL names: one, those of a pattern, or the text of a folder.

    Raises DataError if there are none, UsageError if a package is missing, StorageError if they cannot be listed.
    """
    with _errors_of(url):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
        elif system.isdir(path):
            files = system.find(path, detail=True)
            found = {name: info for name, info in files.items() if _is_text(PurePosixPath(name))}
        else:
            found = {path: system.info(path)}
        names = sorted(name for name, info in found.items() if info["type"] == "file")
        if not names:
            what = f"no file ends in {', '.join(FOLDER_SUFFIXES)}" if not glob.has_magic(path) else "no file matches"
            raise DataError(f"no such input: {url}: {what}")
        return [_remote_file(system.unstrip_protocol(name), found[name]) for name in names]


def download(files: Sequence[RemoteFile], folder: Path, *, advance: Callable[[int], None]) -> None:
    """Download these files into the folder, except those that an earlier call has downloaded whole; remove others.

    `advance` gets the bytes. Raises StorageError, OSError.
    """
    folder.mkdir(exist_ok=True)
    for stale in {*os.listdir(folder)} - {file.local_name for file in files}:
        (folder / stale).unlink()
    for file in files:
        target = folder / file.local_name
        if target.exists():
            advance(target.stat().st_size)
        else:
            _download(file, target, advance)


def _download(file: RemoteFile, target: Path, advance: Callable[[int], None]) -> None:
    staged = target.with_name(f"{target.name}.tmp")
    with _errors_of(file.url), staged.open("wb") as local:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(file.url)
        with system.open(path, "rb", cache_type="none") as remote:
            while chunk := remote.read(CHUNK_BYTES):
                local.write(chunk)
                advance(len(chunk))
        local.flush()
        os.fsync(local.fileno())
        if file.size not in (None, local.tell()):
            raise StorageError(f"{file.url} was cut short: {local.tell():,} of {file.size:,} bytes; start again")
    staged.rename(target)


def _remote_file(url: str, info: dict[str, Any]) -> RemoteFile:
    # What a file system says of a file: its size and, if it has them, a hash, a tag or the time of its last change.
    facts = repr(sorted((key, value) for key, value in info.items()))
    return RemoteFile(url, info.get("size"), hashlib.sha256(f"{url} {facts}".encode()).hexdigest())


def _is_text(path: PurePosixPath) -> bool:
    plain = path.with_suffix("") if path.suffix in formats.COMPRESSIONS else path
    return plain.suffix in FOLDER_SUFFIXES and not path.name.startswith(".")


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Raise the errors of fsspec and of the libraries behind it, which have no common class, as ours."""
    try:
        yield
    except DistgptError:
        raise
    except ImportError as error:
        packages = 'pip install "distgpt[remote]" brings those for hf://, s3:// and https://'
        raise UsageError(f"{url} needs a package ({error}): {packages}") from None
    except FileNotFoundError:
        raise DataError(f"no such input: {url}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        if "Protocol not known" in str(error):
            raise UsageError(f"{url}: no such protocol; for example hf://, s3:// or https://") from None
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        advice = "check the network and your access, then run it again to go on"
        raise StorageError(f"cannot read {url} ({reason}): {advice}") from None
