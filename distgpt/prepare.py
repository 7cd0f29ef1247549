"""Text in, a dataset out: `python -m distgpt.prepare --input PATH... --output DIR`."""

import argparse
import errno
import hashlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import get_args

from distgpt.cli import main_guard
from distgpt.corpus import shards
from distgpt.corpus.preparing import build, report, staging
from distgpt.corpus.preparing.build import Job
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.reading import formats, remote, streams
from distgpt.corpus.reading.finding import STDIN, Finder, standard_library
from distgpt.corpus.reading.remote import RemoteFile
from distgpt.corpus.reading.sources import Format, OnBad, ReadOptions, Source
from distgpt.corpus.tokenizer.base import MAX_VOCAB_SIZE
from distgpt.corpus.tokenizer.huggingface import PATTERNS
from distgpt.corpus.tokenizer.loading import given_tokenizer
from distgpt.errors import DISK_FULL, Interrupted, StorageError, UsageError
from distgpt.files import user_path
from distgpt.machine import available_cpus
from distgpt.usage import Parser

DEFAULT_OUTPUT = Path("data/stdlib")
DEFAULT_VOCAB_SIZE = 8192
NO_SPACE = (*DISK_FULL, errno.EFBIG)

HELP = f"""\
Prepare text for training: write a directory of tokens that distgpt.train reads. Without arguments, prepare
Python's own standard library, one token per character, and write to {DEFAULT_OUTPUT}.

A text file is one document, or several with --document-separator. Each JSON object (one per line, or in an array) and
each row of .parquet is a document. All but .parquet may be compressed (.gz, .zst). A file that you name, or that a
pattern matches, is read whatever its name ends in. A folder is searched with all its subfolders and links. Its files
are read if they end in
{" ".join(formats.FOLDER_SUFFIXES)}
A .json file in a folder must begin with an object that has the --text-key. A .txt file that begins with two lines of
such objects is read as JSON. Hidden files, empty documents, files named a second time and the output are left out.

The end of a single document is for validation. Of several documents, a hash of the text decides which are. If that
would miss the share asked for by far, documents are chosen so that it is as near as possible. An end-of-text token
follows each document. Special tokens of a tokenizer file are ordinary text where a document contains them.
"""
EPILOG = """\
Run the same command again after an interruption: it goes on where it stopped. Exit codes: 0 done now or earlier;
2 usage; 65 bad input; 73 the output exists, is in use or cannot be made; 74 disk full or I/O; 75 interrupted.
"""


def main() -> None:
    """Parse, check, prepare. Raises DistgptError."""
    options = parse(sys.argv[1:])
    if options.verify is not None:
        print(_verify(options.verify))
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    print(prepare(options), flush=True)


