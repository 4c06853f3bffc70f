"""The recipe's `eval` section."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import UserError, check_least


@dataclass(frozen=True)
class EvalConfig:
    """The recipe's `eval` section: when and on which samples the model is evaluated."""

    every_steps: int = 0
    """The number of steps between evaluations of `split`; 0 evaluates only after the last step."""
    split: str = "dev"
    """The split that is evaluated during training."""
    final_split: str = "test"
    """The split that is evaluated once, after the last step."""
    before: bool = False
    """Whether to evaluate `final_split` before the first step as well, to report where training started."""
    max_samples: int | None = None
    """The largest number of samples of `split`, over all tasks; null for all.

    The same samples are chosen every time. All samples of `final_split` are always evaluated.
    """
    stop_after: int = 0
    """The number of consecutive evaluations without a better `checkpoint.best_metric` after which the run ends; 0 for
    never."""
    batch_size: int = 32
    """The number of samples that one LLM replica decodes together. Lower it if an evaluation runs out of memory."""
    max_new_tokens: int = 64
    """The largest number of tokens in an answer. The metric `num_unfinished` counts the answers that reach it."""
    wordnet: str | None = None
    """The folder of WordNet 3.0, which METEOR of captions needs.

    null uses the folder in the environment variable `WNSEARCHDIR` or, if it is not set, the folders in which system
    packages install WordNet. If there is no WordNet, captions are scored without METEOR.
    """

    def __post_init__(self) -> None:
        if self.stop_after < 0:
            raise UserError(f"eval.stop_after = {self.stop_after}: must be 0 (never) or positive")
        check_least("eval", self, batch_size=1, max_new_tokens=1, max_samples=1)
