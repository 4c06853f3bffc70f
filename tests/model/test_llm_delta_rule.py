"""Tests that the gated delta rule in chunks equals its definition, which is applied token by token."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from model.llm.delta_rule import CHUNK_TOKENS, chunked_delta_rule, kernels

HEADS, KEYS, VALUES = 3, 6, 4
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(length: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    query, key, value = drawn(length, HEADS, KEYS), drawn(length, HEADS, KEYS), drawn(length, HEADS, VALUES)
    decay, rate = -0.3 * drawn(length, HEADS).abs(), drawn(length, HEADS).sigmoid()
    return query, key, value, decay, rate, drawn(HEADS, KEYS, VALUES)


def by_definition(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> Any:
    query, key = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    outputs = []
    for t in range(query.shape[1]):
        state = decay[:, t, :, None, None].exp() * state
        found = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        change = rate[:, t, :, None] * (value[:, t] - found)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], change)
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) / KEYS**0.5)
    return torch.stack(outputs, 1), state


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("length", [1, 2, 7, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 30])
def test_chunks_equal_the_definition(length: int) -> None:
    given, again = inputs(length), inputs(length)
    for tensor in (*given, *again):
        tensor.requires_grad_()
    weights = torch.randn(2, length, HEADS, VALUES, generator=torch.Generator().manual_seed(9))
    for found, wanted in zip(chunked_delta_rule(*given), by_definition(*again), strict=True):
        close(found, wanted)
    for rule, tensors in ((chunked_delta_rule, given), (by_definition, again)):
        output, state = rule(*tensors)
        ((output * weights).sum() + state.square().sum()).backward()
    for found, wanted in zip(given, again, strict=True):
        assert found.grad is not None and wanted.grad is not None
        close(found.grad, wanted.grad)


def test_a_sequence_may_be_computed_in_parts_and_padding_changes_no_state() -> None:
    *tensors, state = inputs(90)
    whole, last = chunked_delta_rule(*tensors, state)
    outputs = []
    for part in zip(*(x.split((70, 1, 19), dim=1) for x in tensors), strict=True):
        output, state = chunked_delta_rule(*part, state)
        outputs.append(output)
    close(torch.cat(outputs, 1), whole)
    close(state, last)
    query, key, value, decay, rate = tensors
    padding = torch.ones(2, 13, HEADS, 1)
    padded = [torch.cat((x, padding.expand(-1, -1, -1, x.shape[-1])), 1) for x in (query, key, value)]
    padded += [torch.cat((x, torch.zeros(2, 13, HEADS)), 1) for x in (decay, rate)]
    output, state = chunked_delta_rule(*padded, inputs(90)[-1])
    close(output[:, :90], whole)
    close(state, last)


def test_decays_without_bound_give_finite_values_and_gradients() -> None:
    *tensors, state = inputs(80)
    tensors[3] = (1e3 * tensors[3]).requires_grad_()
    output, last = chunked_delta_rule(*tensors, state)
    (output.sum() + last.sum()).backward()
    assert output.isfinite().all() and tensors[3].grad is not None and tensors[3].grad.isfinite().all()


def test_kernels_are_called_by_their_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the call of flash-linear-attention's kernel, which takes the tensors in the same layout."""

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert use_qk_l2norm_in_kernel and output_final_state and scale is None
        assert initial_state is not None and initial_state.dtype == torch.float32
        return by_definition(q, k, v, g, beta, initial_state)

    assert kernels() is None, "the test expects that the package is not installed"
    package: Any = ModuleType("fla.ops.gated_delta_rule")
    package.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    rule = kernels()
    assert rule is not None
    for found, wanted in zip(rule(*inputs(20)), chunked_delta_rule(*inputs(20)), strict=True):
        close(found, wanted)
