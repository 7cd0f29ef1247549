"""The lines that a user sees: the progress of a phase, warnings, the summary of a dataset."""

import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distgpt.corpus import shards
from distgpt.corpus.preparing import merge
from distgpt.corpus.preparing.scan import BadDocuments
from distgpt.suggestion import WIDTH, training_command, wrapped_command
from distgpt.units import duration

LINE_SECONDS = 10.0
# tqdm fits them into the width of the terminal. The second is for an unknown size, and for work after the last byte.
BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}B, {rate_fmt}, {remaining} left"
BAR_WITHOUT_END = "{desc} {n_fmt}B, {elapsed} so far"
INDENT = " " * 12
INDEX_ENTRIES = 2**20


def say(line: str) -> None:
    """Print a line on stderr."""
    print(f"distgpt: {line}", file=sys.stderr, flush=True)


@contextmanager
def progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr with the time left: a bar on a terminal, otherwise lines.

    Yields a function to call with the bytes done since the last call; with 0 it shows that time passes.
    """
    if sys.stderr.isatty():
        form = BAR if total else BAR_WITHOUT_END
        with tqdm(
            desc=name, total=total, bar_format=form, unit="B", unit_scale=True, leave=False, dynamic_ncols=True
        ) as bar:

            def move(count: int) -> None:
                if total and bar.n + count >= total:
                    bar.bar_format = BAR_WITHOUT_END
                bar.update(count)
                if count == 0:
                    bar.refresh()  # so that its clock moves on

            yield move
        return
    done = 0
    started = printed = time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        now = time.monotonic()
        if now - printed > LINE_SECONDS:
            printed = now
            say(f"{name}: {_progress_text(done, total, now - started)}")

    yield advance


def _progress_text(done: int, total: int | None, seconds: float) -> str:
    """Describe the bytes done in this time, with the time left if the total is known."""
    if not done or (total and done >= total):
        return f"{duration(seconds)} so far" + (f", all {done / 1e6:,.0f} MB done" if done else "")
    rate = done / seconds
    speed = f"{rate / 1e6:,.1f} MB/s"
    if not total:
        return f"{done / 1e6:,.0f} MB, {speed}"
    return f"{done / total:.0%} of {total / 1e6:,.0f} MB, {speed}, {duration((total - done) / rate)} left"


def summary(output: Path, meta: dict[str, Any], *, bad: BadDocuments, ignored: Counter[str], seconds: float) -> str:
    """Return the summary of a dataset that took `seconds` to prepare, with a training command that fits it."""
    splits = [shards.shards_of(meta, name) for name in shards.SPLITS]
    all_shards = [shard for split in splits for shard in split]
    tokens = [sum(shard.tokens for shard in split) for split in splits]
    documents = [sum(shard.documents for shard in split) for split in splits]
    max_window = min(max(shard.tokens for shard in split) for split in splits)
    eot = "no end-of-text" if meta["eot_id"] is None else f"end-of-text {meta['eot_id']}"
    per_token = sum(shard.bytes for shard in all_shards) / sum(tokens)
    kept = f"{sum(documents):,}: {documents[0]:,} for training, {documents[1]:,} for validation"
    val_fraction, found = meta["options"]["val_fraction"], meta["input"]
    asked = "as --val-input names it" if val_fraction is None else f"asked for {val_fraction:.2%}"
    lines = [
        f"documents   {'1, its end for validation' if found['documents'] == 1 else kept}",
        f"tokens      {sum(tokens):,}: {tokens[0]:,} for training, {tokens[1]:,} for validation",
        f"vocabulary  {meta['vocab_size']:,} ({meta['options']['tokenizer']}, {eot})",
        f"each token  {per_token:.2f} bytes of text",
        f"validation  {tokens[1] / sum(tokens):.2%} of the tokens, {asked}",
    ]
    if found["documents"] > 1:
        longest = max(longest_document(output / shard.index) for shard in all_shards)
        lines.append(f"lengths     {sum(tokens) / sum(documents):,.0f} tokens a document, the longest {longest:,}")
    if "duplicates" in found:
        share = found["duplicates"] / found["documents"]
        lines.append(f"copies      {found['duplicates']:,} left out, {share:.2%} of the documents")
    lines += left_out_lines(ignored, bad)
    size = found["bytes"] / 1e6
    lines.append(f"text        {size:,.1f} MB in {seconds:.1f} s, {size / seconds:,.1f} MB/s")
    command = training_command(output, train_tokens=tokens[0], max_window=max_window)
    next_line = wrapped_command(f"next        {command}", indent=len(INDENT))
    return "\n".join([*map(_wrapped, lines), f"prepared    {output}", next_line])


def longest_document(index: Path) -> int:
    """Return the tokens of the longest document of a shard, from its .idx, which is read a piece at a time."""
    offsets = np.memmap(index, dtype="<u8", mode="r")
    pieces = (offsets[start : start + INDEX_ENTRIES + 1] for start in range(0, offsets.size - 1, INDEX_ENTRIES))
    return max((int(np.diff(piece).max()) for piece in pieces), default=0)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False)


def left_out_lines(ignored: Counter[str], bad: BadDocuments) -> Sequence[str]:
    """Return the summary's lines on files of folders that are not text, counted by suffix, and on bad documents."""
    lines = []
    if ignored:
        kinds = ", ".join(f"{count:,} {name or 'without suffix'}" for name, count in ignored.most_common(10))
        more = ", ..." if len(ignored) > 10 else ""
        lines.append(f"left out    {ignored.total():,} files of folders: {kinds}{more}")
    if bad.places:
        lines.append(f"bad         {bad.skipped:,} documents left out, {bad.replaced:,} with U+FFFD; the first:")
        lines += [f"            {place}" for place in bad.places]
    return lines


def warn_of_split(meta: dict[str, Any]) -> None:
    """Warn if the share of the validation split is far from the one asked for, which may happen with few documents."""
    train, val = (sum(shard.tokens for shard in shards.shards_of(meta, name)) for name in shards.SPLITS)
    share, val_fraction = val / (train + val), meta["options"]["val_fraction"]
    if val_fraction is None:
        if share > 0.5:
            say(f"warning: --val-input holds more text than --input: {share:.1%} of all tokens are for validation")
    elif not merge.is_near(share, val_fraction):
        say(
            f"warning: {share:.1%} of the tokens are for validation, not {val_fraction:.1%}: these documents cannot be "
            f"split better; name validation text with --val-input, or give more documents"
        )
