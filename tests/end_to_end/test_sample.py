"""Sample from a trained run, and evaluate it."""

import codecs
import json
import math
import os
import pty
import re
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from distgpt import evaluate, sample
from distgpt.checkpoint.manifest import RunState
from distgpt.checkpoint.reader import load_for_inference
from distgpt.cli import evaluate_options, sample_options
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.errors import DataError, UsageError
from distgpt.model.gpt import GPT
from distgpt.run.paths import RunPaths
from distgpt.training import rerun
from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

PROMPT = "a golden rose"
SAMPLE = {
    "seed 1": ["--seed=1"],
    "seed 1 again": ["--seed=1"],
    "seed 2": ["--seed=2"],
    "several": ["--samples=3", f"--prompt={PROMPT}"],
    "in batches": ["--samples=3", f"--prompt={PROMPT}", "--batch=2"],
    "json": ["--samples=2", "--seed=1", "--json", "--repetition-penalty=1.1", "--min-p=0.01"],
    "stop": ["--seed=1", "--stop=☃", "--stop= "],
    "not UTF-8": ["--prompt=\udcff"],
    "no tokens": ["--tokens=0", f"--prompt={PROMPT}"],
    "greedy": ["--temperature=0", "--tokens=30"],
    "top k 1": ["--top-k=1", "--tokens=30"],
    "unknown character": ["--prompt=ärger ☃"],
    "bad temperature": ["--temperature=-1", f"--prompt={PROMPT}"],
    "no samples": ["--samples=0"],
    "bad seed": ["--seed=18446744073709551616"],
}


@pytest.fixture(scope="module")
def sampled(whole: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, jobs.Ended]:
    """The results of `python -m distgpt.sample` with each of these arguments."""
    run = str(whole("fsdp").run)  # one process reads what two wrote
    commands = {
        name: partial(jobs.command, "sample", run, "--tokens=100", *arguments) for name, arguments in SAMPLE.items()
    }
    prompts = tmp_path_factory.mktemp("prompts")
    (prompts / "lines.txt").write_text(f"{PROMPT}\n\nrose\n")
    (prompts / "objects.jsonl").write_text(json.dumps({"prompt": "a\nrose"}))
    (prompts / "unknown.txt").write_text("rose\nä\n")
    for name in ("lines.txt", "objects.jsonl", "unknown.txt"):
        arguments = (f"--prompts={prompts / name}", "--samples=2", "--tokens=20", "--json")
        commands[name] = partial(jobs.command, "sample", run, *arguments)
    commands["no run"] = partial(jobs.command, "sample", tmp_path_factory.mktemp("nowhere"))
    return jobs.run_all(commands)


def test_the_same_seed_writes_the_same_text(sampled: dict[str, jobs.Ended]) -> None:
    assert sampled["seed 1"].code == 0, sampled["seed 1"]
    assert sampled["seed 1"].stdout == sampled["seed 1 again"].stdout
    assert sampled["seed 1"].stdout != sampled["seed 2"].stdout
    assert len(sampled["seed 1"].stdout) == 101  # characters and a newline
    assert sampled["seed 1"].stderr == ""


def test_several_samples_go_on_from_the_prompt(sampled: dict[str, jobs.Ended]) -> None:
    parts = re.split(r"--- sample \d of 3 ---\n", sampled["several"].stdout)
    assert parts[0] == ""
    assert len(parts) == 4
    assert all(text.startswith(PROMPT) and len(text) == len(PROMPT) + 101 for text in parts[1:])
    assert len(set(parts[1:])) == 3


def test_a_batch_does_not_change_its_texts(sampled: dict[str, jobs.Ended]) -> None:
    assert sampled["in batches"].stdout == sampled["several"].stdout


def test_json_has_a_line_for_each_text(sampled: dict[str, jobs.Ended]) -> None:
    first, second = map(json.loads, sampled["json"].stdout.splitlines())
    assert first.keys() == second.keys() == {"prompt", "text", "tokens", "end", "seed"}
    assert (first["seed"], second["seed"]) == (1, 2)
    assert first["text"] != second["text"]
    assert (first["prompt"], first["tokens"], len(first["text"]), first["end"]) == ("", 100, 100, "length")


def test_a_text_ends_before_a_stop_text(sampled: dict[str, jobs.Ended]) -> None:
    whole = sampled["seed 1"].stdout
    assert " " in whole
    assert sampled["stop"].stdout == whole.partition(" ")[0] + "\n"


def test_no_tokens_are_no_error(sampled: dict[str, jobs.Ended]) -> None:
    assert sampled["no tokens"].stdout == f"{PROMPT}\n"


def test_each_prompt_of_a_file_is_continued(sampled: dict[str, jobs.Ended]) -> None:
    lines = [json.loads(line) for line in sampled["lines.txt"].stdout.splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPT, PROMPT, "rose", "rose"]
    assert [line["seed"] for line in lines] == [0, 1, 2, 3]
    assert {line["tokens"] for line in lines} == {20}
    assert [json.loads(line)["prompt"] for line in sampled["objects.jsonl"].stdout.splitlines()] == ["a\nrose"] * 2


