"""Evaluation during training: all ranks encode audio, every LLM replica generates answers, and rank 0 scores them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from model.batch import Batch, Sample
from model.errors import UserError
from model.lengths import SAMPLE_RATE
from trainer.config.evaluation import EvalConfig
from trainer.data.eval_set import eval_samples
from trainer.data.loader import SkipLog
from trainer.data.prepare import PreparedData
from trainer.data.tokenizer import Tokenizer
from trainer.engine.generate import generate
from trainer.evaluation.predictions import Prediction, by_task, columns, score_predictions, write_predictions
from trainer.parallel.values import all_gather_values, gather_values
from trainer.scoring.meteor import Meteor
from trainer.scoring.scores import TaskScore, confusions, score_values
from trainer.scoring.tasks import find_task
from trainer.scoring.wordnet import find_wordnet
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.metrics import EvalReport
from trainer.training.step import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one split."""

    report: EvalReport
    scores: list[TaskScore]
    predictions: list[Prediction]


class Evaluator:
    """A callable that evaluates the model's current weights on a split of the data.

    Args:
        config: The recipe's `eval` section.
        prepared: The datasets and the tokenizer.
        step: The training step, which holds the engines.
        folder: The folder for the predictions (one JSONL file per evaluation) and their scores (JSON).
        heartbeat: A function that is called with a description of each batch before it is evaluated.

    Raises:
        UserError: If `eval.wordnet` is given and is not a WordNet folder.
    """

    def __init__(
        self,
        config: EvalConfig,
        prepared: PreparedData,
        step: Step,
        folder: Path,
        heartbeat: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.config, self.prepared, self.step, self.folder, self.heartbeat = config, prepared, step, folder, heartbeat
        self.meteor: Meteor | None = None
        """The METEOR metric. It is None if no WordNet folder was found; the first evaluation of captions then logs a
        warning."""
        self._no_meteor = ""
        try:
            self.meteor = Meteor(find_wordnet(config.wordnet))
        except UserError as error:
            if config.wordnet is not None:
                raise
            self._no_meteor = str(error)
        self._samples: dict[tuple[str, int | None], list[Sample]] = {}

    def __call__(self, step: int, split: str, max_samples: int | None = None) -> Evaluation | None:
        """Evaluate the model on a split.

        Collective: every rank of the world must call it.

        Args:
            step: The number of steps completed, for the names of the files.
            split: The name of the split.
            max_samples: The largest number of samples to use; None for all.

        Returns:
            The evaluation on rank 0, None on all others.
        """
        start = time.perf_counter()
        groups = self.step.groups
        if (split, max_samples) not in self._samples:
            skips = SkipLog(self.folder / "skipped.jsonl")
            world = groups.topology.world
            found = eval_samples(self.prepared, split, groups.rank, world, max_samples, on_skip=skips)
            self._samples[split, max_samples] = found
        mine = predict(
            self.step, self._samples[split, max_samples], self.prepared.tokenizer, self.config, self.heartbeat
        )
        everyone = gather_values(mine, groups.world, (Prediction,))
        if everyone is None:
            return None
        predictions = sorted((p for part in everyone for p in part), key=lambda p: p.key)
        if self._no_meteor and any(find_task(p.meta["task"]).needs_wordnet for p in predictions):
            log.warning("%s; until then captions are scored without METEOR", self._no_meteor)
            self._no_meteor = ""
        scores = score_predictions(predictions, self.meteor)
        values = score_values(scores)
        values["num_unfinished"] = float(sum(not p.finished for p in predictions))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_predictions(self.folder / f"predictions-{split}-step{step}.jsonl", predictions)
            self._write_scores(scores, predictions, split, step)
        except OSError as error:  # The run continues, because the metrics also contain the scores.
            log.warning("%s: step %d: PREDICTIONS ON %s COULD NOT BE WRITTEN: %s", self.folder, step, split, error)
        seconds = time.perf_counter() - start
        report = EvalReport(step, split, values, len(predictions), seconds, {s.name: (s.low, s.high) for s in scores})
        return Evaluation(report, scores, predictions)

    def _write_scores(
        self, scores: Sequence[TaskScore], predictions: Sequence[Prediction], split: str, step: int
    ) -> None:
        closed = {task: confusions(*columns(found)) for task, found in by_task(predictions).items()}
        content = {
            "split": split,
            "step": step,
            "num_samples": len(predictions),
            "scores": [asdict(s) for s in scores],
            "confusions": {task: found for task, found in closed.items() if found},
        }
        path = self.folder / f"scores-{split}-step{step}.json"
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def predict(
    step: Step, samples: Sequence[Sample], tokenizer: Tokenizer, config: EvalConfig, heartbeat: Callable[[str], None]
) -> list[Prediction]:
    """Return the model's answers to this rank's samples.

    Collective: every rank of the world must call it. Ranks may have different numbers of samples.

    Args:
        step: The training step, which holds the engines. They are switched to evaluation mode and back.
        samples: This rank's samples, with prompts and without targets.
        tokenizer: The tokenizer that decodes the answers.
        config: The recipe's `eval` section.
        heartbeat: A function that is called with a description of each batch before it is evaluated.
    """
    groups = step.groups
    share = max(1, config.batch_size * groups.topology.without_context.dp // groups.topology.world)
    order = sorted(range(len(samples)), key=lambda i: (samples[i].num_tokens, i))
    rounds = torch.tensor([-(-len(samples) // share)])
    dist.all_reduce(rounds, op=dist.ReduceOp.MAX, group=groups.world)
    step.audio.train(False)
    step.llm.train(False)
    # Weights cannot be gathered in a forward pass here, because a replica without prompts does not run one.
    step.llm.finish_gathering()
    predictions = []
    for n in range(int(rounds)):
        heartbeat(f"batch {n + 1} of an evaluation")
        part = [samples[i] for i in order[n * share : (n + 1) * share]]
        for sample, tokens in zip(part, answer(step, Batch(tuple(part)), tokenizer, config), strict=True):
            finished = len(tokens) < config.max_new_tokens
            seconds = sum(len(clip) for clip in sample.clips) / SAMPLE_RATE
            predictions.append(Prediction(sample.key, tokenizer.decode(tokens), finished, seconds, sample.meta))
    step.audio.train(True)
    step.llm.train(True)
    return predictions


@torch.no_grad()
def answer(step: Step, batch: Batch, tokenizer: Tokenizer, config: EvalConfig) -> list[list[int]]:
    """Return the token ids of the answers to this rank's part of a global batch of prompts.

    Collective: every rank of the world must call it.
    """
    groups = step.groups.without_context
    embedded = step.embed(batch)
    whole = embedded.whole
    members = embedded.packing.members(groups.place.dp, 0).tolist()
    found = generate(
        step.llm,
        embedded.packs,
        whole.num_tokens[members].tolist(),
        end_ids=tokenizer.end_ids,
        vocab_size=tokenizer.vocab_size,
        max_new_tokens=config.max_new_tokens,
    )
    speaks = groups.place.pp == 0 and groups.place.tp == 0
    everyone = all_gather_values(dict(zip(members, found, strict=True)) if speaks else {}, groups.world)
    answers = {i: tokens for part in everyone for i, tokens in part.items()}
    return [answers[whole.first_sample + i] for i in range(len(batch.samples))]
