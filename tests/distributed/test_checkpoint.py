"""Stop and start again: the same losses on the same topology, bit for bit; nearly the same on any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

BEFORE, AFTER = 2, 10
RESHAPE_TOLERANCE = 1e-4
TIMEOUT_SEC = 280

# What is saved, on two ranks. Tied embeddings on two stages; norms of q and k on two tensor ranks; frozen parts;
# parameters that ZeRO-3 keeps gathered (persistence); fp32 masters of bf16 weights.
SAVED: dict[str, dict[str, Any]] = {
    "dp2": {"persistence": 1000, "frozen": ["audio.primary.*", "llm.model.layers.0.*"]},
    "tp2": {"tp": 2, "family": "qwen3"},
    "pp2": {"pp": 2, "family": "qwen2"},
}
# What has another meaning on other topologies is only resumed on its own.
SAME_ONLY: dict[str, dict[str, Any]] = {"dp2-bf16": {"dtype": "bfloat16", "persistence": 1000}}
# Where each of `SAVED` is loaded, by number of ranks; besides its own topology.
LOADED: dict[int, dict[str, dict[str, Any]]] = {
    1: {"1": {"tp": 1, "pp": 1}},
    4: {"tp2·pp2": {"tp": 2, "pp": 2}, "dp4": {"tp": 1, "pp": 1}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, and by case the losses of the run that was never stopped. One launch: engines start slowly."""
    folder = tmp_path_factory.mktemp("reshape")
    results = run_ranks(2, f"{__name__}:save_cases", {"folder": str(folder)}, timeout_sec=TIMEOUT_SEC)
    assert results[0] == results[1]
    return folder, results[0]


def test_the_same_topology_goes_on_bit_identically(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, whole = saved
    resumed = run_ranks(2, f"{__name__}:resume_cases", {"folder": str(folder)}, timeout_sec=TIMEOUT_SEC)
    assert resumed[0] == resumed[1]
    for case in SAVED | SAME_ONLY:
        assert len(set(whole[case]["losses"])) == BEFORE + AFTER
        assert resumed[0][case]["losses"] == whole[case]["losses"][BEFORE:], case
        assert resumed[0][case]["norms"] == whole[case]["norms"][BEFORE:], case
        assert resumed[0][case]["extra"] == {"data": {"batch": BEFORE}, "case": case}


@pytest.mark.parametrize("world", LOADED)
def test_any_other_topology_goes_on_alike(saved: tuple[Path, dict[str, Any]], world: int) -> None:
    folder, whole = saved
    results = run_ranks(world, f"{__name__}:reshape_cases", {"folder": str(folder)}, timeout_sec=TIMEOUT_SEC)
    for case in SAVED:
        for topology in LOADED[world]:
            found, wanted = results[0][f"{case} to {topology}"]["losses"], whole[case]["losses"][BEFORE:]
            assert found == pytest.approx(wanted, rel=RESHAPE_TOLERANCE), f"{case} to {topology}"


def save_cases(folder: str) -> dict[str, Any]:
    """On every rank: train `BEFORE` steps, save, train `AFTER` more."""
    results = {}
    for case, options in (SAVED | SAME_ONLY).items():
        step, manager = _start(folder, case, **options)
        results[case] = _train(step, 0, BEFORE)
        manager.save(BEFORE, step, {"data": {"batch": BEFORE}, "case": case})
        for key, values in _train(step, BEFORE, BEFORE + AFTER).items():
            results[case][key] += values
        manager.close()
        _stop()
    return results


def resume_cases(folder: str) -> dict[str, Any]:
    """On every rank: load and train `AFTER` steps."""
    results = {}
    for case, options in (SAVED | SAME_ONLY).items():
        results[case] = _resume(*_start(folder, case, **options))
        _stop()
    return results


def reshape_cases(folder: str) -> dict[str, Any]:
    """On every rank: load what was saved on another topology, and train `AFTER` steps."""
    from trainer.parallel.groups import connect

    _, world, _ = connect()
    results = {}
    for case, options in SAVED.items():
        for topology, shape in LOADED[world].items():
            results[f"{case} to {topology}"] = _resume(*_start(folder, case, **{**options, **shape}))
            _stop()
    return results


def _resume(step: Any, manager: Any) -> dict[str, Any]:
    latest = manager.latest()
    extra = manager.load(latest, step)
    return {**_train(step, BEFORE, BEFORE + AFTER), "extra": extra}


def _train(step: Any, first: int, last: int) -> dict[str, Any]:
    from model.batch import Batch
    from trainer.parity import make_samples

    losses, norms = [], []
    for number in range(first, last):
        whole = [s for part in make_samples("mixed", 2, step.model.adapter.strides, seed=number) for s in part]
        rank, world = step.groups.rank, step.groups.topology.world
        mine = whole[len(whole) * rank // world : len(whole) * (rank + 1) // world]
        report = step(number, Batch(tuple(mine)))
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
    ep: int = 1,
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
    groups = build_groups(build_topology(ParallelConfig(world, tp, pp, ep), world), rank, device, SEED)
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
