"""Stop and start again: the same losses on the same topology, bit for bit; nearly the same on any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

BEFORE, AFTER = 2, 10
RESHAPE_TOLERANCE = 1e-4
TIMEOUT_SEC = 280

# DeepSpeed numbers the modules of a process, and compares the numbers between ranks unless they hold different experts:
# in one process, cases without expert parallelism come first.

# What is saved, on two ranks. Tied embeddings on two stages; norms of q and k on two tensor ranks; frozen parts;
# parameters that ZeRO-3 keeps gathered (persistence); fp32 masters of bf16 weights.
SAVED: dict[str, dict[str, Any]] = {
    "dp2·ep2": {"ep": 2, "persistence": 1000, "frozen": ["audio.primary.*", "llm.model.layers.0.*"]},
    "tp2": {"tp": 2, "family": "qwen3"},
    "pp2·ep2": {"pp": 2, "ep": 2, "family": "qwen2"},
}
# What has another meaning on other topologies is only resumed on its own.
SAME_ONLY: dict[str, dict[str, Any]] = {"dp2-bf16": {"dtype": "bfloat16", "persistence": 1000}}
# Where each of `SAVED` is loaded, by number of ranks; besides its own topology.
LOADED: dict[int, dict[str, dict[str, Any]]] = {
    1: {"1": {"tp": 1, "pp": 1, "ep": 1}},
    2: {"dp2": {"tp": 1, "pp": 1, "ep": 1}},
    4: {"tp2·pp2": {"tp": 2, "pp": 2, "ep": 1}, "dp4·ep2": {"tp": 1, "pp": 1, "ep": 2}},
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
    for case, options in _in_order(SAVED | SAME_ONLY):
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
    for case, options in _in_order(SAVED | SAME_ONLY):
        results[case] = _resume(*_start(folder, case, **options))
        _stop()
    return results


def reshape_cases(folder: str) -> dict[str, Any]:
    """On every rank: load what was saved on another topology, and train `AFTER` steps."""
    from trainer.parallel.groups import connect

    _, world, _ = connect()
    results = {}
    for topology, shape in _in_order(LOADED[world]):
        for case, options in SAVED.items():
            results[f"{case} to {topology}"] = _resume(*_start(folder, case, **{**options, **shape}))
            _stop()
    return results


def test_encoders_are_added_without_a_jump_and_removed(tmp_path: Path) -> None:
    results = run_ranks(2, grow_cases, {"folder": str(tmp_path)}, timeout_sec=TIMEOUT_SEC)
    assert results[0] == results[1]
    found = results[0]
    assert abs(found["grown"][0] - found["before"]) <= 1e-4, "the new encoder changed the first step's loss"
    assert found["grown"][0] == pytest.approx(found["before"], rel=1e-6)
    assert len(set(found["grown"])) == 3, "the grown model learns"
    assert found["entering"] == [0, 997, 0], "three steps of a thousand"
    assert found["shrunk"] > 0 and found["shrunk"] != pytest.approx(found["before"], rel=1e-6)


def _in_order(cases: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(cases.items(), key=lambda case: case[1].get("ep", 1) > 1)


def grow_cases(folder: str) -> dict[str, Any]:
    """On every rank: train with two experts, begin anew with three (expert-parallel) and with one of the two."""
    from model.hub.configuration import describe

    step, manager = _start(folder, "small", without=["wavlm"])
    _train(step, 0, BEFORE)
    manager.save(BEFORE, step, {"model": describe(step.model, step.llm.hf_config, 61)})
    manager.close()
    found: dict[str, Any] = {"before": _train(step, BEFORE, BEFORE + 1)["losses"][0]}
    _stop()
    step, manager = _start(folder, "grown", ep=2)
    manager.start(Path(folder) / "small", step)
    found["grown"] = _train(step, BEFORE, BEFORE + 3)["losses"]
    found["entering"] = step.audio.tower.router.steps_to_enter.tolist()
    _stop()
    step, manager = _start(folder, "shrunk", ep=2, without=["wavlm", "hubert"])
    manager.start(Path(folder) / "small", step)
    found["shrunk"] = _train(step, BEFORE, BEFORE + 1)["losses"][0]
    _stop()
    return found


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
    without: Sequence[str] = (),
) -> Any:
    import torch

    from model.audio_tower import AudioTower
    from model.llm.reference import resolve_hf_config
    from model.llm.weights import RandomSource
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine
    from trainer.engine.optim import OptimConfig, PartConfig
    from trainer.engine.placement import place
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import ParallelConfig, build_topology
    from trainer.parity import SEED, VOCAB_SIZE, tiny_model
    from trainer.step import Step

    rank, world, device = connect()
    groups = build_groups(build_topology(ParallelConfig(world, tp, pp, ep), world), rank, device, SEED)
    model = replace(tiny_model(family), experts=tuple(e for e in tiny_model(family).experts if e.name not in without))
    hf_config = resolve_hf_config(model.llm)
    parts = tuple(PartConfig(pattern, frozen=True) for pattern in frozen)
    optim = OptimConfig(lr=2e-3, weight_decay=0.01, warmup_steps=2, parts=parts)
    llm = LLMEngine(hf_config, RandomSource(hf_config, SEED), optim, groups, getattr(torch, dtype), recompute=False)
    torch.manual_seed(SEED)
    tower = AudioTower(model, hf_config.hidden_size, VOCAB_SIZE, place(model, ep).held_by(rank)).train()
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": persistence}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    audio = AudioEngine(tower, optim, config, groups, batch_sec=1.5)
    return Step(model, optim, audio, llm, groups, num_steps=20, tokens_per_microbatch=48, seed=SEED)
