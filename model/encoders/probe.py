"""The self-test of an unknown transformers encoder.

It measures the frame rate and the cost, and tests whether padding changes features.

The self-test runs on a CPU, in fp64, on a copy of the network with random weights and at most two layers.

Shapes: B clips, T audio samples, E frames at the encoder's own rate, D width.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto.feature_extraction_auto import feature_extractor_class_from_name

from model.lengths import SAMPLE_RATE

INPUTS = ("input_features", "input_values")
MASKS = ("attention_mask", "padding_mask", "input_features_mask", "feature_attention_mask")
SHORT, LONG = 11_111, 48_000
"""The lengths of the two clips, in samples."""
HOP_UNITS = (160, 64, 16, 1)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Probe:
    """The result of the self-test."""

    width: int
    """The width D of a frame."""
    hop: int
    """The number of audio samples between two frames."""
    time_axis: int
    """The time axis of the extractor's output."""
    leak: str
    """The reason why clips of unequal length must not be padded into one batch; empty if they may be padded."""
    flops: tuple[Fraction, Fraction]
    """The coefficients of the FLOPs of a window of T samples, flops[0]·T + flops[1]·T². They are exact fractions, so
    that all ranks compute the same plan."""


class Unsupported(Exception):
    """Raised when a network or an extractor cannot be used. The message is the reason."""


