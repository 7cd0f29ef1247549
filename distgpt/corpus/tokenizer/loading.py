"""Load a tokenizer of any kind, from a file or by its name."""

import json
from pathlib import Path

from distgpt.corpus.tokenizer.base import Tokenizer
from distgpt.corpus.tokenizer.bpe import BpeTokenizer
from distgpt.corpus.tokenizer.simple import FORMAT, simple_from_json
from distgpt.corpus.tokenizer.tiktoken_file import from_tiktoken, gpt2
from distgpt.errors import DataError, UsageError

FILE_NAME = "tokenizer.json"


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer in this file, or in the tokenizer.json of this directory.

    Reads distgpt's own JSON, Hugging Face's tokenizer.json (byte-level BPE with GPT-2's pattern) and .tiktoken files.
    Raises DataError for anything else.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    try:
        return from_tiktoken(raw) if path.suffix == ".tiktoken" else tokenizer_from_json(raw.decode())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer that distgpt reads: {type(error).__name__}: {error}") from None


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose `to_json` this is. Raises DataError, or ValueError, KeyError, TypeError: bad JSON."""
    content = json.loads(text)
    return simple_from_json(content) if content.get("format") == FORMAT else BpeTokenizer(text)


def tokenizer_named(name: str) -> Tokenizer | None:
    """Return the tokenizer for `--tokenizer name`, or None if it depends on the corpus (char, bytes, bpe).

    Raises UsageError for a name that is neither a tokenizer nor a file, DataError and StorageError as the loaders do.
    """
    if name in ("char", "bytes", "bpe"):
        return None
    if name == "gpt2":
        return gpt2()
    if not Path(name).exists():
        raise UsageError(f"--tokenizer {name} is neither char, bytes, bpe or gpt2 nor a file that exists")
    return load_tokenizer(Path(name))
