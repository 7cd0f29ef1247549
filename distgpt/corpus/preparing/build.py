"""Prepare a dataset: the order of events from the input to a directory with its final name."""

import hashlib
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distgpt.corpus import shard_writer, shards
from distgpt.corpus.preparing import copies, encode, merge, parts, report, scan, staging, vocabulary
from distgpt.corpus.preparing.encode import EncodeOptions, Unit
from distgpt.corpus.preparing.scan import Scan
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.reading import formats, remote, sources
from distgpt.corpus.reading.remote import RemoteFile
from distgpt.corpus.reading.sources import Source
from distgpt.corpus.tokenizer import Tokenizer, fast
from distgpt.corpus.tokenizer.bpe import BpeTokenizer
from distgpt.corpus.tokenizer.huggingface import GPT2_PATTERN
from distgpt.corpus.tokenizer.loading import gpt2
from distgpt.corpus.tokenizer.simple import CharTokenizer
from distgpt.errors import DataError, DirectoryError

LARGE_BYTES = 100_000_000
ANOTHER_OUTPUT = "use another --output, or --overwrite"


@dataclass(frozen=True)
class Job:
    """A dataset to prepare. `tokenizer`: the one of a file that the user gave, or None if `settings` names a kind.

    `settings` are the options that decide the content of the output, and meta.json keeps them. `output` is a real path,
    `shown_output` the same as the user wrote it. `task` is (I, N): this process encodes share I of N. `ignored` counts,
    by suffix, the files of folders that are not text. `remote` has the input files that are URLs.
    """

    inputs: Sequence[Source]
    settings: dict[str, Any]
    tokenizer: Tokenizer | None
    output: Path
    shown_output: Path
    overwrite: bool
    task: tuple[int, int] | None
    ignored: Counter[str]
    remote: Mapping[str, RemoteFile]

    @property
    def remote_version(self) -> str:
        """A hash of the versions of all remote files; "" if there are none."""
        versions = "".join(file.version for file in self.remote.values())
        return versions and hashlib.sha256(versions.encode()).hexdigest()


def prepare(job: Job, workers: Workers) -> str:
    """Prepare the output, or find it prepared; return the text to print."""
    staging.recover(job.output)
    if _exists_with_these_options(job):
        if all(source.path for source in job.inputs):
            return _already_prepared(job, _scan(job, workers))
        if all(source.name in job.remote for source in job.inputs):
            return _already_prepared(job, None)
    if job.settings["tokenizer"] == "gpt2":  # not earlier, since it may be a download
        job = replace(job, tokenizer=gpt2())
    if job.task is not None:
        return _prepare_share(job, *job.task, workers)
    with staging.exclusive(job.output) as directory:
        # Look again: another process may have made the output before this one got the lock.
        exists = _exists_with_these_options(job)
        job = replace(job, inputs=_local_inputs(job, directory))
        found = _scan(job, workers)
        if exists:
            return _already_prepared(job, found)
        return _build(job, found, encode.units_of(found), directory, workers)


