"""An encoder family in one file: 40 ms of the waveform per frame, two small layers on each frame."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, DrawnAsTransformers, call_layer
from model.encoders.family import EncoderFamily, ResolvedEncoder
from model.lengths import Windowing

TOY_FRAME_SAMPLES = 640
"""25 Hz: half as many frames as the mixture has."""


class ToyConfig(PreTrainedConfig):
    """The sizes of the network."""

    model_type = "toy"
    hidden_size: int = 16
    num_hidden_layers: int = 2
    initializer_range: float = 0.1


class ToyNetwork(DrawnAsTransformers, PreTrainedModel):
    """A linear map of every frame's samples, followed by residual layers."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embed = nn.Linear(TOY_FRAME_SAMPLES, size)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.GELU()) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(self, frames: Tensor, recompute: bool = False) -> Tensor:
        """Encode frames [ΣE, 640] to [ΣE, D]."""
        hidden = self.embed(frames)
        for layer in self.layers:
            hidden = hidden + call_layer(layer, hidden, recompute=recompute)
        return hidden


class ToyEncoder(AudioEncoder):
    """The network as an `AudioEncoder`."""

    def __init__(self, encoder: ToyNetwork, resolved: ResolvedEncoder) -> None:
        super().__init__(encoder.config.hidden_size, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`. The last frame of a window is filled up with zeros."""
        size = self.frame_samples
        frames = [F.pad(w, (0, -len(w) % size)).view(-1, size) for w in windows.split()]
        hidden: Tensor = self.encoder(torch.cat(frames).to(self.dtype), recompute=self.recompute)
        return hidden


def _windowing(_config: EncoderConfig, _hf_config: ToyConfig, window_samples: int) -> Windowing:
    return Windowing(window_samples)


def _flops(hf_config: Any, samples: int) -> float:
    frames = -(-samples // TOY_FRAME_SAMPLES)
    width = hf_config.hidden_size
    return 2.0 * frames * width * (TOY_FRAME_SAMPLES + hf_config.num_hidden_layers * width)


TOY = EncoderFamily(
    config_class=ToyConfig,
    network=ToyNetwork,
    wrapper=ToyEncoder,
    windowing=_windowing,
    flops=_flops,
    frame_samples=TOY_FRAME_SAMPLES,
)
