"""Tests of the report on recipe keys that changed since the last attempt of a run."""

from __future__ import annotations

from pathlib import Path

from trainer.config.changes import say_changes
from trainer.config.load import dump, load_recipe


def test_changed_keys_are_reported_with_both_values(tmp_path: Path) -> None:
    stored, said = tmp_path / "recipe.yaml", []
    say_changes(stored, load_recipe("debug"), said.append)  # the first attempt
    stored.write_text(dump(load_recipe("debug")), encoding="utf-8")
    say_changes(stored, load_recipe("debug"), said.append)
    assert said == []
    recipe = load_recipe("debug", ["optim.lr=0.25", "train.steps=30", "data.datasets.0.weight=2"])
    before = load_recipe("debug")
    say_changes(stored, recipe, said.append)
    wanted = f"optim.lr = 0.25 (was {before.optim.lr}), train.steps = 30 (was {before.train.steps})"
    assert len(said) == 1 and said[0].startswith("changed since the last attempt: ")
    assert "data.datasets.0.weight = 2" in said[0] and all(part in said[0] for part in wanted.split(", "))
    stored.write_text("[", encoding="utf-8")
    say_changes(stored, recipe, said.append)
    stored.write_text("optim: {former: 1}", encoding="utf-8")  # a recipe of an older version
    say_changes(stored, recipe, said.append)
    assert len(said) == 1
