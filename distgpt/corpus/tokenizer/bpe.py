"""Byte-level BPE with a known pattern."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Self

import numpy as np
import orjson

from distgpt.corpus.tokenizer import huggingface
from distgpt.corpus.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens
from distgpt.corpus.tokenizer.huggingface import GPT2_PATTERN, UNICODE_TO_BYTE, to_bytes
from distgpt.errors import DataError

LONGEST_WORD = 2048


class BpeTokenizer(Tokenizer):
    """The tokenizer in the text of a Hugging Face tokenizer.json.

    tiktoken encodes, several times faster than Hugging Face's own encoder. The latter is used if tiktoken might give
    other ids for these merges or added tokens, or is not installed. Every reader of the file gets the same ids.
    Special tokens in a text are ordinary text, other added tokens keep their ids.
    """

    kind = "bpe"

    def __init__(self, text: str) -> None:
        content = orjson.loads(text)
        model = content["model"]
        if not set(UNICODE_TO_BYTE) <= set(model["vocab"]):
            raise DataError("the vocabulary lacks some of the 256 single bytes")
        self.pattern = huggingface.pattern_of(content)
        self.needs_whole_text = self.pattern != GPT2_PATTERN
        self._json, self.notes = huggingface.without_unapplied_settings(text, content)
        vocab: dict[str, int] = model["vocab"]
        added: dict[int, str] = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
        table = [b""] * huggingface.size_of_vocabulary([*vocab.values(), *added])
        self._bytes_of: dict[str, bytes] = {}
        for token, id_ in vocab.items():
            if id_ not in added or huggingface.is_byte_level(token):
                self._bytes_of[token] = table[id_] = to_bytes(token)
        for id_, token in added.items():
            table[id_] = token.encode()
        super().__init__(table, huggingface.end_of_text_id(content))
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        self._merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self._vocab = vocab
        for left, right in self._merges:
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise DataError(f"its merge of {left!r} and {right!r} is not among the tokens of its vocabulary")
        # tiktoken identifies a merge by its result, so it cannot have two merges with one result. Nor can it have
        # a token that no merge makes, and with ignore_merges a whole word may be such a token.
        has_equal_results = len(self._ranks) != 256 + len(self._merges)
        unmerged = len(vocab.keys() - set(added.values())) - len(self._ranks) if model.get("ignore_merges") else 0
        self._is_beyond_tiktoken = has_equal_results or unmerged > 0 or bool(huggingface.applied_tokens(content))

    def encode(self, text: str) -> Tokens:
        if self.is_slow or self._encoding is None:
            return self._encode_slowly(text)
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The regular expression engine cannot backtrack over a run of a million spaces.
            return self._encode_slowly(text)
        tokens: Tokens = self.ids_of_ranks[ranks]
        return tokens

    @cached_property
    def is_slow(self) -> bool:
        """True if tiktoken might give other ids than these merges."""
        if self._is_beyond_tiktoken:
            return True
        # tiktoken gives the same ids if it makes each token, encoded alone, from the two parts that its merge names.
        # The text around a token could influence it only after a merge of another pair, and so there is none.
        made_of = {bytes([value]): (b"", b"") for value in range(256)}
        for left, right in ((self._bytes_of[left], self._bytes_of[right]) for left, right in self._merges):
            is_known = left in made_of and right in made_of
            if not is_known or not huggingface.is_made_of(self._ranks, made_of, left, right):
                return True
            made_of[left + right] = left, right
        return False

    def check(self, text: str) -> None:
        if not self.is_slow:
            ours = self.encode(text).tolist()
            theirs = self._huggingface.encode(text, add_special_tokens=False).ids
            if ours != theirs:
                same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
                at = sum(1 for _ in same)
                raise DataError(
                    f"after {self.decode(ours[:at])[-40:]!r} its ids are {ours[at : at + 5]} here and "
                    f"{theirs[at : at + 5]} with Hugging Face tokenizers: distgpt cannot use this tokenizer"
                )
        super().check(text)

    def to_json(self) -> str:
        return self._json

    def _with_added_end_of_text(self) -> Self:
        id_ = self._vocab.get(END_OF_TEXT, self.vocab_size)
        return type(self)(huggingface.with_token(self._json, END_OF_TEXT, id_))

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """Map token bytes to the priority of the merge that makes them; the 256 single bytes come first."""
        singles = [token for token in self._vocab if token in UNICODE_TO_BYTE]
        singles.sort(key=self._vocab.__getitem__)
        ranks = {self._bytes_of[token]: rank for rank, token in enumerate(singles)}
        for left, right in self._merges:
            ranks.setdefault(self._bytes_of[left + right], len(ranks))
        return ranks

    @cached_property
    def ids_of_ranks(self) -> Tokens:
        id_of = {self._bytes_of[token]: id_ for token, id_ in self._vocab.items() if token in self._bytes_of}
        return np.array([id_of[token] for token in self._ranks], dtype=self.dtype)

    def json_of_ranks(self) -> str:
        """Return the tokenizer.json of the same merges with ranks as ids, without any other token."""
        vocab = {huggingface.to_unicode(token): rank for token, rank in self._ranks.items()}
        return huggingface.byte_level_json(vocab, self._merges, self.pattern)

    @cached_property
    def _encoding(self) -> Any:
        """The encoding of tiktoken, None without tiktoken."""
        try:
            import tiktoken
        except ImportError:
            return None
        return tiktoken.Encoding("distgpt", pat_str=self.pattern, mergeable_ranks=self._ranks, special_tokens={})

    @cached_property
    def _huggingface(self) -> Any:
        return huggingface.load_encoder(self._json)

    def _encode_slowly(self, text: str) -> Tokens:
        return np.array(huggingface.encoder_ids(self._huggingface, text), dtype=self.dtype)


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> BpeTokenizer:
    """Learn byte-level BPE of at most `vocab_size` ids from these texts, without an end-of-text id."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFace

    tokenizer = HuggingFace(models.BPE())
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern != GPT2_PATTERN:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Learning takes time quadratic in a word's length, which may be a whole line of DNA.
    cut = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return BpeTokenizer(tokenizer.to_str())


def from_merges(merges: Sequence[tuple[bytes, bytes]]) -> BpeTokenizer:
    """Return the tokenizer of these merges, with the ids that training gives."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers

    pairs = [(huggingface.to_unicode(left), huggingface.to_unicode(right)) for left, right in merges]
    tokens = [*sorted(UNICODE_TO_BYTE), *(left + right for left, right in pairs)]
    tokenizer = HuggingFace(models.BPE({token: id_ for id_, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return BpeTokenizer(tokenizer.to_str())
