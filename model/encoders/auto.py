"""A family for any audio encoder in transformers. It runs transformers' feature extractor and model after a self-test.

Shapes: B windows, T audio samples, E frames at the encoder's own frame rate, F frames of 20 ms, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AutoModel, FeatureExtractionMixin, PreTrainedModel

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, at_mixture_rate, join_frames
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error, one_line
from model.encoders.hf_config import WHOLE_EXTRACTOR
from model.encoders.probe import (
    Probe,
    Unsupported,
    encoder_of,
    extract,
    joined,
    make_extractor,
    make_network,
    probe,
    run,
)
from model.errors import UserError
from model.lengths import FRAME_SAMPLES, Windowing, num_frames

MIN_SAMPLES = 4800
"""The length to which shorter windows are padded with zeros."""


class AutoNetwork:
    """A factory for the audio encoder that a transformers config describes.

    It takes the place of the network class of other families.
    """

    def __new__(cls, hf_config: Any) -> Any:
        """Return the encoder with random weights."""
        try:
            return make_network(hf_config)
        except Unsupported as error:
            raise _refused(hf_config, error) from error

    @staticmethod
    def from_pretrained(weights: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the encoder with the weights from a folder or hub id, and a mapping that lists the missing weights."""
        network, info = AutoModel.from_pretrained(weights, trust_remote_code=False, **options)
        missing = [key for key in info["missing_keys"] if "masked_spec_embed" not in key]
        try:
            return encoder_of(network), {**info, "missing_keys": missing}
        except Unsupported as error:
            raise _refused(network.config, error) from error


class AutoEncoder(AudioEncoder):
    """An `AudioEncoder` that wraps an encoder from transformers. Parameters under `encoder.` keep transformers' names.

    The network stays in evaluation mode: batch norms use the statistics of the checkpoint, and dropout is off. If the
    self-test found that padding changes features, only windows of equal length are encoded together. Layers are not
    recomputed, but `train.recompute_encoder_calls` can recompute whole encoder calls.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: PreTrainedModel, resolved: ResolvedEncoder) -> None:
        found = probed(resolved)
        super().__init__(found.width, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.probe = found
        self.extractor = make_extractor(resolved.extractor[WHOLE_EXTRACTOR])

    def train(self, mode: bool = True) -> AutoEncoder:
        """Set the mode of all modules except the network, which stays in evaluation mode."""
        super().train(mode)
        nn.Module.train(self.encoder, False)
        return self

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`."""
        items = [self._extract(wave) for wave in windows.split()]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (features, _) in enumerate(items):
            groups[() if not self.probe.leak else tuple(features.shape)].append(i)
        frames: list[Tensor] = [windows.values] * len(items)
        for members in groups.values():
            chosen = [items[i] for i in members]
            features, mask = joined(chosen, self.probe.time_axis)
            masked = not self.probe.leak or chosen[0][1] is not None
            device = windows.values.device
            hidden, lengths = run(self.encoder, features.to(device, self.dtype), mask if masked else None)
            for row, i in enumerate(members):
                frames[i] = hidden[row, : hidden.shape[1] if lengths is None else max(1, lengths[row])]
        wanted = tuple(num_frames(t) for t in windows.lengths)
        if self.probe.hop == FRAME_SAMPLES:
            return torch.cat([join_frames(f[None], [len(f)], [n]) for f, n in zip(frames, wanted, strict=True)])
        return at_mixture_rate(Ragged.of(frames), self.probe.hop, wanted).values

    def _extract(self, wave: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the features and the mask of one window. For a window on the meta device, silence is used instead."""
        known = torch.zeros(len(wave), device="cpu") if wave.is_meta else wave
        with torch.device("cpu"):
            return extract(self.extractor, functional.pad(known, (0, max(0, MIN_SAMPLES - len(known)))))


def probed(resolved: ResolvedEncoder) -> Probe:
    """Return the result of the encoder's self-test.

    Raises:
        UserError: If the encoder is not supported.
    """
    extractor = resolved.extractor[WHOLE_EXTRACTOR]
    if not isinstance(extractor, dict):
        raise UserError(
            "family = auto: there is no feature extractor; set weights, or set config.extractor to the content "
            "of preprocessor_config.json"
        )
    config: Any = resolved.hf_config
    try:
        found = probe(config, extractor)
        if found.width != config.hidden_size:
            raise Unsupported(f"its features have {found.width} values, but its hidden_size is {config.hidden_size}")
    except (Unsupported, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise _refused(config, error) from error
    return found


def _refused(hf_config: Any, error: Exception) -> UserError:
    what = f"family = auto: {type(hf_config).__name__} is not supported ({one_line(error)})"
    return UserError(f"{what}; use another checkpoint, or add a family")


def _windowing(_config: EncoderConfig, _hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. Windows are encoded at their own length, but shorter ones are padded to `MIN_SAMPLES`."""
    return Windowing(window_samples, MIN_SAMPLES)


def _check(config: EncoderConfig, hf_config: Any) -> None:
    """Check that the encoder's config has a `hidden_size`."""
    if not isinstance(getattr(hf_config, "hidden_size", None), int):
        raise encoder_error(config, "its config has no hidden_size", "use another checkpoint")


def _flops_of(resolved: ResolvedEncoder) -> Callable[[int], float]:
    """Return an estimator of a window's forward FLOPs by its length, which is fitted to measurements at two lengths."""
    linear, square = probed(resolved).flops
    return lambda samples: float(round(linear * samples + square * samples**2))


def _notes(resolved: ResolvedEncoder) -> list[str]:
    """Return notes about the encoder for the user."""
    leak = probed(resolved).leak
    return [f"only clips of equal length are encoded together, because {leak}"] if leak else []


AUTO = EncoderFamily(
    config_class=None,
    network=AutoNetwork,
    wrapper=AutoEncoder,
    windowing=_windowing,
    flops=None,
    flops_of=_flops_of,
    check=_check,
    normalizes=None,
    extractor_fields={WHOLE_EXTRACTOR: None},
    feature_extractor=FeatureExtractionMixin,
    notes=_notes,
    gathers_per_module=False,
)
