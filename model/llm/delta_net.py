"""The gated delta network of a Megatron layer with linear attention, for packed sequences (arXiv 2412.06464).

Shapes: t rows of a pack; C channels of queries, keys and values together, G key heads of width K and H value heads of
width V, all on this rank; B segments and L tokens of the longest segment of a bucket; W width of the convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from model.llm.delta_rule import DeltaRule, chunked_delta_rule, kernels
from model.llm.features import DeltaSizes
from model.llm.norms import parameter_device
from model.llm.packing import Bucket, PackedSequences


class GatedNorm(nn.Module):
    """An RMSNorm over the channels of a head, multiplied by SiLU of a gate.

    Its weight is shared by all heads, so it is marked for Megatron's gradient all-reduce of sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return `x` [..., width], normalized and gated, for a gate of the same shape."""
        normed = nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        return (self.weight * normed * silu(gate.float())).to(x.dtype)


class Convolution(nn.Module):
    """A causal convolution over tokens with one filter for each channel, followed by SiLU.

    Args:
        weight: The filters [C, 1, W], whose last tap belongs to the current token.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [B, L, C] for inputs [B, W - 1 + L, C], of which the first W - 1 belong to the preceding tokens."""
        taps = self.weight[:, 0].unbind(-1)
        length = inputs.shape[1] - len(taps) + 1
        mixed = taps[0] * inputs[:, :length]
        for shift, tap in enumerate(taps[1:], 1):
            mixed = mixed + tap * inputs[:, shift : shift + length]
        return silu(mixed)


