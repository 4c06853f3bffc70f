"""What is done about a step whose update was left out: it is written down, and the recipe's `spike.action` follows."""

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
    """Collective, on all ranks alike, after a step that was left out.

    Steps are not counted back by `rewind`: the batches between the checkpoint and this one have taught nothing, and the
    next batch is the one after this one.

    Returns:
        Why the run must stop; None: it goes on.
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
            f"step {report.step}: {report.skip_reason}; it is the last of {step.guard.in_a_row} steps in a row that "
            f"were skipped (spike.max_in_a_row); its samples: {', '.join(samples)}"
        )
    if config.action == "rewind":
        back = checkpoints.rewind(step)
        if back is not None:
            step.guard.forget_after(back)
            emit("rewind", report.step, {"to_step": back, "why": report.skip_reason})
    return None