def _prepare_share(job: Job, index: int, count: int, workers: Workers) -> str:
    """Encode the share of this task. The last task to end, of all that may run on other hosts, builds the dataset."""
    found = _scan(job, workers)
    units = encode.units_of(found)
    share = units[len(units) * index // count : len(units) * (index + 1) // count]

    identity, load = _identity(job, found.fingerprint), vocabulary.saved_tokenizer
    set_up = partial(vocabulary.make_tokenizer, found, job.settings, job.tokenizer, workers)
    try:
        with staging.shared(job.output, identity, set_up, load) as (directory, tokenizer):
            _encode(share, found, tokenizer, directory, workers)
    except staging.CommittedError:  # a restart of this task that was not needed, or the same task started twice
        _exists_with_these_options(job)
        return _already_prepared(job, found)
    # The task that releases the directory last can lock it alone, and finds every part there.
    with suppress(DirectoryError), staging.exclusive(job.output) as directory:
        if all(parts.is_whole(directory / staging.PARTS, unit.index) for unit in units):
            return _build(job, found, units, directory, workers, is_encoded=True)
    return f"task {index} of {count} is done; the last task to end writes {job.shown_output}"


def _exists_with_these_options(job: Job) -> bool:
    """Return True if the output was prepared with these options, False if it does not exist or is to be overwritten.

    Raises DirectoryError if it is anything else, DataError if it is a dataset that cannot be read; it stays as it is.
    """
    output = job.output
    if not os.path.lexists(output):
        return False
    if job.overwrite:
        if not output.is_dir() or not all(map(shards.is_dataset_file, os.listdir(output))):
            raise DirectoryError(
                f"{output} holds files that are not a dataset's, which --overwrite would delete: move them first"
            )
        return False
    try:
        settings = shards.read_meta(output).get("options")
    except shards.IncompleteError:
        raise DirectoryError(f"{output} exists and is not a whole dataset: {ANOTHER_OUTPUT}") from None
    if settings != job.settings:
        raise DirectoryError(f"{output} was prepared with other options: {ANOTHER_OUTPUT}")
    return True


def _already_prepared(job: Job, found: Scan | None) -> str:
    """Verify that the output is this dataset and remove what is left of its preparation; return the text to print.

    Remote input is not downloaded again to scan it: then `found` is None, and the versions of its files are compared.
    Raises DirectoryError if it was prepared from another input, DataError if it is damaged.
    """
    dataset = shards.open_dataset(job.output)
    about = dataset.meta["input"]
    same = about["fingerprint"] == found.fingerprint if found else about.get("remote") == job.remote_version
    if not same:
        raise DirectoryError(f"{job.output} was prepared from another input: {ANOTHER_OUTPUT}")
    shards.verify_dataset(dataset)
    staging.clear_leftovers(job.output, _identity(job, about["fingerprint"]))
    size = f"{dataset.train.tokens + dataset.val.tokens:,} tokens, vocabulary {dataset.vocab_size:,}"
    return f"{job.shown_output} is already prepared from this input: {size}"


def _local_inputs(job: Job, directory: Path) -> list[Source]:
    """Return the sources as files that every worker can read: download remote ones, copy standard input."""
    folder = directory / staging.REMOTE
    if job.remote:
        files = list(job.remote.values())
        total = None if any(file.size is None for file in files) else sum(file.size or 0 for file in files)
        with report.progress("downloading", total) as advance:
            remote.download(files, folder, advance=advance)
    inputs = []
    for source in job.inputs:
        if file := job.remote.get(source.name):
            local = formats.source_of(folder / file.local_name, source.options, file.url)
            inputs.append(replace(local, validates=source.validates))
        else:
            inputs.append(source if source.path else _copy_stdin(source, directory))
    return inputs


def _copy_stdin(source: Source, directory: Path) -> Source:
    """Copy standard input to a file that every worker can read; return that source, with the format of its content."""
    source = replace(source, path=str(directory / staging.STDIN_NAME))
    with open(source.path, "wb") as file, report.progress("copying standard input", None) as advance:
        while chunk := sys.stdin.buffer.read(2**20):
            file.write(chunk)
            advance(len(chunk))
    return formats.as_json(source) if source.format == "jsonl" else formats.as_text_or_json(source)


def _scan(job: Job, workers: Workers) -> Scan:
    """Read the input. Raises DataError for text that does not fit the options."""
    characters = job.settings["tokenizer"] == "char" or isinstance(job.tokenizer, CharTokenizer)
    with report.progress("reading", sum(os.path.getsize(source.path) for source in job.inputs)) as advance:
        found = scan.scan_input(job.inputs, characters=characters, workers=workers, advance=advance)
    if job.tokenizer is not None:
        vocabulary.check_characters(found, job.tokenizer)
    separator = job.settings.get("document_separator", "")
    if separator and not found.separators:
        hint = r": a shell writes a line end as $'\n'" if "\\" in separator else ""
        raise DataError(f"--document-separator {separator!r} does not occur in the input{hint}")
    if found.separators and not separator:
        report.say(
            f"{found.separators:,} lines of the text look like separators of documents, such as <|endoftext|>: "
            "--document-separator '<|endoftext|>' makes a document of each part between them"
        )
    return found


def _identity(job: Job, fingerprint: str) -> dict[str, Any]:
    """Return what the content of a part depends on. Parts of a job with another identity are not used."""
    return {"input": fingerprint, "options": job.settings, "unit_bytes": sources.UNIT_BYTES}


def _build(
    job: Job, found: Scan, units: Sequence[Unit], directory: Path, workers: Workers, *, is_encoded: bool = False
) -> str:
    """Write the dataset in the staging directory and rename it to the output; return the summary."""
    started = time.monotonic()
    staging.begin(directory, _identity(job, found.fingerprint))
    tokenizer = vocabulary.make_tokenizer(found, job.settings, job.tokenizer, workers, directory)
    if tokenizer.dtype != np.uint16:
        report.say(f"a vocabulary of {tokenizer.vocab_size:,} ids takes 4 bytes a token: the .bin files are uint32")
    if not is_encoded:
        _encode(units, found, tokenizer, directory, workers)
    part_files, val_fraction = directory / staging.PARTS, job.settings["val_fraction"]
    about = {"fingerprint": found.fingerprint, "documents": found.documents, "bytes": found.text_bytes}
    if job.remote:
        about["remote"] = job.remote_version
    if found.bad.places:
        about["bad_documents"] = found.bad._asdict()
    found_copies = None
    if job.settings.get("dedup"):
        with report.progress("comparing documents", found.text_bytes) as advance:
            found_copies = copies.find_copies(part_files, units, advance=advance)
        about["duplicates"] = int(found_copies.is_copy.sum())
    with report.progress("writing", sum(path.stat().st_size for path in part_files.iterdir())) as advance:
        meta = shard_writer.write_dataset(
            directory / staging.DATASET,
            merge.merge_parts(
                part_files, units, documents=found.documents, val_fraction=val_fraction, copies=found_copies
            ),
            tokenizer=tokenizer,
            eot_id=_eot_id(found, tokenizer),
            shard_tokens=job.settings["shard_tokens"],
            about={"options": job.settings, "input": about},
            advance=advance,
        )
    staging.commit(directory, job.output)
    report.warn_of_split(meta)
    seconds = time.monotonic() - started
    return report.summary(job.shown_output, meta, bad=found.bad, ignored=job.ignored, seconds=seconds)


def _encode(units: Sequence[Unit], found: Scan, tokenizer: Tokenizer, directory: Path, workers: Workers) -> None:
    """Write the parts of these units, except those that are whole."""
    todo = _missing(units, directory / staging.PARTS)
    if len(todo) < len(units):
        report.say(f"going on: {len(units) - len(todo)} of {len(units)} parts are done")
    if not todo:
        return
    options = EncodeOptions(
        tokenizer=directory / vocabulary.FILE_NAME,
        eot_id=_eot_id(found, tokenizer),
        hashes=encode.hash_long_documents(found, workers) if found.documents > 1 else {},
        fast=_is_fast(tokenizer, found),
    )
    if not _encode_parts(todo, directory, options, workers):
        report.say("gigatoken gives other ids than tiktoken for this text: encoding all of it again without gigatoken")
        for unit in units:
            parts.remove(directory / staging.PARTS, unit.index)
        _encode_parts(units, directory, replace(options, fast=False), workers)


def _missing(units: Sequence[Unit], part_files: Path) -> list[Unit]:
    """Return the units whose part is not there or damaged."""
    missing = []
    with report.progress("checking parts", sum(unit.text_bytes for unit in units)) as advance:
        for unit in units:
            if not parts.is_whole(part_files, unit.index):
                missing.append(unit)
            advance(unit.text_bytes)
    return missing


def _encode_parts(units: Sequence[Unit], directory: Path, options: EncodeOptions, workers: Workers) -> bool:
    with report.progress("encoding", sum(unit.text_bytes for unit in units)) as advance:
        return encode.encode(units, directory / staging.PARTS, options=options, workers=workers, advance=advance)


def _is_fast(tokenizer: Tokenizer, found: Scan) -> bool:
    """Return True if gigatoken can encode; if not, say why where that costs much time."""
    if not isinstance(tokenizer, BpeTokenizer):
        return False
    if tokenizer.is_slow:
        report.say("the fast encoder might give other ids than Hugging Face's for this vocabulary: using the slow one")
        return False
    reason = "gigatoken has another pattern" if tokenizer.pattern != GPT2_PATTERN else fast.why_unavailable()
    if reason and found.text_bytes > LARGE_BYTES:
        if importlib.util.find_spec("tiktoken") is None:
            report.say("encoding takes several times longer without the package tiktoken: pip install tiktoken")
        elif tokenizer.pattern == GPT2_PATTERN:
            report.say(f"{reason}, encoding takes several times longer: pip install gigatoken=={fast.VERSION}")
    return not reason


def _eot_id(found: Scan, tokenizer: Tokenizer) -> int | None:
    """Return the id that ends each document; a single document needs none."""
    return tokenizer.eot_id if found.documents > 1 else None
