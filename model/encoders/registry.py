"""Build audio encoders by family name, with random or pre-trained weights, and tell their width and cost."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from model.config import EncoderConfig
from model.conv import use_matrix_products
from model.encoders.base import AudioEncoder, window_lengths
from model.encoders.conv_stack import ConvStackEncoder, conv_lengths, conv_stack_windowing, receptive_field
from model.encoders.hf_config import ResolvedEncoder, encoder_error, one_line, resolve
from model.encoders.hubert import RaggedHubert
from model.encoders.log_mel import FFT_SAMPLES, num_mel_frames
from model.encoders.wavlm import RaggedWavLM
from model.encoders.whisper import RaggedWhisperEncoder, Whisper, whisper_windowing
from model.lengths import Windowing

_NETWORKS: dict[str, type[PreTrainedModel]] = {
    "whisper": RaggedWhisperEncoder,
    "hubert": RaggedHubert,
    "wavlm": RaggedWavLM,
}


def build_encoder(config: EncoderConfig) -> AudioEncoder:
    """An fp32 encoder in training mode, on the default device.

    With `config.weights` (a local Hugging Face directory or a hub id) every parameter comes from there; without, they
    are drawn as transformers draws them, from torch's global generator.

    Raises:
        UserError: see `hf_config.resolve`; weights that are unreadable, missing or of another shape.
    """
    resolved = resolve(config)
    network = _random(config, resolved) if config.weights is None else _pretrained(config, resolved)
    use_matrix_products(network)
    if isinstance(network, RaggedWhisperEncoder):
        return Whisper(
            network, resolved.window_samples, config.length_mode, resolved.do_normalize, config.trailing_silence_sec
        ).train()
    hf_config = cast(Any, resolved.hf_config)
    return ConvStackEncoder(network, hf_config, resolved.window_samples, resolved.do_normalize).train()


def encoder_dim(config: EncoderConfig) -> int:
    """Width of the encoder's features, without building it."""
    return int(_resolve_once(_key(config)).hf_config.hidden_size)


def encoder_windowing(config: EncoderConfig) -> Windowing:
    """What one call of the encoder computes, as its module says. Builds nothing."""
    resolved = _resolve_once(_key(config))
    if config.family == "whisper":
        return whisper_windowing(resolved.window_samples, config.length_mode, config.trailing_silence_sec)
    return conv_stack_windowing(cast(Any, resolved.hf_config), resolved.window_samples)


def encoder_flops(config: EncoderConfig, samples: int) -> float:
    """Estimated forward FLOPs for one clip (a multiply-add counts two), for load balancing. Builds nothing.

    Counts convolutions, projections, mel filters and attention; leaves out norms, activations and Fourier transforms.
    """
    resolved, windowing = _resolve_once(_key(config)), encoder_windowing(config)
    window_flops = _whisper_flops if config.family == "whisper" else _conv_stack_flops
    lengths = window_lengths(samples, windowing.window_samples)
    return sum(window_flops(resolved.hf_config, windowing.padded_samples(t)) for t in lengths)


def _random(config: EncoderConfig, resolved: ResolvedEncoder) -> PreTrainedModel:
    try:
        return _NETWORKS[config.family](resolved.hf_config)
    except (ValueError, RuntimeError) as error:
        raise encoder_error(config, f"config: {one_line(error)}", "correct the sizes in config") from error


def _pretrained(config: EncoderConfig, resolved: ResolvedEncoder) -> PreTrainedModel:
    load: Any = _NETWORKS[config.family].from_pretrained
    # The whole Whisper is published: its encoder sits at `encoder.` or `model.encoder.`.
    renamed = {"key_mapping": {r"^(model\.)?encoder\.": ""}} if config.family == "whisper" else {}
    try:
        network, info = load(
            config.weights,
            config=resolved.hf_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # to name the tensor below
            output_loading_info=True,
            **renamed,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = f"weights = {config.weights}: cannot load them ({one_line(error)})"
        raise encoder_error(config, what, "check the files, or download them again") from error
    _refuse(config, "lack", sorted(info["missing_keys"]))
    misfits = sorted(info["mismatched_keys"])
    _refuse(
        config, "do not fit", [f"{name}: {tuple(have)} there, {tuple(want)} by config" for name, have, want in misfits]
    )
    return cast(PreTrainedModel, network)


def _refuse(config: EncoderConfig, verb: str, tensors: list[str]) -> None:
    if tensors:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        what = f"weights = {config.weights} {verb} {tensors[0]}{more}"
        remedy = f"use a complete {config.family} checkpoint whose config.json matches, and remove overrides in config"
        raise encoder_error(config, what, remedy)


def _key(config: EncoderConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


@lru_cache(maxsize=64)
def _resolve_once(key: str) -> ResolvedEncoder:
    return resolve(EncoderConfig(**json.loads(key)))


def _whisper_flops(hf: Any, samples: int) -> float:
    mel_frames = num_mel_frames(samples)
    frames = -(-mel_frames // 2)
    mel = 2.0 * (FFT_SAMPLES // 2 + 1) * hf.num_mel_bins * mel_frames
    convs = 6.0 * hf.d_model * (hf.num_mel_bins * mel_frames + hf.d_model * frames)
    return mel + convs + hf.encoder_layers * _layer_flops(frames, hf.d_model, hf.encoder_ffn_dim)


def _conv_stack_flops(hf: Any, samples: int) -> float:
    flops, channels = 0.0, 1
    steps = conv_lengths(max(samples, receptive_field(hf.conv_kernel, hf.conv_stride)), hf.conv_kernel, hf.conv_stride)
    for kernel, width, length in zip(hf.conv_kernel, hf.conv_dim, steps, strict=True):
        flops += 2.0 * kernel * channels * width * length
        channels = width
    frames, width = steps[-1], hf.hidden_size
    flops += 2.0 * frames * channels * width
    flops += 2.0 * frames * hf.num_conv_pos_embeddings * width * width / hf.num_conv_pos_embedding_groups
    layer = _layer_flops(frames, width, hf.intermediate_size)
    if hf.model_type == "wavlm":  # gate projection, gated bias and its addition to the scores
        layer += 16.0 * frames * width + 3.0 * hf.num_attention_heads * frames**2
    return flops + hf.num_hidden_layers * layer


def _layer_flops(frames: int, width: int, ffn_width: int) -> float:
    return 8.0 * frames * width**2 + 4.0 * frames**2 * width + 4.0 * frames * width * ffn_width
