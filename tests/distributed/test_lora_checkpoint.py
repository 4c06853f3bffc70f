"""Tests that runs with low-rank adapters can resume on any topology, and that they use the planned memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tools.reshard import AFTER, BEFORE, TOLERANCE, start, stop, train
from trainer.parallel.topology import Topology

TIMEOUT_SEC = 280
SAVED = {"tp": 2, "pp": 1, "ep": 1}
OTHERS = ({"tp": 1, "pp": 2, "ep": 1}, {"tp": 1, "pp": 1, "ep": 2})


@pytest.mark.timeout(TIMEOUT_SEC + 20)
def test_adapters_resume_on_any_topology_and_take_the_planned_memory(tmp_path: Path) -> None:
    results = run_ranks(2, resume_cases, {"folder": str(tmp_path)}, timeout_sec=TIMEOUT_SEC)
    for found in results:
        whole = found["whole"]
        assert len(set(whole)) == AFTER, "every step must change the loss"
        assert found["same"] == whole, "must be bit-identical"
        for losses in found["others"]:
            assert losses == pytest.approx(whole, rel=TOLERANCE)
    assert [found["held"] for found in results] == planned()
    learned = results[0]["learned"]
    layers = "llm.model.layers."
    factors = [name for name in learned if name.endswith(("lora_A", "lora_B"))]
    assert f"{layers}3.self_attn.v_proj.lora_B" in factors and all(learned[name] for name in factors)
    assert "audio.primary.encoder.layers.0.self_attn.q_proj.lora_A" in factors
    assert not learned[f"{layers}3.self_attn.k_proj.weight"] and learned[f"{layers}2.mlp.up_proj.weight"]


def resume_cases(folder: str) -> dict[str, Any]:
    """Train with adapters, save and continue; then load the checkpoint on the same and on different topologies.

    Returns:
        This rank's losses after the checkpoint for each case, its measured memory, and which tensors were trained.
    """
    from trainer.checkpoint.reader import read_manifest
    from trainer.plan.measure import held_states

    step, manager = start(folder, "run", lora=True, **SAVED)
    train(step, 0, BEFORE)
    manager.save(BEFORE, step, {})
    found: dict[str, Any] = {"whole": train(step, BEFORE, BEFORE + AFTER)["losses"], "others": []}
    manager.close()
    held = held_states(step.audio, step.llm)
    found["held"] = [held.weights, held.gradients, held.optimizer]
    found["learned"] = {n: e.step is not None for n, e in read_manifest(manager.latest()).tensors.items()}
    stop()
    for shape in (SAVED, *OTHERS):
        step, manager = start(folder, "run", lora=True, **shape)
        manager.load(manager.latest(), step)
        losses = train(step, BEFORE, BEFORE + AFTER)["losses"]
        if shape is SAVED:
            found["same"] = losses
        else:
            found["others"].append(losses)
        manager.close()
        stop()
    return found


def planned() -> list[list[int]]:
    """Return the planned bytes [weights, gradients, optimizer state] of every rank."""
    from model.llm.reference import resolve_hf_config
    from trainer.parity_cases import ADAPTERS, VOCAB_SIZE, tiny_model
    from trainer.plan.ranks import rank_states
    from trainer.plan.sizes import SizedModel

    config = tiny_model()
    model = SizedModel(config, resolve_hf_config(config.llm), VOCAB_SIZE, ADAPTERS.adapters)
    states = rank_states(model, Topology(2, **SAVED), ADAPTERS.optim, "fp32", {"zero_optimization": {}})
    found = (states.of_rank(rank) for rank in range(2))
    return [[one.weights, one.gradients, one.optimizer] for one in found]
