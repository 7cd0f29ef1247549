"""From text to token ids and back: characters, bytes, BPE and what others use, saved as JSON.

Reading order: base (the interface of all tokenizers), simple (characters and bytes), bpe (byte-level BPE), huggingface
(the format of its tokenizer.json), fast (the same by gigatoken), owner (other kinds, by the library that owns them),
exported (any of them as such a file), loading (any of them, by name or from a file).

The files may import errors alone.
"""

from distgpt.corpus.tokenizer.base import Tokenizer
from distgpt.corpus.tokenizer.loading import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
