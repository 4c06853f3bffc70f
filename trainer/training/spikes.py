"""The response to a step whose update was skipped: the recipe's `spike.action`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from model.batch import Batch
from trainer.checkpoint.manager import CheckpointManager
from trainer.telemetry.events import Emit
from trainer.telemetry.metrics import StepReport
from trainer.training.step import Step


def answer_spike(
    report: StepReport, batch: Batch, step: Step, checkpoints: CheckpointManager, emit: Emit
) -> str | None:
    """Report a step whose update was skipped, and rewind or stop the run if the recipe says so.

    Collective: every rank of the world must call it.

    A rewind restores the weights, but not the step number or the position in the data. The run continues with the next
    batch, and all updates since the checkpoint are lost.

    Args:
        report: The report of the step.
        batch: This rank's part of the step's global batch.
        step: The engines and the spike guard.
        checkpoints: The run's checkpoints.
        emit: The function that is called for each `skip` and `rewind` event.

    Returns:
        The reason why the run must stop; None if it continues.
    """
    assert report.skip_reason is not None
    keys: list[Any] = [None] * step.groups.topology.world
    dist.all_gather_object(keys, [s.key for s in batch.samples], group=step.groups.world)
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
        return f"step {report.step}: {report.skip_reason}; spike.action = stop; its samples: {', '.join(samples)}"
    if step.guard.in_a_row >= config.max_in_a_row:
        return (
            f"step {report.step}: {report.skip_reason}; it is the last of {step.guard.in_a_row} steps in a row whose "
            f"updates were skipped (spike.max_in_a_row); its samples: {', '.join(samples)}"
        )
    if config.action == "rewind":
        back = checkpoints.rewind(step)
        if back is not None:
            step.guard.forget_after(back)
            emit("rewind", report.step, {"to_step": back, "why": report.skip_reason})
    return None
