"""Tests that all buffers of the audio modules are moved to the rank's device. `zero.Init` only moves parameters.

In a bf16 run, buffers that are computed from the config stay in fp32.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from trainer import parity, parity_cases
from trainer.engine.encoders import AudioEngine
from trainer.parallel.groups import Groups, connect
from trainer.parallel.topology import Topology
from trainer.parity_cases import DS_CONFIG


def kinds_of_buffers() -> dict[str, str]:
    """Return the device and dtype of every buffer by its name, for a bf16 engine whose device is not the tower's."""
    rank, world, _ = connect(timeout_sec=60)
    assert dist.group.WORLD is not None
    groups = Groups(Topology(world, 1, 1), rank, torch.device("meta"), dist.group.WORLD, dist.group.WORLD)
    tower = parity.AudioTower(parity_cases.tiny_model(), 32, parity_cases.VOCAB_SIZE)
    for name in tower.expert_names:  # these encoders have no buffers of their own
        tower.encoder(name).register_buffer("added", torch.zeros(2), persistent=False)
    engine = AudioEngine(tower, parity_cases.OPTIM, DS_CONFIG | {"bf16": {"enabled": True}}, groups, batch_sec=1.0)
    found = {name: f"{buffer.device.type} {buffer.dtype}" for name, buffer in engine.tower.named_buffers()}
    dist.destroy_process_group()
    return found


@pytest.mark.timeout(120)
def test_every_buffer_is_moved() -> None:
    (found,) = run_ranks(1, kinds_of_buffers, timeout_sec=100)
    added = {f"experts.{name}.added": "meta torch.float32" for name in ("hubert", "wavlm", "whisper_tiny")}
    assert found == added | {"router.steps_to_enter": "meta torch.int64"}
