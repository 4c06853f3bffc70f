"""Save on one topology, load on another: the losses that follow are those of the run that was never stopped.

    python -m tools.reshard             the whole table, on up to 4 processes
    python -m tools.reshard --ranks 2   loaded on up to 2
    python -m tools.reshard --json      one JSON object on the last line

A tiny model trains 2 steps, saves, and trains 10 more; whoever loads trains the same 10. On the topology that saved,
losses and gradient norms must be bit-identical; on any other, losses within 1e-4. Exit code 1: something is over.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.run.command import module_command
from trainer.run.launch import start_ranks

BEFORE, AFTER = 2, 10
TOLERANCE = 1e-4
SAVING_RANKS = 2

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

Results = dict[str, Any]
"""By case: losses, norms, and what the checkpoint held besides."""


@dataclass(frozen=True)
class Row:
    """One load."""

    saved: str
    loaded: str
    difference: float
    """Largest of any loss, relative; on the same topology of the gradient norms, too."""
    limit: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.difference <= self.limit


def save(folder: Path) -> Results:
    """Make the checkpoints in `folder`; what the runs that were never stopped did. One launch: engines start slowly."""
    return _launch(SAVING_RANKS, "save", folder)


def same(folder: Path, whole: Results) -> list[Row]:
    """Load every case where it was saved."""
    found, rows = _launch(SAVING_RANKS, "resume", folder), []
    for case in SAVED | SAME_ONLY:
        extra, wanted = found[case]["extra"], {"data": {"batch": BEFORE}, "case": case}
        assert extra == wanted, (extra, wanted)
        worst = max(_difference(found[case][key], whole[case][key][BEFORE:]) for key in ("losses", "norms"))
        rows.append(Row(case, "same", worst, 0.0))
    return rows


def others(folder: Path, whole: Results, world: int) -> list[Row]:
    """Load every case on all topologies of `world` ranks."""
    found = _launch(world, "reshape", folder)
    return [
        Row(
            case,
            topology,
            _difference(found[f"{case} to {topology}"]["losses"], whole[case]["losses"][BEFORE:]),
            TOLERANCE,
        )
        for case in SAVED
        for topology in LOADED[world]
    ]


def _difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    assert len(found) == len(wanted) == len(set(wanted)) == AFTER, "every step changes the loss"
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def _launch(world: int, phase: str, folder: Path) -> Results:
    with tempfile.TemporaryDirectory() as scratch:
        task = json.dumps([phase, str(folder), scratch])
        code = start_ranks(world, module_command("tools.reshard", "--worker", task))
        if code:
            raise RuntimeError(f"{phase} on {world} ranks ended with exit code {code}")
        results: list[Results] = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(world)]
    return results[0]  # sums over four ranks may differ between them in the last bit


# ---- on every rank


def work(task: str) -> int:
    """One rank of a launch."""
    from trainer.engine.imports import lean_imports

    with lean_imports():
        import torch

        import trainer.parity  # noqa: F401 - what the cases import, with both engines
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    phase, folder, scratch = json.loads(task)
    found = {"save": save_cases, "resume": resume_cases, "reshape": reshape_cases}[phase](folder)
    Path(scratch, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def save_cases(folder: str) -> dict[str, Any]:
    """On every rank: train `BEFORE` steps, save, train `AFTER` more."""
    results = {}
    for case, options in _in_order(SAVED | SAME_ONLY):
        step, manager = start(folder, case, **options)
        results[case] = train(step, 0, BEFORE)
        manager.save(BEFORE, step, {"data": {"batch": BEFORE}, "case": case})
        for key, values in train(step, BEFORE, BEFORE + AFTER).items():
            results[case][key] += values
        manager.close()
        stop()
    return results


def resume_cases(folder: str) -> dict[str, Any]:
    """On every rank: load and train `AFTER` steps."""
    results = {}
    for case, options in _in_order(SAVED | SAME_ONLY):
        results[case] = _resume(*start(folder, case, **options))
        stop()
    return results


def reshape_cases(folder: str) -> dict[str, Any]:
    """On every rank: load what was saved on another topology, and train `AFTER` steps."""
    from trainer.parallel.groups import connect

    _, world, _ = connect()
    results = {}
    for topology, shape in _in_order(LOADED[world]):
        for case, options in SAVED.items():
            results[f"{case} to {topology}"] = _resume(*start(folder, case, **{**options, **shape}))
            stop()
    return results


def _in_order(cases: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(cases.items(), key=lambda case: case[1].get("ep", 1) > 1)


def _resume(step: Any, manager: Any) -> dict[str, Any]:
    latest = manager.latest()
    extra = manager.load(latest, step)
    return {**train(step, BEFORE, BEFORE + AFTER), "extra": extra}


def train(step: Any, first: int, last: int) -> dict[str, Any]:
    """Losses and gradient norms of these steps."""
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


def start(folder: str, case: str, **options: Any) -> tuple[Any, Any]:
    """(step, checkpoint manager) of one case."""
    from trainer.checkpoint.config import CheckpointConfig
    from trainer.checkpoint.manager import CheckpointManager

    step = _build(**options)
    return step, CheckpointManager(str(Path(folder) / case), CheckpointConfig(keep_last=1), step.groups)


def stop() -> None:
    """Make room for the next case in this process."""
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
    from trainer.training.step import Step

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all within the limits."""
    parser = argparse.ArgumentParser(prog="python -m tools.reshard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="largest number of processes (default 4)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options.worker)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="reshape-") as scratch:
        folder = Path(scratch)
        whole = save(folder)
        print(f"{'saved':10} {'loaded':10} {'difference':>10}   of {AFTER} losses, relative")
        for world in (0, *sorted(LOADED)):
            if world <= max(options.ranks, SAVING_RANKS):
                for row in others(folder, whole, world) if world else same(folder, whole):
                    rows.append(row)
                    text = "identical" if row.difference == 0 else f"{row.difference:.1e}"
                    print(f"{row.saved:10} {row.loaded:10} {text:>10}{'' if row.passed else '   OVER'}", flush=True)
    passed = all(row.passed for row in rows)
    print("every load goes on as if nothing had happened" if passed else "some differ: see OVER above")
    if options.json:
        print(json.dumps({"passed": passed, "limit": TOLERANCE, "rows": [asdict(r) for r in rows]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