def prepare(options: argparse.Namespace) -> str:
    """Prepare what the options describe, or find it prepared; return the text to print. Raises DistgptError."""
    output = Path(os.path.realpath(options.output))
    try:
        job = job_of(options, output)
        with Workers(options.workers) as workers:
            return build.prepare(job, workers)
    except OSError as error:
        raise _storage_error(error, output) from None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the checked command line. Raises UsageError."""
    parser = Parser(prog="python -m distgpt.prepare", description=HELP, epilog=EPILOG, allow_abbrev=False)
    add = parser.add_argument
    inputs = "files, folders, patterns, URLs (hf://, s3://, https://), or - for standard input (one text, or JSON)"
    add("--input", nargs="+", type=user_path, metavar="PATH", help=inputs)
    add("--output", type=_path, metavar="DIR", help=f"directory to make (default without --input: {DEFAULT_OUTPUT})")
    kinds = (
        "characters; bytes; BPE learned from this text; GPT-2's; a tokenizer.json or a directory with one; "
        "a .tiktoken or .model (default: char)"
    )
    add("--tokenizer", type=user_path, default="char", metavar="char|bytes|bpe|gpt2|FILE|DIR", help=kinds)
    add("--vocab-size", type=int, metavar="N", help=f"ids of bpe, end-of-text included (default: {DEFAULT_VOCAB_SIZE})")
    patterns = "how BPE, learned or of a .tiktoken file, cuts a text into words (default: gpt2)"
    add("--bpe-pattern", choices=PATTERNS, metavar="|".join(PATTERNS), help=patterns)
    validation = parser.add_mutually_exclusive_group().add_argument
    validation("--val-fraction", type=float, default=0.1, metavar="F", help="share for validation (default: 0.1)")
    val_inputs = "validation text; files that --input names as well are not used for training"
    validation("--val-input", nargs="+", type=user_path, metavar="PATH", help=val_inputs)
    cpus = available_cpus()
    add("--workers", type=int, default=cpus, metavar="N", help="processes (default: one per CPU; same result)")
    add("--shard-tokens", type=int, metavar="N", help="start a new file after the document that fills N tokens")
    keys = "key of the text in JSON and .parquet (default: text); meta.text: text inside meta; with -: read JSON lines"
    add("--text-key", metavar="KEY", help=keys)
    add("--document-separator", default="", metavar="TEXT", help="text between the documents of a text file")
    add("--encoding", default="", metavar="NAME", help="encoding of all text and JSON (default: utf-8)")
    bad = (
        "if a document has no text or is not in the encoding: stop and list the first ones; skip it; or replace bad "
        "characters by U+FFFD and skip it only if it has no text (default: stop)"
    )
    add("--on-bad-document", choices=get_args(OnBad), default="stop", help=bad)
    dedup = (
        "leave out exact copies of a document: the first one is kept or, if there is one, that in the validation text"
    )
    add("--dedup", action="store_true", help=dedup)
    shares = "encode share I (from 0) of N; start all N tasks, at once or not: the last one to end writes the output"
    add("--task", type=_task, metavar="I/N", help=shares)
    add("--overwrite", action="store_true", help="prepare again and replace the output, in one step")
    add("--verify", type=_path, metavar="DIR", help="check every file of a prepared directory instead")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _path(text: str) -> Path:
    return Path(user_path(text))


def _task(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1")
    return int(index), int(count)


def _check(options: argparse.Namespace) -> None:
    if options.verify and (options.input or options.output):
        raise UsageError("--verify cannot be combined with --input or --output")
    if options.input and options.output is None:
        raise UsageError("--input needs --output DIR, the directory to make")
    if options.on_bad_document != "stop" and not options.input:
        raise UsageError("--on-bad-document has no effect without --input")
    options.output = options.output or DEFAULT_OUTPUT
    if not Path(os.path.realpath(options.output)).name:
        raise UsageError(f"--output {options.output} cannot become a dataset")
    if options.task and (options.overwrite or STDIN in (options.input or [])):
        raise UsageError("--task cannot be combined with --overwrite or standard input")
    if options.task and any(map(remote.is_url, [*(options.input or []), *(options.val_input or [])])):
        raise UsageError("--task needs files that each task can read: download them first")
    options.encoding = streams.checked_encoding(options.encoding)
    if options.val_input:
        if not options.input or STDIN in options.val_input:
            raise UsageError("--val-input needs --input as well, and takes files, folders or patterns")
        options.val_fraction = None
    elif not 0 < options.val_fraction < 1:
        raise UsageError(f"--val-fraction is {options.val_fraction}: it must be above 0 and below 1")
    for name in ("workers", "shard_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    _check_bpe(options)


def _check_bpe(options: argparse.Namespace) -> None:
    """Check the options of BPE, and set the size of a vocabulary to learn. Raises UsageError."""
    if options.vocab_size is not None and options.tokenizer != "bpe":
        raise UsageError(f"--vocab-size belongs to --tokenizer bpe, not to {options.tokenizer}")
    if options.bpe_pattern and options.tokenizer != "bpe" and not options.tokenizer.endswith(".tiktoken"):
        raise UsageError("--bpe-pattern belongs to --tokenizer bpe or a .tiktoken file")
    if options.tokenizer == "bpe":
        options.vocab_size = DEFAULT_VOCAB_SIZE if options.vocab_size is None else options.vocab_size
        if options.vocab_size > MAX_VOCAB_SIZE:
            raise UsageError(f"--vocab-size is {options.vocab_size}: at most {MAX_VOCAB_SIZE}")
        if options.vocab_size < 257:
            raise UsageError(f"--vocab-size is {options.vocab_size}: 256 bytes and end-of-text need at least 257")


def job_of(options: argparse.Namespace, output: Path) -> Job:
    """Return the job that the options describe. Raises DataError, UsageError, OSError."""
    tokenizer = given_tokenizer(options.tokenizer, options.bpe_pattern or "")
    for note in tokenizer.notes if tokenizer else ():
        report.say(f"{options.tokenizer}: {note}")
    inputs, ignored, remote_files = find_inputs(options, output)
    settings = {
        "tokenizer": "file" if tokenizer else options.tokenizer,
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest() if tokenizer else None,
        **{name: getattr(options, name) for name in ("vocab_size", "val_fraction", "shard_tokens")},
    }
    # Options that came later are noted only if they are used, so that the settings of older datasets still match.
    later = {"document_separator": "", "encoding": "", "on_bad_document": "stop", "bpe_pattern": None, "dedup": False}
    used = {name: getattr(options, name) for name, default in later.items() if getattr(options, name) != default}
    return Job(
        inputs=inputs,
        settings={**used, **settings},
        tokenizer=tokenizer,
        output=output,
        shown_output=options.output,
        overwrite=options.overwrite,
        task=options.task,
        ignored=ignored,
        remote=remote_files,
    )


def find_inputs(options: argparse.Namespace, output: Path) -> tuple[list[Source], Counter[str], dict[str, RemoteFile]]:
    """Return the sources, the number of ignored files by suffix, and the remote files.

    Raises DataError, UsageError, StorageError, OSError.
    """
    text_key = options.text_key or "text"
    reading = ReadOptions(text_key, options.document_separator, options.encoding, options.on_bad_document)
    text_format: Format = "separated" if reading.separator else "text"
    stdin = Source("", "standard input", text_format if options.text_key is None else "jsonl", "", reading)
    finder = Finder(reading, stdin=stdin, excluded=(output, staging.directory_of(output)))
    sources = finder.find(options.input) if options.input else standard_library()
    if options.val_input:
        validating = {_place_of(source): source for source in finder.find(options.val_input)}
        sources = [source for source in sources if _place_of(source) not in validating]
        if not sources:
            raise UsageError("--val-input names all of --input: nothing is left to train on")
        sources += [replace(source, validates=True) for source in validating.values()]
    if not finder.remote:  # the content of a remote file is known only later
        _check_effects(options, sources)
    read = {_place_of(source) for source in sources}
    return sources, Counter(suffix for path, suffix in finder.ignored.items() if path not in read), finder.remote


def _place_of(source: Source) -> str:
    return os.path.realpath(source.path) if source.path else source.name


def _check_effects(options: argparse.Namespace, inputs: Sequence[Source]) -> None:
    """Raise UsageError for an option without effect on any input."""
    formats_read = {source.format for source in inputs}
    if options.text_key is not None and not formats_read & {"json", "jsonl", "parquet"}:
        raise UsageError("--text-key has no effect: no input is JSON or Parquet")
    if options.document_separator and "separated" not in formats_read:
        raise UsageError("--document-separator has no effect: no input is a text file given with --input")
    if options.encoding and (not options.input or formats_read == {"parquet"}):
        raise UsageError("--encoding has no effect: no input is a text or JSON file given with --input")


def _verify(path: Path) -> str:
    """Check every file of a dataset; return the text to print. Raises DataError."""
    dataset = shards.open_dataset(path)
    shards.verify_dataset(dataset, always=True)
    tokens = dataset.train.tokens + dataset.val.tokens
    return f"{path}: OK, {tokens:,} tokens below {dataset.vocab_size:,}, every file as it was written"


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}: run the same command again to go on")


def _storage_error(error: OSError, output: Path) -> StorageError:
    if error.errno in NO_SPACE:
        kept = staging.directory_of(output)
        return StorageError(
            f"no space left for {output} ({error.strerror}): make room and run the same command again, "
            f"it goes on with the parts in {kept}"
        )
    return StorageError(f"{error.filename or output}: {error.strerror or error}")


if __name__ == "__main__":
    main_guard(main)
