"""The house as docs/architecture.md draws it: imports point downwards, rooms on one line do not know each other, files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "posttrain"

# top to bottom; a room may import from the lines below its own only
LINES: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("pipeline", "report", "reporting"),
    ("recipe",),
    ("worlds",),
    ("serving",),
    ("releases",),
    ("evaluation",),
    ("stages",),
    ("agents",),
    ("verifying",),
    ("training", "sampling"),
    ("policy",),
    ("contract", "grammar"),
    ("data", "objectives"),
    ("files", "errors", "ranges"),
)
LEVEL = {room: index for index, line in enumerate(LINES) for room in line}
# pipeline writes the report, report is drawn by reporting, the file room raises the project's errors
SAME_LINE = {("pipeline", "report"), ("report", "reporting"), ("files", "errors")}
MODULES = sorted(SOURCE.rglob("*.py"))


def room_of(module: str) -> str:
    return module.removeprefix("posttrain").lstrip(".").split(".")[0]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return {name for name in found if name.startswith("posttrain.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imported(path):
        other = room_of(name)
        if other != own and (own, other) not in SAME_LINE:
            assert LEVEL[own] < LEVEL[other], f"{own} imports {name}, which is not below it"


def test_every_room_is_on_the_map() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert rooms | {"__main__"} == set(LEVEL)
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text("utf-8")
    assert [
        room
        for room in rooms - {"errors", "ranges", "cli", "__main__", "report", "recipe", "reporting"}
        if f"{room}/" not in page
    ] == []


def test_files_can_be_read_in_one_sitting() -> None:
    long = {str(path.relative_to(SOURCE)): len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in long.items() if count > 450} == {}


def test_the_objectives_are_pure() -> None:
    """No files, no clock, no randomness, no model code in the mathematics (`conform` and its reader of cases are a command)."""
    for path in (SOURCE / "objectives").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not names & {"random", "time", "os", "transformers", "peft"}, path.name
