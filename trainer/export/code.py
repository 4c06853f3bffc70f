"""The modelling code of an exported model: the files of `model/` that it needs, in one flat folder.

transformers copies a remote-code module and its relative imports, but does not support sub-packages. Therefore
`model/encoders/base.py` becomes `encoders_base.py`, and imports are rewritten to match.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import model

CONFIGURATION, MODELING, PROCESSING = "model.hub.configuration", "model.hub.modeling", "model.hub.processing"
_ROOT = Path(model.__file__ or "").parent


def remote_code() -> dict[str, str]:
    """Return the source code of each file, by file name."""
    found: dict[str, str] = {}
    waiting = [CONFIGURATION, MODELING, PROCESSING]
    while waiting:
        module = waiting.pop()
        if remote_name(module) + ".py" not in found:
            source = _path(module).read_text(encoding="utf-8")
            imports = list(_imports(source))
            found[remote_name(module) + ".py"] = _rewritten(module, source, imports)
            waiting += [imported for _, imported in imports]
    return dict(sorted(found.items()))


def remote_name(module: str) -> str:
    """Return the name of a module in the flat folder: `encoders_base` for `model.encoders.base`."""
    return module.removeprefix("model.").replace(".", "_")


def _imports(source: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Yield the `from` imports of the package `model`, with the module that each imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "model" for alias in node.names), "use `from model.x import y`"
        elif isinstance(node, ast.ImportFrom) and node.module == "model":
            yield from ((node, f"model.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("model."):
            yield node, node.module or ""


def _rewritten(module: str, source: str, imports: Sequence[tuple[ast.ImportFrom, str]]) -> str:
    lines = source.splitlines(keepends=True)
    for node, imported in imports:
        before = f"from {node.module} import"
        after = "from . import" if node.module == "model" else f"from .{remote_name(imported)} import"
        line = lines[node.lineno - 1]
        assert line.lstrip().startswith((before, after)), line
        lines[node.lineno - 1] = line.replace(before, after, 1)
    origin = _path(module).relative_to(_ROOT.parent).as_posix()
    return f"# Generated from {origin} of the project that trained this model.\n" + "".join(lines)


def _path(module: str) -> Path:
    return (_ROOT.parent / module.replace(".", "/")).with_suffix(".py")
