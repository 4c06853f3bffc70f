"""Tests of `bench.unimoe`: the recipes of every arm are valid, training resumes, and the table summarizes results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import unimoe as bench
from bench.unimoe import ARMS, Result, read_results, recipes, table
from trainer.config.checks import check_recipe
from trainer.run.exit_codes import ExitCode


@pytest.mark.parametrize("arm", ARMS)
def test_the_runs_of_an_arm_are_legal(arm: str, tmp_path: Path) -> None:
    found = recipes(arm, 3, tmp_path)
    for recipe in found:
        check_recipe(recipe)
        assert recipe.seed == 3 and recipe.train.run_dir == f"{tmp_path}/seed3"
    assert found[0].name == "unimoe_align" and found[-1].name == arm
    assert len(found) == (5 if arm in ("mixture", "top1", "balance") else 2)
    last = found[-1]
    assert last.train.steps == (1800 if arm == "dense_long" else 600)
    origins = {expert.from_ for expert in last.model.llm.experts}
    assert len(origins) == (0 if arm.startswith("dense") else 1 if arm == "copies" else 4)
    assert origins <= {recipe.run_url for recipe in found}
    assert last.checkpoint.start_from == found[0].run_url


def test_steps_are_scaled(tmp_path: Path) -> None:
    assert [recipe.train.steps for recipe in recipes("mixture", 1, tmp_path, 0.01)] == [25, 4, 4, 4, 6]


def test_a_call_resumes_and_a_finished_arm_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[str] = []
    codes = iter([0, int(ExitCode.STOPPED), 0, 1, 0])

    def run(recipe: object, folder: Path, deadline: float) -> int:
        code = next(codes)
        if not code:
            finished.append(recipe.name)  # type: ignore[attr-defined]
        return code

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "is_finished", lambda recipe: recipe.name in finished)
    monkeypatch.setattr(bench, "read_result", lambda arm, seed, recipe: Result(arm, seed, 600, {}, {}))
    assert bench.train("dense", 1, tmp_path, 12) == ExitCode.STOPPED and finished == ["unimoe_align"]
    assert bench.train("dense", 1, tmp_path, 12) == 0 and finished == ["unimoe_align", "dense"]
    assert bench.train("dense", 1, tmp_path, 12) == 0
    assert bench.train("copies", 1, tmp_path, 12) == 1 and bench.train("copies", 1, tmp_path, 0.1) == ExitCode.STOPPED
    assert [(result.arm, result.seed) for result in read_results(tmp_path)] == [("dense", 1)]


def test_the_table_has_means_ranges_and_shares(tmp_path: Path) -> None:
    shares = [{"asr/audio": {"speech": share, "text": 1 - share}} for share in (0.5, 0.75)]
    results = [Result("mixture", seed, 600, {"er/accuracy": 0.1 * seed}, shares[seed - 1]) for seed in (1, 2)]
    results.append(Result("dense", 1, 600, {"er/accuracy": 0.4}, {}))
    (tmp_path / bench.RESULTS).write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    assert read_results(tmp_path) == results
    shown = table(results)
    assert "mixture (2)" in shown and "0.150 (0.100–0.200)" in shown and "0.400 (0.400–0.400)" in shown
    assert "speech 0.62  text 0.38" in shown
