"""The states of the random generators: torch's generators on the host and on this rank's device, and Megatron's."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from trainer.parallel.cpu import megatron_calls

_HOST, _DEVICE, _MEGATRON = "host", "device", "megatron/"


def get_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of all generators as uint8 tensors by name."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {_HOST: torch.get_rng_state()}
    if device.type == "cuda":
        states[_DEVICE] = torch.cuda.get_rng_state(device)
    with megatron_calls():
        tracked = get_cuda_rng_tracker().get_states()
    return states | {_MEGATRON + name: state.cpu() for name, state in tracked.items()}


def set_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore states that `get_states` returned on the same rank of an identical rank grid."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with megatron_calls():
        tracked = {k.removeprefix(_MEGATRON): state for k, state in states.items() if k.startswith(_MEGATRON)}
        get_cuda_rng_tracker().set_states(tracked)
    torch.set_rng_state(states[_HOST])
    if device.type == "cuda" and _DEVICE in states:
        torch.cuda.set_rng_state(states[_DEVICE], device)


def reseed(states: dict[str, Tensor]) -> None:
    """Seed the generators of a run that resumes on a different rank grid.

    The seed is derived from rank 0's saved states, so that no random numbers are repeated.

    Args:
        states: The saved states of rank 0.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    digest = hashlib.sha256(states[_HOST].numpy().tobytes()).digest()
    seed = int.from_bytes(digest[:4], "little") >> 1
    with megatron_calls():
        model_parallel_cuda_manual_seed(seed)
    torch.default_generator.manual_seed(seed)
