"""Tests of former recipe keys. They are errors in a user's recipe, but are translated in a stored recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.errors import UserError
from model.hub.configuration import audio_config
from tests.golden.test_golden import GOLDEN
from trainer.config.load import load_recipe, load_stored_recipe
from trainer.telemetry.load_history import HISTORY_NAME, read_history


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sets=[]", "data.sets: renamed; write data.datasets instead"),
        ("data.sets.0.weight=2", "data.sets: renamed; write data.datasets instead"),
        (
            "model.router.entry_steps=3",
            "model.router.entry_steps: renamed; write model.router.added_encoder_warmup_steps instead",
        ),
        ("telemetry.mlflow=true", "telemetry.mlflow: replaced; write telemetry.trackers=[mlflow] instead"),
        ("telemetry.mlflow=false", "telemetry.mlflow: replaced; write telemetry.trackers=[] instead"),
        ("telemetry.mlflow_experiment=a", "telemetry.mlflow_experiment: renamed; write telemetry.experiment instead"),
        (
            "model.router.gates=[dependent]",
            "model.router.gates: 'dependent' is renamed; write 'data_dependent' instead",
        ),
        ("train.recompute_llm=true", "train.recompute_llm = true: replaced; write train.recompute_llm=full instead"),
    ],
)
def test_users_recipe_must_have_current_names(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("debug", [override])
    assert str(error.value) == message


def test_a_stored_recipe_is_translated() -> None:
    path = GOLDEN / "run" / "recipe.yaml"
    assert "sets:" in path.read_text() and "entry_steps: 4" in path.read_text()
    recipe = load_stored_recipe(path)
    assert [d.name for d in recipe.data.datasets] == ["golden"]
    assert recipe.model.router.added_encoder_warmup_steps == 4
    assert recipe.model.router.gates == ("data_independent", "data_dependent")
    assert "recompute_llm: false" in path.read_text() and recipe.train.recompute_llm == "none"
    assert "mlflow: false" in path.read_text()
    assert (recipe.telemetry.trackers, recipe.telemetry.experiment) == ((), "mowe")


def test_a_stored_recipe_that_cannot_be_read_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe.yaml: cannot be read"):
        load_stored_recipe(tmp_path / "recipe.yaml")


def test_histories_and_exports_of_earlier_versions_have_current_gate_names() -> None:
    history = read_history(GOLDEN / "run" / HISTORY_NAME)
    assert history and {i.load.gates for i in history} == {("data_independent", "data_dependent")}
    described = json.loads((GOLDEN / "export" / "config.json").read_text())["audio"]
    assert described["router"]["gates"] == ["independent", "dependent"]
    assert audio_config(described).router.gates == ("data_independent", "data_dependent")
