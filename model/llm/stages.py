"""The division of the LLM's layers into chunks for pipeline stages, and the modes of recomputation.

With V virtual stages, each of the PP pipeline stages holds V chunks of consecutive layers. The PP·V chunks are numbered
in the order of the model. Chunk c is virtual stage c // PP of pipeline stage c % PP.
"""

from __future__ import annotations

from typing import Literal

from model.errors import UserError

Recompute = Literal["none", "pointwise", "selective", "full"]
"""The mode of recomputation in the backward pass. `none` recomputes nothing. `pointwise` recomputes norms and
activation functions. `selective` recomputes attention as well, but no matmul of a linear layer. `full` recomputes whole
layers and saves only their inputs."""
PARTIAL: tuple[Recompute, ...] = ("pointwise", "selective")
"""The modes that recompute parts of layers."""


def check_recompute(mode: Recompute) -> None:
    """Check the mode of recomputation of an LLM with experts.

    Raises:
        UserError: If the mode recomputes parts of layers.
    """
    if mode in PARTIAL:
        raise UserError(f"train.recompute_llm = {mode}: must be none or full for an LLM with experts")


def chunk_layers(num_layers: int, pp_size: int, vp_size: int = 1) -> tuple[int, ...]:
    """Return the number of layers of each chunk, in the order of the model.

    The numbers differ by at most one. If some chunks must have one layer fewer, they are chosen in this order: the last
    chunk, because it also contains the output layer and the loss; chunk 0, which contains the embedding; and then
    chunks 1, 2 and so on, because early stages hold the activations of more micro-batches.

    Args:
        num_layers: The number of layers of the LLM, at least one per chunk.
        pp_size: The number of pipeline stages.
        vp_size: The number of virtual stages.
    """
    count = pp_size * vp_size
    assert num_layers >= count, (num_layers, count)
    largest = -(-num_layers // count)
    order = [count - 1, *range(count - 1)]
    fewer = set(order[: count * largest - num_layers])
    return tuple(largest - (chunk in fewer) for chunk in range(count))


def stage_chunks(num_layers: int, pp_size: int, vp_size: int, stage: int) -> tuple[int, ...]:
    """Return the number of layers of each chunk of the pipeline stage `stage`, in the order of its virtual stages."""
    return chunk_layers(num_layers, pp_size, vp_size)[stage::pp_size]
