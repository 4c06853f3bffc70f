"""Activation memory of the audio side. Encoder calls are traced with the real modules, and the rest is computed.

The audio side consists of all modules that are not part of the LLM. An encoder call is one forward pass of an encoder
over a batch of clips. All clips of a step are encoded before the LLM runs, so the activations that the calls keep for
the backward pass add up. In shapes, B is the number of windows in a call and F is the number of frames of the longest
window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.audio_tower import AudioTower
from model.batch import Ragged
from model.conv import use_matrix_products
from model.lengths import FRAME_SAMPLES, Windowing, num_frames
from model.losses.ctc import PartwiseLinear
from trainer.engine.optim import OptimConfig, param_groups
from trainer.plan.fake_ranks import META
from trainer.plan.states import FP32_BYTES
from trainer.plan.trace import Traced, extrapolated, trace
from trainer.plan.workload import EncoderWork

_SHAPES = ((1, 1), (1, 2), (1, 4), (3, 4))
"""The shapes of the calls that are traced, as (number of clips, length in quarters of the longest clip). They determine
the coefficients of the terms 1, B·F, B·F² and F²."""
_MOST_FRAMES = 800
"""The number of frames of the longest clip for which an encoder is traced, unless its windows are shorter."""


@dataclass(frozen=True)
class CallCost:
    """The memory, memory traffic and attention FLOPs of an encoder call, as functions of the call's shape.

    Each function is stored as four coefficients of the terms 1, B·F, B·F² and F². It is exact for an encoder
    whose cost is a sum of these terms.
    """

    weights: tuple[float, ...]
    """The bytes that a call keeps for its backward pass."""
    forward: tuple[float, ...]
    """The bytes that the forward pass reads and writes, except in matmuls and attention."""
    backward: tuple[float, ...]
    """The bytes that the backward pass reads and writes, except in matmuls and attention."""
    attention: tuple[tuple[float, ...], tuple[float, ...]]
    """The FLOPs of fused attention in the forward pass, and in forward passes that the backward pass recomputes."""
    kernels: tuple[int, int]
    """The number of kernels that the (forward, backward) pass launches."""
    windowing: Windowing
    """The windowing of the encoder."""

    def kept(self, clips: Sequence[int]) -> float:
        """Return the number of bytes that a call keeps for clips of these lengths, given in audio samples."""
        return float(np.dot(self.weights, self._terms(clips)))

    def moved(self, clips: Sequence[int]) -> tuple[float, float]:
        """Return the bytes that the (forward, backward) pass reads and writes for clips of these lengths."""
        terms = self._terms(clips)
        return float(np.dot(self.forward, terms)), float(np.dot(self.backward, terms))

    def attention_flops(self, clips: Sequence[int]) -> tuple[float, float]:
        """Return the FLOPs of fused attention in the (forward pass, recomputed forward passes) for these clips."""
        terms = self._terms(clips)
        forward, again = (float(np.dot(coefficients, terms)) for coefficients in self.attention)
        return forward, again

    def _terms(self, clips: Sequence[int]) -> tuple[float, ...]:
        windows = sum(map(self.windowing.num_windows, clips))
        return _terms(windows, num_frames(max(map(self.windowing.padded_samples, clips))))


@dataclass(frozen=True)
class AudioMemory:
    """The memory of one rank's audio side, in bytes."""

    kept: int
    """The memory of waveforms, encoders, mixture, adapter and projector, held from the forward to the backward pass."""
    forward: int
    """The memory in addition to `kept` at the peak of the forward pass."""
    backward: int
    """The memory in addition to `kept` at the peak of the backward pass, including gradients that ZeRO-3 reduces."""


