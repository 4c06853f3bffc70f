"""Greedy decoding with a KV cache. The LLM is distributed as in training (tensor, sequence and pipeline parallelism).

Every replica decodes its own prompts. Context-parallel ranks hold the same weights, so each of them decodes like a
separate replica. The first pass through the pipeline reads all prompts, and each further pass computes one new token
for every prompt whose continuation has not ended.

Replicas that share the FFN experts of an LLM exchange tokens in every pass, so they must run the same number of passes.
A replica whose continuations have all ended computes a dummy row until the other replicas have finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from model.llm.megatron import embed_tokens
from model.llm.packing import KVCache, PackedSequences
from model.transfer import to_device
from trainer.engine.llm import LLMEngine
from trainer.engine.microbatches import embed_pack
from trainer.engine.packs import Packs


@torch.no_grad()
def generate(
    llm: LLMEngine,
    packs: Packs,
    prompt_lengths: Sequence[int],
    *,
    end_ids: Collection[int],
    vocab_size: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the continuation of every prompt in this replica's pack.

    Collective: every rank of the replica must call it. If replicas share FFN experts, every rank of the world must call
    it.

    Args:
        llm: The LLM, in evaluation mode.
        packs: The prompts, in one pack (packed sequence). Labels are not read.
        prompt_lengths: The lengths of the prompts, in the order of the pack; may be empty. The rest of the pack is
            padding.
        end_ids: The tokens that end a sequence. They are not returned.
        vocab_size: The size of the tokenizer's vocabulary. Larger token ids of the LLM are never chosen.
        max_new_tokens: The largest number of new tokens per prompt. A continuation of this length was truncated.

    Returns:
        The token ids of each continuation. They are the same on every rank of the replica.
    """
    assert len(packs.lengths) == 1
    cache = KVCache(len(prompt_lengths), max(prompt_lengths, default=0) + max_new_tokens)
    found: list[list[int]] = [[] for _ in prompt_lengths]
    active = list(range(len(prompt_lengths)))
    tokens: list[int] = []
    while _any_replica(llm, bool(active)):
        if not active:
            _compute_dummy_row(llm)
            continue
        if tokens:
            padding = -len(active) % llm.groups.topology.tp
            pack = cache.extend([1] * len(active), active, num_padding=padding)
            ids = to_device(tokens + [0] * padding, llm.groups.device)
            chosen = _forward(llm, pack, len(active), vocab_size, ids, None)
        else:
            pack = cache.extend(prompt_lengths, num_padding=packs.pack_tokens - sum(prompt_lengths))
            chosen = _forward(llm, pack, len(active), vocab_size, packs.token_ids, packs)
        for sequence, token in zip(active, chosen, strict=True):
            if token not in end_ids:
                found[sequence].append(token)
        going = [
            token not in end_ids and len(found[s]) < max_new_tokens for s, token in zip(active, chosen, strict=True)
        ]
        tokens = [token for token, goes in zip(chosen, going, strict=True) if goes]
        active = [s for s, goes in zip(active, going, strict=True) if goes]
    return found


def _any_replica(llm: LLMEngine, is_decoding: bool) -> bool:
    """Return whether this replica, or a replica that shares FFN experts with it, is still decoding.

    Collective: every rank of the world must call it if replicas share FFN experts.
    """
    if not llm.groups.topology.experts_span_replicas:
        return is_decoding
    count = torch.tensor([int(is_decoding)])
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=llm.groups.world)
    return bool(count)


def _compute_dummy_row(llm: LLMEngine) -> None:
    """Take part in the exchanges of a pass in which this replica has nothing to decode.

    Collective: every rank of the replica must call it.
    """
    num_rows = llm.groups.topology.tp
    ids = torch.zeros(num_rows, dtype=torch.int64, device=llm.groups.device)
    rows = PackedSequences(lengths=(num_rows,))
    llm.forward_only([rows], lambda _pack: embed_tokens(llm.chunks[0], ids), lambda _pack, logits: logits[:0])


def _forward(
    llm: LLMEngine, pack: PackedSequences, num_prompts: int, vocab_size: int, ids: Tensor, packs: Packs | None
) -> list[int]:
    """Run one pass through the pipeline, and return the next token of each of the first `num_prompts` segments.

    Collective: every rank of the replica must call it.
    """
    groups = llm.groups.without_context
    last_rows = to_device(np.cumsum(pack.lengths[:num_prompts]) - 1, groups.device)

    def choose(_pack: int, logits: Tensor) -> Tensor:
        wanted = gather_from_tensor_model_parallel_region(logits[last_rows].contiguous())
        return wanted[:, :vocab_size].argmax(-1)

    def embed(_pack: int) -> Tensor:
        if packs is None:
            return embed_tokens(llm.chunks[0], ids)
        return embed_pack(llm.chunks[0], ids, packs.audio, packs.audio_mask)

    outputs = llm.forward_only([pack], embed, choose)
    chosen = outputs[0] if groups.is_last_stage else torch.zeros(num_prompts, dtype=torch.int64, device=groups.device)
    dist.broadcast(chosen, src=groups.topology.last_stage_ranks(groups.place.dp)[0], group=groups.replica)
    return chosen.tolist()
