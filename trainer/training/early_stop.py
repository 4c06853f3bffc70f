"""Early stopping of runs whose evaluations no longer improve, as configured by the recipe's `eval.stop_after`."""

from __future__ import annotations

from model.errors import UserError
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.evaluation import EvalConfig


def stops_early(config: EvalConfig, checkpoints: CheckpointManager, done: int, *, just_evaluated: bool) -> bool:
    """Return whether `eval.stop_after` ends the run after `done` steps. The result is the same on every rank.

    Collective: every rank of the world must call it.

    Args:
        config: The recipe's `eval` section.
        checkpoints: The run's checkpoints, which also store the scores of all evaluations so far.
        done: The number of steps completed.
        just_evaluated: Whether an evaluation took place after the last of these steps.

    Raises:
        UserError: If an evaluation has just taken place, and no evaluation so far has reported
            `checkpoint.best_metric`.
    """
    if not config.stop_after:
        return False
    metric = checkpoints.config.best_metric
    stale = checkpoints.since_best(done)
    if stale is None and not just_evaluated:
        return False
    if stale is None:
        raise UserError(
            f"checkpoint.best_metric = {metric}: no evaluation reports it; choose one of the names in metrics.jsonl"
        )
    if stale < config.stop_after:
        return False
    if checkpoints.groups.rank == 0:
        print(f"stopped at step {done}: {metric} has not improved in {stale} evaluations", flush=True)
    return True