class EncoderTracer:
    """A tracer of the encoder calls of an audio tower, which caches its results.

    All layers of an encoder have the same shapes. An encoder is therefore traced with one layer and with two layers,
    and every further layer is assumed to need as much memory as the second one. An encoder without a list `layers` is
    traced as a whole.

    Args:
        tower: The audio tower with all encoder experts, on the meta device.
        optim: The optimizer settings. Frozen parts keep fewer activations for the backward pass.
        dtype: The dtype of weights and activations.
        recompute: The value of `train.recompute_encoders`.
        device: The type of device that the ranks run on. On `cpu`, convolutions keep their unfolded windows.
        ridge: The number of FLOPs per byte above which a convolution is not bound by memory.
    """

    def __init__(
        self,
        tower: AudioTower,
        optim: OptimConfig,
        dtype: torch.dtype,
        recompute: bool,
        device: str,
        ridge: float = math.inf,
    ) -> None:
        self.tower, self.device, self.recompute = tower.to(dtype).train(), device, recompute
        self._ridge = ridge
        if device == "cpu":
            use_matrix_products(self.tower, ("cpu", "meta"))
        param_groups(optim, [(f"audio.{n}", p, p.dim()) for n, p in tower.named_parameters()])
        for parameter in tower.parameters():
            if parameter.requires_grad:  # As in ZeRO-3, full gradients are not kept.
                parameter.register_post_accumulate_grad_hook(_forget)
        tower.set_recompute(recompute)
        self._calls: dict[str, CallCost] = {}
        self._traced: dict[tuple[str, tuple[int, ...]], Traced] = {}
        self._warm: set[str] = set()

    def calls(self, name: str) -> CallCost:
        """Return the costs of a call of the encoder `name` as functions of its shape."""
        if name not in self._calls:
            windowing = _inner(self.tower.encoder(name)).windowing
            window = windowing.window_samples
            fixed = windowing.least_samples == window
            quarter = min(_MOST_FRAMES, num_frames(window)) // 4
            shapes = [(window,) * b for b in (1, 2)] if fixed else [_clips(b, q * quarter) for b, q in _SHAPES]
            found = [self.traced(name, clips) for clips in shapes]
            terms = np.array([_terms(len(clips), num_frames(windowing.padded_samples(clips[0]))) for clips in shapes])

            def fit(values: list[int]) -> tuple[float, ...]:
                if fixed:
                    one, two = values
                    return 2.0 * one - two, (two - one) / num_frames(window), 0.0, 0.0
                return tuple(map(float, np.linalg.lstsq(terms, np.array(values, dtype=float), rcond=None)[0]))

            self._calls[name] = CallCost(
                fit([one.kept for one in found]),
                fit([one.moved_forward for one in found]),
                fit([one.moved_backward for one in found]),
                (fit([one.attention_forward for one in found]), fit([one.attention_again for one in found])),
                (found[-1].kernels_forward, found[-1].kernels_backward),
                windowing,
            )
        return self._calls[name]

    def learned(self, name: str) -> int:
        """Return the number of trainable parameters of the encoder `name`."""
        return sum(p.numel() for p in self.tower.encoder(name).parameters() if p.requires_grad)

    def traced(self, name: str, clips: tuple[int, ...]) -> Traced:
        """Trace a call of the encoder `name` with clips of these lengths, given in audio samples."""
        if (name, clips) not in self._traced:
            module = self.tower.encoder(name)
            owner = _owner_of_layers(_inner(module))
            layers = [] if owner is None else list(owner.layers)
            if name not in self._warm:
                self._warm.add(name)
                with META, _only(owner, layers[:1]):
                    module(Ragged(torch.empty(1600), (1600,)))  # creates constants that the module keeps
            found = []
            for count in range(1, min(2, len(layers)) + 1):
                with _only(owner, layers[:count]):
                    found.append(self._trace(module, clips))
            whole = self._trace(module, clips) if owner is None else extrapolated(found, len(layers))
            self._traced[name, clips] = whole
        return self._traced[name, clips]

    def _trace(self, module: nn.Module, clips: tuple[int, ...]) -> Traced:
        existing = [*module.parameters(), *module.buffers()]
        with META:
            return trace(
                lambda: module(Ragged(torch.empty(sum(clips)), clips)).values, existing, self.device, self._ridge
            )


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _owner_of_layers(encoder: Any) -> Any:
    """Return the module of an encoder that has the list `layers`; None if there is none, as in some `auto` encoders."""
    inner = encoder.encoder
    for owner in (inner, getattr(inner, "encoder", None)):
        if isinstance(getattr(owner, "layers", None), nn.ModuleList):
            return owner
    return None


