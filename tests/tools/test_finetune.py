"""Tests of `earshot finetune` with a stub instead of the training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import finetune

TRAINER = """
import json, pathlib, sys
assert sys.argv[1:4] == ["finetune_cpu", "eval.final_split=dev", "eval.before=true"], sys.argv
run = pathlib.Path("runs/finetune_cpu")
run.mkdir(parents=True)
summary = {"wer_before": 1.2, "wer_after": 0.3, "loss_first": 9, "loss_last": 1, "num_ranks": 2, "seconds": 7}
(run / "summary.json").write_text(json.dumps(summary))
row = {"key": "a1", "task": "asr", "reference": "two words", "hypothesis": "two swords"}
(run / "predictions-dev-step200.jsonl").write_text(json.dumps(row) + "\\n")
"""
SHARED = {"instruction": "What is it?", "subset": "s"}
MANIFESTS = ("asr", "er", "aqa", "sqa", "ac")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, which contains the data, a trainer that only writes results, and no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "module_command", lambda module, *a: [sys.executable, "trainer.py", *a])
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "data").mkdir()
    for i, name in enumerate(MANIFESTS):
        rows = [
            {"id": f"{name[0]}{i}{split}", "task": name, "split": split, "answer": "x", **SHARED}
            for split in ("train", "dev")
        ]
        rows += [{"id": "a1", "task": "asr", "split": "dev", "answer": "two words", **SHARED}] if name == "asr" else []
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_it_fetches_trains_and_reports(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[tuple[str, str]] = []
    monkeypatch.setattr(finetune, "fetch", lambda model, out: fetched.append((model.name, str(out))))
    (here / "models" / "smollm2-135m").mkdir(parents=True)
    assert finetune.main(["data.root=data"]) == 0
    assert fetched == [("whisper-base", "models")], "what exists is not fetched again"
    shown = capsys.readouterr().out
    assert "1.20 before  ->  0.30 after" in shown and "two swords" in shown
    assert "earshot evaluate runs/finetune_cpu --data data/asr.jsonl --split test" in shown


def test_a_missing_manifest_is_one_line_before_anything_is_fetched(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "fetch", lambda model, out: pytest.fail("weights were fetched"))
    (here / "data" / "ac.jsonl").unlink()
    assert finetune.main(["data.root=data"]) == 2
    assert (
        capsys.readouterr().err == "error: data/ac.jsonl: no such manifest; give data.root=DIR, the folder of the kit\n"
    )
