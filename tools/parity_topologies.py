"""The topologies, and the modes of the LLM's engine, that `earshot parity` compares."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from trainer.parallel.topology import Topology, divisors

MAX_TENSOR, MAX_CONTEXT = 4, 4
EVEN, UNEVEN = 4, 7
"""A number of layers that can be divided evenly among two stages and among four chunks, and a number that cannot."""


def modes(topology: Topology) -> list[dict[str, Any]]:
    """Return the fields of every `trainer.parity.Mode` that is compared on this topology with `--modes`."""
    layers = (EVEN, UNEVEN) if topology.pp > 1 else (EVEN,)
    overlaps = ("none", "gradients", "both") if topology.without_context.dp > 1 else ("none",)
    combinations = itertools.product(layers, ("none", "pointwise", "selective", "full"), overlaps)
    return [{"num_layers": n, "recompute": recompute, "overlap": overlap} for n, recompute, overlap in combinations]


def topologies(max_ranks: int, experts: bool = False, max_virtual: int = 1, shard: int | None = None) -> list[Topology]:
    """Return the topologies of 1, 2, 4, … up to `max_ranks` processes.

    The encoders' expert-parallel size is 1, 2 (with different numbers of the three experts on the ranks) or 4 (with a
    rank that holds no expert). Context parallelism is only combined with size 1, since it does not affect the encoders.

    Args:
        max_ranks: The maximum number of processes.
        experts: True for an LLM with experts. Its experts are distributed over 1, 2 or 4 ranks. Each expert is on one
            rank, or divided among the tensor-parallel ranks. The encoders' expert-parallel size is then 1.
        max_virtual: The maximum number of virtual stages of a pipeline with two stages.
        shard: `parallel.audio_shard`. Topologies that do not allow this value, or whose number of processes is equal
            to it, are omitted.
    """
    if shard is not None:
        found = topologies(max_ranks, experts, max_virtual)
        return [replace(t, shard=shard) for t in found if t.world % shard == shard % t.ep == 0 and shard < t.world]
    worlds = [w for w in (1, 2, 4, 8, 16) if w <= max_ranks]
    grids = [
        (w, tp, pp) for w in worlds for tp in divisors(w) for pp in divisors(w // tp) if tp <= MAX_TENSOR and pp <= 4
    ]
    if experts:
        return [
            Topology(w, tp, pp, 1, ffn_ep, etp)
            for w, tp, pp in grids
            for ffn_ep in (1, 2, 4)
            for etp in ([tp] if ffn_ep == 1 else sorted({1, tp}))
            if (w // pp) % (ffn_ep * etp) == 0
        ]
    return [
        Topology(w, tp, pp, ep, vp=vp, cp=cp)
        for ep in (1, 2, 4)
        for w, tp, pp in grids
        for cp in (divisors(w // (tp * pp)) if ep == 1 else (1,))
        for vp in range(1, max_virtual + 1)
        if w % ep == 0 and (ep < 4 or tp * pp <= 2) and (vp == 1 or pp == 2) and cp <= MAX_CONTEXT
    ]


def name(topology: Topology) -> str:
    """Return the name of a topology, such as `DP2·TP2`. Sequence parallelism is on if TP > 1.

    `FFN-EP` is the number of ranks over which the FFN experts are distributed, and `ETP` is the number of ranks that
    share an FFN expert. `SHARD` is `parallel.audio_shard`.
    """
    sizes = [("DP", topology.dp), ("TP", topology.tp), ("CP", topology.cp), ("PP", topology.pp), ("VP", topology.vp)]
    sizes.append(("EP", topology.ep))
    if topology.ffn_ep > 1:
        sizes += [("FFN-EP", topology.ffn_ep), ("ETP", topology.expert_tp)]
    parts = [f"{k}{n}" for k, n in sizes if n > 1]
    if topology.shard is not None:
        parts.append(f"SHARD{topology.shard}")
    return "·".join(parts) or "1"
