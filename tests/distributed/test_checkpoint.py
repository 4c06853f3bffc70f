"""Tests that resumed runs have bit-identical losses on the same topology, and nearly the same losses on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tools import reshard
from tools.reshard import BEFORE, LOADED, SAME_ONLY, SAVED, Results, start, stop, train

TIMEOUT_SEC = 400
pytestmark = pytest.mark.timeout(TIMEOUT_SEC + 20)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """Return a folder with checkpoints, and the losses of the same runs without an interruption."""
    folder = tmp_path_factory.mktemp("reshard")
    return folder, reshard.save(folder)


def test_same_topology_resumes_bit_identically(saved: tuple[Path, Results]) -> None:
    rows = reshard.same(*saved)
    assert len(rows) == len(SAVED | SAME_ONLY) and all(row.passed and row.limit == 0 for row in rows), rows


@pytest.mark.parametrize("world", LOADED)
def test_other_topologies_resume_nearly_identically(saved: tuple[Path, Results], world: int) -> None:
    rows = reshard.others(*saved, world, every=False)  # `make reshape` compares all pairs
    assert {row.saved for row in rows} == set(SAVED) and {row.loaded for row in rows} == set(LOADED[world])
    assert all(row.passed for row in rows), rows


def test_difference_is_detected() -> None:
    curve = [float(n) for n in range(1, 11)]
    assert not reshard.Row("a", "b", reshard._difference([*curve[:9], 10.002], curve), 1e-4).passed
    assert not reshard.Row("a", "b", float("nan"), 1e-4).passed
    with pytest.raises(AssertionError, match="every step must change the loss"):
        reshard._difference([1.0] * 10, [1.0] * 10)


def test_encoders_are_added_without_a_jump_and_removed(tmp_path: Path) -> None:
    results = run_ranks(2, grow_cases, {"folder": str(tmp_path)}, timeout_sec=TIMEOUT_SEC)
    assert results[0] == results[1]
    found = results[0]
    assert abs(found["grown"][0] - found["before"]) <= 1e-4, "the new encoder changed the first step's loss"
    assert found["grown"][0] == pytest.approx(found["before"], rel=1e-6)
    assert len(set(found["grown"])) == 3, "the larger model must learn"
    assert found["entering"] == [0, 997, 0], "3 of 1000 warmup steps must be done"
    assert found["shrunk"] > 0 and found["shrunk"] != pytest.approx(found["before"], rel=1e-6)


def grow_cases(folder: str) -> dict[str, Any]:
    """Train a run with two encoder experts, and start runs with three experts and with one expert from it.

    The new runs use expert parallelism. Their losses are compared with those of the first run.
    """
    from model.hub.configuration import describe

    step, manager = start(folder, "small", without=["wavlm"])
    train(step, 0, BEFORE)
    manager.save(BEFORE, step, {"model": describe(step.model, step.llm.hf_config, 61)})
    manager.close()
    found: dict[str, Any] = {"before": train(step, BEFORE, BEFORE + 1)["losses"][0]}
    stop()
    step, manager = start(folder, "grown", ep=2)
    manager.start(str(Path(folder) / "small"), step, ())
    found["grown"] = train(step, BEFORE, BEFORE + 3)["losses"]
    found["entering"] = step.audio.tower.router.steps_to_enter.tolist()
    stop()
    step, manager = start(folder, "shrunk", ep=2, without=["wavlm", "hubert"])
    manager.start(str(Path(folder) / "small"), step, ())
    found["shrunk"] = train(step, BEFORE, BEFORE + 1)["losses"][0]
    stop()
    return found