class GatedDeltaNet(nn.Module):
    """Linear attention within each segment of a pack, which replaces Megatron's attention in a layer.

    The outputs of the input projection are the queries, keys and values, the output gate, and the rates and decays of
    the heads, in this order. Heads are divided among tensor-parallel ranks. In every segment, the convolution and the
    state of a head start from zeros, or from the values of the segment's sequence in the KV cache.

    Args:
        config: Megatron's config.
        layer_number: The number of the layer, counted from 1.
        sizes: The sizes over all tensor-parallel ranks.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        sizes: DeltaSizes,
        pg_collection: Any,
        recompute: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.config, self.layer_number, self.sizes = config, layer_number, sizes
        tp = config.tensor_model_parallel_size
        self.key_heads, self.value_heads = sizes.key_heads // tp, sizes.value_heads // tp
        self.parts = (
            (2 * sizes.keys + sizes.values) // tp,
            sizes.values // tp,
            self.value_heads,
            self.value_heads,
        )
        shared = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": pg_collection.tp}
        self.in_proj = ColumnParallelLinear(
            config.hidden_size, sum(self.parts) * tp, gather_output=False, skip_bias_add=False, **shared
        )
        self.out_proj = RowParallelLinear(
            sizes.values, config.hidden_size, input_is_parallel=True, skip_bias_add=True, **shared
        )
        self.norm = GatedNorm(config, sizes.value_width)
        self.conv1d = Convolution(self._parameter(self.parts[0], 1, sizes.kernel))
        self.dt_bias, self.A_log = self._parameter(self.value_heads), self._parameter(self.value_heads)
        is_half = config.params_dtype != torch.float32 and not config.use_cpu_initialization
        self.rule: DeltaRule = (kernels() if is_half else None) or chunked_delta_rule

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=parameter_device(self.config)))

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: PackedSequences | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [t/TP, 1, hidden] for an input of the same shape, and no bias."""
        packed = packed_seq_params
        assert isinstance(packed, PackedSequences), "pass a PackedSequences as packed_seq_params"
        assert not packed.gathers_keys, "a state cannot continue on another context-parallel rank"
        projected, _bias = self.in_proj(hidden_states)
        mix = partial(self._mix, packed=packed)
        if self.training and self.recompute:
            mixed = checkpoint(mix, False, projected)
        else:
            mixed = mix(projected)
        output, bias = self.out_proj(mixed)
        return output, bias

    def _mix(self, projected: Tensor, packed: PackedSequences) -> Tensor:
        """Return the heads' gated outputs [t, 1, H · V] for the projected inputs [t, 1, C + H · V + 2 H]."""
        inputs, gate, rate, decay = projected[:, 0].split(self.parts, dim=-1)
        rate = rate.sigmoid()
        decay = -self.A_log.float().exp() * softplus(decay.float() + self.dt_bias)
        if packed.cache is None:
            buckets = packed.buckets(projected.device)
            outputs = [bucket.unpad(self._attend(bucket, inputs, rate, decay)[0]) for bucket in buckets]
            heads = torch.cat(outputs).index_select(0, packed.unbucket(projected.device))
        else:
            heads = self._continue(inputs, rate, decay, packed)
        gated: Tensor = self.norm(heads, gate.unflatten(-1, (self.value_heads, -1)))
        return gated.flatten(-2)[:, None]

    def _continue(self, inputs: Tensor, rate: Tensor, decay: Tensor, packed: PackedSequences) -> Tensor:
        """Return the heads' outputs [t, H, V] for segments that continue cached sequences, and update the cache."""
        assert packed.cache is not None
        segments, sizes = packed.cached_segments(inputs.device), self.sizes
        shapes = (sizes.kernel - 1, self.parts[0]), (self.value_heads, sizes.key_width, sizes.value_width)
        recent, states = packed.cache.states(self.layer_number, *shapes, like=inputs)
        which = segments.sequences
        attended, padded, state = self._attend(segments.bucket, inputs, rate, decay, recent[which], states[which])
        # `padded` begins with the inputs before the segment, so these rows are the last inputs of the segment.
        rows = segments.lengths[:, None] + torch.arange(sizes.kernel - 1, device=inputs.device)
        recent[which] = padded.take_along_dim(rows[..., None], 1)
        states[which] = state
        found = inputs.new_zeros(len(inputs), self.value_heads, sizes.value_width)
        return found.index_copy(0, segments.bucket.rows, segments.bucket.unpad(attended))

    def _attend(
        self,
        bucket: Bucket,
        inputs: Tensor,
        rate: Tensor,
        decay: Tensor,
        recent: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the segments of a bucket.

        Args:
            bucket: The segments.
            inputs: The inputs of the convolution, [t, C].
            rate: The rates, [t, H].
            decay: The logarithms of the decays, [t, H] in fp32.
            recent: The inputs before each segment [B, W - 1, C]; None for zeros.
            state: The state before each segment [B, H, K, V] in fp32; None for zeros.

        Returns:
            The outputs [B, H, L, V], the inputs with those before each segment [B, W - 1 + L, C], and the states after
            the segments.
        """
        sizes, count = self.sizes, bucket.num_segments
        values = bucket.pad(inputs[:, None])[:, 0]
        if recent is None:
            recent = values.new_zeros(count, sizes.kernel - 1, values.shape[-1])
        if state is None:
            shape = (count, self.value_heads, sizes.key_width, sizes.value_width)
            state = torch.zeros(shape, device=values.device)
        padded = torch.cat((recent, values), dim=1)
        widths = [self.key_heads * sizes.key_width] * 2 + [self.value_heads * sizes.value_width]
        query, key, value = self.conv1d(padded).split(widths, dim=-1)
        copies = self.value_heads // self.key_heads
        query, key = (x.unflatten(-1, (self.key_heads, -1)).repeat_interleave(copies, 2) for x in (query, key))
        # Padding has the decay 0 and the rate 0, so it does not change the state.
        rate, decay = (bucket.pad(x[..., None])[..., 0].transpose(1, 2) for x in (rate, decay))
        value = value.unflatten(-1, (self.value_heads, -1))
        output, state = self.rule(query, key, value, decay, rate, state)
        return output.transpose(1, 2), padded, state
