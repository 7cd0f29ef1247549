"""Benchmark of prepare and its tokenizers against the usual ways: python bench/tokenizing.py [--megabytes 200]

The text is Python source and documentation of this installation, as JSON lines. Both sides of a comparison do the same
work in turn, in this process and its children; the figures are medians over the rounds. Memory is the most that the
process tree holds at a time (PSS: a shared page counts once) beyond what it held before. Peers that are packages run
for real; the two loops are written out in our own words:

  loop of nanoGPT   data/openwebtext/prepare.py: processes encode a document each into a list, the parent copies the
                    lists to a memory map. Its intermediate files, by the package datasets, are left out here
  pool of fineweb   llm.c's data/fineweb.py: processes encode a document each into an array of uint16, the parent
                    collects shards of 100 M tokens

Writes its section of bench/RESULTS.md.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import tiktoken
import tokenizers
from results import processor, write_section

from distgpt.corpus.preparing import build
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.tokenizer import fast
from distgpt.corpus.tokenizer.bpe import BpeTokenizer, train_bpe
from distgpt.corpus.tokenizer.huggingface import GPT2_PATTERN
from distgpt.corpus.tokenizer.simple import CharTokenizer
from distgpt.prepare import job_of, parse

TITLE = "Tokenizing: `python bench/tokenizing.py`"
SUFFIXES = (".py", ".pyi", ".h", ".md", ".rst", ".txt")
LONGEST_FILE = 2_000_000
ENCODED_BYTES = 20_000_000  # of the text, where one side encodes alone
SHARD_TOKENS = 100_000_000
SAMPLING_SECONDS = 0.05

Way = Callable[[], object]


class Result(NamedTuple):
    """What was compared with what, by which clock, and the seconds of both sides in each round."""

    name: str
    peer: str
    clock: str
    size: int
    ours: list[float]
    theirs: list[float]

    def line(self) -> str:
        """Return a row of the table."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        rates = [f"{self.size / 1e6 / statistics.median(seconds):.1f}" for seconds in (self.ours, self.theirs)]
        span = f"{statistics.median(ratios):.1f} | {min(ratios):.1f} to {max(ratios):.1f}"
        return f"| {self.name} | {self.peer} | {self.clock} | {rates[0]} | {rates[1]} | {span} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=6, help="text to prepare, at most (default: 6)")
    parser.add_argument("--vocab-size", type=int, default=8_192, help="ids of BPE (default: 8192)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_lines(folder / "in.jsonl", options.megabytes * 1_000_000)
        print(f"{size / 1e6:.1f} MB of JSON lines", flush=True)
        results = [*training(folder, size, options)]
        tokenizer = BpeTokenizer((folder / "tokenizer.json").read_text())
        ways = preparing(folder, tokenizer, options.workers)
        results += [*encoding(texts_of(folder / "in.jsonl"), tokenizer, options.rounds)]
        results += [*compare_preparing(ways, size, options.rounds)]
        peaks = {name: peak_memory(way) for name, way in ways.items()}
    text = report(results, peaks, size, options)
    print(text)
    write_section(TITLE, text)


def report(results: Sequence[Result], peaks: dict[str, float], size: int, options: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("gigatoken", "tokenizers", "tiktoken"))
    about = (
        f"{size / 1e6:.1f} MB of JSON lines, {options.vocab_size:,} ids, {options.workers} processes, medians of "
        f"{options.rounds} rounds in turn; {packages}; {processor()}. MB/s of time, or of CPU time of all "
        "processes; the ratio is that of the times within a round."
    )
    head = (
        "| | compared with | clock | distgpt | the other | ratio | lowest to highest |\n|---|---|---|---|---|---|---|"
    )
    memory = ", ".join(f"{name} {peak:,.0f} MiB" for name, peak in peaks.items())
    return "\n".join(
        (
            f"{textwrap.fill(about, 120)}\n\n{head}",
            *(result.line() for result in results),
            f"\n{textwrap.fill(f'Memory of the process tree at most: {memory}.', 120)}",
        )
    )


def write_lines(path: Path, most: int) -> int:
    """Write files of this installation as JSON lines, in an order that mixes them. Return their bytes of text."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files = {file for folder in folders for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file()}
    known, size = set[bytes](), 0
    with path.open("wb") as lines:
        for file in sorted(files, key=lambda file: blake2b(file.name.encode() + file.parent.name.encode()).digest()):
            if size >= most:
                break
            if file.stat().st_size > LONGEST_FILE or (raw := file.read_bytes()) in known or not raw:
                continue
            with contextlib.suppress(UnicodeDecodeError):
                # Text that gigatoken leaves to the others is rare elsewhere, not in a library of characters.
                if not fast.has_newer_characters(text := raw.decode()):
                    known.add(raw)
                    lines.write(orjson.dumps({"text": text}) + b"\n")
                    size += len(raw)
    return size


def texts_of(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for line in lines:
            yield orjson.loads(line)["text"]


def compare(
    name: str, peer: str, size: int, rounds: int, ours: Way, theirs: Way, *, clocks: Sequence[str] = ("CPU",)
) -> Iterator[Result]:
    """Let both sides work in turn. Yield the result of each clock."""
    seconds = {clock: (list[float](), list[float]()) for clock in clocks}
    for _ in range(rounds):
        for side, way in enumerate((ours, theirs)):
            started = {clock: CLOCKS[clock]() for clock in clocks}
            way()
            for clock in clocks:
                seconds[clock][side].append(CLOCKS[clock]() - started[clock])
    for clock in clocks:
        result = Result(name, peer, clock, size, *seconds[clock])
        print(result.line(), flush=True)
        yield result


def cpu_of_tree() -> float:
    """Return the CPU seconds of this process and all below it, those that have ended included."""
    return sum(sum(map(int, stat_of(pid)[11:15])) for pid in tree()) / os.sysconf("SC_CLK_TCK")


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name; none if the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def tree() -> Iterator[int]:
    """Yield this process, its children, and theirs."""
    todo = [os.getpid()]
    while todo:
        pid = todo.pop()
        yield pid
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (thread / "children").read_text().split())


CLOCKS: dict[str, Callable[[], float]] = {"time": time.perf_counter, "CPU": cpu_of_tree}


def training(folder: Path, size: int, options: argparse.Namespace) -> Iterator[Result]:
    """Learn a vocabulary with both, and save it with an end-of-text token."""
    learned = list[str]()

    def ours() -> None:
        learned.append(fast.train(partial(texts_of, folder / "in.jsonl"), options.vocab_size - 1, folder).to_json())

    def theirs() -> None:
        learned.append(train_bpe(texts_of(folder / "in.jsonl"), options.vocab_size - 1).to_json())

    yield from compare("learning BPE", "Hugging Face tokenizers", size, options.rounds, ours, theirs)
    if len(set(learned)) > 1:
        raise AssertionError("the two learned different vocabularies")
    (folder / "tokenizer.json").write_text(BpeTokenizer(learned[0]).with_end_of_text().to_json())


def encoding(texts: Iterator[str], tokenizer: BpeTokenizer, rounds: int) -> Iterator[Result]:
    """Encode documents in one thread."""
    documents, size = list[str](), 0
    for text in texts:
        documents.append(text)
        size += len(text.encode())
        if size > ENCODED_BYTES:
            break
    owner, openai = tokenizers.Tokenizer.from_str(tokenizer.to_json()), tiktoken_of(tokenizer)

    def each(encode: Callable[[str], Any]) -> Way:
        return lambda: [encode(text) for text in documents]

    def ours() -> None:
        encoder = fast.FastEncoder(tokenizer)  # anew, as it remembers words
        for text in documents:
            encoder.encode(text)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    one = partial(compare, "encoding BPE", size=size, rounds=rounds, ours=ours)
    yield from one("tiktoken", theirs=each(lambda text: np.array(openai.encode_ordinary(text), dtype=np.uint16)))
    yield from one(
        "Hugging Face tokenizers", theirs=lambda: owner.encode_batch_fast(documents, add_special_tokens=False)
    )
    joined = "".join(documents)
    characters = CharTokenizer(joined, end_of_text=False)
    ids = {character: id_ for id_, character in enumerate(characters.characters)}
    yield from compare(
        *("encoding characters", "a comprehension", size, rounds),
        each(characters.encode),
        each(lambda text: np.array([ids[character] for character in text], dtype=np.uint16)),
    )


def tiktoken_of(tokenizer: BpeTokenizer) -> tiktoken.Encoding:
    assert tokenizer.eot_id == tokenizer.vocab_size - 1, "the ids of the others are their ranks"
    ranks = {tokenizer.decode_bytes([id_]): id_ for id_ in range(tokenizer.eot_id)}
    return tiktoken.Encoding("bench", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


def preparing(folder: Path, tokenizer: BpeTokenizer, workers: int) -> dict[str, Way]:
    """Return the ways to prepare the text, by name; ours is the first."""
    lines = folder / "in.jsonl"
    one = partial(distgpt_prepare, lines, folder / "distgpt", folder / "tokenizer.json", workers)
    start = Peer(tiktoken_of(tokenizer), tokenizer.vocab_size - 1)
    return {
        "distgpt": one,
        "loop of nanoGPT": partial(nanogpt_loop, lines, folder / "nanogpt.bin", start, workers),
        "pool of fineweb": partial(fineweb_pool, lines, folder / "fineweb", start, workers),
    }


def compare_preparing(ways: dict[str, Way], size: int, rounds: int) -> Iterator[Result]:
    (_, ours), *others = ways.items()
    for peer, theirs in others:
        yield from compare("preparing BPE", peer, size, rounds, ours, theirs, clocks=("time", "CPU"))


def distgpt_prepare(lines: Path, output: Path, tokenizer: Path, workers: int) -> None:
    arguments = ["--input", str(lines), "--output", str(output), "--tokenizer", str(tokenizer), "--overwrite"]
    options = parse(arguments)
    with contextlib.redirect_stderr(io.StringIO()) as said, Workers(workers) as pool:
        build.prepare(job_of(options, output), pool)
    assert "gigatoken" not in said.getvalue(), said.getvalue()


class Peer:
    """What the processes of the two loops know of a tokenizer."""

    def __init__(self, encoding: tiktoken.Encoding, eot_id: int) -> None:
        self.encoding, self.eot_id = encoding, eot_id

    def list_of(self, line: bytes) -> list[int]:
        ids = self.encoding.encode_ordinary(json.loads(line)["text"])
        ids.append(self.eot_id)
        return ids

    def array_of(self, line: bytes) -> npt.NDArray[np.uint16]:
        ids = [self.eot_id, *self.encoding.encode_ordinary(json.loads(line)["text"])]
        wide = np.array(ids)
        assert (wide >= 0).all()
        assert (wide < 2**16).all()
        return wide.astype(np.uint16)


peer: Peer


def start(known: Peer) -> None:
    global peer
    peer = known


def list_of(line: bytes) -> list[int]:
    return peer.list_of(line)


def array_of(line: bytes) -> npt.NDArray[np.uint16]:
    return peer.array_of(line)


def nanogpt_loop(lines: Path, output: Path, known: Peer, workers: int) -> None:
    context = multiprocessing.get_context("fork")
    with lines.open("rb") as file, context.Pool(workers, start, (known,)) as pool, output.open("wb") as out:
        for ids in pool.imap(list_of, file, chunksize=16):
            out.write(np.array(ids, dtype=np.uint16).tobytes())


def fineweb_pool(lines: Path, output: Path, known: Peer, workers: int) -> None:
    output.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    shard, used, count = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
    with lines.open("rb") as file, context.Pool(workers, start, (known,)) as pool:
        for ids in pool.imap(array_of, file, chunksize=16):
            if used + ids.size > SHARD_TOKENS:
                room = SHARD_TOKENS - used
                shard[used:] = ids[:room]
                shard.tofile(output / f"{count}.bin")
                ids, used, count = ids[room:], 0, count + 1
            shard[used : used + ids.size] = ids
            used += ids.size
    shard[:used].tofile(output / f"{count}.bin")


def peak_memory(way: Way) -> float:
    """Return the most MiB that this process and all its children hold while it works, beyond those at the start."""
    ended = threading.Event()
    before = memory_of_tree()
    most = before

    def watch() -> None:
        nonlocal most
        while not ended.wait(SAMPLING_SECONDS):
            most = max(most, memory_of_tree())

    watching = threading.Thread(target=watch)
    watching.start()
    way()
    ended.set()
    watching.join()
    return (most - before) / 2**20


def memory_of_tree() -> int:
    """Return the bytes of PSS of this process and all below it."""
    total = 0
    for pid in tree():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
            total += 1024 * int(fields[fields.index("Pss:") + 1])
    return total


if __name__ == "__main__":
    main()