def make_network(hf_config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the audio encoder of a transformers config with random weights.

    Its dtype is `dtype`. None stands for torch's default dtype, which `from_pretrained(dtype=…)` sets when it loads an
    exported model.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return encoder_of(AutoModel.from_config(hf_config, dtype=dtype, trust_remote_code=False))


def encoder_of(network: Any) -> PreTrainedModel:
    """Return the encoder of an encoder-decoder model, or the model itself, in evaluation mode."""
    found: PreTrainedModel = network.get_encoder() if network.config.is_encoder_decoder else network
    if found.main_input_name not in INPUTS:
        raise Unsupported(f"{type(found).__name__} reads {found.main_input_name}, not audio features")
    for name, parameter in found.named_parameters():
        if "masked_spec_embed" in name:  # This parameter is used only in pre-training.
            parameter.requires_grad_(False)
    return found


def make_extractor(fields: Mapping[str, Any]) -> Any:
    """Return the feature extractor of transformers that preprocessor_config.json describes."""
    name = fields.get("feature_extractor_type")
    cls: Any = feature_extractor_class_from_name(name) if isinstance(name, str) else None
    if cls is None:
        raise Unsupported(f"preprocessor_config.json has feature_extractor_type = {name}, which transformers lacks")
    extractor = cls.from_dict(dict(fields))
    if extractor.sampling_rate != SAMPLE_RATE:
        raise Unsupported(f"its extractor needs {extractor.sampling_rate} Hz, but clips have {SAMPLE_RATE} Hz")
    return extractor


def extract(extractor: Any, wave: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the features of one clip with a first axis of size 1, and their mask (None if the extractor has none)."""
    made = extractor([wave.float().cpu().numpy()], sampling_rate=SAMPLE_RATE, return_tensors="pt")
    features = next((made[key] for key in INPUTS if key in made), None)
    if features is None:
        raise Unsupported(f"{type(extractor).__name__} returns {', '.join(made)}, but none of {', '.join(INPUTS)}")
    return features, next((made[key] for key in MASKS if key in made), None)


def joined(items: Sequence[tuple[Tensor, Tensor | None]], axis: int) -> tuple[Tensor, Tensor]:
    """Return features and masks of several clips, padded with zeros along the time axis."""
    size = max(features.shape[axis] for features, _ in items)
    rows, masks = [], []
    for features, mask in items:
        length = features.shape[axis]
        mask = torch.ones(1, length, dtype=torch.long) if mask is None else mask.long()
        after = (0, 0) * (features.dim() - 1 - axis)
        rows.append(nn.functional.pad(features, (*after, 0, size - length)))
        masks.append(nn.functional.pad(mask, (0, size - length)))
    return torch.cat(rows), torch.cat(masks)


def run(network: PreTrainedModel, features: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int] | None]:
    """Return the frames [B, max E, D] and the number of frames of each clip.

    The second value is None if neither the network nor the mask determines it. The mask must be on the CPU, so that the
    numbers can be read without waiting for the device.
    """
    legal = inspect.signature(network.forward).parameters
    name = next((key for key in MASKS if key in legal), None)
    fields = {network.main_input_name: features}
    # transformers reads the values of the mask, which meta tensors do not have.
    if mask is not None and name is not None and not features.is_meta:
        fields[name] = mask.to(features.device)
    if "output_attention_mask" in legal:
        fields["output_attention_mask"] = True  # type: ignore[assignment]
    out: Any = network(**fields)
    hidden: Tensor = out.last_hidden_state
    if hidden.dim() != 3 or hidden.shape[0] != features.shape[0]:
        raise Unsupported(f"{type(network).__name__} returns {tuple(hidden.shape)}, not the frames of every clip")
    lengths: Any = None
    count: Any = getattr(network, "_get_feat_extract_output_lengths", None)
    if name is None or mask is None or hidden.is_meta:
        return hidden, None
    if getattr(out, "attention_mask", None) is not None:
        lengths = out.attention_mask.sum(-1)
    elif mask.shape[1] == hidden.shape[1]:
        lengths = mask.sum(-1)
    elif count is not None:
        lengths = count(mask.sum(-1))
    return hidden, None if lengths is None else [min(int(n), hidden.shape[1]) for n in lengths]


def probe(hf_config: Any, extractor: Mapping[str, Any]) -> Probe:
    """Run the self-test. The result is the same in every process.

    Raises:
        Unsupported: If the network does not map the extractor's features to frames.
    """
    fields = {key: value for key, value in hf_config.to_dict().items() if key != "dtype"}
    return _probe(json.dumps(fields, sort_keys=True), json.dumps(dict(extractor), sort_keys=True))


@cache
def _probe(config_json: str, extractor_json: str) -> Probe:
    fields = json.loads(config_json)
    hf_config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    hf_config._attn_implementation = None
    extractor = make_extractor(json.loads(extractor_json))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), local_torch_dtype(torch.float32):
        torch.manual_seed(0)
        small, large = (_shortened(hf_config, layers) for layers in (1, 2))
        with torch.no_grad():
            for parameter in large.parameters():
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        waves = [0.1 * torch.randn(n, generator=generator) + 0.05 for n in (SHORT, LONG)]
        items = [extract(extractor, wave) for wave in waves]
        axes = [i for i, (a, b) in enumerate(zip(items[0][0].shape, items[1][0].shape, strict=True)) if a != b]
        if len(axes) != 1:
            raise Unsupported(f"{type(extractor).__name__} makes features of the same length for all clips")
        with torch.no_grad():
            frames = [run(large, *item)[0] for item in items]
        sizes, width = [f.shape[1] for f in frames], frames[0].shape[2]
        if sizes[1] <= sizes[0]:
            raise Unsupported(f"{type(large).__name__} makes {sizes[0]} and {sizes[1]} vectors, which are not frames")
        hop = _hop(LONG - SHORT, sizes[1] - sizes[0])
        cost = [[_flops(net, extractor, wave) for wave in waves] for net in (small, large)]
        leak = _leak(large.double(), items, axes[0])
    extra = getattr(hf_config, "num_hidden_layers", 2) - 2
    # The FLOPs per sample of both clips.
    short, long = (Fraction(two + extra * (two - one), n) for one, two, n in zip(*cost, (SHORT, LONG), strict=True))
    square = (long - short) / (LONG - SHORT)
    return Probe(width, hop, axes[0], leak, (short - square * SHORT, square))


def _hop(samples: int, frames: int) -> int:
    """Return the number of samples per frame, if `samples` samples give `frames` frames, plus or minus one.

    Multiples of the larger units in `HOP_UNITS` are preferred.
    """
    for unit in HOP_UNITS:
        hop = max(1, round(samples / frames / unit)) * unit
        if samples / (frames + 1) <= hop <= samples / max(1, frames - 1):
            return hop
    return round(samples / frames)


def _shortened(hf_config: Any, layers: int) -> PreTrainedModel:
    short = copy.deepcopy(hf_config)
    if getattr(short, "num_hidden_layers", 0) > layers:
        short.num_hidden_layers = layers
    return make_network(short, torch.float32).eval()


def _flops(network: PreTrainedModel, extractor: Any, wave: Tensor) -> int:
    """Return the forward FLOPs of one clip, including those of its features if they are computed by PyTorch."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(network, *extract(extractor, wave))
    return int(counter.get_total_flops())


def _leak(network: PreTrainedModel, items: Sequence[tuple[Tensor, Tensor | None]], axis: int) -> str:
    """Return a description of how padding changes features or gradients; empty if it does not."""
    items = [(features.double(), mask) for features, mask in items]
    alone = []
    for item in items:
        hidden, lengths = run(network, *item)
        alone.append(hidden[0, : None if lengths is None else lengths[0]])
    weights = [torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).to(a.dtype) for a in alone]
    hidden, lengths = run(network, *joined(items, axis))
    if lengths is None:
        return "it takes no mask, or does not say how many frames a clip has"
    if lengths != [len(a) for a in alone]:
        return f"clips of {[len(a) for a in alone]} frames have {lengths} in a padded batch"
    rows = [row[:n] for row, n in zip(hidden, lengths, strict=True)]
    change = max(float(((a - b).abs().max() / a.abs().max()).detach()) for a, b in zip(alone, rows, strict=True))
    if not change <= TOLERANCE:
        return f"padding changes features by {change:.1g}"
    learned = [p for p in network.parameters() if p.requires_grad]
    sums = [torch.stack([(f * w).sum() for f, w in zip(found, weights, strict=True)]).sum() for found in (alone, rows)]
    one, other = (torch.autograd.grad(total, learned, allow_unused=True) for total in sums)
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    floor = 1e-2 * max(float(a.abs().max()) for a, _ in pairs)
    change = max(float((a - b).abs().max()) / max(float(a.abs().max()), floor) for a, b in pairs)
    return "" if change <= TOLERANCE else f"padding changes gradients by {change:.1g}"
