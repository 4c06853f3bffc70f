"""Detection of silent data corruption: the replicas of the LLM must hold the same weights, bit by bit.

After every update, Megatron's distributed optimizer sends each part of the weights from the rank that updated it to all
replicas. A replica whose weights differ has a faulty device or memory. Its gradients would spread the fault to the
others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from trainer.parallel.topology import Topology

_CHUNK = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weight_digest(weights: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return a digest of the bits of weights, an int64 scalar on `device`. The host does not wait for the device.

    Any change of a single element changes the digest. Other changes are missed with a probability of about 2⁻⁶⁴, unless
    they are constructed to be missed.

    Args:
        weights: The tensors on `device`, in a fixed order. Those of an LLM's experts must not be among them if its
            replicas share the experts.
        device: The device of the weights.
    """
    generator = torch.Generator().manual_seed(0)
    # Odd factors are invertible modulo 2⁶⁴, so the product of a factor and a changed element changes.
    factors = (torch.randint(-(2**62), 2**62, (_CHUNK,), generator=generator) * 2 + 1).to(device)
    digest = torch.zeros((), dtype=torch.int64, device=device)
    for weight in weights:
        bits = weight.detach().contiguous().view(-1).view(_BITS[weight.element_size()])
        for chunk in bits.split(_CHUNK):
            digest = digest * 6364136223846793005 + (chunk.long() * factors[: len(chunk)]).sum()
    return digest


def differing_ranks(digests: np.ndarray, topology: Topology) -> tuple[list[int], bool]:
    """Return the ranks whose weights differ from those of most replicas, in ascending order, and whether it is certain.

    If two replicas differ, or the replicas are divided evenly, it is not known which of them is right. All ranks that
    hold this part of the weights are then returned, and the second value is false.

    Args:
        digests: [world] the digest of each rank.
        topology: The grid of ranks, without context parallelism, so that ranks with equal weights are replicas.
    """
    found: list[int] = []
    is_certain = True
    for pp in range(topology.pp):
        for tp in range(topology.tp):
            ranks = [topology.rank_of(dp, pp, tp) for dp in range(topology.dp)]
            counted = Counter(int(digests[rank]) for rank in ranks).most_common()
            is_clear = len(counted) == 1 or counted[0][1] > counted[1][1]
            is_certain = is_certain and is_clear
            found += [rank for rank in ranks if not is_clear or int(digests[rank]) != counted[0][0]]
    return sorted(found), is_certain
