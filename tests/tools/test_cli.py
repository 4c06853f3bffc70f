"""Tests of the command `earshot`: every subcommand exists and has help, and recipes and their keys can be listed."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools import cli, evaluate, export, init, profile_experts, recipe, serve, transcribe
from trainer.config.load import load_recipe, recipe_names
from trainer.config.reference import as_markdown, sections

ROOT = Path(__file__).parents[2]
COMMANDS = [command for group in cli.COMMANDS.values() for command in group]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_command_has_help_with_an_example(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(importlib.import_module(command.module).main)
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.name.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    usage, _, rest = text.partition("\n")
    assert usage.startswith(f"usage: earshot {command.name} ")
    assert re.search(rf"^ *earshot {command.name}\b", rest, flags=re.MULTILINE), f"no example in:\n{text}"


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert all(f"  {c.name} " in text for c in COMMANDS)
        assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: earshot trian: no such command; choose one of demo, init"),
        (["shards", "mkae"], "error: earshot shards mkae: no such command; choose shards make or shards inspect"),
    ],
)
def test_an_unknown_command_is_a_one_line_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)


def test_every_key_has_a_meaning_and_the_reference_is_current() -> None:
    found = sections()
    keys = [key for section in found for key in section.keys]
    assert not [key.path for key in keys if not key.meaning]
    assert {"optim.lr", "data.datasets.N.weight", "model.experts.N.family", "train.steps"} <= {k.path for k in keys}
    committed = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert committed == as_markdown(found), "run: earshot recipe --markdown > docs/recipe.md"


def test_keys_of_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--keys", "data.join"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("data.join.probability  (a number; default 0.0)") and "data.root" not in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert recipe.main(["--keys", "dta"]) == 2
    assert "--keys dta: no such section; choose one of tasks, model, data" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_names())
def test_shown_recipe_can_be_loaded(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["--show", name, "seed=7"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(str(path)) == load_recipe(name, ["seed=7"])


def test_overrides_need_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main(["seed=7"]) == 2
    hint = "and put key=value overrides after it\n"
    expected = f"error: seed=7: unexpected argument; to show a recipe use --show RECIPE, {hint}"
    assert capsys.readouterr().err == expected
    assert recipe.main(["mowe_8b"]) == 2
    expected = f"error: mowe_8b: unexpected argument; to show a recipe use --show mowe_8b, {hint}"
    assert capsys.readouterr().err == expected


def test_init_writes_the_files_to_edit_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "project"
    assert init.main([str(folder), "--recipe", "mowe_70b"]) == 0
    assert {p.name for p in folder.iterdir()} == {"slurm", "ds_configs", "recipe.yaml"}
    assert {p.name for p in (folder / "slurm").iterdir()} == {p.name for p in (ROOT / "slurm").iterdir()}
    assert all(p.stat().st_mode & 0o111 for p in (folder / "slurm").glob("*.sh"))
    written = (folder / "recipe.yaml").read_text().splitlines()
    original = (ROOT / "trainer" / "recipes" / "mowe_70b.yaml").read_text().splitlines()
    # The commands in the file's comment name the file that was written, not the recipe from which it was copied.
    changed = [" ".join(new.split()[:5]) for new, old in zip(written, original, strict=True) if new != old]
    assert changed == [
        "# earshot train recipe.yaml --dry-run",
        "# sbatch slurm/train_70b.sh recipe.yaml data.root=/data",
    ]
    assert init.main([str(folder)]) == 2
    assert "slurm: exists already; move it away, or choose another folder" in capsys.readouterr().err
    assert init.main([str(tmp_path / "other"), "--recipe", "none"]) == 2
    assert "--recipe none: choose one of debug" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("module", "more"),
    [(evaluate, ["--data", "x"]), (export, ["out"]), (profile_experts, []), (serve, []), (transcribe, [])],
)
def test_a_wrong_path_of_a_model_is_reported_before_anything_is_imported(
    module: ModuleType,
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert module.main(["runs/nowhere", *more]) == 2
    wanted = "error: runs/nowhere: no such folder; use the folder of a run, a checkpoint or an export\n"
    assert capsys.readouterr().err == wanted


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -m tools.cli recipe --keys | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("name  (text") and done.stderr == ""
