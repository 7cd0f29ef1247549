"""Text in, a dataset out: `python -m distgpt.prepare --input PATH... --output DIR`."""

import argparse
import codecs
import errno
import hashlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, get_args

from tqdm import tqdm

from distgpt.cli import Parser, main_guard
from distgpt.corpus import pipeline, shards, sources, split, staging
from distgpt.corpus.pipeline import Encoder, Scan, Unit
from distgpt.corpus.sources import STDIN, Source
from distgpt.corpus.tokenizer import (
    MAX_VOCAB_SIZE,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_name,
    gpt2,
    tokenizer_from_json,
)
from distgpt.corpus.workers import Workers
from distgpt.errors import DISK_FULL, DataError, DirectoryError, Interrupted, StorageError, UsageError
from distgpt.files import user_path, write_file
from distgpt.machine import available_cpus
from distgpt.suggestion import training_command

DEFAULT_OUTPUT = Path("data/stdlib")
DEFAULT_VOCAB_SIZE = 8192
TOKENIZER, TOKENIZER_HASH = "tokenizer.json", "tokenizer.sha256"
LINE_SECONDS = 10.0
NO_SPACE = (*DISK_FULL, errno.EFBIG)

HELP = f"""\
Prepare text for training: a directory of uint16 tokens that distgpt.train reads. Without arguments: Python's own
standard library, one character a token, to {DEFAULT_OUTPUT}.

A text file is one document, or several with --document-separator; an object of JSON, one a line or in an array, and a
row of .parquet is one document each. All but .parquet may be compressed (.gz, .zst). Files that are named, or matched
by a pattern, are read whatever their name ends in. A folder is searched to the bottom and through links; these files
of it count:
{" ".join(sources.folder_suffixes())}
of .json, those that begin with an object that has the --text-key. A .txt that begins with two lines of such objects is
JSON as well. Hidden files, empty documents, second mentions of a file and the output are left out.

A single document is split at the end of its training part. Several are split by a hash of their text, or, where that
is far from the share asked for, so that it is as near as can be; an end-of-text token follows each. A special token of
a tokenizer file that stands in a text is ordinary text there.
"""
EPILOG = """\
Run again after an interruption, it goes on where it stopped. Exit codes: 0 done, or done before; 2 usage; 65 bad
input; 73 the output exists, is in use or cannot be made; 74 disk full or I/O; 75 interrupted.
"""


