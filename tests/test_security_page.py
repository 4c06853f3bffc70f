"""Tests that docs/security.md lists every environment variable that the project reads or sets."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "security.md"
NAME = re.compile(r"[A-Z][A-Z0-9_]{3,}")
# Names that `read_variables` finds, but that are values and not variables.
NOT_VARIABLES = {"TRUE"}


def names_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and NAME.fullmatch(part.value):
            yield part.value


def read_variables(path: Path) -> set[str]:
    """Return the environment variables that a file reads or sets in `os.environ` or in an argument `environ`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        keys: list[ast.AST] = []
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            keys = [node.slice]
        elif isinstance(node, ast.Call) and re.search(r"environ\.\w+$", ast.unparse(node.func)):
            keys = list(node.args[:1])
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[-1]).endswith("environ"):
            keys = [node.left]
        for key in keys:
            found |= set(names_in(key))
            if isinstance(key, ast.Name) and NAME.fullmatch(str(constants.get(key.id, ""))):
                found.add(constants[key.id])
    return found - NOT_VARIABLES


@pytest.mark.slow
def test_every_environment_variable_is_listed() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## Environment variables")[2]
    listed = set(re.findall(r"`([A-Z][A-Z0-9_*]+)`", table))
    read = {
        name: path.relative_to(ROOT)
        for folder in ("model", "trainer", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in read_variables(path)
    }
    assert len(read) > 30, "the search found too few variables"
    missing = {n: str(p) for n, p in read.items() if not any(fnmatch.fnmatch(n, pattern) for pattern in listed)}
    assert not missing, f"{missing}: add them to docs/security.md"
