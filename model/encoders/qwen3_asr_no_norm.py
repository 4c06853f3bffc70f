"""Qwen3-ASR's encoder without its last LayerNorm, whose frames are repeated so that an adapter can recover them.

Each frame is repeated for every 20 ms that it covers. The adapter `pooling_perceptron` with `strides: [4]` and
`block_frames: 50` averages equal frames, so every audio token is one frame, and then applies the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3ASREncoderConfig

from model.encoders.qwen3_asr import QWEN3_ASR, STRIDE, Qwen3ASR, RaggedQwen3ASREncoder, convolved
from model.lengths import num_frames
from model.transfer import to_device


class UnnormedQwen3ASREncoder(RaggedQwen3ASREncoder):
    """`RaggedQwen3ASREncoder` whose output is not normalized."""

    def __init__(self, config: Qwen3ASREncoderConfig) -> None:
        super().__init__(config)
        self.ln_post = nn.Identity()  # type: ignore[assignment]


class RepeatedQwen3ASR(Qwen3ASR):
    """`Qwen3ASR` whose frames are repeated instead of interpolated."""

    def at_mixture_rate(self, hidden: Tensor, samples: Sequence[int], mel_lengths: Sequence[int]) -> Tensor:
        """Return the frame that covers each 20 ms of all windows, [ΣF, D]; see `Qwen3ASR.at_mixture_rate`."""
        rows, first, block = [], 0, self.chunk // 2
        for length, mel_frames in zip(samples, mel_lengths, strict=True):
            units = np.arange(num_frames(length)).clip(max=-(-mel_frames // 2) - 1)
            rows.append(first + units // block * convolved(self.chunk) + units % block // STRIDE)
            whole, rest = divmod(mel_frames, self.chunk)
            first += whole * convolved(self.chunk) + (convolved(rest) if rest else 0)
        return F.embedding(to_device(np.concatenate(rows), hidden.device), hidden)


QWEN3_ASR_NO_NORM = replace(QWEN3_ASR, network=UnnormedQwen3ASREncoder, wrapper=RepeatedQwen3ASR)
