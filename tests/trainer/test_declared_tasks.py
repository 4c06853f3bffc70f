"""Tests that tasks declared in a recipe are known wherever tasks are used, including child processes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import UserError
from tools.options import add_plugins
from trainer.config.load import dump, load_recipe, parse_stored_recipe
from trainer.data.errors import SampleError
from trainer.data.metadata import check_metadata
from trainer.scoring import declared
from trainer.scoring.scores import score, task_metrics
from trainer.scoring.tasks import METRICS, TASKS, Answers, find_task

ACTS = ["tasks=[{name: act, title: dialogue acts, metrics: [answers, cider], headline: macro_f1}, {name: gist}]"]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(declared.VARIABLE, "[]")
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


def test_a_declared_task_is_scored_and_stored() -> None:
    with pytest.raises(SampleError, match="unknown_task|known tasks"):
        check_metadata({"task": "act", "answer": "greet", "instruction": "?"}, 1)
    recipe = load_recipe("debug", ACTS)
    check_metadata({"task": "act", "answer": "greet", "instruction": "?"}, 1)
    assert find_task("act").title == "dialogue acts" and find_task("act").headlines == ("macro_f1",)
    assert find_task("gist").headlines == ("accuracy",)
    metas = [{"answer": "greet", "choices": ["greet", "ask"]}, {"answer": "ask", "choices": ["greet", "ask"]}]
    found = {s.metric: s.value for s in score("act", ["greet", "greet"], metas)}
    assert found["accuracy"] == 0.5 and found["macro_f1"] == pytest.approx(1 / 3) and "cider" in found
    assert parse_stored_recipe(dump(recipe), "recipe.yaml").tasks == recipe.tasks
    code = "from trainer.scoring.declared import inherit_tasks as i; from trainer.scoring.tasks import TASKS; i();"
    code += "print(TASKS['act'].title)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "dialogue acts\n"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("[{name: asr}]", "another task called asr"),
        ("[{name: a}, {name: a}]", "another task called a"),
        ("[{name: a/b}]", "use letters"),
        ("[{name: a, metrics: [wer]}]", "tasks.a.metrics .*choose at least one of transcription"),
        ("[{name: a, metrics: []}]", "choose at least one"),
        ("[{name: a, headline: bleu}]", "tasks.a.headline = bleu: its metrics compute accuracy"),
        ("[{name: a, metrics: [answers, accuracy]}]", "several of them compute accuracy"),
    ],
)
def test_wrong_declarations_are_refused(tasks: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("debug", [f"tasks={tasks}"])


def test_an_undeclared_task_names_the_remedy() -> None:
    with pytest.raises(UserError, match="task act: .*declare it in the recipe's section `tasks`"):
        task_metrics("act", [], [])


def test_commands_take_tasks_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump(load_recipe("debug", ACTS)))
    for name in ("act", "gist"):
        del TASKS[name]
    parser = argparse.ArgumentParser()
    add_plugins(parser)
    parser.parse_args(["--tasks-of", str(path)])
    assert "act" in TASKS
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--tasks-of", str(path) + "x"])
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: recipe")


def test_every_named_metric_computes_what_it_says() -> None:
    meta = {"answer": '{"intent": "x"}', "references": ["a b"], "choices": ["a b", "c"]}
    for name, metrics in METRICS.items():
        found = metrics.function(Answers(["a b"], [meta], lambda said, accepted: 1.0))  # type: ignore[arg-type]
        names = {m.name for m in found}
        assert {metrics.main, *metrics.others} <= names, name
        assert all(m.lower_is_better != metrics.higher_is_better for m in found if m.name == metrics.main), name
