"""Insertion of audio embeddings at the placeholder positions of a token sequence."""

from __future__ import annotations

from torch import Tensor


def splice(text: Tensor, audio_mask: Tensor, audio: Tensor) -> Tensor:
    """Replace the rows of `text` at which `audio_mask` is true with the rows of `audio`, in order.

    Args:
        text: The token embeddings [L, D].
        audio_mask: The placeholder positions [L], bool.
        audio: The audio embeddings [number of true positions, D].

    Returns:
        The embeddings [L, D]. Gradients reach `text` only where the mask is false.
    """
    assert audio.shape[0] == int(audio_mask.sum()), (audio.shape, int(audio_mask.sum()))
    return text.masked_scatter(audio_mask[:, None], audio.to(text.dtype))
