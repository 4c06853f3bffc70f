"""Tests that every encoder family trains with ZeRO-3 as in one process, for both ways of gathering weights."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.encoder_table import model_of, one_per_family
from trainer.parallel.topology import Topology


def train(ep: int, gathering: str) -> list[list[float | str]]:
    """Compare training with the single-process model on this rank.

    Returns:
        For a batch: the differences of the loss and of the gradients, and the name of the worst parameter. For two
        steps: the differences of the losses and of the gradient norms, and an empty string.
    """
    from trainer import parity, parity_cases
    from trainer.parallel.groups import build_groups, connect
    from trainer.parity_cases import DS_CONFIG

    rank, world, device = connect(timeout_sec=150)
    groups = build_groups(Topology(world, 1, 1, ep), rank, device, parity_cases.SEED)
    names = [name for name in one_per_family() if gathering == "per_update" or not name.startswith("auto")]
    model = model_of(names)
    step = parity.build_step(model, groups, DS_CONFIG, 2, gathering=gathering)  # type: ignore[arg-type]
    oracle = parity.build_oracle(model)
    for part in (step.audio.tower, oracle):
        for name, buffer in part.named_buffers():
            if name.endswith(("running_mean", "running_var")):  # statistics of batch norms
                buffer += torch.linspace(0.0, 0.4, buffer.numel())
    found = parity.compare(step, oracle, parity_cases.make_samples("mixed", world, model.adapter.rate))
    loss, norm = parity.loss_curves(step, oracle, 2)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return [[found.loss, found.gradient, found.worst], [loss, norm, ""]]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("ep", "gathering"), [(2, "per_update"), (1, "per_module")])
def test_every_family_trains_on_two_ranks_as_in_one_process(ep: int, gathering: str) -> None:
    (batch, curve), _ = run_ranks(2, train, {"ep": ep, "gathering": gathering}, timeout_sec=200)
    assert batch[0] <= 1e-5 and batch[1] <= 1e-5, batch
    assert curve[0] <= 1e-4, curve
