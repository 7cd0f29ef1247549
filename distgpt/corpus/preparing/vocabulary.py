"""The tokenizer for a corpus: made from its characters, learned from its text, or the one that was given.

It is kept in the staging directory, so that a vocabulary is learned once.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from distgpt.corpus.preparing import report
from distgpt.corpus.preparing.scan import Scan, ScannedPiece, read_again
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.tokenizer import fast
from distgpt.corpus.tokenizer.base import Tokenizer, describe
from distgpt.corpus.tokenizer.bpe import BpeTokenizer, train_bpe
from distgpt.corpus.tokenizer.huggingface import PATTERNS
from distgpt.corpus.tokenizer.loading import tokenizer_from_json
from distgpt.corpus.tokenizer.simple import ByteTokenizer, CharTokenizer
from distgpt.errors import DataError
from distgpt.files import write_file

FILE_NAME, HASH_NAME = "tokenizer.json", "tokenizer.sha256"
BPE_SAMPLE_BYTES = 256 * 2**20
SMALL_BYTES = 2**20  # learned from in a second
PROGRESS_SECONDS = 1.0


def make_tokenizer(
    found: Scan, settings: Mapping[str, Any], given: Tokenizer | None, workers: Workers, directory: Path
) -> Tokenizer:
    """Return the tokenizer for the input after saving it in the directory; BPE is learned unless it is saved there."""
    several = found.documents > 1
    if given is not None:
        tokenizer = given
    elif settings["tokenizer"] == "char":
        tokenizer = CharTokenizer(found.characters, end_of_text=False)
    elif settings["tokenizer"] == "bytes":
        tokenizer = ByteTokenizer(end_of_text=False)
    elif saved := saved_tokenizer(directory):
        return saved
    else:
        tokenizer = learn_bpe(
            found, settings["vocab_size"] - several, settings.get("bpe_pattern", "gpt2"), directory, workers
        )
    tokenizer = tokenizer.with_end_of_text() if several else tokenizer
    raw = tokenizer.to_json().encode()
    write_file(directory / FILE_NAME, raw)
    write_file(directory / HASH_NAME, hashlib.sha256(raw).hexdigest().encode())
    return tokenizer


def saved_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer saved in the staging directory; None if there is none or it is damaged."""
    try:
        raw, known = ((directory / name).read_bytes() for name in (FILE_NAME, HASH_NAME))
    except FileNotFoundError:
        return None
    return tokenizer_from_json(raw.decode()) if hashlib.sha256(raw).hexdigest().encode() == known else None


def check_characters(found: Scan, tokenizer: Tokenizer) -> None:
    """Raise DataError, with the file, if a saved char tokenizer lacks a character of the input."""
    missing = tokenizer.missing(found.characters) if isinstance(tokenizer, CharTokenizer) else ""
    for scanned in found.pieces if missing else []:
        if character := next((c for c in missing if c in scanned.characters), ""):
            raise DataError(
                f"{scanned.piece.source.name} holds the character {describe(character)}, which the saved vocabulary "
                f"lacks (as it lacks {len(missing)} of the input's characters)"
            )


def learn_bpe(found: Scan, vocab_size: int, pattern: str, directory: Path, workers: Workers) -> BpeTokenizer:
    """Learn BPE of at most `vocab_size` ids from the corpus, or from pieces spread evenly over a huge one."""
    chosen = []
    passed = taken = 0
    for scanned in found.pieces:
        if taken * found.text_bytes <= passed * BPE_SAMPLE_BYTES:
            chosen.append(scanned)
            taken += scanned.text_bytes
        passed += scanned.text_bytes
    name = f"learning a vocabulary of {vocab_size + (found.documents > 1):,}"
    report.say(name)
    text = ""
    with report.progress(name, min(found.text_bytes, BPE_SAMPLE_BYTES)) as advance:
        for _, step in workers.run(learn_task, [(chosen, vocab_size, pattern, directory)]):
            if isinstance(step, str):
                text = step
            else:
                advance(step)
    return BpeTokenizer(text)


def learn_task(task: tuple[Sequence[ScannedPiece], int, str, Path]) -> Iterator[int | str]:
    """Yield, every second, the bytes read since the last time; 0 while pairs are merged; then the vocabulary."""
    pieces, vocab_size, pattern, directory = task
    read = reported = 0

    def texts() -> Iterator[str]:
        nonlocal read
        read = 0
        for scanned, content in read_again(pieces):
            yield from content.texts
            read += scanned.text_bytes

    with ThreadPoolExecutor(1) as thread:
        is_large = sum(scanned.text_bytes for scanned in pieces) > SMALL_BYTES
        if is_large and pattern == "gpt2" and not fast.why_unavailable():
            learning = thread.submit(_learn_fast, texts, vocab_size, directory)
        else:
            learning = thread.submit(train_bpe, texts(), vocab_size, PATTERNS[pattern])
        while not wait([learning], timeout=PROGRESS_SECONDS).done:
            now = max(read, reported)
            yield now - reported
            reported = now
        yield learning.result().to_json()


def _learn_fast(texts: Callable[[], Iterator[str]], vocab_size: int, directory: Path) -> BpeTokenizer:
    try:
        return fast.train(texts, vocab_size, directory)
    except fast.MismatchError as error:
        report.say(f"learning with Hugging Face tokenizers, not gigatoken: {error}")
        return train_bpe(texts(), vocab_size)
