"""Tests that a plug-in's task with a new metric is trained and evaluated without changes to the project."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.plugin_package import ROOT, records, run, train_two_steps, write_plugin, write_task_corpus
from trainer.evaluation.predictions import read_predictions
from trainer.scoring.tasks import TASKS

WRITERS_OF_DATA = {"tools/demo_corpus.py", "tools/spoken_text.py", "trainer/importers/fields.py"}
"""The files that may name tasks because they write data. Imported recordings with only a transcript belong to asr."""

SOURCE = '''
"""A task of repeated commands, scored by the length of the answers."""

from trainer.scoring.metric import Metric, mean
from trainer.scoring.tasks import Answers, Task, accuracy_metric


def answer_length(answers: Answers) -> list[Metric]:
    """Return the mean number of characters of an answer."""
    return [mean("answer_length", [len(text) for text in answers.hypotheses])]


COMMAND = Task(
    "command", "spoken commands", (answer_length, accuracy_metric), ("answer_length",), is_transcription=True
)
'''


def test_only_the_table_names_tasks() -> None:
    names = set(TASKS) - {"text", "intent"}  # both words also have other meanings in the code
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("model", "trainer", "tools")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"trainer/scoring/tasks.py", *WRITERS_OF_DATA}


@pytest.mark.timeout(600)
def test_a_task_of_a_plugin_trains_and_is_scored(tmp_path: Path) -> None:
    path = write_plugin(tmp_path / "site", "commands", SOURCE, {"earshot.tasks": {"command": "COMMAND"}})
    manifest = write_task_corpus(tmp_path / "corpus", "command")

    unknown = train_two_steps(manifest.parent, tmp_path / "unknown", "", path=path)
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr
    assert "known tasks are asr, er, aqa, sqa, ac, text, st, lid, " in unknown.stderr

    done = train_two_steps(manifest.parent, tmp_path / "runs", "commands", "data.num_workers=1", path=path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "debug"
    logged = records(folder)
    assert [r["step"] for r in logged if "train/loss/command" in r] == [1, 2]
    assert all("train/loss_ctc" in r for r in logged if "train/loss" in r)
    answers = read_predictions(folder / "predictions-test-step2.jsonl")
    assert [p.meta["task"] for p in answers] == ["command", "command"]
    expected = sum(len(p.hypothesis) for p in answers) / 2
    assert logged[-1]["eval/test/command/answer_length"] == pytest.approx(expected)
    assert "answer_length" in done.stdout and "command/answer_length" in done.stderr

    # The run's recipe names the plug-in. A command that opens the run therefore loads it, as do its workers.
    out = tmp_path / "evaluation"
    options = ["--data", str(manifest), "--split", "test", "--nproc", "2", "--out", str(out), "--json"]
    done = run("tools.evaluate", str(folder), *options, path=path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["headlines"] == {"command": "answer_length"} and not found["num_skipped"]

    # This command finds the plug-in in the recipes of the runs.
    done = run("tools.compare", str(folder), str(folder), path=path)
    assert done.returncode == 0 and "test/command/answer_length" in done.stdout, done.stderr

    # A command that opens no run needs the option `--plugins`.
    compared = [str(out / "predictions.jsonl")] * 2
    done = run("tools.compare", *compared, path=path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: task command: not one of asr, er, aqa, sqa, ac, text, st, ")
    assert done.stderr.endswith("or name the plug-in that adds it under `plugins`\n") and done.stderr.count("\n") == 1
    done = run("tools.compare", *compared, "--plugins", "commands", path=path)
    assert done.returncode == 0 and "answer_length" in done.stdout, done.stderr
