"""Tests of the import layers in docs/architecture.md, and of the rule that no function changes a module's state."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "trainer", "tools", "bench")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# A package may import packages of lower layers, but none of its own or a higher layer. The modules directly in
# trainer/ (`build`, `parity`, …) are the layer "trainer". tools/ and bench/ are above all layers.
LAYERS = (
    {"model"},
    {"trainer.files"},
    {"trainer.storage", "trainer.scoring", "trainer.page", "trainer.parallel", "trainer.telemetry"},
    {"trainer.plugins"},
    {"trainer.data", "trainer.engine"},
    {"trainer.checkpoint", "trainer.run", "trainer.importers"},
    {"trainer.config"},
    {"trainer.run_tokenizer"},
    {"trainer.plan", "trainer.export", "trainer.expert_usage", "trainer.job"},
    {"trainer.evaluation"},
    {"trainer.training"},
    {"trainer"},
    {"tools"},
    {"bench"},
)
LAYER_OF = {package: height for height, layer in enumerate(LAYERS) for package in layer}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def package_of(module: str) -> str:
    """Return a module's package, such as `trainer.data` for `trainer.data.lanes` and `trainer` for `trainer.build`."""
    for length in (2, 1):
        package = ".".join(module.split(".")[:length])
        if package in LAYER_OF:
            return package
    raise ValueError(f"{module}: its package is in no layer of LAYERS")


def imports_of(module: str, path: Path) -> Iterator[str]:
    """Yield the project's modules that `module` imports, including imports within functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else source for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


GRAPH = {module: sorted(set(imports_of(module, path)) - {module}) for module, path in MODULES.items()}


def forbidden(module: str, imported: str) -> bool:
    here, there = package_of(module), package_of(imported)
    return here != there and LAYER_OF[there] >= LAYER_OF[here]


def test_sources_are_found() -> None:
    assert {"model.config", "trainer.config.load", "trainer.data.config", "trainer.__main__"} <= set(MODULES)
    assert "trainer.config.schema" in GRAPH["trainer.config.load"]


def test_imports_go_down_only() -> None:
    wrong = [f"{m} imports {i}" for m, imports in GRAPH.items() for i in imports if forbidden(m, i)]
    assert not wrong, "\n".join(wrong)


def test_violations_are_detected() -> None:
    assert forbidden("model.adapter", "trainer.training.step")
    assert forbidden("trainer.data.lanes", "trainer.engine.llm")
    assert forbidden("trainer.engine.llm", "trainer.config.schema")
    assert forbidden("trainer.parallel.plan", "trainer.training.step")
    assert forbidden("trainer.training.step", "tools.demo")
    assert forbidden("trainer.storage.open", "trainer.scoring.metric")
    assert not forbidden("trainer.training.step", "trainer.engine.llm")


def test_imports_have_no_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for imported in GRAPH.get(module, ()):
            visit(imported, (*trail, module))
        done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_file_has_a_meaningless_name(name: str) -> None:
    assert not [m for m in MODULES if name in m.split(".") or m.endswith((f"_{name}", f".{name}"))]


# This module replaces functions of torch for the whole process, and `_depth` counts nested replacements.
PROCESS_WIDE = {"trainer/parallel/cpu.py: global _depth"}

MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "clear", "discard"}


def global_changes(path: Path) -> Iterator[str]:
    """Yield the places where a function changes a module's variable by `global`, item assignment or a mutating call."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign)]
    targets = [t for n in assigned for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    owned = {t.id for t in targets if isinstance(t, ast.Name)}
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        for node in ast.walk(function):
            name: ast.expr | None = None
            if isinstance(node, ast.Global):
                yield f"{path.relative_to(ROOT)}: global {', '.join(node.names)}"
            elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                name = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                name = node.func.value
            if isinstance(name, ast.Name) and name.id in owned:
                yield f"{path.relative_to(ROOT)}: changes the module's {name.id}"


@pytest.mark.slow
def test_no_function_changes_module_state() -> None:
    found = [change for path in SOURCES for change in global_changes(path)]
    assert not set(found) - PROCESS_WIDE, "\n".join(found)


def test_changes_of_module_state_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = tmp_path / "m.py"
    source.write_text(
        "A = {}\nB: list = []\n"
        "def f():\n    global C\n    A[1] = 2\n    B.append(3)\n    local = []\n    local.append(A)\n"
    )
    assert [change.split(": ", 1)[1] for change in global_changes(source)] == [
        "global C",
        "changes the module's A",
        "changes the module's B",
    ]


def test_shipped_text_is_free_of_machine_paths() -> None:
    texts = [*SOURCES, *(ROOT / "trainer" / "recipes").glob("*.yaml"), *(ROOT / "slurm").iterdir(), ROOT / "Makefile"]
    marks = ("/" + "work/", "/" + "tmp/w/")
    assert not [str(p.relative_to(ROOT)) for p in texts if any(m in p.read_text(encoding="utf-8") for m in marks)]
