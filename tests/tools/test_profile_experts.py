"""Tests of `earshot profile`: its output, files and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.expert_usage_run import write_run
from tools.profile_experts import Limits, main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs"))


def test_tables_files_and_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--out", str(tmp_path / "p"), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out.splitlines()[-1])
    assert found["passed"] is True and found["dead"] == ["whisper_tiny"]
    assert {k: v for k, v in found.items() if k not in ("passed", "failures", "folder")} == json.loads(
        (tmp_path / "p" / "profile.json").read_text()
    )
    assert "share of clips that ran each encoder" in shown.out
    assert {"report.html", "cells.csv", "shares.png"} <= {p.name for p in (tmp_path / "p").iterdir()}
    assert shown.err.splitlines() == [
        f"not added to a tracker: {run} has none of mlflow_run_id, wandb_run_id, so no tracker that keeps files knows "
        "the run"
    ]


@pytest.mark.parametrize(
    ("limits", "code", "words"),
    [
        ("dead", 1, "failed: dead: whisper_tiny"),
        ("imbalance=1.1", 1, "failed: imbalance 1.194 > 1.1"),
        ("dead,imbalance=1.1", 1, "failed: dead: whisper_tiny; imbalance 1.194 > 1.1"),
        ("imbalance=1.5", 0, ""),
        ("", 0, ""),
    ],
)
def test_limits_set_the_exit_code(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: str, code: int, words: str
) -> None:
    assert main([str(run), "--out", str(tmp_path), "--fail-on", limits]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed")]
    assert lines == ([words] if words else [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fail-on", "daed"], "--fail-on daed: must be dead, imbalance=NUMBER or overload=NUMBER"),
        (["--fail-on", "imbalance=0.5"], "--fail-on imbalance=0.5: must be a number of at least 1"),
        (["--fail-on", "imbalance=nan"], "--fail-on imbalance=nan"),
        (["--split", "test"], "--split test: applies to --data only"),
        (["--data", "nowhere.jsonl"], "no checkpoint"),
    ],
)
def test_user_error_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([str(run), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_file_in_place_of_the_folder_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([str(run), "--out", str(tmp_path / "file")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: --out {tmp_path / 'file'}: cannot be written (Not a directory")
    assert shown.err.count("\n") == 1 and shown.out == ""


def test_limits_are_parsed() -> None:
    assert Limits.parse("imbalance=2,dead") == Limits(True, 2.0) and Limits.parse("") == Limits()
