"""Measurements of the memory of a real rank, for comparison with a plan."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.plan.states import States


def held_states(audio: AudioEngine, llm: LLMEngine) -> States:
    """Return the bytes of weights, gradients and optimizer state on this rank. Each storage is counted once.

    At least one step must have been taken, since AdamW allocates its moments in the first step.
    """
    return _llm_states(llm) + _audio_states(audio)


def _llm_states(llm: LLMEngine) -> States:
    parameters = [p for _, p in llm.parameters()]
    weights = storages(parameters)
    gradients = storages(p.main_grad for p in parameters if hasattr(p, "main_grad"))
    optimizer: dict[int, int] = {}
    for one in [] if llm.optimizer is None else llm.optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            optimizer |= storages(group["params"])
        for state in one.optimizer.state.values():
            optimizer |= storages(t for t in state.values() if isinstance(t, Tensor))
    return _without_aliases(weights, gradients, optimizer)


def _audio_states(audio: AudioEngine) -> States:
    zero = audio.zero
    weights = storages(p.ds_tensor for _, p in audio.named_parameters())  # type: ignore[attr-defined]
    optimizer = storages(zero.fp32_partitioned_groups_flat)
    for state in zero.optimizer.state.values():
        optimizer |= storages(t for t in state.values() if isinstance(t, Tensor))
    return _without_aliases(weights, storages([zero.grad_partitions_flat_buffer]), optimizer)


def _without_aliases(weights: dict[int, int], gradients: dict[int, int], optimizer: dict[int, int]) -> States:
    own = {k: n for k, n in optimizer.items() if k not in weights}
    return States(sum(weights.values()), sum(gradients.values()), sum(own.values()))


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each storage that backs one of `tensors`, by the storage's address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found
