"""Jitter for the inputs of the LLM's routers (Switch Transformer, arXiv 2101.03961, section 2.2).

In training, a router reads x·u instead of a token's activations x. Each entry of u is uniformly distributed between
1 - ε and 1 + ε. The experts read x. The values of u are a hash of the sample, the token's position in it, the layer and
the channel, so they depend neither on the device nor on how samples are divided among packs and ranks.

Shapes: n tokens, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195) as signed integers."""
_MIX32_1, _MIX32_2 = -0x7A143595, -0x3D4D51CB
"""The constants of the last steps of MurmurHash3 (`fmix32`) as signed integers."""
_BITS = 24
"""The number of random bits of a value, which fp32 can represent exactly."""


@dataclass(frozen=True)
class TokenNoise:
    """The numbers that identify n tokens in a training step, from which their jitter is computed."""

    samples: Tensor
    """The number [n] int64 that identifies each token's sample in the step."""
    positions: Tensor
    """The position [n] int64 of each token in its sample."""

    def rows(self, index: slice) -> TokenNoise:
        """Return the numbers that identify some of the tokens."""
        return TokenNoise(self.samples[index], self.positions[index])


def jittered_rows(rows: Tensor, noise: TokenNoise, layer: int, amount: float) -> Tensor:
    """Return `rows` [n, H] multiplied by their jitter. The factors are computed again in the backward pass.

    Args:
        rows: The inputs of a router in fp32.
        noise: The numbers that identify the tokens.
        layer: The number of the layer.
        amount: The amplitude ε.
    """
    result: Tensor = _Jitter.apply(rows, noise, layer, amount)
    return result


def jitter_factors(noise: TokenNoise, layer: int, width: int, amount: float) -> Tensor:
    """Return the factors [n, H] in fp32 by which the inputs of a router are multiplied.

    Args:
        noise: The numbers that identify the tokens.
        layer: The number of the layer.
        width: The hidden width H.
        amount: The amplitude ε.
    """
    channels = _mix(torch.arange(width, device=noise.samples.device))
    tokens = _mix(_mix(noise.samples) + _mix(noise.positions + (layer << 32)))
    bits = tokens.to(torch.int32)[:, None] + channels.to(torch.int32)
    for shift, factor in ((16, _MIX32_1), (13, _MIX32_2), (16, 1)):
        bits = (bits ^ _shifted(bits, shift, 32)) * factor
    return 1 - amount + _shifted(bits, 32 - _BITS, 32).float() * (2 * amount / (1 << _BITS))


class _Jitter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, noise: TokenNoise, layer: int, amount: float) -> Tensor:
        ctx.arguments = noise, layer, rows.shape[1], amount
        return rows * jitter_factors(*ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return grad * jitter_factors(*ctx.arguments), None, None, None


def _mix(values: Tensor) -> Tensor:
    """Return the SplitMix64 hash of each int64 value. Products are computed modulo 2⁶⁴."""
    values = values + _GOLDEN
    values = (values ^ _shifted(values, 30, 64)) * _MIX_1
    values = (values ^ _shifted(values, 27, 64)) * _MIX_2
    return values ^ _shifted(values, 31, 64)


def _shifted(values: Tensor, shift: int, bits: int) -> Tensor:
    """Return the values, read as unsigned integers of `bits` bits, divided by 2 to the power of `shift`."""
    return (values >> shift) & ((1 << bits - shift) - 1)
