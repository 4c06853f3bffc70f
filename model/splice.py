"""Audio embeddings into the placeholder positions of a token sequence."""

from __future__ import annotations

from torch import Tensor


def splice(text: Tensor, audio_mask: Tensor, audio: Tensor) -> Tensor:
    """Put `audio` where `audio_mask` is set, in order.

    Args:
        text: token embeddings [L, D] (what they hold at placeholder positions is dropped).
        audio_mask: [L] bool.
        audio: [number of set positions, D].

    Returns:
        [L, D]; gradients reach `text` only where the mask is clear.
    """
    assert audio.shape[0] == int(audio_mask.sum()), (audio.shape, int(audio_mask.sum()))
    return text.masked_scatter(audio_mask[:, None], audio.to(text.dtype))
