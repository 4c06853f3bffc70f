"""The functions that ranks execute in runs with failures, for `tests.distributed.harness.run_ranks`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from model.batch import Batch
from model.errors import UserError
from trainer.build import build_hooks, describe_run, prepare_once, run_training
from trainer.build_step import build_step
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.load import load_recipe
from trainer.data.loader import Loader
from trainer.data.state import State
from trainer.parallel.groups import Groups, build_groups, connect
from trainer.parallel.topology import build_topology
from trainer.run.failure import Position
from trainer.run.launch import RankEnv
from trainer.run.watchdog import Watchdog
from trainer.telemetry.events import EventLog, read_events
from trainer.telemetry.metrics import StepReport
from trainer.training import loop as loop_module
from trainer.training.evaluate import Evaluator
from trainer.training.step import Step


class Absent(Step):
    """A `Step` that computes nothing in the steps of `absent` (counted from 1)."""

    absent: frozenset[int] = frozenset()

    def __call__(self, step: int, batch: Batch, *shared: Any) -> StepReport:
        if step + 1 not in self.absent:
            return super().__call__(step, batch, *shared)
        self.timer.take()
        self.meter.add_step({name: astuple(cost) for name, cost in self.audio.take_costs().items()}, 0.0)
        return StepReport(step + 1, 0.0)


def poisoned(steps: frozenset[int]) -> type[Loader]:
    """Return a subclass of `Loader` in which the last rank's clips are NaN in `steps` (counted from 1)."""

    class Poisoned(Loader):
        def __iter__(self) -> Iterator[tuple[Batch, State]]:
            for batch, state in super().__iter__():
                last = state["lanes"][-1] == state["num_lanes"] - 1
                if state["batch"] in steps and last:
                    batch = Batch(tuple(map(_poison, batch.samples)))
                yield batch, state

    return Poisoned


def _poison(sample: Any) -> Any:
    return replace(sample, clips=tuple(torch.full_like(c, float("nan")) for c in sample.clips))


def spikes(folder: str, corpus: str) -> dict[str, Any]:
    """Run trainings with NaN batches and trainings that omit some steps, and return the results by name."""
    connect()
    groups = None
    found: dict[str, Any] = {}
    for name, action, nan, absent in (
        ("clean", "skip", [], []),
        ("skip", "skip", [4], []),
        ("without 4", "skip", [], [4]),
        ("rewind", "rewind", [4], []),
        ("without 3 and 4", "skip", [], [3, 4]),
        ("stop", "stop", [4], []),
        ("three in a row", "skip", [2, 3, 4, 5], []),
        ("misspelt metric", "skip", [], []),
    ):
        overrides = [f"data.root={corpus}", f"data.cache_dir={folder}/cache", f"name={name.replace(' ', '-')}"]
        overrides += ["train.steps=6", f"train.run_dir={folder}", f"spike.action={action}", "spike.max_in_a_row=3"]
        if name == "misspelt metric":
            overrides += ["eval.every_steps=3", "eval.stop_after=1", "eval.split=test", "eval.max_samples=2"]
            overrides += ["checkpoint.best_metric=eval/test/asr/werr"]
        recipe = load_recipe("debug", [*overrides, "telemetry.progress=false", "train.hang_timeout_sec=0"])
        if groups is None:
            topology = build_topology(recipe.parallel, 2)
            groups = build_groups(topology, torch.distributed.get_rank(), torch.device("cpu"), 0)
        error = _run(recipe, groups, frozenset(nan), frozenset(absent))
        run_dir = Path(folder) / recipe.name
        found[name] = {"error": error, "losses": _losses(run_dir), "events": read_events(run_dir)}
    return found


def _run(recipe: Any, groups: Groups, nan: frozenset[int], absent: frozenset[int]) -> str | None:
    run_dir = Path(recipe.train.run_dir) / recipe.name
    events = EventLog(run_dir, groups.rank, 1)
    recipe, prepared = prepare_once(recipe, groups)
    step = build_step(recipe, groups, prepared.tokenizer.vocab_size)
    step.__class__ = type("Partial", (Absent,), {"absent": absent})
    checkpoints = CheckpointManager(str(run_dir / "checkpoints"), recipe.checkpoint, groups)
    loop = loop_module.Loop(
        recipe,
        step,
        groups,
        prepared,
        Evaluator(recipe.eval, prepared, step, run_dir),
        checkpoints,
        run_dir,
        describe_run(recipe, step, prepared),
        Watchdog(0, events, 2),
        Position(),
    )
    start, extra = loop.restore()
    hooks = build_hooks(recipe, run_dir, start, events) if groups.rank == 0 else []
    try:
        with patch.object(loop_module, "Loader", poisoned(nan)):
            loop.run(hooks, start, extra.get("data"))
    except UserError as error:
        return str(error)
    return None


def _losses(run_dir: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {str(d["step"]): [d["train/loss"], d["train/grad_norm"]] for d in lines if "train/loss" in d}


def failing(folder: str, corpus: str) -> int:
    """Run one rank of a run whose third step fails on rank 1, and return the rank's exit code."""
    rank = int(os.environ["RANK"])
    overrides = [f"data.root={corpus}", f"data.cache_dir={folder}/cache", "train.steps=4", f"train.run_dir={folder}"]
    usual = Step.forward_backward

    def fails(self: Step, step: int, batch: Batch, *shared: Any) -> StepReport:
        if step == 2 and rank == 1:
            raise ValueError(f"cannot do {id(batch)}")
        return usual(self, step, batch, *shared)

    with patch.object(Step, "forward_backward", fails):
        code = run_training(load_recipe("debug", [*overrides, "telemetry.progress=false"]), RankEnv(rank, rank, 2))
    return int(code)
