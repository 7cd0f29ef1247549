"""The rooms of the package import each other one way, as docs/architecture.md states."""

import ast
from pathlib import Path

import pytest

import distgpt

PACKAGE = Path(distgpt.__file__).parent
# Each group may import those below it, and no other of its own group.
ORDER: tuple[tuple[str, ...], ...] = (
    ("commands",),
    ("launch",),
    ("cli",),
    ("training", "preflight", "reporting"),
    ("weights",),
    ("planning",),
    ("checkpoint", "telemetry"),
    ("health",),
    ("run",),
    ("distributed",),
    ("model", "corpus"),
    ("ground",),
)
COMMANDS = {
    *("__main__", "plan", "train", "prepare", "evaluate", "sample", "export", "report", "runs", "replay", "doctor"),
    *("verify", "completion"),
}
LIBRARY = {"__init__", "library"}  # what `import distgpt` offers
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room_of(module: str) -> str:
    """`module`: as in an import, distgpt.ROOM.FILE or distgpt.FILE."""
    name = module.split(".")[1]
    if name in COMMANDS | LIBRARY:
        return "commands"
    return name if name in LEVEL else "ground"


def imports_of(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "distgpt":
            found |= {f"distgpt.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distgpt."):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("distgpt.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES])
def test_a_room_imports_only_what_is_below_it(file: Path) -> None:
    here = room_of(".".join(("distgpt", *file.relative_to(PACKAGE).with_suffix("").parts)))
    for module in imports_of(file):
        there = room_of(module)
        assert there == here or LEVEL[there] > LEVEL[here], f"{file.name} ({here}) imports {module} ({there})"


def test_every_room_says_what_it_is_for() -> None:
    rooms = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    assert {room.name for room in rooms} == {*LEVEL} - {"commands", "cli", "ground"}
    for room in rooms:
        text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        assert 3 <= len(text.splitlines()) <= 10, room.name
        missing = [f.stem for f in room.glob("*.py") if f.stem not in ("__init__", "__main__") and f.stem not in text]
        assert not missing, f"{room.name} does not name {missing}"
