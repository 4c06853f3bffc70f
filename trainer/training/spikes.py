"""The response to a step whose update was skipped: the recipe's `spike.action`."""

from __future__ import annotations

from model.batch import Batch
from model.errors import UserError
from trainer.checkpoint.manager import CheckpointManager
from trainer.parallel.values import all_gather_values
from trainer.telemetry.events import Emit
from trainer.telemetry.metrics import StepReport
from trainer.training.divergence import Divergence
from trainer.training.step import Step


class EndError(UserError):
    """Raised to end the run cleanly because of a problem with the data, the loss or an evaluation."""


class DivergedError(EndError):
    """Raised when too many updates in a row were skipped. The state is not saved, as the weights are probably bad."""


def answer_spike(
    report: StepReport, batch: Batch, step: Step, checkpoints: CheckpointManager, emit: Emit, run_url: str
) -> str | None:
    """Report a step whose update was skipped, and rewind or stop the run if the recipe says so.

    Collective: every rank of the world must call it.

    A rewind restores the weights from the newest checkpoint, but not the step number or the position in the data. The
    run continues with the next batch; updates since that checkpoint are lost.

    Args:
        report: The report of the step.
        batch: This rank's part of the step's global batch.
        step: The training step, which holds the engines and the spike guard.
        checkpoints: The run's checkpoints.
        emit: The function that is called for each `skip`, `rewind` and `diverged` event.
        run_url: The location of the run, for the error message.

    Returns:
        The reason why the run must stop after saving; None if it continues.

    Raises:
        DivergedError: If `spike.max_in_a_row` updates in a row were skipped. The weights must not be saved.
    """
    assert report.skip_reason is not None
    keys = all_gather_values([s.key for s in batch.samples], step.groups.world)
    samples = [key for some in keys for key in some]
    config = step.guard.config
    fields = {
        "why": report.skip_reason,
        "loss": str(report.loss),
        "grad_norm": str(report.grad_norm),
        "samples": samples,
    }
    emit("skip", report.step, fields)
    if config.action == "stop":
        return (
            f"the update of step {report.step} was skipped ({report.skip_reason}), and spike.action is stop; "
            f"samples in this step: {', '.join(samples)}"
        )
    if step.guard.in_a_row >= config.max_in_a_row:
        found = Divergence(tuple(step.guard.history), step.optim, samples)
        steps = checkpoints.settled_steps()
        emit("diverged", report.step, found.fields(steps))
        raise DivergedError(found.message(steps, run_url))
    if config.action == "rewind":
        back = checkpoints.rewind(step)
        if back is not None:
            step.guard.forget_after(back)
            step.stages.updated = back
            emit("rewind", report.step, {"to_step": back, "why": report.skip_reason})
    return None