def main() -> None:
    """Parse, check, prepare. Raises DistgptError."""
    options = parse(sys.argv[1:])
    if options.verify is not None:
        _verify(options.verify)
        return
    output = Path(os.path.realpath(options.output))
    try:
        with _interruptible():
            said = _prepare(options, output)
    except OSError as error:
        raise _storage_error(error, output) from None
    print(said, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.prepare",
        description=HELP,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        type=user_path,
        metavar="PATH",
        help="files, folders, patterns, or - for standard input (one text, or JSON)",
    )
    add("--output", type=_path, metavar="DIR", help=f"directory to make (default with no input: {DEFAULT_OUTPUT})")
    add(
        "--tokenizer",
        type=user_path,
        default="char",
        metavar="char|bytes|bpe|gpt2|FILE",
        help="characters; bytes; BPE learned from this text; GPT-2's; a tokenizer.json or .tiktoken (default: char)",
    )
    add("--vocab-size", type=int, metavar="N", help=f"ids of bpe, end-of-text included (default: {DEFAULT_VOCAB_SIZE})")
    validation = parser.add_mutually_exclusive_group().add_argument
    validation("--val-fraction", type=float, default=0.1, metavar="F", help="share that validates (default: 0.1)")
    validation(
        "--val-input",
        nargs="+",
        type=user_path,
        metavar="PATH",
        help="validation text; what --input names as well is left out there",
    )
    add(
        "--workers",
        type=int,
        default=available_cpus(),
        metavar="N",
        help="processes (default: one per CPU; same result)",
    )
    add("--shard-tokens", type=int, metavar="N", help="start a new file after the document that fills N tokens")
    add(
        "--text-key",
        metavar="KEY",
        help="what holds the text in JSON and .parquet (default: text), meta.text what is in meta; with -, JSON lines",
    )
    add("--document-separator", default="", metavar="TEXT", help="what stands between the documents of a text file")
    add("--encoding", default="", metavar="NAME", help="encoding of all text and JSON (default: utf-8)")
    add(
        "--on-bad-document",
        choices=get_args(sources.OnBad),
        default="stop",
        help="where a document has no text, or is not in the encoding: stop and list the first ones; skip it; or "
        "replace bad characters by U+FFFD and skip it only if it has no text (default: stop)",
    )
    add(
        "--task",
        type=_task,
        metavar="I/N",
        help="do share I (from 0) of N; start all N, at once or not: the last to end writes the output",
    )
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
        raise UsageError("--verify DIR goes without --input and --output")
    if options.input and options.output is None:
        raise UsageError("--input needs --output DIR, the directory to make")
    if options.on_bad_document != "stop" and not options.input:
        raise UsageError("--on-bad-document has no effect without --input")
    options.output = options.output or DEFAULT_OUTPUT
    if not Path(os.path.realpath(options.output)).name:
        raise UsageError(f"--output {options.output} cannot become a dataset")
    if options.task and (options.overwrite or STDIN in (options.input or [])):
        raise UsageError("--task goes without --overwrite and without standard input")
    options.encoding = _checked_encoding(options.encoding)
    if options.val_input:
        if not options.input or STDIN in options.val_input:
            raise UsageError("--val-input needs --input beside it, and names files, folders or patterns")
        options.val_fraction = None
    elif not 0 < options.val_fraction < 1:
        raise UsageError(f"--val-fraction is {options.val_fraction}: it must be above 0 and below 1")
    for name in ("workers", "shard_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if options.vocab_size is not None and options.tokenizer != "bpe":
        raise UsageError(f"--vocab-size belongs to --tokenizer bpe, not to {options.tokenizer}")
    if options.tokenizer == "bpe":
        options.vocab_size = DEFAULT_VOCAB_SIZE if options.vocab_size is None else options.vocab_size
        if options.vocab_size > MAX_VOCAB_SIZE:
            raise UsageError(
                f"--vocab-size is {options.vocab_size}: tokens are stored as uint16, so at most {MAX_VOCAB_SIZE}"
            )
        if options.vocab_size < 257:
            raise UsageError(f"--vocab-size is {options.vocab_size}: 256 bytes and end-of-text need at least 257")


def _checked_encoding(name: str) -> str:
    """Its usual name; "" for UTF-8. Raises UsageError where there is no such encoding of text."""
    try:
        "".encode(name or "utf-8")
        usual = codecs.lookup(name or "utf-8").name
        # Those of host names take no other error handler: they are not for text that may be bad.
        codecs.getincrementaldecoder(usual)(sources.MARK_BAD).decode(b"a", final=True)
    except (LookupError, UnicodeError, ValueError):
        raise UsageError(f"--encoding {name}: no such encoding of text, as latin-1, cp1252 or utf-16") from None
    return "" if usual == "utf-8" else usual


def _prepare(options: argparse.Namespace, output: Path) -> str:
    """Prepare the output, or find it prepared; gives what to say of it."""
    given = None if options.tokenizer == "gpt2" else from_name(options.tokenizer)
    for note in given.notes if given else ():
        _say(f"{options.tokenizer}: {note}")
    inputs = inputs_of(options, output)
    settings = _settings(options, given)
    staging.recover(output)
    exists = _check_output(output, settings, overwrite=options.overwrite)
    with Workers(options.workers, preload=pipeline.__name__) as workers:
        if exists and not options.overwrite and STDIN not in (options.input or []):
            return _done_before(_scan(inputs, given, options, workers), options, settings, output)
        if options.tokenizer == "gpt2":
            given = gpt2()
        if options.task:
            return _prepare_share(inputs, given, options, settings, output, workers)
        with staging.staging(output) as directory:
            # Only now does no other process make it.
            exists = _check_output(output, settings, overwrite=options.overwrite)
            inputs = _spool(inputs, directory)
            found = _scan(inputs, given, options, workers)
            if exists and not options.overwrite:
                return _existing(options, output, found)
            return _build(found, given, options, settings, directory, output, workers)


def _prepare_share(
    inputs: Sequence[Source],
    given: Tokenizer | None,
    options: argparse.Namespace,
    settings: dict[str, Any],
    output: Path,
    workers: Workers,
) -> str:
    """Encode this task's share beside the others, which may run on other hosts; build if no part is missing then."""
    found = _scan(inputs, given, options, workers)
    units, (index, count) = pipeline.units(found), options.task
    share = units[len(units) * index // count : len(units) * (index + 1) // count]

    def set_up(directory: Path) -> None:
        _tokenizer(found, given, options, directory, workers)

    def is_set_up(directory: Path) -> bool:
        return _saved_tokenizer(directory) is not None

    try:
        with staging.shared(output, _job(found, settings), set_up, is_set_up) as directory:
            tokenizer = _saved_tokenizer(directory)
            assert tokenizer is not None, "it is set up"
            _encode(share, found, tokenizer, directory, workers)
    except staging.CommittedError:  # a restart of this task that was not needed, or the same task started twice
        _check_output(output, settings, overwrite=False)
        return _done_before(found, options, settings, output)
    # Of the tasks that let go of the directory, the last gets it for itself and finds every part there.
    with suppress(DirectoryError), staging.staging(output) as directory:
        if all(pipeline.is_done(unit, directory / "parts") for unit in units):
            return _build(found, given, options, settings, directory, output, workers)
    return f"task {index} of {count} is done; the last of the others writes {options.output}"


def inputs_of(options: argparse.Namespace, output: Path) -> list[Source]:
    """The sources; `options.ignored` counts what folders hold besides. Raises DataError, UsageError, OSError."""
    ignored: dict[str, str] = {}
    if not options.input:
        found = sources.standard_library()
    else:
        own = (output, staging.directory_of(output))
        reading = {"separator": options.document_separator, "encoding": options.encoding}
        spool = str(staging.directory_of(output) / staging.STDIN_NAME)
        stdin = Source(spool, "standard input", "separated" if options.document_separator else "text", **reading)
        if options.text_key is not None:
            stdin = Source(spool, "standard input", "jsonl", "", options.text_key, encoding=options.encoding)

        def expand(paths: Sequence[str]) -> list[Source]:
            return sources.expand(
                paths,
                text_key=options.text_key or "text",
                stdin=replace(stdin, on_bad=options.on_bad_document),
                left_out=own,
                on_bad=options.on_bad_document,
                ignored=ignored,
                **reading,
            )

        found = expand(options.input)
        if options.val_input:
            found = _with_validation(found, expand(options.val_input))
    read = {os.path.realpath(source.path) for source in found}
    options.ignored = Counter(suffix for path, suffix in ignored.items() if path not in read)
    _check_effects(options, found)
    return found


def _with_validation(inputs: Sequence[Source], val_inputs: Sequence[Source]) -> list[Source]:
    """Both, those that are to validate last. Raises UsageError where nothing else is left."""
    validating = {os.path.realpath(source.path) for source in val_inputs}
    training = [source for source in inputs if os.path.realpath(source.path) not in validating]
    if not training:
        raise UsageError("--val-input names all of --input: nothing is left to train on")
    return [*training, *(replace(source, validates=True) for source in val_inputs)]


def _check_effects(options: argparse.Namespace, inputs: Sequence[Source]) -> None:
    """Raise UsageError for an option that no input has a use for."""
    formats = {source.format for source in inputs}
    if options.text_key is not None and not formats & {"json", "jsonl", "parquet"}:
        raise UsageError("--text-key has no effect: no input is JSON or Parquet")
    if options.document_separator and "separated" not in formats:
        raise UsageError("--document-separator has no effect: no input is a text file given with --input")
    if options.encoding and not any(source.encoding for source in inputs):
        raise UsageError("--encoding has no effect: no input is a text or JSON file given with --input")


def _settings(options: argparse.Namespace, given: Tokenizer | None) -> dict[str, Any]:
    """The options that decide what the output holds; meta.json keeps them."""
    # Those that came later are there only where they are given: a dataset from before still is what they make.
    reading = {name: getattr(options, name) for name in ("document_separator", "encoding")}
    if options.on_bad_document != "stop":
        reading["on_bad_document"] = options.on_bad_document
    return {
        **{name: value for name, value in reading.items() if value},
        "tokenizer": "file" if given else options.tokenizer,
        "tokenizer_sha256": hashlib.sha256(given.to_json().encode()).hexdigest() if given else None,
        "vocab_size": options.vocab_size,
        "val_fraction": options.val_fraction,
        "shard_tokens": options.shard_tokens,
    }


def _check_output(output: Path, settings: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether the output exists, and may then turn out to be this very dataset.

    Raises DirectoryError, and DataError for a dataset that cannot be read, which is none to overwrite.
    """
    if not os.path.lexists(output):
        return False
    if overwrite:
        if not output.is_dir() or not all(map(shards.is_dataset_file, os.listdir(output))):
            raise DirectoryError(
                f"{output} holds more than a dataset: --overwrite would destroy that, remove it yourself"
            )
        return True
    try:
        meta = shards.read_meta(output)
    except shards.NotWholeError:
        raise DirectoryError(
            f"{output} exists and is not a whole dataset: take another --output, or --overwrite"
        ) from None
    if meta.get("options") != settings:
        raise DirectoryError(f"{output} was prepared with other options: take another --output, or --overwrite")
    return True


def _existing(options: argparse.Namespace, output: Path, found: Scan) -> str:
    """What to say of an output that is this dataset already. Raises DirectoryError where it is not, DataError."""
    dataset = shards.open_dataset(output)
    if dataset.meta["input"]["fingerprint"] != found.fingerprint:
        raise DirectoryError(f"{output} was prepared from another input: take another --output, or --overwrite")
    shards.verify_dataset(dataset)
    tokens = dataset.train.tokens + dataset.val.tokens
    return f"{options.output} is already prepared from this input: {tokens:,} tokens, vocabulary {dataset.vocab_size:,}"


def _done_before(found: Scan, options: argparse.Namespace, settings: dict[str, Any], output: Path) -> str:
    """As _existing; what the process that made the output may have left beside it is removed."""
    said = _existing(options, output, found)
    staging.clear_leftovers(output, _job(found, settings))
    return said


def _spool(inputs: Sequence[Source], directory: Path) -> list[Source]:
    """Keep standard input where every worker can read it. Gives the inputs, as it shows now. Raises OSError."""
    kept = list(inputs)
    for index, source in enumerate(inputs):
        if Path(source.path) == directory / staging.STDIN_NAME:
            with open(source.path, "wb") as file, Progress("keeping standard input", None) as advance:
                while chunk := sys.stdin.buffer.read(2**20):
                    file.write(chunk)
                    advance(len(chunk))
            if source.format == "jsonl":
                kept[index] = sources.as_json(source, source.text_key)
            else:
                kept[index] = sources.by_content(source, "text")
    return kept


def _scan(inputs: Sequence[Source], given: Tokenizer | None, options: argparse.Namespace, workers: Workers) -> Scan:
    characters = options.tokenizer == "char" or isinstance(given, CharTokenizer)
    with Progress("reading", sum(os.path.getsize(source.path) for source in inputs)) as advance:
        found = pipeline.scan(inputs, characters=characters, workers=workers, advance=advance)
    if given is not None:
        pipeline.check_characters(found, given)
    if options.document_separator and not found.separators:
        hint = r": a shell writes a line end as $'\n'" if "\\" in options.document_separator else ""
        raise DataError(f"--document-separator {options.document_separator!r} is in no text of the input{hint}")
    if found.separators and not options.document_separator:
        _say(
            f"{found.separators:,} lines of the text look like separators of documents, such as <|endoftext|>: "
            "--document-separator '<|endoftext|>' makes a document of each part between them"
        )
    return found


def _job(found: Scan, settings: dict[str, Any]) -> dict[str, Any]:
    """What parts are good for."""
    return {"input": found.fingerprint, "options": settings, "unit_bytes": sources.UNIT_BYTES}


def _build(
    found: Scan,
    given: Tokenizer | None,
    options: argparse.Namespace,
    settings: dict[str, Any],
    directory: Path,
    output: Path,
    workers: Workers,
) -> str:
    """Make the dataset in the staging directory and give it its name; gives what to say of it."""
    started = time.monotonic()
    staging.begin(directory, _job(found, settings))
    tokenizer = _tokenizer(found, given, options, directory, workers)
    _encode(pipeline.units(found), found, tokenizer, directory, workers)
    parts = directory / "parts"
    with Progress("writing", sum(os.path.getsize(part) for part in parts.iterdir())) as advance:
        meta = shards.write_dataset(
            directory / "dataset",
            pipeline.merged(parts, pipeline.units(found), documents=found.documents, val_fraction=options.val_fraction),
            tokenizer=tokenizer,
            eot_id=_eot_id(found, tokenizer),
            shard_tokens=options.shard_tokens,
            about={
                "options": settings,
                "input": {
                    "fingerprint": found.fingerprint,
                    "documents": found.documents,
                    "bytes": found.text_bytes,
                    **({"bad_documents": found.bad._asdict()} if found.bad.places else {}),
                },
            },
            advance=advance,
        )
    staging.commit(directory, output)
    _warn_of_split(meta, options.val_fraction)
    return _summary(options, meta, found, time.monotonic() - started)


def _encode(units: Sequence[Unit], found: Scan, tokenizer: Tokenizer, directory: Path, workers: Workers) -> None:
    """Write the parts of these units that are not there yet."""
    parts = directory / "parts"
    todo = [unit for unit in units if not pipeline.is_done(unit, parts)]
    if len(todo) < len(units):
        _say(f"going on: {len(units) - len(todo)} of {len(units)} parts are done")
    if not todo:
        return
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.is_slow:
        _say("the fast encoder might give other ids than Hugging Face's for this vocabulary: taking the slow one")
    encoder = Encoder(
        tokenizer=directory / TOKENIZER,
        eot_id=_eot_id(found, tokenizer),
        hashes=pipeline.long_document_hashes(found, workers) if found.documents > 1 else {},
    )
    with Progress("encoding", sum(unit.text_bytes for unit in todo)) as advance:
        pipeline.encode(todo, parts, encoder=encoder, workers=workers, advance=advance)


def _eot_id(found: Scan, tokenizer: Tokenizer) -> int | None:
    return tokenizer.eot_id if found.documents > 1 else None


def _tokenizer(
    found: Scan, given: Tokenizer | None, options: argparse.Namespace, directory: Path, workers: Workers
) -> Tokenizer:
    """The tokenizer that was asked for, saved in the staging directory; a trained one is trained once."""
    several = found.documents > 1
    if given is not None:
        tokenizer = given.with_end_of_text() if several else given
    elif options.tokenizer == "char":
        tokenizer = CharTokenizer(found.characters, end_of_text=several)
    elif options.tokenizer == "bytes":
        tokenizer = ByteTokenizer(end_of_text=several)
    elif saved := _saved_tokenizer(directory):
        return saved
    else:
        name = f"learning a vocabulary of {options.vocab_size:,}"
        _say(name)
        with Progress(name, pipeline.bpe_sample_bytes(found)) as advance:
            trained = pipeline.trained_bpe(
                found, vocab_size=options.vocab_size - several, workers=workers, advance=advance
            )
        tokenizer = trained.with_end_of_text() if several else trained
    raw = tokenizer.to_json().encode()
    write_file(directory / TOKENIZER, raw)
    write_file(directory / TOKENIZER_HASH, hashlib.sha256(raw).hexdigest().encode())
    return tokenizer


def _saved_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in the staging directory; None where there is none, or not the one that was written."""
    try:
        raw, known = ((directory / name).read_bytes() for name in (TOKENIZER, TOKENIZER_HASH))
    except FileNotFoundError:
        return None
    return tokenizer_from_json(raw.decode()) if hashlib.sha256(raw).hexdigest().encode() == known else None


def _verify(path: Path) -> None:
    dataset = shards.open_dataset(path)
    shards.verify_dataset(dataset, always=True)
    tokens = dataset.train.tokens + dataset.val.tokens
    print(f"{path}: OK, {tokens:,} tokens below {dataset.vocab_size:,}, every file as it was written")


def _summary(options: argparse.Namespace, meta: dict[str, Any], found: Scan, seconds: float) -> str:
    splits = [shards.shards_of(meta, [name]) for name in shards.SPLITS]
    tokens = [sum(shard.tokens for shard in split) for split in splits]
    documents = [sum(shard.documents for shard in split) for split in splits]
    longest = min(max(shard.tokens for shard in split) for split in splits)
    eot = "no end-of-text" if meta["eot_id"] is None else f"end-of-text {meta['eot_id']}"
    documents_line = f"{found.documents:,}: {documents[0]:,} for training, {documents[1]:,} for validation"
    speed = found.text_bytes / 1e6 / seconds
    asked = "as --val-input names it" if options.val_fraction is None else f"asked for {options.val_fraction:.2%}"
    return "\n".join(
        (
            f"documents   {'1, its end for validation' if found.documents == 1 else documents_line}",
            f"tokens      {sum(tokens):,}: {tokens[0]:,} for training, {tokens[1]:,} for validation",
            f"vocabulary  {meta['vocab_size']:,} ({meta['options']['tokenizer']}, {eot})",
            f"validation  {tokens[1] / sum(tokens):.2%} of the tokens, {asked}",
            *left_out_lines(options, found),
            f"text        {found.text_bytes / 1e6:,.1f} MB in {seconds:.1f} s, {speed:,.1f} MB/s",
            f"prepared    {options.output}",
            f"next        {training_command(options.output, train_tokens=tokens[0], longest=longest)}",
        )
    )


def _warn_of_split(meta: dict[str, Any], val_fraction: float | None) -> None:
    """Say where validation is far from what is asked for, as few documents may have it."""
    train, val = (sum(shard.tokens for shard in shards.shards_of(meta, [name])) for name in shards.SPLITS)
    share = val / (train + val)
    if val_fraction is None:
        if share > 0.5:
            _say(f"warning: --val-input holds more text than --input: {share:.1%} of all tokens validate")
    elif not split.is_near(share, val_fraction):
        _say(
            f"warning: {share:.1%} of the tokens validate, not {val_fraction:.1%}: the text cannot be divided better; "
            f"name validation text with --val-input, or give more documents"
        )


def left_out_lines(options: argparse.Namespace, found: Scan) -> list[str]:
    """What the summary says of files of folders that are no text, and of bad documents."""
    lines = []
    if options.ignored:
        kinds = ", ".join(f"{count:,} {name or 'without suffix'}" for name, count in options.ignored.most_common(10))
        more = ", ..." if len(options.ignored) > 10 else ""
        lines.append(f"left out    {options.ignored.total():,} files of folders: {kinds}{more}")
    if found.bad.places:
        lines.append(
            f"bad         {found.bad.skipped:,} documents left out, {found.bad.replaced:,} with U+FFFD; the first:"
        )
        lines += [f"            {place}" for place in found.bad.places]
    return lines


class Progress:
    """A phase's progress on stderr: a bar on a terminal, otherwise a line every LINE_SECONDS."""

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=self._name, total=self._total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            if count == 0:
                self._bar.refresh()  # it shows the time
        elif time.monotonic() - self._printed > LINE_SECONDS:
            self._printed = time.monotonic()
            _say(self._line(self._done / (self._printed - self._started)))

    def _line(self, rate: float) -> str:
        line = f"{self._name}: {self._done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
        if not self._total:
            return line
        if self._done >= self._total:
            return f"{self._name}: all {self._done / 1e6:,.0f} MB read, {self._printed - self._started:,.0f} s so far"
        left = max(self._total - self._done, 0) / max(rate, 1)
        return f"{line}, {self._done / self._total:.0%}, {left:,.0f} s left"


def _say(line: str) -> None:
    print(f"distgpt: {line}", file=sys.stderr, flush=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise Interrupted."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}: run the same command again to go on")

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _storage_error(error: OSError, output: Path) -> StorageError:
    if error.errno in NO_SPACE:
        kept = staging.directory_of(output)
        return StorageError(
            f"no space left for {output} ({error.strerror}): make room and run the same command again, "
            f"it goes on with what {kept} holds"
        )
    return StorageError(f"{error.filename or output}: {error.strerror or error}")


if __name__ == "__main__":
    main_guard(main)
