"""The state of the audio engine and of the LLM's engine, as shards of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from model.errors import UserError
from trainer.checkpoint import audio_state, llm_state
from trainer.checkpoint.layout import Shard
from trainer.checkpoint.reader import Reader

if TYPE_CHECKING:
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine


class Engines(Protocol):
    """An object with the two engines whose state is saved, such as `trainer.training.step.Step`."""

    @property
    def audio(self) -> AudioEngine: ...

    @property
    def llm(self) -> LLMEngine: ...


class EngineState:
    """Access to the state of both engines by the names of tensors."""

    def shards(self, engines: Engines) -> dict[str, list[Shard]]:
        """Return all shards that this rank holds, by family of files."""
        return {"audio": audio_state.shards(engines.audio), "llm": llm_state.shards(engines.llm)}

    def tensor_names(self, engines: Engines) -> set[str]:
        """Return the names of the audio modules' tensors that this rank holds, and of all tensors of the LLM."""
        audio = {shard.name for shard in audio_state.shards(engines.audio)}
        return audio | {name for name, _ in engines.audio.named_parameters()} | llm_state.tensor_names(engines.llm)

    def set_steps(self, engines: Engines, steps: dict[str, int]) -> None:
        """Set the number of updates of each trainable parameter. `steps` contains the numbers by tensor name."""
        audio_state.set_steps(engines.audio, steps)
        llm_state.set_steps(engines.llm, steps)

    def refresh(self, engines: Engines) -> None:
        """Copy the fp32 weights to the weights that the forward pass reads.

        Collective: every rank of the world must call it.
        """
        audio_state.refresh(engines.audio)
        llm_state.refresh(engines.llm)


ENGINE_STATE = EngineState()


def check(reader: Reader, shards: Sequence[Shard], names: set[str]) -> None:
    """Check that a checkpoint contains exactly the tensors of the model, in their shapes.

    Args:
        reader: The reader of the checkpoint.
        shards: The shards that this rank holds.
        names: The names of all tensors of the model.

    Raises:
        UserError: If the checkpoint has a tensor that the model lacks, lacks a tensor of the model, or has a tensor of
            a different shape.
    """
    surplus = sorted(set(reader.manifest.tensors) - names)
    if surplus:
        raise UserError(f"holds {surplus[0]}, which the model does not have; restore the recipe of the run")
    for shard in shards:
        reader.check(shard)


@torch.no_grad()
def fill(shards: Sequence[Shard], reader: Reader, heartbeat: Callable[[str], None]) -> None:
    """Read the values of shards from a checkpoint into the memory of the engines.

    Args:
        shards: The shards that this rank holds.
        reader: The reader of the checkpoint.
        heartbeat: A function that is called with a description of every tensor before it is read.
    """
    for shard in shards:
        heartbeat(f"the read of {shard.name}")
        reader.fill(shard)
