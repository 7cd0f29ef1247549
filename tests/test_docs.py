"""README.md and docs/: each command runs as it is typed, or a named test covers it; what they name is there."""

import ast
import gzip
import importlib.util
import json
import random
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distgpt
from distgpt.config import keys, resolve
from distgpt.corpus.reading import remote
from distgpt.corpus.tokenizer.bpe import train_bpe
from distgpt.prepare import parse
from tests import jobs

DOCS = (jobs.PROJECT / "README.md", *sorted(jobs.PROJECT.glob("docs/*.md")), jobs.PROJECT / "data" / "README.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"sh", "text", "toml", "python", "mermaid"}
LONGEST_SENTENCE = 30
# Of files whose name begins as a section's does: train.json.
SUFFIXES = ("py", "bin", "json")

# Commands that are not run here: the test that covers each.
QUICKSTART = "tests/launch/test_quickstart.py::test_from_nothing_to_a_sample_and_again"
LOCAL = "tests/launch/test_local.py::test_paths_are_those_of_the_caller"
SWEEP_HERE = "tests/launch/test_sweep.py::test_the_script_trains_what_it_can_and_goes_on_where_it_stopped"
HOSTS = "tests/hosts/test_multinode.py::test_four_hosts_train_as_one_process_and_the_slow_host_is_named"
GO_FURTHER = "tests/end_to_end/test_resume.py::test_a_run_goes_on_in_any_other_topology"
STANDARD_LIBRARY = "tests/test_prepare.py::test_without_arguments_it_prepares_the_standard_library_once"
INTERACTIVE = "tests/end_to_end/test_sample.py::test_prompts_are_asked_for_and_ctrl_c_stops_the_text_alone"
EVALUATE_RANKS = "tests/end_to_end/test_evaluate.py::test_two_ranks_print_what_one_process_prints"
TASK = "tests/end_to_end/test_evaluate.py::test_a_task_is_scored"
EVALUATE = "tests/end_to_end/test_sample.py::test_evaluate_finds_the_loss_that_the_run_logged"
PREFLIGHT = "tests/test_doctor.py::test_distributed_on_one_host"
SLURM = "tests/slurm/test_train.py::test_several_nodes_learn_what_one_learns"
SLURM_PREPARE = "tests/slurm/test_prepare.py::test_an_array_writes_what_one_process_writes"
SWEEP = "tests/slurm/test_train.py::test_an_array_sweeps_over_lines_of_flags"
KUBERNETES = "tests/slurm/test_kubernetes.py::test_the_manifest_saves_what_an_evicted_pod_has_learned"
INSTALLATION = "tests/launch/test_scripts.py::test_every_installation_reads_all_kinds_of_files"
ALL_TESTS = "tests/launch/test_environment.py::test_all_tests_are_the_linters_and_pytest_in_the_project"
SOME_TESTS = "tests/launch/test_environment.py::test_some_tests_start_without_a_detour"
OTHER_TORCH = "tests/launch/test_environment.py::test_another_torch_has_an_environment_of_its_own"
TABLES = "tests/test_docs.py::test_the_tables_of_keys_and_presets_are_up_to_date"
HOOKS = "tests/test_docs.py::test_the_hooks_check_what_all_tests_check"
FROM_WEIGHTS = "tests/end_to_end/test_weights.py::test_a_run_starts_from_weights_of_transformers_and_reads_them_once"
MIX = "tests/end_to_end/test_mixture.py::test_a_mix_is_trained_on_exactly_after_a_restart_and_each_dataset_is_evaluated"
SINGLE = "tests/end_to_end/test_train.py::test_the_loss_falls"
HARNESS = "tests/weights/test_lm_eval.py::test_its_accuracy_is_that_of_our_likelihoods"
EXACT = "tests/end_to_end/test_exact.py::test_weights_are_the_same_on_changing_numbers_of_ranks"
CHECKED = "tests/end_to_end/test_exact.py::test_a_rank_that_computes_wrongly_is_named_before_it_saves"
VERIFY_RANKS = "tests/end_to_end/test_diloco.py::test_replicas_replayed_in_the_same_layout_have_the_same_bits"
PLAN = "tests/test_plan.py::test_the_command_prints_a_plan_and_its_figures_as_json"
COVERED = {
    "python -m distgpt.train quickstart --data.path=data/mine:0.7,data/chat:0.3 --run.dir=runs/mixed": MIX,
    "python -m distgpt.plan gpt2-1558m --nodes 4 --device h100 --price 2.5": PLAN,
    "python -m distgpt.plan modern-1b --gpus-per-node 4 --tokens 20B --json": PLAN,
    "python -m distgpt.plan --budget 24gpu-hours --device 4090": PLAN,
    'hf download openai-community/gpt2 --include "*.json" "*.safetensors" --local-dir models/gpt2': FROM_WEIGHTS,
    "lm_eval --model hf --model_args pretrained=exported/modern --tasks hellaswag --device cpu": HARNESS,
    "./launch/quickstart.sh": QUICKSTART,
    "./launch/test.sh": ALL_TESTS,
    "launch/test.sh": ALL_TESTS,
    "launch/test.sh --fast": ALL_TESTS,
    "launch/test.sh --storms -m storm": ALL_TESTS,
    "launch/test.sh tests/corpus/test_order.py": SOME_TESTS,
    "launch/test.sh tests/model/test_gpt.py": SOME_TESTS,
    "launch/test.sh -k resume": SOME_TESTS,
    "launch/test.sh --storms tests/end_to_end/test_equivalence.py": SOME_TESTS,
    "DISTGPT_TORCH=2.11.0 launch/test.sh": OTHER_TORCH,
    ".venv/bin/pip install pre-commit && .venv/bin/pre-commit install": HOOKS,
    "python docs/generate.py": TABLES,
    "launch/local.sh gpt2-124m --data.path=data/mine": LOCAL,
    "launch/local.sh quickstart --data.path=data/mine --run.dir=runs/mine --train.steps=600": GO_FURTHER,
    "launch/sweep.sh sweep.txt quickstart --data.path=data/mine": SWEEP_HERE,
    "HEAD=node1:29500 NODES=4 launch/multinode.sh gpt2-1558m --data.path=/shared/data/mine "
    "--run.dir=/shared/runs/mine": HOSTS,
    "python -m distgpt.prepare": STANDARD_LIBRARY,
    "python -m distgpt.sample runs/mine --interactive": INTERACTIVE,
    "python -m distgpt.train quickstart --data.path=data/mine --run.dir=runs/changed": SINGLE,
    "python -m distgpt.evaluate runs/mine": EVALUATE,
    "python -m distgpt.evaluate runs/mine --split train --sequences 100": EVALUATE_RANKS,
    "python -m distgpt.evaluate runs/mine --data data/other --json --checkpoint best": EVALUATE_RANKS,
    "torchrun --standalone --nproc_per_node=2 -m distgpt.evaluate runs/mine": EVALUATE_RANKS,
    "python -m distgpt.evaluate runs/mine --task docs/ten-questions.jsonl": TASK,
    "torchrun --standalone --nproc_per_node=2 -m distgpt.verify runs/mine --replay 100": VERIFY_RANKS,
    "torchrun --standalone --nproc_per_node=2 -m distgpt.train quickstart --data.path=data/mine --run.dir=runs/exact "
    "--parallel.reduction=exact": EXACT,
    "torchrun --standalone --nproc_per_node=2 -m distgpt.train quickstart --data.path=data/mine --run.dir=runs/checked "
    "--parallel.reduction=exact --health.check_every=100": CHECKED,
    "torchrun --standalone --nproc_per_node=2 -m distgpt.doctor --distributed quickstart": PREFLIGHT,
    "git clone URL distgpt && cd distgpt": INSTALLATION,
    'python3 -m venv .venv && .venv/bin/pip install -c requirements.lock -e ".[all]"': INSTALLATION,
    "sbatch slurm/prepare.sh --input /data/texts --output data/mine --tokenizer bpe": SLURM_PREPARE,
    "sbatch --array=0-31 slurm/prepare.sh --input /data/texts --output data/mine --tokenizer gpt2": SLURM_PREPARE,
    "sbatch --nodes=4 slurm/train.sh gpt2-124m --data.path=data/mine": SLURM,
    "DISTGPT_SWEEP=sweep.txt sbatch --array=0-7 slurm/train.sh quickstart --data.path=data/mine": SWEEP,
    'squeue --me --format="%i %T %M %R %k"': SLURM,
    "kubectl apply -f launch/kubernetes.yaml": KUBERNETES,
    "kubectl replace --force -f launch/kubernetes.yaml": KUBERNETES,
}

# In the commands that need a network, and are only parsed here.
PUBLIC = "hf://"

# What the commands that run here train, whatever the preset: flags would win over these.
SMALL = (
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "optim.warmup_steps=0"),
    *("train.steps=4", "train.global_batch=8", "train.dtype=float32", "eval.every=2", "eval.sequences=8"),
    *("eval.sample_tokens=0", "checkpoint.every=2", "log.every=1"),
)
# Programs whose arguments are a config, up to where it begins.
TAKES_CONFIG = re.compile(
    r"-m distgpt\.(?:train|doctor)\b|launch/(?:quickstart|local|multinode)\.sh\b|slurm/train\.sh\b"
)
NO_KEYS = {"--help", "--print-config", "--distributed"}
# Options of other programs that the docs mention.
FOREIGN_OPTIONS = {
    *(
        "--nnodes",
        "--nproc_per_node",
        "--standalone",
        "--max-restarts",
        "--signals-to-handle",
        "--numa-binding",
        "--logdir",
    ),
    "--model_args",
    *("--mem", "--partition", "--account", "--gpus-per-node", "--time", "--signal", "--array", "--exclude"),
}


