"""The modeling code of an exported model, which consists of the files of `model/` that it needs, in one flat folder.

transformers copies a remote-code module and its relative imports, but does not support sub-packages. Therefore
`model/encoders/base.py` becomes `encoders_base.py`, and imports are rewritten to match. The tables of encoder families
and of adapters are generated. They contain only the entries that the exported model uses, including entries of
plug-ins.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import model
from model.connectors.kinds import ADAPTERS
from model.encoders.families import ENCODER_FAMILIES
from model.errors import UserError

CONFIGURATION, MODELING, PROCESSING = "model.hub.configuration", "model.hub.modeling", "model.hub.processing"
FAMILIES, KINDS = "model.encoders.families", "model.connectors.kinds"
_ROOT = Path(model.__file__ or "").parent


def remote_code(families: Collection[str], adapter: str = "convolutions") -> dict[str, str]:
    """Return the source code of each file, by file name.

    Args:
        families: The names of the encoder families that the exported model uses.
        adapter: The kind of the exported model's adapter.

    Raises:
        UserError: If a family or the adapter cannot be exported, because it is not a single file that imports only
            `model` and installed packages.
    """
    places = {name: _place("ENCODER_FAMILIES", ENCODER_FAMILIES, name) for name in ENCODER_FAMILIES if name in families}
    kinds = {adapter: _place("ADAPTERS", ADAPTERS, adapter)}
    found = {
        f"{remote_name(FAMILIES)}.py": _table("ENCODER_FAMILIES", places),
        f"{remote_name(KINDS)}.py": _table("ADAPTERS", kinds),
    }
    waiting = [CONFIGURATION, MODELING, PROCESSING]
    waiting += [module for module, _ in (*places.values(), *kinds.values())]
    while waiting:
        module = waiting.pop()
        if remote_name(module) + ".py" not in found:
            source = _path(module).read_text(encoding="utf-8")
            imports = list(_imports(module, source))
            found[remote_name(module) + ".py"] = _rewritten(module, source, imports)
            waiting += [imported for _, imported in imports]
    return dict(sorted(found.items()))


def _place(title: str, table: Mapping[str, object], key: str) -> tuple[str, str]:
    """Return the module and the name to which an entry of a table refers."""
    entry = table[key]
    if not isinstance(entry, str):
        raise UserError(
            f"{title}[{key!r}]: an export needs the file that defines it; make the entry a string 'module:NAME'"
        )
    module, _, name = entry.partition(":")
    return module, name


def _table(title: str, places: dict[str, tuple[str, str]]) -> str:
    """Return the source of the table `title` with these entries."""
    lines = ["# Generated: the entries that this model uses.", "from typing import TYPE_CHECKING", ""]
    lines += ["if TYPE_CHECKING:  # transformers copies the files that such lines name"]
    lines += [f"    from .{remote_name(module)} import {name}" for module, name in places.values()] or ["    pass"]
    lines += ["", f"{title} = {{"]
    lines += [f'    "{key}": ".{remote_name(module)}:{name}",' for key, (module, name) in places.items()]
    return "\n".join([*lines, "}", ""])


def remote_name(module: str) -> str:
    """Return the name of a module in the flat folder: `encoders_base` for `model.encoders.base`."""
    return module.removeprefix("model.").replace(".", "_") if _is_ours(module) else f"plugin_{module.replace('.', '_')}"


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "model"


def _imports(module: str, source: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Yield each `from` import of the package `model`, with the module that it imports."""
    for node in ast.walk(ast.parse(source)):
        if not _is_ours(module):
            _check_plugin_import(module, node)
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "model" for alias in node.names), "use `from model.x import y`"
        elif isinstance(node, ast.ImportFrom) and node.module == "model":
            yield from ((node, f"model.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("model."):
            yield node, node.module or ""


def _check_plugin_import(module: str, node: ast.AST) -> None:
    """Check that a plug-in's file imports no other files of the plug-in, since an export contains only this file."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        names = ["." if node.level else node.module or ""]
    for name in names:
        if name == "." or name.split(".")[0] in (module.split(".")[0], "trainer"):
            raise UserError(
                f"{_path(module)}: an export contains only this file of the plug-in, so it may import only `model` "
                f"and installed packages, not {'a relative module' if name == '.' else name}; move what "
                "it needs into the file"
            )


def _rewritten(module: str, source: str, imports: Sequence[tuple[ast.ImportFrom, str]]) -> str:
    lines = source.splitlines(keepends=True)
    for node, imported in imports:
        before = f"from {node.module} import"
        after = "from . import" if node.module == "model" else f"from .{remote_name(imported)} import"
        line = lines[node.lineno - 1]
        assert line.lstrip().startswith((before, after)), line
        lines[node.lineno - 1] = line.replace(before, after, 1)
    return f"# Generated from {module} of the project that trained this model.\n" + "".join(lines)


def _path(module: str) -> Path:
    if _is_ours(module):
        return (_ROOT.parent / module.replace(".", "/")).with_suffix(".py")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} cannot be found"
    return Path(spec.origin)
