"""The noise of routers during training, which depends on the seed, the step and the sample, but not on the rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from trainer.parallel.plan import Ints

RouterNoise = Callable[[int, Batch], Tensor | None]
"""A function of the number of completed steps and a batch, which returns the noise [clips, gates, experts] or None."""


def sample_digest(key: str) -> int:
    """Return a hash of a sample's key, from 0 to 2**63 - 1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def jitter_ids(seed: int, step: int, digests: Ints) -> Ints:
    """Return an identity for each sample in a step, from which the jitter of the LLM's routers is computed.

    Args:
        seed: The seed of the jitter.
        step: The number of steps completed before this one.
        digests: The hashes [n] of the samples' keys; see `sample_digest`.

    Returns:
        The identities [n] int64. `model.llm.jitter` hashes them again.
    """
    return digests ^ sample_digest(f"{seed}/{step}/jitter")


def router_noise(model: ModelConfig, seed: int, step: int, batch: Batch) -> Tensor | None:
    """Return standard normal noise [clips, gates, experts] for the router, or None if the recipe disables noise.

    The noise depends on the seed, the step, the sample and the name of the expert. It does not depend on the rank or on
    the other experts.

    Args:
        model: The model's config.
        seed: The seed of the noise.
        step: The number of steps completed before this one.
        batch: This rank's part of the global batch.
    """
    router = model.router
    if router.noise_std == 0 or not batch.clip_owner or not model.experts:
        return None
    rows = []
    for clip, owner in enumerate(batch.clip_owner):
        text = f"{seed}/{step}/{batch.samples[owner].key}/{clip - batch.clip_owner.index(owner)}"
        columns = []
        for expert in model.experts:
            digest = hashlib.sha256(f"{text}/{expert.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            columns.append(torch.randn(len(router.gates), generator=generator))
        rows.append(torch.stack(columns, dim=1))
    return torch.stack(rows)