def blocks(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the language and the content of each code block."""
    for block in BLOCK.finditer(file.read_text(encoding="utf-8")):
        yield block[1], block[2]


def commands(file: Path) -> Iterator[str]:
    """Yield each command, without its comment."""
    for language, text in blocks(file):
        if language == "sh":
            for line in text.replace("\\\n", "").splitlines():
                if command := re.sub(r"(^|\s{2,})#.*", "", line).strip():
                    yield " ".join(command.split()) if command in COVERED else command


def prose(file: Path) -> str:
    """Return the text without code blocks, headings, pictures and what is generated."""
    text = BLOCK.sub("", file.read_text(encoding="utf-8"))
    text = re.sub(r"<!-- begin.*?<!-- end", "", text, flags=re.DOTALL)
    return re.sub(r"^(#.*|<img.*)$", "", text, flags=re.MULTILINE)


def code_spans() -> Iterator[tuple[str, str]]:
    """Yield each `code` in prose, with the name of its file."""
    for file in DOCS:
        for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", file.read_text(encoding="utf-8"))):
            yield file.name, span


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory as a clone of the project, with the texts that the docs prepare."""
    (tmp_path / "launch").mkdir()
    for script in jobs.PROJECT.glob("launch/*.sh"):
        # Not a link: from its own place the script would install that place into .venv.
        (tmp_path / "launch" / script.name).write_text(f'#!/bin/sh\nexec {shlex.quote(str(script))} "$@"\n')
        (tmp_path / "launch" / script.name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=2000)) for _ in range(4)]
    my = tmp_path / "my"
    (my / "texts").mkdir(parents=True)
    for name, text in zip(("first", "second", "third", "last"), texts, strict=True):
        (my / "texts" / f"{name}.txt").write_text("Once upon a time " + text)
    posts = "".join(json.dumps({"meta": {"text": text}}) + "\n" for text in texts)
    (my / "posts.jsonl.gz").write_bytes(gzip.compress(posts.encode()))
    (my / "books.txt").write_text("<|endoftext|>".join(texts))
    (my / "old").mkdir()
    (my / "old" / "letter.txt").write_text("caf\u00e9 " + texts[0], encoding="cp1252")
    (tmp_path / "my.toml").write_text("[train]\nsteps = 20000\n")
    return tmp_path


