"""The gated delta rule of linear attention (Yang et al. 2024, arXiv 2412.06464), computed in chunks.

A head has a state S [K, V], which token t changes and then reads: ::

    S ← a_t S          S ← S + b_t k_t (v_t - k_tᵀ S)ᵀ          o_t = Sᵀ q_t

Within a chunk of C tokens, the changes by all tokens are computed at once from the state before the chunk, by solving a
triangular system (Yang et al. 2024, arXiv 2406.06484, section 3). Only the chunks are computed one after the other.

Shapes: B sequences, H heads, L tokens, K width of queries and keys, V width of values, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK_TOKENS = 64
"""The largest number of tokens in a chunk."""
_EPS = 1e-6

DeltaRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function with the arguments and results of `chunked_delta_rule`."""


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gated delta rule with PyTorch, in fp32.

    Queries and keys are first divided by their norms, and queries also by √K. A token with decay 0 and rate 0 does not
    change the state.

    Args:
        query: q [B, L, H, K].
        key: k [B, L, H, K].
        value: v [B, L, H, V].
        decay: log a [B, L, H], at most 0.
        rate: b [B, L, H].
        state: S before the first token [B, H, K, V].

    Returns:
        The outputs o [B, L, H, V] in the dtype of `value`, and S after the last token in fp32.
    """
    length, dtype = query.shape[1], value.dtype
    size = min(CHUNK_TOKENS, 1 << (length - 1).bit_length())
    query, key, value = (_chunks(x, size) for x in (_unit(query) * query.shape[-1] ** -0.5, _unit(key), value))
    decay, rate = (_chunks(x[..., None], size) for x in (decay, rate))  # [B, H, N, C, 1]
    before = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    total = decay.mT.masked_fill(~before, 0.0).sum(-1, keepdim=True)  # Unlike `cumsum`, this is deterministic on CUDA.
    # The decay from the token of a column to the token of a row. Differences above the diagonal could overflow.
    ratio = (total - total.mT).masked_fill(~before, float("-inf")).exp()
    rated = rate * key
    both = torch.cat((rate * value, rated * total.exp()), dim=-1)
    solved = torch.linalg.solve_triangular((rated @ key.mT) * ratio, both, upper=False, unitriangular=True)
    changes, seen = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    scores = (query @ key.mT) * ratio
    query, last = query * total.exp(), total[..., -1:, :]
    key, kept = key * (last - total).exp(), last.exp()
    outputs, state = [], state.float()
    for n in range(query.shape[2]):
        change = changes[:, :, n] - seen[:, :, n] @ state
        outputs.append(query[:, :, n] @ state + scores[:, :, n] @ change)
        state = state * kept[:, :, n] + key[:, :, n].mT @ change
    output = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :length]
    return output.transpose(1, 2).to(dtype), state


def _unit(x: Tensor) -> Tensor:
    """Return `x` in fp32, divided by the norm of its last dimension."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)


def _chunks(x: Tensor, size: int) -> Tensor:
    """Return `x` [B, L, H, channels] in fp32 as chunks [B, H, N, C, channels]. The last chunk is zero-padded."""
    x = pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def kernels() -> DeltaRule | None:
    """Return the gated delta rule of flash-linear-attention, for GPUs; None if the package is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None

    def computed(
        query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Any, Any] = chunk_gated_delta_rule(
            query,
            key,
            value,
            g=decay,
            beta=rate,
            initial_state=state.float(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        return found

    return computed
