"""Check that a run continues in the same way after its checkpoint is loaded on a different topology.

    earshot reshard             all pairs of topologies, on up to 4 processes
    earshot reshard --ranks 2   load checkpoints on up to 2 processes
    earshot reshard --json      also print one JSON object on the last line

A tiny model trains 2 steps, saves a checkpoint, and trains 10 more steps. Each topology loads the checkpoint and trains
the same 10 steps. On the same topology, losses and gradient norms must be bit-identical. On different topologies,
losses must agree to 1e-4.

Exit code 0: all differences are within the limits. 1: a difference exceeds its limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.run.command import rank_command
from trainer.run.launch import start_ranks

BEFORE, AFTER = 2, 10
TOLERANCE = 1e-4
SAVING_RANKS = 2

# The cases that are saved on two ranks. They cover tied embeddings on two stages, norms of queries and keys on two
# tensor-parallel ranks, virtual stages of unequal length, context parallelism, frozen parts, parameters that ZeRO-3
# keeps gathered (persistence), LLMs whose experts are distributed over ranks, one of them with biases that balance the
# experts, and blocks of ranks that hold copies of the audio side.
SAVED: dict[str, dict[str, Any]] = {
    "dp2·ep2": {"ep": 2, "persistence": 1000, "frozen": ["audio.primary.*", "llm.model.layers.0.*"]},
    "tp2": {"tp": 2, "family": "qwen3"},
    "pp2·ep2": {"pp": 2, "ep": 2, "family": "qwen2", "frozen": ["audio.experts.hubert.*"]},
    "ffn-ep2": {"family": "qwen3_moe", "ffn_ep": 2, "frozen": ["llm.model.layers.0.mlp.experts.[0-4].*"]},
    "balanced": {"family": "mixture_balanced", "ffn_ep": 2, "frozen": ["llm.model.layers.1.mlp.experts.a.*"]},
    "pp2·vp2": {"pp": 2, "vp": 2, "layers": 7, "family": "qwen2"},
    "cp2": {"cp": 2, "family": "qwen3", "frozen": ["llm.model.layers.1.*"]},
    "dp2·shard1": {"shard": 1, "frozen": ["audio.experts.wavlm.*"]},
}
# A case with bf16 weights and fp32 master weights. Its losses depend on the topology, so its checkpoint is only loaded
# on the topology that saved it.
SAME_ONLY: dict[str, dict[str, Any]] = {"dp2-bf16": {"dtype": "bfloat16", "persistence": 1000}}
# The other topologies on which each case of `SAVED` is loaded, by number of ranks. `ffn_ep` only applies to LLMs with
# experts, and `vp` and `cp` only to LLMs without experts.
LOADED: dict[int, dict[str, dict[str, Any]]] = {
    1: {"1": {"tp": 1, "pp": 1, "ep": 1, "ffn_ep": 1, "vp": 1, "cp": 1, "shard": None}},
    2: {
        "dp2": {"tp": 1, "pp": 1, "ep": 1, "ffn_ep": 1, "vp": 1, "cp": 1, "shard": None},
        "cp2": {"tp": 1, "pp": 1, "ep": 1, "ffn_ep": 1, "vp": 1, "cp": 2, "shard": None},
    },
    4: {
        "tp2·pp2": {"tp": 2, "pp": 2, "ep": 1, "ffn_ep": 2, "vp": 1, "cp": 1, "shard": None},
        "dp2·pp2·vp2": {"tp": 1, "pp": 2, "ep": 1, "ffn_ep": 1, "vp": 2, "cp": 1, "shard": None},
        "dp4·ep2·shard2": {"tp": 1, "pp": 1, "ep": 2, "ffn_ep": 4, "vp": 1, "cp": 1, "shard": 2},
    },
}

Results = dict[str, Any]
"""The losses, gradient norms and additional checkpoint content of each case."""


@dataclass(frozen=True)
class Row:
    """The result of loading one checkpoint on one topology."""

    saved: str
    """The case whose checkpoint was loaded."""
    loaded: str
    """The topology that loaded the checkpoint; `same` for the topology that saved it."""
    difference: float
    """The largest relative difference of a loss or, on the same topology, of a loss or gradient norm."""
    limit: float
    """The largest difference that passes."""

    @property
    def passed(self) -> bool:
        """True if the difference is within the limit. NaN does not pass."""
        return self.difference <= self.limit


def save(folder: Path) -> Results:
    """Train all cases and save their checkpoints, and return the results of these uninterrupted runs."""
    return _launch(SAVING_RANKS, "save", folder)


def same(folder: Path, whole: Results) -> list[Row]:
    """Load every case on the topology that saved it, and return the comparison with the uninterrupted runs."""
    found, rows = _launch(SAVING_RANKS, "resume", folder), []
    for case in SAVED | SAME_ONLY:
        extra, wanted = found[case]["extra"], {"data": {"batch": BEFORE}, "case": case}
        assert extra == wanted, (extra, wanted)
        worst = max(_difference(found[case][key], whole[case][key][BEFORE:]) for key in ("losses", "norms"))
        rows.append(Row(case, "same", worst, 0.0))
    return rows


def pairs(world: int, every: bool = True) -> list[tuple[str, str]]:
    """Return the cases that are saved, and the topologies with `world` ranks that load them.

    Args:
        world: The number of ranks.
        every: True for all pairs. Otherwise, if there are several topologies, half of the pairs are returned, in which
            every case and every topology occurs.
    """
    return [
        (case, topology)
        for i, case in enumerate(SAVED)
        for j, topology in enumerate(LOADED[world])
        if every or len(LOADED[world]) == 1 or (i + j) % 2 == 0
    ]


def others(folder: Path, whole: Results, world: int, every: bool = True) -> list[Row]:
    """Load the cases on topologies of `world` ranks, and return the comparison with the uninterrupted runs.

    See `pairs` for the cases and topologies.
    """
    found = _launch(world, "reshape" if every else "reshape half", folder)
    return [
        Row(
            case,
            topology,
            _difference(found[f"{case} to {topology}"]["losses"], whole[case]["losses"][BEFORE:]),
            TOLERANCE,
        )
        for case, topology in pairs(world, every)
    ]


def _difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    assert len(found) == len(wanted) == len(set(wanted)) == AFTER, "every step must change the loss"
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def _launch(world: int, phase: str, folder: Path) -> Results:
    with tempfile.TemporaryDirectory() as scratch:
        task = json.dumps([phase, str(folder), scratch])
        code = start_ranks(world, rank_command("tools.reshard", "--worker", task))
        if code:
            raise RuntimeError(f"{phase} on {world} ranks ended with exit code {code}")
        results: list[Results] = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(world)]
    return results[0]  # Sums over four ranks may differ in the last bit between ranks.


# ---- Functions that run on every rank


def work(task: str) -> int:
    """Run one rank of a launch.

    Collective: every rank of the world must call it.
    """
    from trainer.engine.imports import lean_imports

    with lean_imports():
        import torch

        import trainer.parity  # noqa: F401 - the modules that the cases import, with both engines
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    phase, folder, scratch = json.loads(task)
    cases: dict[str, Callable[[str], Results]] = {
        "save": save_cases,
        "resume": resume_cases,
        "reshape": reshape_cases,
        "reshape half": partial(reshape_cases, every=False),
    }
    found = cases[phase](folder)
    Path(scratch, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def save_cases(folder: str) -> dict[str, Any]:
    """Train every case for `BEFORE` steps, save a checkpoint, and train `AFTER` more steps.

    Collective: every rank of the world must call it.
    """
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
    """Load every case on the topology that saved it, and train `AFTER` steps.

    Collective: every rank of the world must call it.
    """
    results = {}
    for case, options in _in_order(SAVED | SAME_ONLY):
        results[case] = _resume(*start(folder, case, **options))
        stop()
    return results


def reshape_cases(folder: str, every: bool = True) -> dict[str, Any]:
    """Load the cases of `SAVED` on other topologies with this number of ranks (`pairs`), and train `AFTER` steps.

    Collective: every rank of the world must call it.
    """
    from trainer.parallel.groups import connect

    _, world, _ = connect()
    results, chosen = {}, pairs(world, every)
    for topology, shape in _in_order(LOADED[world]):
        for case, options in SAVED.items():
            if (case, topology) not in chosen:
                continue
            results[f"{case} to {topology}"] = _resume(*start(folder, case, **{**options, **shape}))
            stop()
    return results


def _in_order(cases: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the cases, starting with the cases without expert parallelism.

    DeepSpeed numbers the modules of a process. Without expert parallelism, it requires equal numbers on all ranks.
    """
    return sorted(cases.items(), key=lambda case: case[1].get("ep", 1) > 1)


