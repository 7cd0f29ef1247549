"""From text to token ids and back: characters, bytes, BPE and what others use, saved as JSON.

Reading order: base (the interface of all tokenizers), simple (characters and bytes), bpe (byte-level BPE), huggingface
(the format of its tokenizer.json), fast (byte-level BPE by gigatoken), libraries (other kinds, by the library of their
format), exported (each kind as a tokenizer.json), loading (each kind, by name or from a file).

The files may import errors alone.
"""

from distgpt.corpus.tokenizer.base import Tokenizer
from distgpt.corpus.tokenizer.loading import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
