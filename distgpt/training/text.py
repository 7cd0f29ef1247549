"""Texts that grow token by token: what is new in them, and where they end."""

import codecs
from collections.abc import Generator, Sequence
from typing import Literal

import torch

from distgpt.corpus.tokenizer import Tokenizer
from distgpt.model.generate import Sampling, generate
from distgpt.model.gpt import GPT

End = Literal["length", "end_of_text", "stop"]


class Text:
    """A text that continues a prompt. It ends after `max_tokens`, at the end-of-text id or before one of `stops`.

    Raises DataError if the tokenizer lacks a character of the prompt.
    """

    def __init__(
        self, prompt: str, tokenizer: Tokenizer, *, seed: int, max_tokens: int, stops: Sequence[str] = ()
    ) -> None:
        self.prompt, self.seed, self.max_tokens = prompt, seed, max_tokens
        self.prompt_ids: list[int] = tokenizer.encode(prompt).tolist()
        self.written, self.tokens = "", 0
        self.end: End | None = None if max_tokens else "length"
        self._tokenizer, self._stops = tokenizer, stops
        # A token may end inside a character; the decoder keeps its bytes until the next token completes it.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._shown = 0

    def add(self, token: int) -> None:
        """Add the next token."""
        self.tokens += 1
        if token == self._tokenizer.eot_id:
            self.end = "end_of_text"
        else:
            self.written += self._decoder.decode(self._tokenizer.decode_bytes([token]))
            if self.tokens == self.max_tokens:
                self.end = "length"
        if self.end:
            self.written += self._decoder.decode(b"", final=True)
        # What was shown cannot begin a stop text.
        places = [place for stop in self._stops if (place := self.written.find(stop, self._shown)) >= 0]
        if places:
            self.written, self.end = self.written[: min(places)], "stop"

    def pop_new(self) -> str:
        """Return what was written since the last call, without an end that may turn out to begin a stop text."""
        sure = len(self.written)
        if self.end is None:
            sure -= max((_overlap(self.written, stop) for stop in self._stops), default=0)
        new, self._shown = self.written[self._shown : sure], sure
        return new


def write(model: GPT, texts: Sequence[Text], sampling: Sampling) -> Generator[None, None, None]:
    """Continue the texts as one batch. Yields after each token, so that the caller can show what is new."""
    tokens = generate(
        model,
        [text.prompt_ids for text in texts],
        max_tokens=max(text.max_tokens for text in texts),
        sampling=sampling,
        generators=[torch.Generator().manual_seed(text.seed) for text in texts],
        ended=lambda row: texts[row].end is not None,
    )
    for row, token in tokens:
        texts[row].add(token)
        yield


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
