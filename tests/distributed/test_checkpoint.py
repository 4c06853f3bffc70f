"""Stop and start again: the same losses on the same topology, bit for bit; nearly the same on any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

BEFORE, AFTER = 2, 3
RESHAPE_TOLERANCE = 1e-5
TIMEOUT_SEC = 280

# Tied embeddings on two stages; norms of q and k on two tensor ranks; frozen parts; parameters that ZeRO-3 keeps
# gathered (persistence); fp32 masters of bf16 weights.
CASES: dict[str, dict[str, Any]] = {
    "dp2": {"persistence": 1000, "frozen": ["audio.primary.*", "llm.model.layers.0.*"]},
    "tp2": {"tp": 2, "family": "qwen3"},
    "pp2": {"pp": 2, "family": "qwen2"},
    "dp2-bf16": {"dtype": "bfloat16", "persistence": 1000},
}


def test_resume(tmp_path: Path) -> None:
    """Three launches, as starting the engines takes longest: train and save; resume; resume on one rank."""
    saved = run_ranks(2, f"{__name__}:save_cases", {"folder": str(tmp_path)}, timeout_sec=TIMEOUT_SEC)
    resumed = run_ranks(2, f"{__name__}:resume_cases", {"folder": str(tmp_path)}, timeout_sec=TIMEOUT_SEC)
    alone = run_ranks(1, f"{__name__}:resume_tp2_alone", {"folder": str(tmp_path)}, timeout_sec=TIMEOUT_SEC)
    assert saved[0] == saved[1] and resumed[0] == resumed[1]
    for case in CASES:
        whole, after = saved[0][case], resumed[0][case]
        assert len(set(whole["losses"])) == BEFORE + AFTER
        assert after["losses"] == whole["losses"][BEFORE:], case
        assert after["norms"] == whole["norms"][BEFORE:], case
        assert after["extra"] == {"data": {"batch": BEFORE}, "case": case}
    want = saved[0]["tp2"]["losses"][BEFORE:]
    assert resumed[0]["tp2 to pp2"]["losses"] == pytest.approx(want, rel=RESHAPE_TOLERANCE)
    assert alone[0]["losses"] == pytest.approx(want, rel=RESHAPE_TOLERANCE)


def save_cases(folder: str) -> dict[str, Any]:
    """On every rank: train `BEFORE` steps, save, train `AFTER` more."""
    results = {}
    for case, options in CASES.items():
        step, manager = _start(folder, case, **options)
        results[case] = _train(step, 0, BEFORE)
        manager.save(BEFORE, step, {"data": {"batch": BEFORE}, "case": case})
        for key, values in _train(step, BEFORE, BEFORE + AFTER).items():
            results[case][key] += values
        _stop()
    return results


def resume_cases(folder: str) -> dict[str, Any]:
    """On every rank: load and train `AFTER` steps, also on another topology."""
    results = {}
    for case, options in CASES.items():
        results[case] = _resume(*_start(folder, case, **options))
        _stop()
    results["tp2 to pp2"] = _resume(*_start(folder, "tp2", pp=2, family=CASES["tp2"]["family"]))
    return results


def resume_tp2_alone(folder: str) -> dict[str, Any]:
    """On one rank: load what two tensor ranks saved."""
    return _resume(*_start(folder, "tp2", family=CASES["tp2"]["family"]))


def _resume(step: Any, manager: Any) -> dict[str, Any]:
    latest = manager.latest()
    extra = manager.load(latest, step)
    return {**_train(step, BEFORE, BEFORE + AFTER), "extra": extra}


def _train(step: Any, first: int, last: int) -> dict[str, Any]:
    from model.batch import Batch
    from trainer.parity import make_samples

    losses, norms = [], []
    for number in range(first, last):
        parts = make_samples("mixed", 2, step.model.adapter.strides, seed=number)
        if step.groups.topology.world == 1:
            parts = [[sample for part in parts for sample in part]]
        report = step(number, Batch(tuple(parts[step.groups.rank])))
        assert report.loss == report.loss  # not NaN
        losses.append(report.loss)
        norms.append(report.grad_norm)
    return {"losses": losses, "norms": norms}


def _start(folder: str, case: str, **options: Any) -> tuple[Any, Any]:
    from trainer.checkpoint.config import CheckpointConfig
    from trainer.checkpoint.manager import CheckpointManager

    step = _build(**options)
    return step, CheckpointManager(Path(folder) / case, CheckpointConfig(keep_last=1), step.groups)


def _stop() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def _build(
    tp: int = 1,
    pp: int = 1,
    family: str = "llama",
    persistence: int = 0,
    frozen: Sequence[str] = (),
    dtype: str = "float32",
) -> Any:
    import torch

    from model.audio_tower import AudioTower
    from model.llm.reference import resolve_hf_config
    from model.llm.weights import RandomSource
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine
    from trainer.engine.optim import OptimConfig, PartConfig
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import ParallelConfig, build_topology
    from trainer.parity import SEED, VOCAB_SIZE, tiny_model
    from trainer.step import Step

    rank, world, device = connect()
    groups = build_groups(build_topology(ParallelConfig(world, tp, pp), world), rank, device, SEED)
    model = tiny_model(family)
    hf_config = resolve_hf_config(model.llm)
    parts = tuple(PartConfig(pattern, frozen=True) for pattern in frozen)
    optim = OptimConfig(lr=2e-3, weight_decay=0.01, warmup_steps=2, parts=parts)
    llm = LLMEngine(hf_config, RandomSource(hf_config, SEED), optim, groups, getattr(torch, dtype), recompute=False)
    torch.manual_seed(SEED)
    tower = AudioTower(model, hf_config.hidden_size, VOCAB_SIZE).train()
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": persistence}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    audio = AudioEngine(tower, optim, config, groups, batch_sec=1.5)
    return Step(model, optim, audio, llm, groups, num_steps=20, tokens_per_microbatch=48, seed=SEED)
