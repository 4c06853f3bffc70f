"""Tests that the loss and all gradients with tensor, sequence and pipeline parallelism equal those of transformers."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from trainer.parity_llms import FEATURED, features

VOCAB = 97  # is not divisible by any tensor-parallel size of the tests
TOLERANCE = 1e-5
NUM_LAYERS = 4
# All packs have the same length, which is a multiple of the largest tensor-parallel size, 4. The last segment of a pack
# is padding.
PACKS = ((5, 9, 1, 6, 7), (12, 16), (2, 2, 17, 5, 2), (8, 20))

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 16},
    **{
        family: {
            "model_type": family,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **features(family, NUM_LAYERS),
        }
        for family in FEATURED
    },
}

# The cases by the number of ranks. With tp 4, qwen2, olmo2 and phi3 have fewer key-value heads than ranks.
CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        {"family": "qwen3", "tp": 2},
        {"family": "qwen3", "tp": 2, "recompute": "full"},
        {"family": "qwen2", "pp": 2},
        {"family": "llama", "pp": 2, "recompute": "full"},
        {"family": "llama", "dp": 2},
        {"family": "qwen2", "tp": 2, "frozen": True},
        *({"family": family, "tp": 2} for family in ("phi3", "gemma2", "gemma3_text", "olmo3", "qwen3_5_text")),
        *({"family": family, "pp": 2} for family in ("granite", "smollm3", "ministral3", "qwen3_5_text")),
    ],
    4: [
        {"family": "llama", "tp": 2, "pp": 2},
        {"family": "qwen2", "tp": 2, "pp": 2, "recompute": "full"},
        {"family": "qwen2", "tp": 4},
        {"family": "qwen3", "tp": 2, "dp": 2},
        {"family": "olmo2", "tp": 4},
        {"family": "phi3", "tp": 4, "recompute": "full"},
        *({"family": family, "tp": 2, "pp": 2, "recompute": "full"} for family in ("granite", "gemma3_text", "olmo3")),
        *(
            {"family": family, "tp": 2, "pp": 2}
            for family in (
                *("mistral", "qwen3", "smollm3", "phi3", "gemma2", "gemma3_text", "ministral3", "olmo2"),
                "qwen3_5_text",
            )
        ),
    ],
}


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_equal_the_reference(world: int) -> None:
    results = run_ranks(world, "tests.distributed.test_llm_parallel:compare_cases", timeout_sec=240)
    for i, case in enumerate(CASES[world]):
        seen: dict[str, float] = {}
        for worst in results:
            for name, difference in worst[i].items():
                assert difference <= TOLERANCE, (case, name, difference)
            seen.update(worst[i])
        assert {"loss", "input"} <= set(seen)
        if case.get("frozen"):
            continue
        assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= set(seen)
        kinds = FAMILIES[case["family"]].get("layer_types", [""] * NUM_LAYERS)
        projections = ["in_proj" if kind == "linear_attention" else "linear_qkv" for kind in kinds]
        assert {f"decoder.layers.{n}.self_attention.{p}.weight" for n, p in enumerate(projections)} <= set(seen)


def _hf_model(family: str) -> tuple[Any, Any]:
    import torch

    from model.config import LLMConfig
    from model.llm.reference import build_reference

    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        **FAMILIES[family],
    }
    reference = build_reference(LLMConfig(config=config), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():  # also changes norms and biases, which are initially 1 and 0
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return reference, reference.config


def _packs(token_seed: int = 7) -> list[dict[str, Any]]:
    import torch

    generator = torch.Generator().manual_seed(token_seed)
    packs = []
    for lengths in PACKS:
        rows = sum(lengths)
        mask = torch.rand(rows, generator=generator) < 0.6
        mask[rows - lengths[-1] :] = False
        packs.append(
            {
                "lengths": lengths,
                "ids": torch.randint(0, VOCAB, (rows,), generator=generator),
                "labels": torch.randint(0, VOCAB, (rows,), generator=generator),
                "audio": torch.randn(rows, 32, generator=generator),  # added to every row instead of being spliced in
                "mask": mask.float(),
            }
        )
    return packs


def _reference_gradients(reference: Any) -> tuple[float, dict[str, Any], list[Any]]:
    import torch

    total, audios = 0.0, []
    for pack in _packs():
        audio = pack["audio"].clone().requires_grad_()
        embedded = reference.get_input_embeddings()(pack["ids"]) + audio
        logits = torch.cat([reference(inputs_embeds=x[None]).logits[0] for x in embedded.split(list(pack["lengths"]))])
        loss = (torch.nn.functional.cross_entropy(logits, pack["labels"], reduction="none") * pack["mask"]).sum()
        loss.backward()
        total += loss.item()
        audios.append(audio.grad)
    return total, {name: p.grad for name, p in reference.named_parameters()}, audios


def compare_cases() -> list[dict[str, float]]:
    """Return this rank's relative differences of the loss, decoded logits and gradients, by name, for every case."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from trainer.parallel.cpu import megatron_calls

    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=world)
    results = []
    for case in CASES[world]:
        with megatron_calls():
            parallel_state.initialize_model_parallel(case.get("tp", 1), case.get("pp", 1))
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        results.append(_compare(**case))
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return results


