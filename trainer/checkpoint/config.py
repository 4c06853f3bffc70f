"""When checkpoints are written and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from model.errors import UserError
from trainer.storage.open import scheme_of


@dataclass(frozen=True)
class CheckpointConfig:
    """The recipe's `checkpoint` section."""

    every_steps: int = 500
    """A checkpoint after every so many steps, and at the end; 0: only at the end."""
    root: str | None = None
    """Folder or `s3://BUCKET/PREFIX` that holds `<name>/checkpoints`; null: `train.run_dir`."""
    retry_sec: float = 120.0
    """How long a bucket may be away before a save, or loading, fails; a failed save is tried again at the next one."""
    start_from: str | None = None
    """A run, one of its checkpoints, or an export (a folder or `s3://…`), whose weights and tokenizer a new run starts
    with. Encoders may have been added or removed (`model.router.added_encoder_warmup_steps`). Once the new run has a
    checkpoint of its own, it resumes from that."""
    keep_last: int = 2
    """The newest ones stay."""
    keep_every_steps: int = 0
    """Those whose step is a multiple of this stay for good; 0: none."""
    best_metric: str | None = None
    """The best one by this metric stays, too: a name as in metrics.jsonl, e.g. `eval/test/asr/wer`. Only steps that
    were both saved and evaluated take part."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Of `best_metric`."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise UserError(f"checkpoint.every_steps = {self.every_steps}: must be 0 (only at the end) or positive")
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
    """Those of the ascending `steps` that stay; `scores` are `best_metric` of some of them."""
    kept = set(steps[-config.keep_last :])
    if config.keep_every_steps:
        kept |= {step for step in steps if step % config.keep_every_steps == 0}
    scored = [step for step in steps if step in scores]
    if config.best_metric is not None and scored:
        sign = 1 if config.best_is == "lowest" else -1
        kept.add(min(scored, key=lambda step: (sign * scores[step], step)))
    return kept


def evaluations_since_best(config: CheckpointConfig, step: int, scores: Mapping[int, float]) -> int:
    """How many evaluations in a row, the last of them at or before `step`, were no better than an earlier one.

    `scores` are `best_metric` of evaluated steps; later ones than `step` are of a run that was given up.
    """
    known = sorted(s for s in scores if s <= step)
    if not known:
        return 0
    sign = 1 if config.best_is == "lowest" else -1
    best = min(known, key=lambda s: (sign * scores[s], s))
    return sum(s > best for s in known)
