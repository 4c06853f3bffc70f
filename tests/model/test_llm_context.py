"""Tests of context parallelism: how packs are divided, and that attention over ranks equals that of a whole pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import LLMConfig
from model.llm import context
from model.llm.attention import PackedAttention
from model.llm.context import ContextPart, crosses_chunks
from model.llm.features import AttentionLayer, Scales
from model.llm.layer_config import transformer_config
from model.llm.packing import PackedSequences
from model.llm.reference import resolve_hf_config
from model.llm.rotary import rotary_embeddings
from tests.distributed.harness import run_ranks

CASES: list[dict[str, Any]] = [
    {"lengths": (48,)},
    {"lengths": (5, 1, 30, 12), "window": 9, "softmax": 0.3},
    {"lengths": (7, 41), "window": 60, "long_queries": (0.1, 8)},
    {"lengths": (6,) * 8, "crosses": False},
    {"lengths": (5, 31, 12), "window": 9, "sinks": (0.5, -1.0, 2.0, 0.0)},
    {"lengths": (48,), "sinks": (0.5, -1.0, 2.0, 0.0)},
    {"lengths": (20, 28), "window": 9, "cap": 0.7},
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 5))
def test_pieces_cover_the_rows_of_every_rank_with_equal_work(sizes: list[int], size: int) -> None:
    lengths = (*sizes, -sum(sizes) % (2 * size)) if sum(sizes) % (2 * size) else tuple(sizes)
    whole = PackedSequences(lengths=lengths)
    rows, pairs = [], []
    for rank in range(size):
        part = ContextPart(rank, size)
        own = PackedSequences.of_part(lengths, part)
        held = part.rows(sum(lengths))
        rows += held.tolist()
        pairs.append(int((held + 1).sum()))
        assert own.positions.tolist() == whole.positions[held].tolist()
        firsts = np.repeat(whole.offsets, lengths)[held]
        for row, piece in own.continued:
            assert piece.start > 0 and (firsts[row : row + piece.length] == piece.first_key).all()
        assert own.gathers_keys or not own.continued
        assert own.gathers_keys == crosses_chunks(lengths, part)
    assert sorted(rows) == list(range(sum(lengths)))
    assert len(set(pairs)) == 1, "every rank must compute as many scores if the pack is one segment"


@pytest.mark.parametrize("world", [2, 4])
def test_attention_over_ranks_equals_that_of_the_whole_pack(world: int) -> None:
    for found in run_ranks(world, attend_cases):
        assert len(found) == len(CASES) and max(map(max, found)) < 1e-5, found


def attend_cases() -> list[list[float]]:
    """Return, for each case, the largest differences of the output and of the gradients of query, key and value."""
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology

    rank, world, device = connect()
    build_groups(Topology(world, 1, 1, cp=world), rank, device, 0)
    context.BLOCK_ROWS = 4
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_hidden_layers": 1}
    hf_config = resolve_hf_config(LLMConfig(config={"model_type": "llama", **sizes}))
    config, part = transformer_config(hf_config), ContextPart(rank, world)
    found = []
    for case in CASES:
        attention = PackedAttention(
            config,
            1,
            rotary=rotary_embeddings(hf_config)[""],
            layer=AttentionLayer(window=case.get("window")),
            scales=Scales(
                softmax=case.get("softmax"), long_queries=case.get("long_queries"), scores_cap=case.get("cap")
            ),
            has_sinks="sinks" in case,
        )
        if attention.sinks is not None:
            attention.sinks.data = torch.tensor(case["sinks"])
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(48, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
        factors = torch.randn(48, 4, 8, generator=generator)
        expected = attention(*inputs, packed_seq_params=PackedSequences(lengths=case["lengths"]))
        learned = [] if attention.sinks is None else [attention.sinks]
        wanted = torch.autograd.grad((expected * factors).sum(), [*inputs, *learned])
        rows = torch.from_numpy(part.rows(48))
        own = [x.detach()[rows].requires_grad_() for x in inputs]
        packed = PackedSequences.of_part(case["lengths"], part)
        assert packed.gathers_keys == case.get("crosses", True)
        output = attention(*own, packed_seq_params=packed)
        grads = torch.autograd.grad((output * factors[rows]).sum(), [*own, *learned])
        pairs = [(output, expected), *zip(grads[:3], wanted[:3], strict=True)]
        found.append([float((mine - whole[rows]).abs().max()) for mine, whole in pairs])
        for mine, whole in zip(grads[3:], wanted[3:], strict=True):
            torch.distributed.all_reduce(mine)
            found[-1].append(float((mine - whole).abs().max()))
    return found
