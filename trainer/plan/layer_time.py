"""The time that one rank takes to compute a layer of the LLM, or its output layer, for one micro-batch.

A layer's time is the sum of its matmuls, its attention, its element-wise operations (which take as long as their reads
and writes of memory) and its kernel launches. In formulas, h is the hidden size, f the feed-forward size, H and G are
the number of query and key-value heads on a rank, and d is the head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from model.llm.families import family_of
from model.llm.names import head_dim
from model.llm.stages import Recompute
from trainer.plan.accelerator import Accelerator
from trainer.plan.mechanisms import Mechanisms

_BF16_BYTES = 2
_LOGIT_BYTES = 50
"""The bytes that Megatron's cross entropy reads and writes per logit: the fp32 copy, the softmax and the gradient."""
_SCORE_BYTES = (13, 17)
"""The bytes read and written per attention score by unfused attention with dropout, forward and backward."""
_HEAD_KERNELS = 20
_LAYER_KERNELS = {True: (14, 26), False: (33, 62)}
"""The number of kernels that a layer launches, (forward, backward), with and without TransformerEngine's kernels."""


@dataclass(frozen=True)
class Seconds:
    """The forward and backward seconds of a part of the model."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """The sum of the forward and backward time in seconds."""
        return self.forward + self.backward


@dataclass(frozen=True)
class RankRates:
    """The rates of a rank, and the assumptions that determine which kernels it runs."""

    accelerator: Accelerator
    mechanisms: Mechanisms
    bytes_per_value: int
    """The size of a weight or activation in bytes: 2 for bf16, 4 for fp32."""
    bytes_per_gradient: int = 4
    """The size of an accumulated gradient of the LLM in bytes."""

    @property
    def peak(self) -> float:
        """The peak rate of matmuls, in FLOP/s."""
        half = self.bytes_per_value == _BF16_BYTES
        return (self.accelerator.tflops if half else self.accelerator.fp32_tflops) * 1e12

    def product(self, rows: float, columns: float, inner: float, *, fp8: bool = False) -> float:
        """Return the time of a [rows, inner] by [inner, columns] matmul in seconds."""
        rate = self.peak * self.accelerator.matrix_share(rows, columns, inner) * (2 if fp8 else 1)
        return 2.0 * rows * columns * inner / rate

    def memory(self, moved_bytes: float) -> float:
        """Return the time in seconds that element-wise operations take to read and write `moved_bytes`."""
        return moved_bytes / (self.accelerator.memory_tb_s * 1e12 * self.accelerator.memory_efficiency)

    @property
    def ridge(self) -> float:
        """The FLOPs per byte at which computation at the best rate of matmuls takes as long as the memory traffic."""
        share = self.accelerator.efficiency or self.accelerator.matrix[-1][1]
        return self.peak * share * self.memory(1.0)

    def starts(self, kernels: float) -> float:
        """Return the time of launching `kernels` kernels in seconds."""
        return kernels * self.accelerator.kernel_us * 1e-6


def layer_seconds(
    config: PretrainedConfig, rates: RankRates, tp: int, rows: float, squares: float, learned: bool
) -> Seconds:
    """Return the time of one layer for one micro-batch in seconds, without communication and recomputation.

    Args:
        config: The configuration of the LLM.
        rates: The rates of the rank.
        tp: The tensor-parallel size.
        rows: The tokens of the micro-batch on this rank.
        squares: The sum of the squared lengths of the micro-batch's segments, per context-parallel rank.
        learned: True if the layer's weights are trained.
    """
    mechanisms = rates.mechanisms
    products = layer_products(config, tp)
    forward = sum(rates.product(rows, n, k, fp8=mechanisms.fp8) for n, k in products)
    weights = sum(n * k for n, k in products)
    gradient = rates.bytes_per_gradient
    # The accumulated gradient is read and written. Without the fused kernel, the product is written and read as well.
    moved = 2.0 * gradient + (0 if mechanisms.fused_kernels else 2 * rates.bytes_per_value)
    accumulation = rates.memory(weights * moved) * learned
    cast = _cast_bytes(products, rows) if mechanisms.fp8 else 0.0
    attention = _attention(config, rates, tp, rows, squares)
    passes = [e + rates.memory(cast) for e in _elementwise(config, rates, tp, rows)]
    starts = [rates.starts(count) for count in _LAYER_KERNELS[mechanisms.fused_kernels]]
    return Seconds(
        forward + attention.forward + passes[0] + starts[0],
        forward * (2 if learned else 1) + accumulation + attention.backward + passes[1] + starts[1],
    )


def layer_products(config: PretrainedConfig, tp: int) -> list[tuple[float, float]]:
    """Return the sizes (columns, inner) of the weights of each of a layer's four matmuls on one rank."""
    h, f, d = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, groups = config.num_attention_heads / tp, config.num_key_value_heads / tp
    return [((queries + 2 * groups) * d, h), (h, queries * d), (2 * f / tp, h), (h, f / tp)]


def mlp_seconds(config: PretrainedConfig, rates: RankRates, tp: int, rows: float) -> float:
    """Return the time of the forward pass of a layer's MLP for one micro-batch in seconds."""
    products, ffn = layer_products(config, tp)[2:], config.intermediate_size / tp
    moved = 3 * ffn * rows * rates.bytes_per_value
    if rates.mechanisms.fp8:
        moved += _cast_bytes(products, rows)
    return sum(rates.product(rows, n, k, fp8=rates.mechanisms.fp8) for n, k in products) + rates.memory(moved)


