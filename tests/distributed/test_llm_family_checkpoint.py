"""Tests that LLMs with shared tensors, norms after the branches, or experts can resume on a different topology."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tools.reshard import BEFORE, TOLERANCE, start, stop, train

STEPS = 2
FAMILIES = {"phi3": True, "gemma3_text": False, "gpt_oss": True}
"""The families, and whether they are trained with low-rank adapters."""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_families_resume_on_a_pipeline_after_tensor_parallelism(tmp_path: Path) -> None:
    for found in run_ranks(2, resume_families, {"folder": str(tmp_path)}, timeout_sec=180):
        assert found.keys() == FAMILIES.keys()
        for family, (whole, resumed) in found.items():
            assert len(set(whole)) == STEPS, (family, "every step must change the loss")
            assert resumed == pytest.approx(whole, rel=TOLERANCE), family


def resume_families(folder: str) -> dict[str, list[list[float]]]:
    """Return the losses of each family on this rank, first on TP2 and then after its checkpoint was loaded on PP2."""
    found = {}
    for family, lora in FAMILIES.items():
        step, manager = start(folder, family, family=family, lora=lora, tp=2)
        train(step, 0, BEFORE)
        manager.save(BEFORE, step, {})
        losses = [train(step, BEFORE, BEFORE + STEPS)["losses"]]
        manager.close()
        stop()
        step, manager = start(folder, family, family=family, lora=lora, pp=2)
        manager.load(manager.latest(), step)
        losses.append(train(step, BEFORE, BEFORE + STEPS)["losses"])
        manager.close()
        stop()
        found[family] = losses
    return found