def _compare(
    family: str, tp: int = 1, pp: int = 1, dp: int = 1, recompute: str = "none", frozen: bool = False
) -> dict[str, float]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from model.llm.megatron import build_megatron
    from model.llm.names import hf_to_local, tp_dim
    from model.llm.weights import StateDictSource, global_parameters, load_megatron
    from trainer.parallel.cpu import megatron_calls

    reference, hf_config = _hf_model(family)
    expected_loss, expected, expected_audio = _reference_gradients(reference)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    with megatron_calls():
        chunks = build_megatron(
            hf_config, tp_size=tp, pp_size=pp, first_stage=first, last_stage=last, recompute=recompute
        )
        (gpt,) = chunks
        source = StateDictSource(reference.state_dict())
        load_megatron(chunks, source, hf_config, tp_rank=tp_rank, tp_size=tp)
        gpt.requires_grad_(not frozen)
        losses, audios = _forward_backward(gpt, first, dp)
    worst = {}
    if last:
        loss = torch.tensor(sum(losses))
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        worst["loss"] = abs(loss.item() - expected_loss) / expected_loss
    if pp == 1:
        with megatron_calls():
            worst["decode"] = _decode_difference(gpt, reference, tp)
    for index, gradient in audios.items():
        full = expected_audio[index]
        worst["input"] = max(worst.get("input", 0.0), _difference(gradient, full.chunk(tp)[tp_rank]))
    reader = StateDictSource(expected)
    for name, parameter in global_parameters(chunks):
        if frozen:
            continue
        # Without this attribute, Megatron's gradient norm would count a divided parameter on one rank only.
        assert getattr(parameter, "tensor_model_parallel", False) == (tp_dim(name) is not None), name
        worst[name] = _difference(parameter.main_grad, hf_to_local(name, reader.read, hf_config, tp_rank, tp))
    return worst


def _difference(found: Any, want: Any) -> float:
    return float((found - want).abs().max() / want.abs().max())


def _forward_backward(gpt: Any, first: bool, dp: int) -> tuple[list[float], dict[int, Any]]:
    """Run forward and backward over this replica's packs. Token losses are summed, not averaged.

    Returns:
        The losses of the packs, and the gradients of their audio input by the index of the pack.
    """
    from unittest.mock import patch

    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from model.llm.megatron import embed_tokens
    from model.llm.packing import PackedSequences

    # Gradients must not be divided by token counts, because sums are compared.
    gpt.config.finalize_model_grads_func = lambda chunks, _num_tokens, **kw: finalize_model_grads(chunks, None, **kw)
    ddp = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
    replica, tp = parallel_state.get_data_parallel_rank(), gpt.config.tensor_model_parallel_size
    packs = {i: pack for i, pack in enumerate(_packs()) if i % dp == replica}
    audios: dict[int, Any] = {}

    def forward_step(iterator: Any, model: Any) -> Any:
        index, pack = next(iterator)
        embedded = None
        if first:
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            audios[index] = pack["audio"].chunk(tp)[tp_rank].clone().requires_grad_()
            embedded = embed_tokens(gpt, pack["ids"]) + audios[index][:, None]
        output = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embedded,
            labels=pack["labels"][None],
            packed_seq_params=PackedSequences(lengths=pack["lengths"]),
        )

        def loss_sum(losses: Any) -> Any:
            loss = (losses[0] * pack["mask"]).sum()
            return loss, torch.tensor(0, dtype=torch.int), loss.item()

        return output, loss_sum

    ddp.zero_grad_buffer()
    error = AssertionError("a stage sent the shape of a pack, which both stages know")
    with patch.object(P2PCommunicator, "_communicate_shapes", side_effect=error):
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(packs.items()),
            model=[ddp],
            num_microbatches=len(packs),
            seq_length=sum(PACKS[0]),
            micro_batch_size=1,
            forward_only=False,
        )
    return losses, {i: audio.grad for i, audio in audios.items()}


def _decode_difference(gpt: Any, reference: Any, tp: int) -> float:
    """Return the largest difference between logits with a cache and the reference's logits.

    The first pass reads three sequences except for their last two tokens. Two more passes read these, one token each.
    Passes are padded to a multiple of `tp`.
    """
    import torch

    from model.llm.megatron import embed_tokens
    from model.llm.packing import KVCache

    generator = torch.Generator().manual_seed(8)
    sequences = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (6, 3, 10)]
    cache, worst, done = KVCache(len(sequences), max_tokens=10), 0.0, [0] * len(sequences)
    for grow in ([n.shape[0] - 2 for n in sequences], [1, 1, 1], [1, 1, 1]):
        tokens = [s[d : d + g] for s, d, g in zip(sequences, done, grow, strict=True)]
        done = [d + g for d, g in zip(done, grow, strict=True)]
        num_padding = -sum(grow) % tp
        packed = cache.extend(grow, num_padding=num_padding)
        ids = torch.cat([*tokens, torch.zeros(num_padding, dtype=torch.int64)])
        with torch.no_grad():
            logits = gpt(
                None,
                None,
                None,
                decoder_input=embed_tokens(gpt, ids),
                packed_seq_params=packed,
                runtime_gather_output=True,
            )[0]
            for i, part in enumerate(logits.split([*grow, num_padding])[: len(sequences)]):
                want = reference(input_ids=sequences[i][None, : done[i]]).logits[0, -grow[i] :]
                assert torch.isneginf(part[:, VOCAB:]).all()
                worst = max(worst, _difference(part[:, :VOCAB], want))
    return worst
