"""Detection of silent data corruption, by a bitwise comparison of the weights of the LLM's replicas.

After every update, Megatron's distributed optimizer sends each part of the weights from the rank that updated it to all
replicas. If the weights of a replica differ, its device or memory is faulty, and its gradients would spread the fault
to the other replicas.
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

    Any change to a single element changes the digest. Random changes of several elements are missed with a probability
    of about 2⁻⁶⁴.

    Args:
        weights: The tensors on `device`, in a fixed order. If replicas share FFN experts, the weights of these experts
            must not be included.
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
    """Find the ranks whose weights differ from the weights of most replicas.

    If only two replicas exist and differ, or no majority exists, it is unknown which replica is right.

    Args:
        digests: [world] the digest of each rank.
        topology: The grid of ranks, without context parallelism, so that ranks with equal weights are replicas.

    Returns:
        The differing ranks in ascending order, and whether the result is certain. If it is unknown which replica is
        right, all ranks that hold this part of the weights are returned, and the second value is false.
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
