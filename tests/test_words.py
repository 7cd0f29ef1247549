"""Plain words in the names, comments and docstrings of the package: the field's terms, and none of our own."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import distgpt

PACKAGE = Path(distgpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])

# A docstring begins with a verb in the imperative, or with the noun that it is about.
NOT_FIRST = ("What", "Whether", "Who", "That", "Of", "It", "How", "Which", "Where")
PRIVATE = re.compile(
    r"\b(doors?|beats?|sight|patience|verdicts?|guards?|hopeless|unheard|deaf|culprits?"
    r"|word from|settles?|settled|whereabouts)\b",
    re.IGNORECASE,
)
# A key of train.json, which these files read and write.
KEY, FILES_WITH_KEY = "guard", ("checkpoint/manifest.py", "checkpoint/checkpointer.py", "checkpoint/reader.py")


@each_file
def test_docstrings_begin_with_a_verb_or_a_noun_and_end_with_a_full_stop(file: Path) -> None:
    for line, text in docstrings(file.read_text()):
        first, last_line = text.split()[0], text.splitlines()[-1]
        assert first not in NOT_FIRST, f"{file.name}:{line}: a docstring begins with {first!r}: {text[:80]!r}"
        is_table = "  " in last_line
        assert is_table or last_line.endswith((".", ".)")), f"{file.name}:{line}: no full stop ends {last_line!r}"


@each_file
def test_names_comments_and_docstrings_use_no_private_words(file: Path) -> None:
    source, allowed = file.read_text(), {"main_guard"}
    if str(file.relative_to(PACKAGE)) in FILES_WITH_KEY:
        allowed.add(KEY)
    for line, text in (*names_and_comments(source, allowed), *docstrings(source)):
        # A docstring quotes names in backticks, which are looked at in the code.
        word = PRIVATE.search(re.sub(r"`[^`]*`", "", text))
        assert word is None, f"{file.name}:{line}: {word[0]!r} is a word of our own in {text[:80]!r}"


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring of a module, class or function."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text


def names_and_comments(source: str, allowed: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the line of each comment and name, and its words: endIfDeaf and END_IF_DEAF give "end if deaf"."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
        elif token.type == tokenize.NAME and token.string not in allowed:
            yield token.start[0], re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", token.string).lower()
