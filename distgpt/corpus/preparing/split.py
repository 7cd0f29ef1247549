"""The choice of the documents that validate: by a hash of their text, near the share of all tokens asked for.

A threshold on the hash is enough for many documents. Few documents, or one that is longer than all others, may give
any share: then documents are chosen one by one.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from distgpt.errors import DataError

HASH_BYTES = 8

Hashes = npt.NDArray[np.uint64]


def text_hash(text: bytes) -> int:
    """Return a 64-bit hash of a document's UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=HASH_BYTES).digest(), "big")


def threshold(fraction: float) -> int:
    """Return the text hash below which documents validate."""
    return int(fraction * 2**64)


def is_near(share: float, fraction: float) -> bool:
    """Return True if both splits are within a factor of two of their share, and validation does not get the most."""
    near = fraction / 2 <= share <= 2 * fraction and 1 - share >= (1 - fraction) / 2
    return near and (share <= 0.5 or fraction >= 0.5)


def nearest(hashes: Hashes, sizes: npt.NDArray[np.int64], fraction: float) -> Hashes:
    """Return the text hashes of the documents that validate, given those of all and their tokens.

    In the order of the hashes, each document that still fits; then the one that brings the share nearest to `fraction`.
    At least one and not all, and never more than half of all tokens unless `fraction` is more. Raises DataError.
    """
    texts, index = np.unique(hashes, return_inverse=True)
    if texts.size < 2:
        raise DataError("all documents of the input hold the same text: name other validation text with --val-input")
    tokens = np.bincount(index, weights=sizes)
    room = fraction * tokens.sum()
    limit = max(room, tokens.sum() / 2)
    validates = np.zeros(texts.size, dtype=np.bool_)
    for number, size in enumerate(tokens):
        if size <= room:
            validates[number] = True
            room -= size
    rest = np.flatnonzero(~validates & (tokens[validates].sum() + tokens <= limit))
    if rest.size and (~validates).sum() > 1:
        best = rest[np.argmin(np.abs(tokens[rest] - room))]
        if abs(tokens[best] - room) < room or not validates.any():
            validates[best] = True
    return texts[validates]
