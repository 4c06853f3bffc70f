"""Tests of the loss in docs/extending.md, which a module outside the project adds to the loss table."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from model.losses.table import LOSSES, active_losses
from tests.distributed.harness import run_ranks
from tests.golden.corpus import write_corpus
from trainer.parity_cases import tiny_model

ROOT = Path(__file__).parents[1]
NAME, WEIGHT = "embedding_size", 0.25


@pytest.fixture
def plug_in(tmp_path: Path) -> Path:
    """Write the module from docs/extending.md, and return its folder."""
    section = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("\n## Add a loss\n")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    (tmp_path / "embedding_size_loss.py").write_text(found[1], encoding="utf-8")
    return tmp_path


def load(folder: str) -> None:
    """Import the module, as the plug-in's entry point does in every process."""
    assert NAME not in LOSSES
    sys.path.insert(0, folder)
    importlib.import_module("embedding_size_loss")


def train(folder: str) -> int:
    """Run one rank of a training run, and return its exit code."""
    from trainer.build import run_training
    from trainer.config.load import load_recipe
    from trainer.run.launch import RankEnv

    load(folder)
    overrides = ["name=seam", f"data.root={folder}", f"data.cache_dir={folder}/cache", f"train.run_dir={folder}"]
    overrides += ["train.steps=2", f"model.losses.{NAME}.weight={WEIGHT}", "model.losses.distillation.weight=0.5"]
    rank = int(os.environ["RANK"])
    return run_training(load_recipe("tests/golden/recipe.yaml", overrides), RankEnv(rank, rank, 2))


def compare(folder: str, tp: int, pp: int) -> dict[str, Any]:
    """Compare one rank's training with the single-process model, and return the relative differences."""
    from trainer import parity, parity_cases
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology
    from trainer.parity_cases import DS_CONFIG

    load(folder)
    rank, world, device = connect()
    groups = build_groups(Topology(world, tp, pp), rank, device, parity_cases.SEED)
    config = parity_cases.tiny_model()
    config = replace(config, losses={**config.losses, NAME: {"weight": WEIGHT}})
    step, oracle = parity.build_step(config, groups, DS_CONFIG, num_steps=1), parity.build_oracle(config)
    found = parity.compare(step, oracle, parity_cases.make_samples("mixed", world, config.adapter.rate))
    return {"loss": found.loss, "gradient": found.gradient, "names": [loss.name for loss in step.losses]}


@pytest.mark.timeout(240)
def test_two_steps_report_the_new_loss(plug_in: Path) -> None:
    write_corpus(plug_in)
    assert run_ranks(2, train, {"folder": str(plug_in)}, timeout_sec=200) == [0, 0]
    lines = (plug_in / "seam" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if "train/loss" in r]
    assert [r["step"] for r in records] == [1, 2]
    for record in records:
        assert record[f"train/loss_{NAME}"] > 0
        terms = {name: record[f"train/loss_{name}"] for name in ("next_token", "routing", "ctc", "distillation", NAME)}
        total = terms["next_token"] + 0.1 * terms["routing"] + terms["ctc"] + 0.5 * terms["distillation"]
        total += WEIGHT * terms[NAME]
        assert record["train/loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1)])
def test_the_new_loss_equals_that_of_one_process(plug_in: Path, tp: int, pp: int) -> None:
    for found in run_ranks(2, compare, {"folder": str(plug_in), "tp": tp, "pp": pp}, timeout_sec=200):
        assert NAME in found["names"]
        assert found["loss"] <= 1e-5 and found["gradient"] <= 1e-5, found


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"distilation": {"weight": 1.0}}, "model.losses.distilation: no loss has this name"),
        ({"distillation": {"wait": 1.0}}, "model.losses.distillation.wait: unknown option; known options are weight"),
        ({"distillation": {"weight": -1.0}}, "model.losses.distillation.weight = -1.0: must be a number of at least 0"),
        ({"distillation": {"temperature": 0.0}}, "model.losses.distillation.temperature = 0.0: must be positive"),
        ({"ctc": {"weight": 1.0}}, "model.losses.ctc: no loss has this name"),
    ],
)
def test_mistakes_in_the_recipe_are_refused_in_one_line(losses: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        active_losses(replace(tiny_model(), losses=losses))
