"""The check that all replicas of the LLM hold the same weights, before every save and every few steps."""

from __future__ import annotations

import numpy as np

from trainer.engine.llm import LLMEngine
from trainer.engine.replicas import differing_ranks, weight_digest
from trainer.parallel.groups import Groups
from trainer.parallel.tree import all_gather_numbers, broadcast_bytes
from trainer.telemetry.events import Emit
from trainer.telemetry.gpu_health import node_name


class CorruptionError(RuntimeError):
    """Raised when replicas of the LLM hold different weights, because of a faulty device."""


def check_replicas(step: int, llm: LLMEngine, groups: Groups, emit: Emit) -> None:
    """Compare the weights of the LLM's replicas.

    Collective: every rank of the world must call it.

    Args:
        step: The number of steps completed.
        llm: The engine of the LLM.
        groups: This rank's process groups.
        emit: The function that is called on all ranks for the event `corrupted`, with the node of each differing rank.

    Raises:
        CorruptionError: On all ranks, if the weights of any replica differ. The state must not be saved. The last
            checkpoint was saved after a successful check.
    """
    copies = groups.topology.without_context
    if copies.dp == 1:
        return
    llm.finish_gathering()
    weights = (p for _, p in llm.parameters() if getattr(p, "allreduce", True))
    mine = np.array([int(weight_digest(weights, groups.device))])
    different, is_certain = differing_ranks(all_gather_numbers(mine, groups.world)[:, 0], copies)
    if not different:
        return
    nodes = {rank: broadcast_bytes(node_name().encode(), rank, groups.world).decode() for rank in different}
    where = ", ".join(f"{rank} on {node}" for rank, node in nodes.items())
    emit("corrupted", step, {"ranks": different, "nodes": sorted(set(nodes.values())), "certain": is_certain})
    raise CorruptionError(
        f"after step {step}, replicas of the LLM hold different weights; ranks that differ: {where}; a device or its "
        "memory is faulty, so nothing is saved; rerun the same command to resume from the last checkpoint"
    )
