"""Tests that names from data cannot control a terminal, spreadsheet, plot or page, and that secrets are hidden."""

from __future__ import annotations

import csv
import errno
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError, printable, printable_lines
from tests.tools.exportable import write_run
from tests.trainer.scorecard_data import tones
from tools import export, status
from trainer.__main__ import be_calm
from trainer.config.load import load_recipe
from trainer.evaluation.offline.run import run_evaluation
from trainer.evaluation.predictions import Prediction
from trainer.evaluation.scorecard.card import make_card
from trainer.evaluation.scorecard.files import write_files
from trainer.export import publish
from trainer.files import locked
from trainer.job.check import main as check_job
from trainer.job.node_check import Wanted
from trainer.page.figure import plain
from trainer.page.spreadsheet import as_cell
from trainer.scoring.table import format_table
from trainer.storage.open import scheme_of
from trainer.telemetry.events import begin_attempt, read_events

RED = "\x1b[31mred\x1b]0;title\x07"
SECRET = "https://user:hunter2@example.org/x"


def test_control_characters_are_escaped_and_languages_are_not() -> None:
    assert printable("a\x1b[2J\r\n\x9b\u202eb\u2028\ud800") == "a\\x1b[2J\\r\\n\\x9b\\u202eb\\u2028\\ud800"
    for text in ("naïve 日本語 العربية नमस्ते \U0001f468\u200d\U0001f469", "می\u200cخواهم"):
        assert printable(text) == text
    assert printable_lines("a\nb\rc") == "a\nb\\rc"
    assert "\x1b" not in str(UserError(f"{RED}: no such sample"))


def test_tables_status_and_logs_have_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in format_table([{"task": RED, RED: 1}])
    begin_attempt(tmp_path, name=RED, num_ranks=1, num_steps=1).add("failed", error=RED)
    assert status.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "red" in shown and "\x1b" not in shown and "\x07" not in shown
    be_calm()
    assert logging.lastResort is not None
    record = logging.LogRecord("x", logging.WARNING, "", 0, "sample %s\nis odd", (RED,), None)
    assert logging.lastResort.format(record) == f"sample {printable(RED)}\nis odd"


def test_cells_are_not_formulas() -> None:
    assert [as_cell(x) for x in ("=1+1", "@a", "-x", "+x", "\tx", -1, -1.5, "a=1")] == [
        "'=1+1", "'@a", "'-x", "'+x", "'\tx", -1, -1.5, "a=1",
    ]  # fmt: skip


def test_plots_do_not_parse_formulas(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.set_title(plain(r"$\frac{ and $\undefined{$"))
    axes.set_xticks([0], [plain("$x_{$$")])
    figure.savefig(tmp_path / "a.png")


def test_secrets_in_urls_are_refused_and_masked(tmp_path: Path) -> None:
    for key in ("data.root", "checkpoint.start_from", "model.llm.weights"):
        message = rf"{key} = https://\*\*\*@example.org/x: a URL in a recipe must not"
        with pytest.raises(UserError, match=message) as caught:
            load_recipe("debug", [f"{key}={SECRET}"])
        assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        scheme_of(SECRET)
    assert "hunter2" not in str(caught.value)
    log = begin_attempt(tmp_path)
    log.add("save_failed", why=f"cannot reach {SECRET}", samples=[SECRET])
    assert "hunter2" not in log.path.read_text()
    assert read_events(tmp_path)[1]["samples"] == ["https://***@example.org/x"]


def test_the_password_of_a_tracker_is_in_no_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:hunter2@mlflow.example.org:5000/x?token=hunter2")
    arguments = [f"data.root={tmp_path}", "telemetry.trackers=[mlflow]", "data.datasets=[{name: a, manifest: a.jsonl}]"]
    check_job(["debug", *arguments])
    facts = json.loads(capsys.readouterr().out.splitlines()[0])
    assert facts["trackers"] == ["https://mlflow.example.org:5000"]
    # The job passes this text to srun, whose command line is visible to other users.
    assert "hunter2" not in json.dumps(asdict(Wanted(0, "x", (), tuple(facts["trackers"]), 0, 0)))


def test_a_folder_that_no_export_made_is_not_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    mine = tmp_path / ".out.part"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "was not written by an interrupted export" in capsys.readouterr().err
    assert (mine / "thesis.tex").read_text() == "years of work" and not (tmp_path / "out").exists()
    mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    mine.unlink()
    with locked(tmp_path / ".out.lock"):
        assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "another export is writing it" in capsys.readouterr().err
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "out", "run"]


def test_a_second_evaluation_in_one_folder_is_refused(tmp_path: Path) -> None:
    request: Any = None
    with locked(tmp_path / ".lock"), pytest.raises(UserError, match="another evaluation is writing it"):
        run_evaluation(request, tmp_path, 1)


def test_a_full_disk_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish, "write_weights", full)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    wanted = "No space left on device; free space, then rerun the same command"
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: {wanted}\n"


def test_files_of_a_scorecard_with_hostile_groups(tmp_path: Path) -> None:
    names = ("=cmd|' /C calc'!A0", "@x", r"$\frac{$", "constructor", "__proto__", RED)
    predictions = []
    for i, name in enumerate(names * 2):
        meta = {"task": "er", "answer": "angry", "choices": ["angry", name], "subset": name, "source": name}
        meta |= {"language": name, "instruction": "Which?"}
        predictions.append(Prediction(f"{i}", name, True, 1.0, meta))
    tree = make_card("$ and $", {}, predictions, [], None, tones, 1000)
    files = {p.name: p for p in write_files(tree, tmp_path)}
    rows = list(csv.reader(files["scores.csv"].open(newline="")))
    cells = {cell for row in rows for cell in row}
    assert {f"'{name}" for name in names[:2]} <= cells and not cells & set(names[:2])
    assert len([name for name in files if name.endswith(".png")]) >= 2
