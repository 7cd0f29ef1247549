"""From text to token ids and back: characters, bytes and byte-level BPE, saved as JSON, never as pickle.

Reading order: base (the interface of all tokenizers), simple (characters and bytes), bpe (byte-level BPE), huggingface
(the vocabulary in its tokenizer.json), fast (the same by gigatoken), loading (any of them, by name or from a file).

The files may import errors alone.
"""

from distgpt.corpus.tokenizer.base import Tokenizer
from distgpt.corpus.tokenizer.loading import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