@contextmanager
def _only(owner: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let `owner` have only these layers during the block; do nothing if `owner` is None."""
    if owner is None:
        yield
        return
    before, owner.layers = owner.layers, nn.ModuleList(layers)
    try:
        yield
    finally:
        owner.layers = before


def audio_memory(
    tracer: EncoderTracer,
    work: Sequence[EncoderWork],
    rank: int,
    loaded_samples: Sequence[int],
    reduce_elements: int,
    learned: int,
    recompute_calls: bool = False,
) -> AudioMemory:
    """Return the activation memory of the audio side on one rank.

    Args:
        tracer: The tracer of the model's encoders.
        work: The encoders' work; see `encoder_work`.
        rank: The rank whose memory is returned.
        loaded_samples: The lengths of the clips that the rank loaded, in audio samples.
        reduce_elements: ZeRO-3's `reduce_bucket_size`, a number of elements.
        learned: The number of trainable audio parameters of which the rank holds a share.
        recompute_calls: True if a call keeps only its clips, and runs again in the backward pass. In this case, the
            modules after the encoders keep only features and embeddings.
    """
    tower = tracer.tower
    dtype = next(tower.projector.parameters()).dtype
    size = dtype.itemsize
    encoders: list[_EncoderCalls] = []
    over_forward = features = 0
    for one in work:
        for name, calls in zip(one.names, one.calls[rank], strict=True):
            if calls:
                traced = tracer.traced(name, max(calls, key=tracer.calls(name).kept))
                once = 0 if recompute_calls else traced.kept
                kept = [sum(c) * FP32_BYTES if recompute_calls else tracer.calls(name).kept(c) for c in calls]
                # Recomputed calls and layers pass their gradients on one by one.
                sums = 0 if recompute_calls or tracer.recompute else tracer.learned(name) * size
                encoders.append(_EncoderCalls(tuple(kept), traced.backward - once, sums))
                over_forward = max(over_forward, traced.forward - once)
                features += sum(num_frames(n) for clips in calls for n in clips) * _width(tower.encoder(name)) * size
    in_calls = sum(sum(one.kept) for one in encoders)
    mixed = _after_encoders(tower, loaded_samples, size, tracer.device)
    kept_after = _inputs_and_outputs(tower, loaded_samples, size) if recompute_calls else mixed.kept
    in_bucket = min(reduce_elements, learned) * FP32_BYTES * (2 if size < FP32_BYTES else 1)
    # When the backward pass reaches the encoders, the modules after them have freed what they kept. What remains are
    # their outputs, which the step still reports, and the gradients of the features.
    outputs = _outputs(tower, [num_frames(n) for n in loaded_samples], size) if loaded_samples else 0
    freed = max(0, kept_after - outputs - features)
    of_encoders = _backward_peak(encoders) - in_calls - freed
    return AudioMemory(
        int(in_calls) + kept_after + sum(loaded_samples) * FP32_BYTES,
        max(over_forward, 2 * features + mixed.forward - kept_after),
        max(int(of_encoders), mixed.backward - (0 if recompute_calls else kept_after)) + in_bucket,
    )


@dataclass(frozen=True)
class _EncoderCalls:
    """The calls of one encoder on a rank."""

    kept: tuple[float, ...]
    """The bytes that each call keeps for the backward pass."""
    backward: float
    """The bytes that the backward pass of the largest call needs on top of what it keeps."""
    sums: int
    """The bytes of the gradients of all weights, which autograd sums over several calls."""


def _backward_peak(encoders: Sequence[_EncoderCalls]) -> float:
    """Return the peak of the bytes that encoder calls use in the backward pass.

    The backward pass visits the calls in the opposite order. The backward pass of a call frees what the call kept, and
    creates the gradients of the weights. If an encoder has several calls, autograd holds the sums of these gradients
    until the last of them.
    """
    remaining = sum(sum(one.kept) for one in encoders)
    peak = remaining
    for one in reversed(encoders):
        held = 0
        for number, kept in enumerate(reversed(one.kept), start=1):
            then = one.sums if number < len(one.kept) else 0
            peak = max(peak, remaining + held + one.backward, remaining - kept + max(held, then) + one.backward)
            remaining, held = remaining - kept, then
    return peak


def _after_encoders(tower: AudioTower, loaded_samples: Sequence[int], size: int, device: str) -> Traced:
    """Return the memory of mixture, adapter, projector and loss heads for the clips that a rank loaded.

    The memory is computed from the shapes of the modules' tensors, not traced.
    """
    frames = [num_frames(n) for n in loaded_samples]
    if not frames:
        return Traced(0, 0, 0)
    config, total, longest = tower.config, sum(frames), max(frames)
    gates = len(config.router.gates) if config.experts else 0
    joined = (0 if tower.primary is None else tower.primary.dim) + gates * config.expert_dim
    streams = total * gates * config.expert_dim * size  # products kept for the gradients of the weights
    padded = len(frames) * longest * joined * size
    kept = 2 * streams + tower.adapter.kept_elements(frames, device) * size
    rate = config.adapter.rate
    longest = rate.tokens_of_frames(longest)
    audio_tokens = sum(map(rate.tokens_of_frames, frames))
    if tower.stream_projection is not None:  # the input of the projection
        kept += total * joined * size
    if tower.feature_norm is not None:
        kept += total * joined * size
    if tower.output_norm is not None:
        kept += audio_tokens * tower.projector.out_features * size
    if tower.ctc_feedback is not None:  # the probabilities, in fp32 and as the input of the linear layer
        kept += audio_tokens * tower.ctc_feedback.linear.in_features * (4 if size == 4 else 4 + size)
    kept += _outputs(tower, frames, size)
    return Traced(kept, kept + 2 * total * joined * size, kept + 2 * padded)


def _outputs(tower: AudioTower, frames: Sequence[int], size: int) -> int:
    """Return the bytes of the outputs of the adapter, the projector and the heads.

    `frames` contains the number of frames of each clip.
    """
    rate = tower.config.adapter.rate
    audio_tokens = sum(map(rate.tokens_of_frames, frames))
    logits = 0
    for name in tower.loss_heads:
        # Every head is counted like the CTC head, which is the widest: its logits and their padded log-softmax in fp32.
        columns = [
            m.out_features * (m.num_parts if isinstance(m, PartwiseLinear) else 1)
            for m in tower.head_of(name).modules()
            if isinstance(m, nn.Linear)
        ]
        padded = len(frames) * rate.tokens_of_frames(max(frames))
        logits += max(columns, default=0) * (audio_tokens * size + padded * 8)
    return audio_tokens * (tower.adapter.dim + tower.projector.out_features) * size + logits


def _inputs_and_outputs(tower: AudioTower, loaded_samples: Sequence[int], size: int) -> int:
    """Return the bytes of the features that are received from the encoders, plus `_outputs`."""
    frames, config = [num_frames(n) for n in loaded_samples], tower.config
    if not frames:
        return 0
    chosen = min(len(config.experts), len(config.router.gates) * config.router.top_k)
    width = (0 if tower.primary is None else tower.primary.dim) + chosen * config.expert_dim
    return sum(frames) * width * size + _outputs(tower, frames, size)


def _inner(module: nn.Module) -> Any:
    return module.encoder if hasattr(module, "projection") else module


def _width(module: nn.Module) -> int:
    return module.projection.out_features if hasattr(module, "projection") else module.dim  # type: ignore


def _clips(count: int, frames: int) -> tuple[int, ...]:
    """Return the lengths of clips in audio samples. The lengths differ a little, like those in a real call."""
    longest = frames * FRAME_SAMPLES
    return tuple(longest - longest // 32 * i for i in range(count))


def _terms(windows: int, frames: int) -> tuple[float, ...]:
    return 1.0, windows * frames, windows * frames**2, frames**2
