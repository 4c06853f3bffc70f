"""Tests that the content of a pack's padding does not change any bit of the loss or the gradients."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

SIZES, MULTIPLE = [9, 5, 7, 3, 11], 24


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_content_of_padding_has_no_effect(tp: int, pp: int) -> None:
    for found in run_ranks(2, compare_paddings, {"tp": tp, "pp": pp}, timeout_sec=150):
        assert found["padding_rows"] >= MULTIPLE // 2 and found["learned"] > 4
        assert found["changed"] == [] and found["grad_of_padding"] == 0.0


def compare_paddings(tp: int, pp: int) -> dict[str, object]:
    """Run the same packs twice with different tokens and audio in their padding, and return the differences."""
    import torch

    from model.batch import IGNORE
    from model.llm.reference import resolve_hf_config
    from model.llm.weights import RandomSource
    from model.losses.next_token import NextToken
    from trainer.engine.llm import LLMEngine
    from trainer.engine.packs import Packs
    from trainer.engine.token_losses import PackedLoss
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.packs import plan_packs
    from trainer.parallel.topology import Topology
    from trainer.parity_cases import OPTIM, SEED, VOCAB_SIZE, tiny_model

    rank, world, device = connect()
    topology = Topology(world, tp, pp)
    groups = build_groups(topology, rank, device, SEED)
    hf_config = resolve_hf_config(tiny_model().llm)
    engine = LLMEngine(hf_config, RandomSource(hf_config, SEED), OPTIM, groups, torch.float32)
    plan = plan_packs(SIZES, topology.dp, MULTIPLE, MULTIPLE)
    rows, share = plan.num_microbatches * plan.pack_tokens, plan.pack_tokens // tp
    padding = torch.ones(rows, dtype=torch.bool)
    for first, length in zip(plan.replica_row, plan.num_tokens, strict=True):
        padding[first : first + length] = False
    mine = torch.arange(rows).view(plan.num_microbatches, tp, share)[:, groups.place.tp].flatten()

    def run(seed: int) -> dict[str, torch.Tensor]:
        def drawn(fixed: torch.Tensor, other: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            return torch.where(chosen.view(-1, *(1 for _ in fixed.shape[1:])), other, fixed)

        first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
        ids = [torch.randint(0, VOCAB_SIZE, (rows,), generator=g) for g in (first, second)]
        audio = [torch.randn(rows, hf_config.hidden_size, generator=g) for g in (first, second)]
        labels = torch.randint(0, VOCAB_SIZE, (rows,), generator=first)
        packs = Packs(
            lengths=tuple(plan.lengths(0, m) for m in range(plan.num_microbatches)),
            token_ids=drawn(*ids, padding),
            labels=labels.masked_fill(padding, IGNORE),
            samples=tuple(tuple(plan.members(0, m).tolist()) for m in range(plan.num_microbatches)),
            audio=drawn(*audio, padding)[mine],
            audio_mask=(torch.arange(rows) % 3 == 0)[mine],
            num_samples=len(SIZES),
        )
        losses, grad = engine.forward_backward(packs, [PackedLoss(NextToken(), tiny_model(), 1 / sum(SIZES))])
        grads = {n: p.main_grad.clone() for n, p in engine.parameters()}  # type: ignore[attr-defined]
        return {"losses": losses, "audio": grad, **grads}

    one, other = run(2), run(3)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    at_padding = one["audio"][padding[mine]] if groups.is_first_stage else torch.zeros(1)
    return {
        "padding_rows": int(padding.sum()),
        "learned": sum(bool(g.any()) for g in one.values()),
        "changed": [name for name, value in one.items() if not torch.equal(value, other[name])],
        "grad_of_padding": float(at_padding.abs().max()) if at_padding.numel() else 0.0,
    }