def _resume(step: Any, manager: Any) -> dict[str, Any]:
    latest = manager.latest()
    extra = manager.load(latest, step)
    return {**train(step, BEFORE, BEFORE + AFTER), "extra": extra}


def train(step: Any, first: int, last: int) -> dict[str, Any]:
    """Train the steps from `first` up to but not including `last`, and return their losses and gradient norms.

    Collective: every rank of the world must call it.
    """
    from model.batch import Batch
    from trainer.parity_cases import make_samples

    losses, norms = [], []
    for number in range(first, last):
        whole = [s for part in make_samples("mixed", 2, step.model.adapter.rate, seed=number) for s in part]
        rank, world = step.groups.rank, step.groups.topology.world
        mine = whole[len(whole) * rank // world : len(whole) * (rank + 1) // world]
        report = step(number, Batch(tuple(mine)))
        assert report.loss == report.loss  # not NaN
        losses.append(report.loss)
        norms.append(report.grad_norm)
    return {"losses": losses, "norms": norms}


def start(folder: str, case: str, **options: Any) -> tuple[Any, Any]:
    """Build the training step and the checkpoint manager of one case.

    Collective: every rank of the world must call it.
    """
    from trainer.checkpoint.config import CheckpointConfig
    from trainer.checkpoint.manager import CheckpointManager

    step = _build(**options)
    return step, CheckpointManager(str(Path(folder) / case), CheckpointConfig(keep_last=1), step.groups)


def stop() -> None:
    """Destroy Megatron's process groups, so that this process can build the next case."""
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
    lora: bool = False,
    ffn_ep: int = 1,
    vp: int = 1,
    layers: int = 4,
    cp: int = 1,
    shard: int | None = None,
) -> Any:
    import torch

    from model.audio_tower import AudioTower
    from model.llm.families import mixture_of
    from model.llm.reference import resolve_hf_config
    from model.llm.weights import RandomSource
    from model.lora import add_adapters
    from trainer.engine.ds_config import Gathering
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine
    from trainer.engine.optim import OptimConfig, PartConfig
    from trainer.engine.placement import place
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import ParallelConfig, build_topology
    from trainer.parity_cases import ADAPTERS, ALL_WEIGHTS, SEED, VOCAB_SIZE, tiny_model
    from trainer.training.step import Step

    rank, world, device = connect()
    model = tiny_model(family, num_layers=layers)
    model = replace(model, experts=tuple(e for e in model.experts if e.name not in without))
    hf_config = resolve_hf_config(model.llm)
    parallel = ParallelConfig(world, tp, pp, expert=ep, virtual_stages=vp, context=cp, audio_shard=shard)
    if mixture_of(hf_config) is not None:
        parallel = replace(parallel, ffn_expert=ffn_ep, virtual_stages=1, context=1)
    groups = build_groups(build_topology(parallel, world), rank, device, SEED)
    parts = tuple(PartConfig(pattern, frozen=True) for pattern in frozen)
    learned = ADAPTERS if lora else ALL_WEIGHTS
    optim = OptimConfig(lr=2e-3, weight_decay=0.01, warmup_steps=2, parts=(*learned.optim.parts, *parts))
    source = RandomSource(hf_config, SEED)
    llm = LLMEngine(hf_config, source, optim, groups, getattr(torch, dtype), adapters=learned.adapters)
    torch.manual_seed(SEED)
    tower = AudioTower(model, hf_config.hidden_size, VOCAB_SIZE, place(model, ep).held_by(rank)).train()
    add_adapters(tower, "audio.", learned.adapters)
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": persistence}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    gathering: Gathering = "per_module" if persistence and shard is None else "per_update"
    audio = AudioEngine(tower, optim, config, groups, batch_sec=1.5, gathering=gathering)
    return Step(model, optim, audio, llm, groups, num_steps=20, tokens_per_microbatch=48, seed=SEED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 if all differences are within the limits, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="earshot reshard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="largest number of processes (default: 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
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
        print(f"{'saved':10} {'loaded':14} {'difference':>10}   of {AFTER} losses, relative")
        for world in (0, *sorted(LOADED)):
            if world <= max(options.ranks, SAVING_RANKS):
                for row in others(folder, whole, world) if world else same(folder, whole):
                    rows.append(row)
                    text = "identical" if row.difference == 0 else f"{row.difference:.1e}"
                    print(f"{row.saved:10} {row.loaded:14} {text:>10}{'' if row.passed else '   OVER'}", flush=True)
    passed = all(row.passed for row in rows)
    print(
        "every run continues in the same way after its checkpoint is loaded"
        if passed
        else "some runs differ; see the lines with OVER"
    )
    if options.json:
        print(json.dumps({"passed": passed, "limit": TOLERANCE, "rows": [asdict(r) for r in rows]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
