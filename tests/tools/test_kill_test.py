"""A rank is killed, in a save and outside of one: the run ends as if it had not been. What it saved can be exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import export, transcribe
from tools.demo_corpus import write_corpus
from tools.kill_test import Result, kill_test

Tested = tuple[Path, Result]


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Tested:
    folder = tmp_path_factory.mktemp("kill")
    write_corpus(folder / "corpus", scale=0.05)
    return folder, kill_test(folder, num_kills=2, num_steps=9, seed=1, corpus=folder / "corpus")


@pytest.mark.timeout(280)
def test_two_kills_change_nothing(tested: Tested) -> None:
    result = tested[1]
    assert result.failures == []
    assert result.kills == 2 and result.restarts >= 1


def test_the_run_is_exported_and_answers_about_a_flac_file(
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
