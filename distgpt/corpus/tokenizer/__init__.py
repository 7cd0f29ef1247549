"""From text to token ids and back: characters, bytes and byte-level BPE, saved as JSON, never as pickle.

Reading order: base (what all tokenizers do), simple (characters and bytes), byte_level (bytes as the characters of a
vocabulary), bpe (encode, learn), huggingface and tiktoken_file (vocabularies that others made), loading (any of them).

The files may import errors alone.
"""

from distgpt.corpus.tokenizer.base import Tokenizer
from distgpt.corpus.tokenizer.loading import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
