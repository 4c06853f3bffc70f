"""Greedy decoding with a KV cache over the distributed LLM: tensor, sequence and pipeline parallel as in training.

Every replica decodes its own prompts; its ranks pass through the pipeline once for all prompts together, then once per
new token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from model.llm.megatron import embed_tokens
from model.llm.packing import KVCache, PackedSequences
from model.transfer import to_device
from trainer.engine.llm import LLMEngine, Packs
from trainer.parallel.cpu import megatron_calls


@torch.no_grad()
def generate(
    llm: LLMEngine, packs: Packs, prompt_lengths: Sequence[int], *, eos_id: int, vocab_size: int, max_new_tokens: int
) -> list[list[int]]:
    """Continue every prompt of this replica's only pack.

    Args:
        llm: in evaluation mode.
        packs: with one micro-batch; labels are not read.
        prompt_lengths: of the pack's prompts, in order; what follows them in the pack is padding. May be empty.
        eos_id: ends a sequence; it is not returned.
        vocab_size: of the tokenizer; the LLM's vocabulary may be larger, those tokens are never chosen.
        max_new_tokens: per prompt. A sequence of this length did not end by itself.

    Returns:
        Token ids per prompt, the same on every rank of the replica.
    """
    assert len(packs.lengths) == 1
    if not prompt_lengths:
        return []
    cache = KVCache(len(prompt_lengths), max(prompt_lengths) + max_new_tokens)
    found: list[list[int]] = [[] for _ in prompt_lengths]
    active = list(range(len(prompt_lengths)))
    pack = cache.extend(prompt_lengths, num_padding=packs.pack_tokens - sum(prompt_lengths))
    chosen = _forward(llm, pack, len(active), vocab_size, packs.token_ids, packs)
    while True:
        for sequence, token in zip(active, chosen, strict=True):
            if token != eos_id:
                found[sequence].append(token)
        going = [token != eos_id and len(found[s]) < max_new_tokens for s, token in zip(active, chosen, strict=True)]
        tokens = [token for token, goes in zip(chosen, going, strict=True) if goes]
        active = [s for s, goes in zip(active, going, strict=True) if goes]
        if not active:
            return found
        padding = -len(active) % llm.groups.topology.tp
        pack = cache.extend([1] * len(active), active, num_padding=padding)
        ids = to_device(tokens + [0] * padding, llm.groups.device)
        chosen = _forward(llm, pack, len(active), vocab_size, ids, None)


def _forward(
    llm: LLMEngine, pack: PackedSequences, num_prompts: int, vocab_size: int, ids: Tensor, packs: Packs | None
) -> list[int]:
    """One pass; the token that follows each of the first `num_prompts` segments."""
    groups, topology = llm.groups, llm.groups.topology
    last_rows = to_device(np.cumsum(pack.lengths[:num_prompts]) - 1, groups.device)

    def choose(logits: Tensor, non_loss_data: bool) -> Tensor:
        assert non_loss_data
        wanted = gather_from_tensor_model_parallel_region(logits[0, last_rows].contiguous())
        return wanted[:, :vocab_size].argmax(-1)

    def step(microbatches: Any, model: Any) -> tuple[Tensor, Any]:
        next(microbatches)
        decoder_input = None
        if groups.is_first_stage:
            decoder_input = embed_tokens(llm.gpt, ids)
            if packs is not None:
                mask = packs.audio_mask[:, None, None]
                decoder_input = torch.where(mask, packs.audio[:, None].to(decoder_input.dtype), decoder_input)
        output = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=decoder_input,
            packed_seq_params=pack,
        )
        return output, choose

    with megatron_calls():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([0]),
            model=[llm.gpt],
            num_microbatches=1,
            seq_length=pack.num_tokens,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    chosen = outputs[0] if groups.is_last_stage else torch.zeros(num_prompts, dtype=torch.int64, device=groups.device)
    dist.broadcast(chosen, src=topology.last_stage_ranks(groups.place.dp)[0], group=groups.replica)
    return chosen.tolist()
