"""The lines that a user sees: the progress of a phase, warnings, the summary of a dataset."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distgpt.corpus import shards
from distgpt.corpus.preparing import merge
from distgpt.corpus.preparing.scan import BadDocuments
from distgpt.suggestion import training_command

LINE_SECONDS = 10.0


def say(line: str) -> None:
    """Print a line on stderr."""
    print(f"distgpt: {line}", file=sys.stderr, flush=True)


@contextmanager
def progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr, a bar on a terminal, otherwise lines.

    Yields a function to call with the bytes done since the last call.
    """
    if sys.stderr.isatty():
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True) as bar:

            def move(count: int) -> None:
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
    if total and done >= total:
        return f"all {done / 1e6:,.0f} MB done, {seconds:,.0f} s so far"
    rate = done / seconds
    speed = f"{done / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s"
    return f"{speed}, {done / total:.0%}, {(total - done) / max(rate, 1):,.0f} s left" if total else speed


def summary(output: Path, meta: dict[str, Any], *, bad: BadDocuments, ignored: Counter[str], seconds: float) -> str:
    """Return the summary of a dataset, prepared in so many seconds, with a training command that fits it."""
    splits = [shards.shards_of(meta, name) for name in shards.SPLITS]
    tokens = [sum(shard.tokens for shard in split) for split in splits]
    documents = [sum(shard.documents for shard in split) for split in splits]
    longest = min(max(shard.tokens for shard in split) for split in splits)
    eot = "no end-of-text" if meta["eot_id"] is None else f"end-of-text {meta['eot_id']}"
    count, text_bytes = meta["input"]["documents"], meta["input"]["bytes"]
    documents_line = f"{count:,}: {documents[0]:,} for training, {documents[1]:,} for validation"
    val_fraction = meta["options"]["val_fraction"]
    asked = "as --val-input names it" if val_fraction is None else f"asked for {val_fraction:.2%}"
    return "\n".join(
        (
            f"documents   {'1, its end for validation' if count == 1 else documents_line}",
            f"tokens      {sum(tokens):,}: {tokens[0]:,} for training, {tokens[1]:,} for validation",
            f"vocabulary  {meta['vocab_size']:,} ({meta['options']['tokenizer']}, {eot})",
            f"validation  {tokens[1] / sum(tokens):.2%} of the tokens, {asked}",
            *left_out_lines(ignored, bad),
            f"text        {text_bytes / 1e6:,.1f} MB in {seconds:.1f} s, {text_bytes / 1e6 / seconds:,.1f} MB/s",
            f"prepared    {output}",
            f"next        {training_command(output, train_tokens=tokens[0], longest=longest)}",
        )
    )


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
