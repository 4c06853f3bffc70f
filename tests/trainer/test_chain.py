"""Tests of chains of recipes, in which later runs start from weights of earlier runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import UserError
from tests.golden.corpus import write_corpus
from tools import chain
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.config.chain import chain_names, load_chain
from trainer.config.checks import check_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", chain_names())
def test_every_shipped_chain_consists_of_legal_recipes(name: str) -> None:
    recipes = load_chain(name)
    assert len(recipes) >= 3 and recipes[-1].model.llm.experts
    for recipe in recipes:
        check_recipe(recipe)
    donors = {expert.from_ for expert in recipes[-1].model.llm.experts} - {"base"}
    assert donors <= {recipe.run_url for recipe in recipes[:-1]}


def write_chain(folder: Path, text: str) -> str:
    path = folder / "steps.yaml"
    path.write_text(f"base: {ROOT}/tests/golden/recipe.yaml\n{text}")
    return str(path)


TWO = """
chain:
  - {name: first, train: {steps: 1}}
  - {name: second, train: {steps: 2}, checkpoint: {start_from: "chain:first"}}
"""


def test_overrides_change_all_runs_or_one(tmp_path: Path) -> None:
    path = write_chain(tmp_path, TWO)
    first, second = load_chain(path, ["train.run_dir=elsewhere", "second:train.steps=7", "optim.lr=0.5"])
    assert (first.train.steps, second.train.steps) == (1, 7) and first.optim.lr == second.optim.lr == 0.5
    assert second.checkpoint.start_from == first.run_url == "elsewhere/first"
    with pytest.raises(UserError, match="third:optim.lr=1: the chain has no run third; its runs are first, second"):
        load_chain(path, ["third:optim.lr=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain: []", "chain: must be a list of runs, each with a name"),
        ("chain: [{name: a}, {name: a}]", "the names a, a must be unique"),
        ('chain: [{name: a, checkpoint: {start_from: "chain:b"}}]', "chain:b: no earlier run of the chain"),
        ("chain: [{name: a, optimm: {}}]", "optimm: unknown key"),
    ],
)
def test_an_illegal_chain_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_chain(write_chain(tmp_path, text))


def test_finished_runs_are_skipped_and_the_first_failure_ends_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, codes, started = write_chain(tmp_path, TWO), [0, 3, 0], []

    def run(command: list[str], **_: Any) -> Any:
        recipe = Path(command[-1]).stem
        started.append(recipe)
        code = codes.pop(0)
        if code == 0:
            steps = {"first": 1, "second": 2}[recipe]
            (tmp_path / "runs" / recipe / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    command = [path, f"train.run_dir={tmp_path}/runs"]
    assert chain.main(command) == 3 and started == ["first", "second"]
    assert "run 2 of 2, second: ended with exit code 3; the same command resumes" in capfd.readouterr().err
    assert chain.main(command) == 0 and started == ["first", "second", "second"]
    assert chain.main([*command, "--list"]) == 0 and len(started) == 3
    assert "second                   step 2 of 2" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mixture_of_the_runs_of_a_chain_is_trained(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    text = """
chain:
  - {name: dense, train: {steps: 1}}
  - name: mixed
    train: {steps: 1}
    checkpoint: {start_from: "chain:dense"}
    model: {llm: {experts: [{name: a, from: "chain:dense"}, {name: b, from: base}]}}
"""
    command = [write_chain(tmp_path, text), f"data.root={corpus}", f"data.cache_dir={corpus}/cache"]
    assert chain.main([*command, f"train.run_dir={tmp_path}/runs"]) == 0
    origins = read_extra(find_checkpoint(str(tmp_path / "runs" / "mixed")))["ffn_experts"]
    assert [(one["name"], one["run"], one["step"]) for one in origins] == [("a", "dense", 1), ("b", "", None)]