def save_gpt2(directory: Path) -> None:
    """Save a random GPT-2 of the size of SMALL there, with a tokenizer, as transformers does."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_bpe(["Once upon a time " + "abcdefghij" * 20], 300).with_end_of_text()
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": tokenizer.vocab_size}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tokenizer.to_json())


def run_in(clone: Path, script: str, *, data: Path) -> jobs.Ended:
    """Run a script of bash there up to the first command that fails; `data` is what a run without --data.path reads."""
    values = dict(setting.split("=") for setting in (*SMALL, f"data.path={data}"))
    small = {f"DISTGPT_{key.replace('.', '__').upper()}": value for key, value in values.items()}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = ["bash", "-exo", "pipefail", "-c", f'cd "$0"\n{script}', str(clone)]
    return jobs.run(command, PATH=path, CUDA_VISIBLE_DEVICES="", PYTHONSAFEPATH="1", FORK_COMMANDS="1", **small)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: str(file.relative_to(jobs.PROJECT)))
def test_each_command_runs_as_it_is_typed(clone: Path, file: Path, prepared: Path) -> None:
    """In their order, as a reader follows them. `bash -x` shows on stderr which one failed."""
    script = [command for command in commands(file) if command not in COVERED and PUBLIC not in command]
    for number, (language, text) in enumerate(blocks(file)):
        if language == "python":
            (clone / f"block-{number}.py").write_text(text)
            script.append(f"python block-{number}.py")
    if any("models/gpt2" in command for command in script):
        save_gpt2(clone / "models" / "gpt2")
    if not any("--output data/mine" in command for command in script):  # a page on something else
        (clone / "data").mkdir()
        (clone / "data" / "mine").symlink_to(prepared)
    done = run_in(clone, "\n".join(script), data=prepared)
    assert done.code == 0, done


def test_each_command_that_does_not_run_here_is_covered_by_a_test_that_exists() -> None:
    typed = {command for file in DOCS for command in commands(file)}
    assert set(COVERED) <= typed, "COVERED names commands that the docs no longer have"
    for test in set(COVERED.values()):
        path, _, name = test.partition("::")
        tree = ast.parse((jobs.PROJECT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_commands_on_public_corpora_can_be_parsed() -> None:
    found = [command for file in DOCS for command in commands(file) if PUBLIC in command]
    assert len(found) > 8
    for command in found:
        program, _, module, *options = shlex.split(command)
        assert (program, module) == ("python", "distgpt.prepare")
        assert all(remote.is_url(url) for url in parse(options).input)


def test_the_options_of_each_command_are_keys() -> None:
    """Those of commands that are only covered elsewhere, with other options, as well."""
    checked = 0
    for file in DOCS:
        for command in commands(file):
            if found := TAKES_CONFIG.search(command):
                words = shlex.split(command[found.end() :])
                options = [word for word in words if word.partition("=")[0] not in NO_KEYS]
                resolve([word for word in options if word != "my.toml"], {})
                checked += 1
    assert checked > 10


def test_each_block_says_what_it_is() -> None:
    for file in DOCS:
        assert {language for language, _ in blocks(file)} <= LANGUAGES, file
        assert file.read_text().count("```") == 2 * len(list(blocks(file))), file


def test_files_of_keys_are_files_of_keys(tmp_path: Path) -> None:
    found = [text for file in DOCS for language, text in blocks(file) if language == "toml"]
    assert found
    for text in found:
        (tmp_path / "my.toml").write_text(text)
        resolve([str(tmp_path / "my.toml")], {})


def test_the_tables_of_keys_and_presets_are_up_to_date() -> None:
    script = jobs.PROJECT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_generate", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file, text in module.generated().items():
        assert file.read_text(encoding="utf-8") == text, "run: python docs/generate.py"


def test_each_key_in_the_text_is_one() -> None:
    sections = {key.partition(".")[0] for key in keys()}
    for file, span in code_spans():
        found = re.fullmatch(r"(?:--)?([a-z]+)\.(\w+)(?:=.*)?", span)
        if found and found[1] in sections and found[2] not in SUFFIXES:
            assert f"{found[1]}.{found[2]}" in keys(), f"{file}: {span}"


def test_each_option_in_the_text_is_one() -> None:
    names = ("plan", "prepare", "sample", "evaluate", "export", "report", "replay", "verify", "doctor", "runs", "train")
    text = " ".join(jobs.command(name, "--help", **jobs.NOT_FORKED).stdout for name in names)
    known = {*re.findall(r"--[\w-]+", text), *FOREIGN_OPTIONS, *NO_KEYS, "--fast"}
    for file, span in code_spans():
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*(?![\w.])", span):
            assert option in known, f"{file}: {span}"


def test_each_file_in_the_text_is_there() -> None:
    rooms = "|".join(sorted(path.name for path in (jobs.PROJECT / "distgpt").iterdir() if path.is_dir()))
    for file in DOCS:
        text = file.read_text(encoding="utf-8")
        for path in re.findall(rf"(?<![\w/.-])((?:{rooms})/\w+\.py)\b", text):
            assert (jobs.PROJECT / "distgpt" / path).is_file(), f"{file.name}: {path}"
        for name in re.findall(r"-m distgpt\.([\w.]+\w)", text):
            assert importlib.util.find_spec(f"distgpt.{name}"), f"{file.name}: distgpt.{name}"
        for path in re.findall(r"(?<![\w/.-])((?:distgpt|launch|slurm|tests|docs|bench)/[\w/.-]*\w\.\w+)", text):
            assert "NAME" in path or (jobs.PROJECT / path).exists(), f"{file.name}: {path}"


def test_each_link_leads_somewhere() -> None:
    for file in (*DOCS, jobs.PROJECT / "CHANGELOG.md"):
        text = file.read_text(encoding="utf-8")
        for link in (*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)):
            path, _, anchor = link.partition("#")
            if "://" not in link:
                target = (file.parent / path) if path else file
                assert target.exists(), f"{file.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{file.name}: {link}"


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sentences_are_short() -> None:
    for file in DOCS:
        # Cells of tables, items of lists and paragraphs end a sentence as well; code counts as one word.
        text = re.sub(r"`[^`]+`", "code", prose(file))
        text = re.sub(r"\]\([^)]*\)", "]", text)
        for part in re.split(r"\n\s*\n|\n(?=[-|\d])|\||[.:;!?](?=\s)", text):
            words = re.findall(r"[\w'-]+", part)
            assert len(words) <= LONGEST_SENTENCE, f"{file.name}: {len(words)} words: {' '.join(words)}"


def test_the_hooks_check_what_all_tests_check() -> None:
    lines = (jobs.PROJECT / "launch" / "test.sh").read_text().splitlines()
    tools = [line.removesuffix(" &") for line in lines if line.split(" ")[0] in ("ruff", "mypy")]
    assert len(tools) == 3
    hooks = re.findall(r"entry: (.*)", (jobs.PROJECT / ".pre-commit-config.yaml").read_text())
    assert {f".venv/bin/{tool}" for tool in tools} <= set(hooks)


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[(.*?)\]", (jobs.PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert distgpt.__version__ in headings