def test_a_prompt_of_a_file_that_cannot_be_encoded_is_named(sampled: dict[str, jobs.Ended]) -> None:
    ended = sampled["unknown.txt"]
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("distgpt: error: prompt 2: ")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("none.txt", None, "cannot read {}: No such file or directory"),
        ("empty.txt", "\n", "{} has no prompt, or one that is not text"),
        ("latin.txt", b"caf\xe9", "{} is not UTF-8 text, or a line of it is not an object with a prompt: .*"),
        ("other.jsonl", '{"text": "a"}', "{} is not UTF-8 text, or a line of it is not an object with a prompt: .*"),
        ("number.jsonl", '{"prompt": 1}', "{} has no prompt, or one that is not text"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_one_clear_line(
    tmp_path: Path, name: str, content: str | bytes | None, line: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=line.format(re.escape(str(file)))):
        sample.read_prompts(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_sampled_in_the_data_type_that_it_computed_in(
    dtype: str,
    whole: Callable[[str], Trained],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dtypes = set[torch.dtype]()

    def load(run: Path, device: torch.device, choice: str) -> tuple[GPT, Tokenizer, RunState]:
        model, tokenizer, state = load_for_inference(run, device, choice)
        model.register_forward_hook(lambda _module, _arguments, logits: dtypes.add(logits.dtype))
        config = {**state.config, "train": {**state.config["train"], "dtype": dtype}}
        return model, tokenizer, replace(state, config=config)

    monkeypatch.setattr(sample, "load_for_inference", load)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    sample.main(*sample_options([str(whole("fsdp").run), "--tokens=3"]))
    assert dtypes == {getattr(torch, dtype)}
    assert len(capsys.readouterr().out) == 4


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"})
        self._screen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def _read(self) -> None:
        self._screen += self._decoder.decode(os.read(self._terminal, 4096))

    def read_until(self, text: str) -> str:
        """Return what is shown up to and including `text`, since the last call."""
        while text not in self._screen:
            self._read()
        shown, found, self._screen = self._screen.partition(text)
        return shown + found

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def stop(self) -> None:
        """Type Ctrl-C until there is a prompt: Python's readline misses one that comes just before it waits for a key.

        All that was typed must have been read. If Ctrl-C discards a key that readline has seen but not read, readline
        waits for the next key, and sees no Ctrl-C meanwhile.
        """
        typed = -math.inf
        while "> " not in self._screen:
            if time.monotonic() > typed + 5.0:
                self.type(CTRL_C)
                typed = time.monotonic()
            if select.select([self._terminal], [], [], 1.0)[0]:
                self._read()
        self.read_until("> ")

    def wait(self) -> int:
        """Read to the end, and return the exit code."""
        with suppress(OSError):  # the end of a terminal
            while os.read(self._terminal, 4096):
                pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


def test_prompts_are_asked_for_and_ctrl_c_stops_the_text_alone(whole: Callable[[str], Trained]) -> None:
    run = str(whole("fsdp").run)
    terminal = Terminal(sys.executable, "-m", "distgpt.sample", run, "--interactive", "--tokens=1000000000")
    terminal.read_until("Ctrl-D ends.")
    terminal.read_until("> ")
    terminal.type("golden\n")
    terminal.read_until("golden\r\ngolden")  # as it was typed, and at the start of the text
    terminal.read_until(" ")  # from the model: text is shown while more is written
    terminal.stop()
    terminal.type("half a line")
    terminal.read_until("half a line")
    terminal.stop()
    terminal.type("\u2603\n")
    terminal.read_until("distgpt: error: prompt: ")
    terminal.read_until("> ")
    terminal.type(UP + UP + "\n")
    terminal.read_until("golden\r\ngolden")
    terminal.stop()
    terminal.type(CTRL_D)
    assert terminal.wait() == 0


def test_greedy_sampling_takes_the_likeliest_token(sampled: dict[str, jobs.Ended]) -> None:
    assert sampled["greedy"].code == 0
    assert sampled["greedy"].stdout == sampled["top k 1"].stdout


@pytest.mark.parametrize(("name", "character"), [("unknown character", "ä"), ("not UTF-8", "udcff")])
def test_an_unknown_character_is_one_clear_line(sampled: dict[str, jobs.Ended], name: str, character: str) -> None:
    ended = sampled[name]
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("distgpt: error: prompt: ")
    assert character in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [("bad temperature", "--temperature is -1"), ("no samples", "--samples is 0"), ("bad seed", "--seed is 184467")],
)
def test_an_impossible_request_is_one_clear_line(sampled: dict[str, jobs.Ended], name: str, line: str) -> None:
    ended = sampled[name]
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("distgpt: error: ")
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--tokens=-3", "--tokens is -3: it cannot be negative"),
        ("--top-k=-1", "--top-k is -1: it cannot be negative"),
        ("--top-p=0", "--top-p is 0.0: it must be above 0 and at most 1"),
        ("--temperature=nan", "--temperature is nan: it must be 0 (greedy) or a positive number"),
        ("--min-p=1.5", "--min-p is 1.5: it must lie between 0 and 1"),
        ("--repetition-penalty=0", "--repetition-penalty is 0.0: it must be a positive number"),
        ("--batch=0", "--batch is 0: it must be positive"),
        ("--stop=", "--stop is empty: give the text before which a sample ends"),
        ("--json --interactive", "--json and --interactive do not go together: give --prompts FILE"),
        ("--prompt=a --prompts=b", "argument --prompts: not allowed with argument --prompt"),
        ("--prompt=a --interactive", "argument --interactive: not allowed with argument --prompt"),
        ("--samples=2 --temperature=0", "--samples is 2, but all texts are the same with --temperature=0"),
    ],
)
def test_impossible_values_are_refused_by_the_names_of_their_flags(flags: str, line: str) -> None:
    """They are refused before the model is loaded."""
    with pytest.raises(UsageError) as refused:
        sample_options(["run", *flags.split()])
    assert str(refused.value) == f"{line} (--help shows the options)"


