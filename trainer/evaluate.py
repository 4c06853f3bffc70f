"""Evaluation without leaving the process group: all ranks encode, every LLM replica decodes, rank 0 scores."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.audio_tower import count, usable_ctc_targets
from model.batch import Batch, Sample
from trainer.data.eval_set import eval_samples
from trainer.data.loader import SkipLog
from trainer.data.prepare import PreparedData
from trainer.data.tokenizer import Tokenizer
from trainer.engine.generate import generate
from trainer.eval_config import EvalConfig
from trainer.global_batch import gather
from trainer.parallel.packs import plan_packs
from trainer.scoring import TaskScore, score, score_values
from trainer.step import Step, send
from trainer.telemetry.metrics import EvalReport


@dataclass(frozen=True)
class Prediction:
    """What the model said to one sample."""

    key: str
    hypothesis: str
    finished: bool
    """It ended by itself before `eval.max_new_tokens`."""
    meta: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One split, read once."""

    report: EvalReport
    scores: dict[str, dict[str, TaskScore]]
    """Per task, per subset (all of the task's: see `trainer.scoring.score`)."""
    predictions: list[Prediction]


class Evaluator:
    """Reads splits with the model as it is now. Its calls are collective.

    Args:
        config: the recipe's `eval` section.
        prepared: where the splits lie.
        step: the engines.
        folder: predictions are written there, one JSONL per evaluation.
    """

    def __init__(self, config: EvalConfig, prepared: PreparedData, step: Step, folder: Path) -> None:
        self.config, self.prepared, self.step, self.folder = config, prepared, step, folder
        self._samples: dict[tuple[str, int | None], list[Sample]] = {}

    def __call__(self, step: int, split: str, max_samples: int | None = None) -> Evaluation | None:
        """The evaluation on rank 0, None on the others."""
        start = time.perf_counter()
        groups = self.step.groups
        if (split, max_samples) not in self._samples:
            log = SkipLog(self.folder / "skipped.jsonl")
            world = groups.topology.world
            found = eval_samples(self.prepared, split, groups.rank, world, max_samples, on_skip=log)
            self._samples[split, max_samples] = found
        mine = predict(self.step, self._samples[split, max_samples], self.prepared.tokenizer, self.config)
        everyone: list[Any] | None = [None] * groups.topology.world if groups.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0, group=groups.world)
        if everyone is None:
            return None
        predictions = sorted((p for part in everyone for p in part), key=lambda p: p.key)
        scores = _score(predictions)
        values = score_values(s for by_subset in scores.values() for s in by_subset.values())
        values["num_unfinished"] = float(sum(not p.finished for p in predictions))
        self._write(predictions, split, step)
        report = EvalReport(step, split, values, len(predictions), time.perf_counter() - start)
        return Evaluation(report, scores, predictions)

    def _write(self, predictions: Sequence[Prediction], split: str, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"predictions-{split}-step{step}.jsonl", "w", encoding="utf-8") as file:
            for p in predictions:
                line = {
                    "key": p.key,
                    "task": p.meta["task"],
                    "subset": p.meta.get("subset"),
                    "reference": p.meta["answer"],
                    "hypothesis": p.hypothesis,
                    "finished": p.finished,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def predict(step: Step, samples: Sequence[Sample], tokenizer: Tokenizer, config: EvalConfig) -> list[Prediction]:
    """Answers to this rank's `samples`; collective, ranks may have different numbers of them."""
    groups = step.groups
    share = max(1, config.batch_size * groups.topology.dp // groups.topology.world)
    order = sorted(range(len(samples)), key=lambda i: (samples[i].num_tokens, i))
    rounds = torch.tensor([-(-len(samples) // share)])
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX, group=groups.world)
    step.audio.train(False)
    step.llm.train(False)
    predictions = []
    for n in range(int(rounds)):
        part = [samples[i] for i in order[n * share : (n + 1) * share]]
        for sample, tokens in zip(part, answer(step, Batch(tuple(part)), tokenizer, config), strict=True):
            finished = len(tokens) < config.max_new_tokens
            predictions.append(Prediction(sample.key, tokenizer.decode(tokens), finished, sample.meta))
    step.audio.train(True)
    step.llm.train(True)
    return predictions


@torch.no_grad()
def answer(step: Step, batch: Batch, tokenizer: Tokenizer, config: EvalConfig) -> list[list[int]]:
    """Token ids for this rank's part of a global batch of prompts."""
    groups = step.groups
    none = usable_ctc_targets(batch, step.model)
    whole = gather(batch, count(batch, none), groups)
    packing = plan_packs(whole.num_tokens, groups.topology.dp, int(whole.num_tokens.sum()), multiple=groups.topology.tp)
    audio = step.audio.forward(batch.clips, batch.prompts, none, noise=None)
    packs, _ = send(batch, audio.embeddings.values, whole, packing, groups)
    members = packing.members(groups.place.dp, 0).tolist()
    found = generate(
        step.llm,
        packs,
        whole.num_tokens[members].tolist(),
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        max_new_tokens=config.max_new_tokens,
    )
    speaks = groups.place.pp == 0 and groups.place.tp == 0
    everyone: list[Any] = [None] * groups.topology.world
    dist.all_gather_object(everyone, dict(zip(members, found, strict=True)) if speaks else {}, group=groups.world)
    answers = {i: tokens for part in everyone for i, tokens in part.items()}
    return [answers[whole.first_sample + i] for i in range(len(batch.samples))]


def _score(predictions: Sequence[Prediction]) -> dict[str, dict[str, TaskScore]]:
    by_task: dict[str, list[Prediction]] = {}
    for p in predictions:
        by_task.setdefault(p.meta["task"], []).append(p)
    return {
        task: score(task, [p.hypothesis for p in found], [p.meta for p in found]) for task, found in by_task.items()
    }
