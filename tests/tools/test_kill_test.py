"""Tests that runs whose ranks are killed, even during a save, end with the same result and can be exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import export, transcribe
from tools.demo_corpus import write_corpus
from tools.kill_test import Result, kill_test
from tools.kill_test import main as kill_test_main

Tested = tuple[Path, Result]


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Tested:
    folder = tmp_path_factory.mktemp("kill")
    write_corpus(folder / "corpus", scale=0.05)
    return folder, kill_test(folder, num_kills=2, num_steps=9, seed=1, corpus=folder / "corpus")


@pytest.mark.parametrize("option", ["--kills", "--steps"])
def test_zero_kills_or_steps_are_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert kill_test_main([option, "0"]) == 2
    assert capsys.readouterr().err == f"error: {option} 0: must be at least 1\n"


def test_a_run_that_cannot_start_is_a_one_line_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.kill_test.write_corpus", lambda folder, scale: None)
    monkeypatch.setattr("tools.kill_test._attempt", lambda arguments, killer: (2, "at once\nerror: no data\n"))
    assert kill_test_main([]) == 2
    assert capsys.readouterr().err == "error: the uninterrupted run failed with exit code 2: error: no data\n"


@pytest.mark.timeout(280)
def test_two_kills_change_nothing(tested: Tested) -> None:
    result = tested[1]
    assert result.failures == []
    assert result.kills == 2 and result.restarts >= 1


def test_run_is_exported_and_answers_about_a_flac_file(
    tested: Tested, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = tested
    run, corpus = folder / "whole" / "debug", folder / "corpus"
    arguments = [str(run), str(tmp_path / "out"), "--verify", str(corpus / "demo.jsonl"), "--samples", "5", "--json"]
    assert export.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"]["num_samples"] == 5
    flac = next((corpus / "audio").rglob("*.flac"))
    assert transcribe.main([str(tmp_path / "out"), str(flac), "--prompt", "What is said?"]) == 0
    assert capsys.readouterr().out.endswith("\n")
