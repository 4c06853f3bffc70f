"""When and on what the model is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import UserError, check_least


@dataclass(frozen=True)
class EvalConfig:
    """The recipe's `eval` section."""

    every_steps: int = 0
    """Evaluate `split` after every so many steps; 0: only at the end."""
    split: str = "dev"
    """Read during training."""
    final_split: str = "test"
    """Read once, after the last step."""
    before: bool = False
    """Also read `final_split` before the first step, to report where training started."""
    max_samples: int | None = None
    """Of `split`, over all tasks, always the same ones; null: all. `final_split` is always read whole."""
    stop_after: int = 0
    """End the run when `checkpoint.best_metric` has not become better in so many evaluations in a row; 0: never."""
    batch_size: int = 32
    """Samples that one LLM replica decodes together."""
    max_new_tokens: int = 64
    """A transcript that reaches this length is counted and reported as `num_unfinished`."""
    wordnet: str | None = None
    """Folder of WordNet 3.0, for METEOR of captions; null: where packages put it. Nowhere: METEOR is left out."""

    def __post_init__(self) -> None:
        if self.stop_after < 0:
            raise UserError(f"eval.stop_after = {self.stop_after}: must be 0 (never) or positive")
        check_least("eval", self, batch_size=1, max_new_tokens=1, max_samples=1)