def test_a_directory_that_is_no_run_is_one_clear_line(sampled: dict[str, jobs.Ended]) -> None:
    ended = sampled["no run"]
    assert (ended.code, ended.stdout) == (65, "")
    assert re.fullmatch(r"distgpt: error: .* holds no checkpoint: train one with .*\n", ended.stderr)


@pytest.fixture(scope="module")
def evaluated(whole: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, jobs.Ended]:
    """The results of `python -m distgpt.evaluate`, on the data of the run and on data with another tokenizer."""
    run = whole("fsdp").run
    root = tmp_path_factory.mktemp("evaluate")
    (root / "text.txt").write_text("0123456789" * 1000)
    made = jobs.command("prepare", "--input", root / "text.txt", "--output", root / "other", "--tokenizer", "char")
    assert made.code == 0, made
    return jobs.run_all(
        {
            "same windows": lambda: jobs.command("evaluate", run, "--sequences=30"),
            "other tokenizer": lambda: jobs.command("evaluate", run, f"--data={root / 'other'}"),
        }
    )


def test_evaluate_finds_the_loss_that_the_run_logged(
    evaluated: dict[str, jobs.Ended], whole: Callable[[str], Trained]
) -> None:
    line = evaluated["same windows"].stdout
    assert evaluated["same windows"].stderr == ""
    found = re.fullmatch(
        r"step 36 \| val loss (\d\.\d{4}) \(standard error 0\.\d{4}\) \| \d\.\d{3} bits/byte \| "
        r"30 windows of 16 tokens .*\n",
        line,
    )
    assert found, evaluated["same windows"]
    assert float(found[1]) == pytest.approx(jobs.val_losses(whole("fsdp").run)[36], abs=1e-4)


def test_evaluate_refuses_another_tokenizer(evaluated: dict[str, jobs.Ended]) -> None:
    ended = evaluated["other tokenizer"]
    assert (ended.code, ended.stdout) == (65, "")
    assert re.fullmatch(
        r"distgpt: error: .* has another tokenizer than .*: prepare it with --tokenizer .*/tokenizer.json\n",
        ended.stderr,
    )


def test_a_run_is_evaluated_and_replayed_from_another_directory(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").symlink_to(prepared)
    train = [sys.executable, "-m", "distgpt.train", *tiny(Path("data"), Path("run")), "--train.steps=1"]
    trained = jobs.run(["env", "-C", str(tmp_path), *train])
    assert trained.code == 0, trained
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate.main(*evaluate_options(["../run", "--sequences=5"]))
    assert f"5 windows of 16 tokens from {tmp_path / 'data'}" in capsys.readouterr().out
    for step in (1, 2):  # from the initial weights, and from the checkpoint
        start = rerun.start_before(RunPaths(Path("../run")), step)
        assert rerun.open_data(start, None).path == tmp_path / "data"


def test_each_new_best_is_saved_and_can_be_chosen(prepared: Path, tmp_path: Path) -> None:
    """Most evaluations are at steps where no save is due otherwise."""
    ended = jobs.train(1, *tiny(prepared, tmp_path), "--checkpoint.every=10", "--checkpoint.keep=9")
    assert [line.endswith(" | best") for line in ended.stdout.splitlines() if " | val loss " in line] == [True] * 3
    assert jobs.checkpoints(tmp_path) == [f"step-{step:08d}" for step in (10, 12, 20, 24, 30, 36)]
    ended = jobs.command("evaluate", tmp_path, "--sequences=30", "--checkpoint=24")
    assert ended.stdout.startswith(f"step 24 | val loss {jobs.val_losses(tmp_path)[24]:.4f} "), ended
    ended = jobs.command("sample", tmp_path / "checkpoints" / "step-00000012", "--tokens=1")
    assert (ended.code, ended.stderr) == (0, ""), ended
