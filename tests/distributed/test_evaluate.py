"""Tests that evaluation during training gives the same predictions on any topology as the exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.tools.exportable import write_manifest, write_run
from tools import evaluate, export
from trainer.build_step import build_step
from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.manager import CheckpointManager
from trainer.data.config import DatasetConfig
from trainer.data.prepare import prepare
from trainer.evaluation.predictions import read_predictions
from trainer.export.source import Source
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import ParallelConfig, build_topology
from trainer.training.evaluate import Evaluator

NUM_SAMPLES = 11


def body(root: str, tp: int, pp: int, ep: int, out: str) -> int:
    """Evaluate the run's weights, and return the number of samples that this rank evaluated."""
    folder = Path(root)
    rank, world, device = connect()
    recipe = Source(folder / "run").recipe
    data = replace(
        recipe.data,
        root=root,
        datasets=(DatasetConfig(name="noise", manifest="dev.jsonl", split="dev"),),
        eval_splits=("dev",),
        cache_dir=f"{out}/cache-{rank}",
        num_workers=0,
        tokenizer=replace(recipe.data.tokenizer, path=str(folder / "run" / "tokenizer.model")),
    )
    recipe = replace(
        recipe,
        data=data,
        parallel=ParallelConfig(num_ranks=world, tensor=tp, pipeline=pp, expert=ep),
        train=replace(recipe.train, deepspeed="ds_configs/zero3_cpu.json"),
        eval=replace(recipe.eval, batch_size=3),
    )
    groups = build_groups(build_topology(recipe.parallel, world), rank, device, recipe.seed)
    prepared = prepare(data, recipe.model.adapter.rate)
    step = build_step(recipe, groups, prepared.tokenizer.vocab_size)
    CheckpointManager(f"{out}/checkpoints", CheckpointConfig(), groups).start(str(folder / "run"), step, ())
    evaluator = Evaluator(recipe.eval, prepared, step, Path(out))
    found = evaluator(0, "dev")
    assert (found is not None) == (rank == 0)
    (own,) = evaluator._samples.values()
    return len(own)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, bool]]]:
    """Return a folder with `run` and `dev.jsonl`, and the predictions of the export in one process.

    A prediction is the answer's text and whether it is finished, by the key of its sample.
    """
    root = tmp_path_factory.mktemp("evaluate")
    write_run(root / "run")
    manifest = write_manifest(root, NUM_SAMPLES)
    assert export.main([str(root / "run"), str(root / "out"), "--dtype", "fp32"]) == 0
    assert evaluate.main([str(root / "out"), "--data", str(manifest), "--out", str(root / "alone")]) == 0
    said = {p.key: (p.hypothesis, p.finished) for p in read_predictions(root / "alone" / "predictions.jsonl")}
    assert len(said) == NUM_SAMPLES and len(set(said.values())) > 2, "equal answers would prove nothing"
    return root, said


@pytest.mark.parametrize(("world", "tp", "pp", "ep"), [(1, 1, 1, 1), (2, 1, 2, 2), (4, 2, 2, 2)])
def test_predictions_equal_those_of_the_export(
    made: tuple[Path, dict[str, tuple[str, bool]]], tmp_path: Path, world: int, tp: int, pp: int, ep: int
) -> None:
    root, said = made
    arguments = {"root": str(root), "tp": tp, "pp": pp, "ep": ep, "out": str(tmp_path)}
    counts = run_ranks(world, body, arguments, timeout_sec=240)
    assert sum(counts) == NUM_SAMPLES and max(counts) - min(counts) <= 1, "all ranks must share the work"
    found = read_predictions(tmp_path / "predictions-dev-step0.jsonl")
    assert {p.key: (p.hypothesis, p.finished) for p in found} == said
