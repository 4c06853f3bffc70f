"""Tests that a broken plug-in causes exit code 2 and a one-line error with the package and the entry point."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.encoders.families import ENCODER_FAMILIES
from model.errors import UserError
from model.llm.families import LLM_FAMILIES
from model.losses.table import LOSSES
from tests.plugin_package import run, write_plugin
from trainer.config.checks import check_recipe
from trainer.config.load import load_recipe
from trainer.plugins import GROUPS, VARIABLE, inherit_plugins, load_plugins
from trainer.scoring.tasks import TASKS

GOOD = """
from dataclasses import replace
from trainer.scoring.tasks import TASKS
EXTRA = replace(TASKS["er"], name="NAME")
"""


@pytest.fixture(autouse=True)
def restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the test find plug-ins in `tmp_path`, and restore the tables afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, "")  # restores the variable after the test, even if the test sets it
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


def test_every_group_has_its_table() -> None:
    for name, group in GROUPS.items():
        module = importlib.import_module(group.module)
        assert isinstance(getattr(module, group.table), dict), name
        place, _, class_name = group.type.partition(":")
        assert isinstance(getattr(importlib.import_module(place), class_name), type), name


def test_a_folder_that_hides_the_module_is_named(tmp_path: Path) -> None:
    write_plugin(tmp_path, "plug_hidden", GOOD, {"earshot.tasks": {"x": "EXTRA"}})
    (tmp_path / "plug_hidden.py").unlink()
    (tmp_path / "plug_hidden").mkdir()  # as if the current folder contained the folder of an editable installation
    with pytest.raises(
        UserError, match=rf"AttributeError.*; the folder {tmp_path}/plug_hidden hides the module; start"
    ):
        load_plugins(["plug_hidden"])


def test_a_plugin_is_loaded_by_package_or_entry_point_and_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, task in (("plug_whole", "whole"), ("plug_single", "single")):
        write_plugin(tmp_path, package, GOOD.replace("NAME", task), {"earshot.tasks": {task: "EXTRA"}})
    load_plugins(["plug-whole", "single", "single"])
    load_plugins(["single"])
    assert {"whole", "single"} <= set(TASKS) and TASKS["single"].title == "emotion"
    assert os.environ[VARIABLE] == "plug-whole,single"
    imports = "from trainer.plugins import inherit_plugins\nfrom trainer.scoring.tasks import TASKS\n"
    (tmp_path / "show_tasks.py").write_text(f"{imports}inherit_plugins()\nprint(*TASKS)\n")
    assert run("show_tasks", path=tmp_path).stdout.split()[-2:] == ["whole", "single"]
    monkeypatch.setenv(VARIABLE, "gone")
    with pytest.raises(UserError, match="plugins: gone is not installed"):
        inherit_plugins()


def test_plugins_add_families_and_losses(tmp_path: Path) -> None:
    source = """
from model.encoders.hubert import HUBERT as EAR
from model.llm.families import LLMFamily
from model.losses.routing import RoutingLoss

LLM = LLMFamily(qkv_bias=True)


class Quiet(RoutingLoss):
    name = "quiet"


QUIET = Quiet()
"""
    points = {
        "earshot.encoders": {"ear": "EAR"},
        "earshot.llms": {"llm_x": "LLM"},
        "earshot.losses": {"quiet": "QUIET"},
    }
    write_plugin(tmp_path, "plug_parts", source, points)
    with pytest.raises(UserError, match=r"the installed package plug_parts defines this loss.*plugins=\[plug_parts\]"):
        check_recipe(load_recipe("debug", ["model.losses.quiet.weight=0.1"]))
    try:
        load_plugins(["plug-parts"])
        # An export copies the module of an encoder family, so the table stores the module's name.
        assert ENCODER_FAMILIES["ear"] == "plug_parts:EAR"
        assert LLM_FAMILIES["llm_x"].qkv_bias and LOSSES["quiet"].name == "quiet"
    finally:
        for table, name in ((ENCODER_FAMILIES, "ear"), (LLM_FAMILIES, "llm_x"), (LOSSES, "quiet")):
            table.pop(name, None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("package", "source", "group", "point", "message"),
    [
        (
            "plug_raises",
            "raise RuntimeError('no\\nGPU')",
            "earshot.tasks",
            "x",
            "the entry point x = plug_raises:EXTRA of the package plug_raises cannot be imported "
            "(RuntimeError: no GPU)",
        ),
        (
            "plug_exits",
            "import no_such_module",
            "earshot.hooks",
            "x",
            "the entry point x = plug_exits:EXTRA of the package plug_exits cannot be imported (ModuleNotFoundError: "
            "No module named 'no_such_module')",
        ),
        (
            "plug_type",
            "EXTRA = 3",
            "earshot.tasks",
            "x",
            "the entry point x = plug_type:EXTRA of the package plug_type is a int, but the group earshot.tasks needs "
            "a trainer.scoring.tasks.Task",
        ),
        (
            "plug_class",
            "class EXTRA: pass",
            "earshot.trackers",
            "x",
            "the entry point x = plug_class:EXTRA of the package plug_class is the class EXTRA, but the group "
            "earshot.trackers needs a trainer.telemetry.trackers.base.Tracker",
        ),
        (
            "plug_other",
            GOOD.replace("NAME", "y"),
            "earshot.tasks",
            "x",
            "the entry point x = plug_other:EXTRA of the package plug_other defines an entry with the name y; use "
            "the same name for both",
        ),
        (
            "plug_taken",
            GOOD.replace("NAME", "asr"),
            "earshot.tasks",
            "asr",
            "the entry point asr = plug_taken:EXTRA of the package plug_taken: asr already exists in the group "
            "earshot.tasks; choose another name",
        ),
    ],
)
def test_an_unusable_plugin_is_a_one_line_error(
    tmp_path: Path, package: str, source: str, group: str, point: str, message: str
) -> None:
    write_plugin(tmp_path, package, source, {group: {point: "EXTRA"}})
    with pytest.raises(UserError) as error:
        load_plugins([package])
    assert str(error.value) == f"plugins: {package}: {message}"


@pytest.mark.slow
def test_a_command_ends_with_exit_code_2_before_it_starts_ranks(tmp_path: Path) -> None:
    write_plugin(tmp_path, "plug_broken", "raise OSError('x')", {"earshot.tasks": {"x": "EXTRA"}})
    for name, expected in (("plug_broken", "cannot be imported (OSError: x)"), ("gone", "gone is not installed")):
        done = run("trainer", "debug", f"plugins=[{name}]", path=tmp_path)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = run("tools.compare", "a", "b", "--plugins", "gone", path=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: plugins: gone is not installed in this environment; installed plug-ins: plug_broken\n",
    )
    done = run("trainer", "debug", "plugins=commands", path=tmp_path)
    assert done.returncode == 2 and "plugins = 'commands': expected a list of text" in done.stderr