def head_seconds(config: PretrainedConfig, rates: RankRates, tp: int, rows: float) -> Seconds:
    """Return the time of the output layer and the loss for one micro-batch in seconds."""
    columns = config.vocab_size / tp
    product = rates.product(rows, columns, config.hidden_size)
    loss = rates.memory(rows * columns * _LOGIT_BYTES) / 2 + rates.starts(_HEAD_KERNELS)
    return Seconds(product + loss, 2 * product + loss)


def attention_seconds(config: PretrainedConfig, rates: RankRates, tp: int, rows: float, squares: float) -> Seconds:
    """Return the time of a layer's attention for one micro-batch in seconds."""
    return _attention(config, rates, tp, rows, squares)


def _attention(config: PretrainedConfig, rates: RankRates, tp: int, rows: float, squares: float) -> Seconds:
    accelerator, heads, d = rates.accelerator, config.num_attention_heads / tp, head_dim(config)
    causal = 2.0 * heads * d * squares
    bounded = bounds_scores(config)
    if rates.mechanisms.fused_attention and not bounded:
        rate = rates.peak * accelerator.attention_efficiency
        return Seconds(causal / rate, 2.5 * causal / rate)  # the fused backward pass computes the scores again
    length = squares / rows
    rate = rates.peak * accelerator.matrix_share(length, length, d)
    forward, backward = (rates.memory(heads * squares * each) for each in _SCORE_BYTES)
    first = 2 * causal / rate + forward
    return Seconds(first, 4 * causal / rate + backward + (first if bounded else 0.0))


def recomputed_seconds(
    config: PretrainedConfig, rates: RankRates, tp: int, rows: float, squares: float, recompute: Recompute
) -> float:
    """Return the time of recomputation in a layer's backward pass for one micro-batch in seconds.

    Args:
        config: The configuration of the LLM.
        rates: The rates of the rank.
        tp: The tensor-parallel size.
        rows: The tokens of the micro-batch on this rank.
        squares: The sum of the squared lengths of the micro-batch's segments, per context-parallel rank.
        recompute: The value of `train.recompute_llm`.
    """
    if recompute == "none":
        return 0.0
    if recompute == "full":
        return layer_seconds(config, rates, tp, rows, squares, learned=False).forward
    values, attends = _values(config, rates, tp)[0], recompute == "selective"
    moved = values.norms + values.gate + (values.rotary if attends else 0.0)
    starts = rates.starts(_LAYER_KERNELS[rates.mechanisms.fused_kernels][0])
    attention = _attention(config, rates, tp, rows, squares).forward if attends else 0.0
    return rates.memory(rows * moved * rates.bytes_per_value) + starts + attention


class _Values(NamedTuple):
    """The values that element-wise operations of a layer read and write per token on one rank."""

    norms: float
    residuals: float
    rotary: float
    gate: float


def _values(config: PretrainedConfig, rates: RankRates, tp: int) -> tuple[_Values, _Values]:
    """Return the values that a layer reads and writes in the forward and in the backward pass.

    The two norms read and write 4 h values forward, and the two residuals 6 h. Together, they read and write 12 h
    backward. SwiGLU reads and writes 3 f values forward and 5 f backward, and other activations 5 f and 15 f
    (`model.llm.mlp`). With fused kernels, the rotary embedding reads and writes 2 (H + G) d values. PyTorch's separate
    kernels read and write 10 (H + G) d forward and 12 (H + G) d backward, and the segments are copied into batches for
    attention and back.
    """
    h, f, d = config.hidden_size, config.intermediate_size / tp, head_dim(config)
    queries, groups = config.num_attention_heads / tp * d, config.num_key_value_heads / tp * d
    whole = h / tp if rates.mechanisms.sequence_parallel else h
    gate = (3 * f, 5 * f) if rates.mechanisms.fused_kernels or _fuses_gate(config) else (5 * f, 15 * f)
    if rates.mechanisms.fused_kernels:
        rotary = (2 * (queries + groups),) * 2
    else:
        copies = 2 * (queries + 2 * groups) + 4 * queries
        rotary = (10 * (queries + groups) + copies, 12 * (queries + groups) + copies)
    return _Values(4 * whole, 6 * whole, rotary[0], gate[0]), _Values(4.8 * whole, 7.2 * whole, rotary[1], gate[1])


def _elementwise(config: PretrainedConfig, rates: RankRates, tp: int, rows: float) -> tuple[float, float]:
    """Return the forward and backward time of norms, residuals, rotary embedding and activation in seconds."""
    forward, backward = (
        rates.memory(rows * sum(values) * rates.bytes_per_value) for values in _values(config, rates, tp)
    )
    return forward, backward


def bounds_scores(config: PretrainedConfig) -> bool:
    """Return True if attention scores are bounded. They are then stored, and computed again in the backward pass."""
    return family_of(config).scales(config).scores_cap is not None


def _fuses_gate(config: PretrainedConfig) -> bool:
    """Return True if the activation is SwiGLU, which the trainer computes with one kernel (`model.llm.mlp.gated`)."""
    return family_of(config).activation == "silu"


def _cast_bytes(products: Sequence[tuple[float, float]], rows: float) -> float:
    """Return the bytes read and written in one pass to cast inputs and weights to fp8 and to transpose them."""
    return sum(4.0 * (rows * k + n * k) for n, k in products)
