"""The recipe's `checkpoint` section, and the rules that determine which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from model.errors import UserError
from trainer.storage.open import scheme_of


@dataclass(frozen=True)
class CheckpointConfig:
    """The recipe's `checkpoint` section: when and where checkpoints are written, and which of them are kept."""

    every_steps: int = 500
    """The number of steps between two checkpoints; 0 saves only at the end. The end of a run is always saved."""
    root: str | None = None
    """The folder or `s3://BUCKET/PREFIX` in which the checkpoints are stored as `<name>/checkpoints`; null for
    `train.run_dir`. Set it to store checkpoints in a bucket, or on a different file system from the run's folder."""
    retry_sec: float = 120.0
    """The number of seconds for which an unreachable bucket is retried before a save or a load fails. A failed save
    does not stop the run, and the next checkpoint is saved as scheduled."""
    start_from: str | None = None
    """A run, one of its checkpoints, or an export (a folder or `s3://…`), from which a new run takes its weights and
    its tokenizer; null for the initial weights of `model`. Encoders may have been added (see
    `model.router.added_encoder_warmup_steps`) or removed. If the new run already has a checkpoint of its own, it
    resumes from that checkpoint instead."""
    start_optimizer: bool = False
    """Whether a new run also takes Adam's moments and their number of updates from the run or checkpoint that
    `start_from` names. Parameters that were not trained there start with moments of zero. The learning-rate schedule
    starts from the beginning in any case."""
    keep_last: int = 2
    """The number of most recent checkpoints to keep, at least 1."""
    keep_every_steps: int = 0
    """The interval, in steps, between checkpoints that are kept permanently; 0 for none. Their steps are the multiples
    of this number."""
    best_metric: str | None = None
    """The metric that determines the best checkpoint, which is kept as well; null for none. Use the metric's name in
    metrics.jsonl, for example `eval/test/asr/wer`. Only steps that were both saved and evaluated are compared."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Whether the lowest or the highest value of `best_metric` is the best."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise UserError(f"checkpoint.every_steps = {self.every_steps}: must be 0 (only at the end) or positive")
        if self.start_optimizer and self.start_from is None:
            raise UserError("checkpoint.start_optimizer = true: needs checkpoint.start_from; set that key as well")
        if self.retry_sec <= 0:
            raise UserError(f"checkpoint.retry_sec = {self.retry_sec}: must be positive")
        for key, url in (("root", self.root), ("start_from", self.start_from)):
            try:
                scheme_of(url or "")
            except UserError as error:
                raise UserError(f"checkpoint.{key} = {error}") from None
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last = {self.keep_last}: must be at least 1")
        if self.keep_every_steps < 0:
            raise UserError(f"checkpoint.keep_every_steps = {self.keep_every_steps}: must be 0 (none) or positive")


def kept_steps(config: CheckpointConfig, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
    """Return the steps whose checkpoints must be kept.

    Args:
        config: The rules.
        steps: The steps of all checkpoints in ascending order.
        scores: The values of `best_metric` by step. Steps without a value may be missing.
    """
    kept = set(steps[-config.keep_last :])
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    scored = [step for step in steps if step in scores]
    if config.best_metric is not None and scored:
        sign = 1 if config.best_is == "lowest" else -1
        kept.add(min(scored, key=lambda step: (sign * scores[step], step)))
    return kept


def evaluations_since_best(config: CheckpointConfig, step: int, scores: Mapping[int, float]) -> int:
    """Return the number of evaluations since the best one, up to `step`.

    Args:
        config: The rules, which determine whether the lowest or the highest value is the best.
        step: The run's current step. Later scores are ignored, since the run returned to an earlier checkpoint.
        scores: The values of `best_metric` by evaluated step.
    """
    known = sorted(s for s in scores if s <= step)
    if not known:
        return 0
    sign = 1 if config.best_is == "lowest" else -1
    best = min(known, key=lambda s: (sign * scores[s], s))
    return sum(s > best for s in known)
