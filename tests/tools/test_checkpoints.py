"""Tests of `earshot checkpoints`, which lists, verifies, compares and prunes checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.tools.exportable import write_checkpoint
from tools import checkpoints


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        tensors = {"audio.a": torch.arange(12.0).view(3, 4), "audio.b": torch.full((5,), float(step))}
        write_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", tensors, {})
    return tmp_path


def report(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict:
    assert checkpoints.main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_list_and_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = report(capsys, run)["checkpoints"]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["ranks"] == 3 for row in rows)
    (run / "checkpoints" / "frozen-00000001-abcd").mkdir()
    assert report(capsys, run, "prune", "--keep", 1)["steps"] == [3]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]


def test_rollback_removes_what_came_after_a_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, run, "rollback", 2)
    assert found["steps"] == [1, 2] and [Path(url).name for url in found["removed"]] == ["step-00000003"]


def test_verify_names_the_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, run, "verify")["passed"]
    os.truncate(run / "checkpoints" / "step-00000002" / "moments-00001.safetensors", 9)
    found = report(capsys, run, "verify", code=1)
    assert found["damage"]["1"] is None and "moments-00001.safetensors has 9 bytes" in found["damage"]["2"]


def test_diff_reports_what_changed_and_how_much(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, run, "diff", 1, 3)
    assert found == {"changed": {"audio.b": 2.0}, "num_equal": 1, "only_first": [], "only_second": []}
    assert checkpoints.main([str(run / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "2"], "prune: takes no step, but 2 was given"),
        (["list", "1", "3"], "list: takes no step, but 1 3 was given"),
        (["diff", "1"], "diff: takes two steps, but 1 was given"),
        (["diff", "1", "9"], "there is no checkpoint of step 9; the checkpoints are 1, 2, 3"),
        (["rollback"], "rollback: takes one step, but nothing was given"),
        (["rollback", "7"], "there is no checkpoint of step 7; the checkpoints are 1, 2, 3"),
    ],
)
def test_steps_are_checked(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert checkpoints.main([str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_one_checkpoint_is_not_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.main([str(run / "checkpoints" / "step-00000002")]) == 2
    assert "step-00000002: is a single checkpoint; use its run" in capsys.readouterr().err
    assert report(capsys, run / "checkpoints")["checkpoints"][0]["step"] == 1
