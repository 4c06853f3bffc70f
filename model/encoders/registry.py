"""Functions that build audio encoders with random or pre-trained weights, and return their width and cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from model.config import EncoderConfig
from model.conv import use_matrix_products
from model.encoders.base import AudioEncoder, window_lengths
from model.encoders.family import ResolvedEncoder, encoder_error, family_of, one_line
from model.encoders.hf_config import resolve
from model.lengths import Windowing


def build_encoder(config: EncoderConfig) -> AudioEncoder:
    """Build an fp32 encoder in training mode on the default device.

    If `config.weights` (a local Hugging Face directory or a hub id) is set, all parameters are read from it. Otherwise,
    they are drawn from torch's global generator, as in transformers.

    Raises:
        UserError: If the config is invalid (see `hf_config.resolve`), or weights are unreadable, missing or of a
            different shape.
    """
    family, resolved = family_of(config), resolve(config)
    network = _random(config, resolved) if config.weights is None else _pretrained(config, resolved)
    use_matrix_products(network)
    return family.wrapper(network, resolved).train()


def encoder_dim(config: EncoderConfig) -> int:
    """Return the width of the encoder's features without building it."""
    return int(_resolve_once(_key(config)).hf_config.hidden_size)


def encoder_windowing(config: EncoderConfig) -> Windowing:
    """Return the rule by which the encoder cuts and pads clips, without building the encoder."""
    return _resolve_once(_key(config)).windowing


def encoder_flops(config: EncoderConfig, samples: int) -> float:
    """Estimate the forward FLOPs for one clip without building the encoder.

    A multiply-add counts as two. The families count convolutions, projections, mel filters and attention, but not
    norms, activations and Fourier transforms.
    """
    resolved, family = _resolve_once(_key(config)), family_of(config)
    if family.flops is not None:
        flops: Callable[[int], float] = partial(family.flops, resolved.hf_config)
    else:
        assert family.flops_of is not None, f"{config.family} has neither flops nor flops_of"
        flops = family.flops_of(resolved)
    lengths = window_lengths(samples, resolved.windowing.window_samples)
    return sum(flops(resolved.windowing.padded_samples(t)) for t in lengths)


def _random(config: EncoderConfig, resolved: ResolvedEncoder) -> PreTrainedModel:
    try:
        return family_of(config).network(resolved.hf_config)
    except (ValueError, RuntimeError) as error:
        raise encoder_error(config, f"config: {one_line(error)}", "correct the sizes in config") from error


def _pretrained(config: EncoderConfig, resolved: ResolvedEncoder) -> PreTrainedModel:
    family = family_of(config)
    network_class: Any = family.network
    load = network_class.from_pretrained
    renamed = {"key_mapping": dict(family.key_mapping)} if family.key_mapping else {}
    try:
        network, info = load(
            config.weights,
            config=resolved.hf_config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # `_refuse` reports the name of the tensor.
            output_loading_info=True,
            use_safetensors=True,  # Other files are pickles, which execute code when they are read.
            **renamed,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = f"weights = {config.weights}: cannot load them ({one_line(error)})"
        remedy = "use weights in safetensors format; check the files, or download them again"
        raise encoder_error(config, what, remedy) from error
    _refuse(config, "lack", sorted(info["missing_keys"]))
    misfits = sorted(info["mismatched_keys"])
    _refuse(
        config,
        "do not match the config in",
        [f"{name}, whose shape is {tuple(have)} instead of {tuple(want)}" for name, have, want in misfits],
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
