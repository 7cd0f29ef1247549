"""The files that --input names, directly, by a pattern or by a folder."""

import glob
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from distgpt.corpus.reading import formats, remote
from distgpt.corpus.reading.remote import RemoteFile
from distgpt.corpus.reading.sources import ReadOptions, Source
from distgpt.errors import DataError, UsageError

STDIN = "-"
DANGLING = "link to nothing"
NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Finder:
    """Finds sources. `stdin`: the source for STDIN. `excluded`: files and folders that are not input, as real paths.

    `ignored` maps the real path of each file in a folder that is not text to its suffix. `remote` has the files of URLs
    by URL, which is the name of their source; it has no path yet.
    """

    def __init__(self, options: ReadOptions, *, stdin: Source, excluded: Sequence[Path] = ()) -> None:
        self.ignored: dict[str, str] = {}
        self.remote: dict[str, RemoteFile] = {}
        self._options, self._stdin, self._excluded = options, stdin, excluded

    def find(self, inputs: Sequence[str]) -> list[Source]:
        """Return the sources that these values of --input name, in order, each file once.

        Raises DataError for a file that is missing or a folder without text, UsageError for a file that cannot be
        input, OSError for a folder that cannot be read, StorageError for a URL that cannot be read.
        """
        sources: dict[str, Source] = {}
        for value in inputs:
            if value == STDIN:
                sources[STDIN] = self._stdin
                continue
            if remote.is_url(value):
                for found in remote.find(value):
                    # Its suffix alone: a missing package and an archive are told before it is downloaded.
                    source = formats.source_of(found.path, self._options, found.url)
                    self.remote[found.url], sources[found.url] = found, replace(source, path="")
                continue
            for file in self._files_of(value):
                real = os.path.realpath(file)
                if real not in sources:
                    sources[real] = formats.source_of(file, self._options)
        if not sources:
            raise DataError(f"--input names no file but the output: {', '.join(inputs)}")
        return list(sources.values())

    def _files_of(self, value: str) -> list[Path]:
        """Return the files that a value of --input names."""
        if not value:
            raise UsageError("an --input is empty: name a file, a folder or a pattern")
        named = Path(value)
        if named.is_symlink() and not named.exists():
            raise DataError(f"no such input: {value} is a link to {os.readlink(named)}, which is not there")
        matches = [named] if named.exists() else [Path(match) for match in sorted(glob.glob(value, recursive=True))]
        if not matches:
            raise DataError(f"no such input: {value}")
        found = [file for path in matches for file in self._files_in(path)]
        # The output may be named too: a shell expands * to it after an earlier run.
        if not found and not self._is_excluded(named):
            problem = (
                f"holds no text: of a folder, only files are read that end in {', '.join(formats.FOLDER_SUFFIXES)}"
            )
            if any(".json" in suffix for suffix in self.ignored.values()):
                problem += f"; .json if its first object has the key {self._options.text_key!r}"
                problem += ": --text-key names another"
            raise DataError(f"{value} {problem}")
        return found

    def _files_in(self, path: Path) -> list[Path]:
        """Return the file itself, or the files below the folder that are text; hidden files are left out."""

        def enters(folder: Path) -> bool:
            return not folder.name.startswith(".") and not self._is_excluded(folder)

        if self._is_excluded(path):
            return []
        is_folder = path.is_dir()
        files = [file for file in walk(path, enters) if not file.name.startswith(".")] if is_folder else [path]
        found = []
        for file in files:
            if not file.exists():
                self.ignored[os.path.realpath(file)] = DANGLING
            elif not is_folder or formats.is_input_in_folder(file, self._options):
                found.append(file)
            else:
                suffixes = file.suffixes[-2:] if file.suffix in formats.COMPRESSIONS else [file.suffix]
                self.ignored[os.path.realpath(file)] = "".join(suffixes)
        return found

    def _is_excluded(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(folder) for folder in self._excluded)


def standard_library() -> list[Source]:
    """Return Python's own standard library without its tests. Raises DataError if it is not a folder of files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in walk(root, lambda folder: folder.name not in NOT_LIBRARY) if file.suffix == ".py"]
    if not files:
        raise DataError(f"Python's standard library is not in {root}: give texts of your own with --input")
    return [Source(str(file), str(file), "text") for file in files]


def walk(folder: Path, enters: Callable[[Path], bool]) -> list[Path]:
    """Return all files below a folder, sorted; links are followed, each folder is entered once. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    found, entered = [], {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        found += [Path(root, name) for name in names]
        candidates, folders[:] = sorted(folders), []
        for name in candidates:
            real = os.path.realpath(Path(root, name))
            if enters(Path(root, name)) and real not in entered:
                entered.add(real)
                folders.append(name)
    return sorted(found, key=lambda path: path.parts)
