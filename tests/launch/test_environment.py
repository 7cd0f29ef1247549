"""launch/environment.sh makes a .venv and installs into it. A fake python prints what it was asked to do."""

import shutil
from pathlib import Path

import pytest

from tests import jobs

# `-m venv DIR` breaks off the first time, as a Python without ensurepip does: DIR then has a python and no pip.
PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv "*)
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" || exit 1
        test -e "$0.broke" || { touch "$0.broke"; exit 1; }
        ln -s python "$3/bin/pip"
        ;;
    "-m pip install "*)
        test -e "${0%/*}/pip" || { echo "No module named pip" >&2; exit 1; }
        echo "installed by $0"
        ;;
    *pytest*) echo "pytest in $PWD: $*" ;;
esac
"""
# Says what it was told, and fails if there is a file NAME-fails beside it.
LINTER = """\
#!/bin/sh
echo "${0##*/} $*"
test ! -e "$0-fails"
"""


@pytest.fixture(autouse=True)
def usual_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset the variable for another torch, which the tests may run with."""
    monkeypatch.delenv("DISTGPT_TORCH", raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that the scripts need, without a .venv."""
    project = tmp_path / "project"
    shutil.copytree(jobs.PROJECT / "launch", project / "launch")
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(jobs.PROJECT / name, project)
    return project


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which the fake python is the first one."""
    executable(tmp_path / "bin" / "python3", PYTHON)
    return f"{tmp_path / 'bin'}:/usr/bin:/bin"


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def test_a_venv_that_was_broken_off_is_made_again(project: Path, path: str) -> None:
    command = ["bash", "-c", '. "$0/launch/environment.sh"; environment', str(project)]
    broken = jobs.run(command, PATH=path)
    assert broken.code == 1
    assert (project / ".venv" / "bin" / "python").exists()
    again = jobs.run(command, PATH=path)
    assert again.code == 0, again
    assert again.stdout.endswith(f"installed by {project}/.venv/bin/python\n")
    third = jobs.run(command, PATH=path)
    assert (third.code, third.stdout, third.stderr) == (0, "", "")


def test_another_torch_has_an_environment_of_its_own(project: Path, path: str) -> None:
    command = ["bash", "-c", '. "$0/launch/environment.sh"; environment', str(project)]
    assert jobs.run(command, PATH=path, DISTGPT_TORCH="2.11.0").code == 1  # -m venv breaks off
    done = jobs.run(command, PATH=path, DISTGPT_TORCH="2.11.0")
    assert done.stdout.endswith(f"installed by {project}/.venv-torch-2.11.0/bin/python\n"), done
    assert not (project / ".venv").exists()


def test_a_python_that_is_too_old_is_passed_over(project: Path, tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    executable(tmp_path / "bin" / "python3.14", PYTHON.replace('test -e "$0.broke"', "true"))
    command = ["bash", "-c", '. "$0/launch/environment.sh"; environment', str(project)]
    assert jobs.run(command, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin").code == 0
    for name in ("python3.14", "python3.13", "python3.12", "python3.11"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\nexit 1\n")
    shutil.rmtree(project / ".venv")
    done = jobs.run(command, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.code == 2
    assert done.error_lines == ["distgpt: error: no Python 3.11 or newer was found: install one"]


@pytest.fixture
def tools(project: Path) -> Path:
    """Fake linters and a fake Python in the project's .venv, which print their arguments."""
    tools = project / ".venv" / "bin"
    for tool in ("ruff", "mypy"):
        executable(tools / tool, LINTER)
    for name in ("python", "pip"):
        executable(tools / name, PYTHON)
    return tools


@pytest.mark.parametrize(
    ("options", "ends"), [([], " --workers=6"), (["--fast"], " -m not slow"), (["--storms"], " --storms")]
)
def test_all_tests_are_the_linters_and_pytest_in_the_project(
    project: Path, path: str, tools: Path, options: list[str], ends: str
) -> None:
    done = jobs.run([str(project / "launch" / "test.sh"), *options], PATH=path)
    assert done.code == 0, done
    *linters, tests = sorted(done.stdout.splitlines()[2:], key=lambda line: line.startswith("pytest"))
    assert linters == ["ruff check .", "ruff format --check .", "mypy "]
    assert tests.startswith(f"pytest in {project}: ")
    assert tests.endswith(ends)


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_a_tool_that_finds_something_fails_it(project: Path, path: str, tools: Path, tool: str) -> None:
    assert jobs.run([str(project / "launch" / "test.sh"), "--version"], PATH=path).code == 0  # installs
    (tools / f"{tool}-fails").touch()
    failed = jobs.run([str(project / "launch" / "test.sh")], PATH=path)
    assert failed.code == 1
    assert (failed.stdout == "ruff check .\n") == (tool == "ruff")  # the tests run beside mypy


def test_some_tests_start_without_a_detour(project: Path, path: str, tools: Path) -> None:
    done = jobs.run([str(project / "launch" / "test.sh"), "-k", "two words"], PATH=path)
    assert done.code == 0, done
    (tests,) = done.stdout.splitlines()[2:]
    assert tests.startswith(f"pytest in {project}: ")
    assert tests.endswith("pytest -k two words")
