"""Tests that the Megatron model in one process computes the same values as transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from transformers.models.olmo3.modeling_olmo3 import apply_rotary_pos_emb

from model.config import LLMConfig
from model.llm.attention import rotate
from model.llm.megatron import build_megatron, embed_tokens
from model.llm.names import global_to_hf, hf_to_local
from model.llm.packing import KVCache, PackedSequences
from model.llm.reference import build_reference
from model.llm.weights import StateDictSource, global_parameters, load_megatron
from trainer.parallel.cpu import megatron_calls
from trainer.parity_llms import EXPERTS, FEATURED, features

VOCAB = 97
LENGTHS = (5, 9, 1, 6)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {"model_type": "qwen2_moe", **EXPERTS["qwen2_moe"], "mlp_only_layers": [1]},
    "gpt_oss": {"model_type": "gpt_oss", **EXPERTS["gpt_oss"]},
    **{family: {"model_type": family, **features(family, 2)} for family in FEATURED},
}
ADDED = {"experts": ["b", "c", "a"], "layers": [1], "top_k": 2, "normalize": True}
"""The experts that a recipe adds to the second of two layers."""
FAMILIES |= {
    f"{family}-experts": {"model_type": family, **features(family, 2), "ffn_experts": ADDED}
    for family in ("qwen2", "qwen3", *FEATURED)
    if family not in ("phi3", "gemma2", "gemma3_text")  # experts cannot be added to these
}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with megatron_calls():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def pair(family: str, **options: Any) -> tuple[Any, Any]:
    """Return the reference model with random weights, and the Megatron model with the same weights."""
    reference = build_reference(LLMConfig(config={**SHAPE, **FAMILIES[family]}), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    with megatron_calls():
        (gpt,) = build_megatron(reference.config, tp_size=1, pp_size=1, first_stage=True, last_stage=True, **options)
        load_megatron([gpt], StateDictSource(reference.state_dict()), reference.config, tp_rank=0, tp_size=1)
    return reference, gpt


def tokens(count: int = sum(LENGTHS), seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def run(gpt: Any, ids: Tensor, packed: PackedSequences, labels: Tensor | None = None) -> Tensor:
    with megatron_calls():
        output: Tensor = gpt(
            None,
            None,
            None,
            decoder_input=embed_tokens(gpt, ids),
            labels=None if labels is None else labels[None],
            packed_seq_params=packed,
        )
    return output[0]


def run_reference(reference: Any, ids: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([reference(input_ids=part[None]).logits[0] for part in ids.split(list(lengths))])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family: str) -> None:
    reference, gpt = pair(family)
    ids, labels = tokens(), tokens(seed=1)
    expected = run_reference(reference, ids)
    torch.testing.assert_close(run(gpt, ids, PackedSequences(lengths=LENGTHS)), expected, rtol=0, atol=1e-5)

    torch.nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    with megatron_calls():
        run(gpt, ids, PackedSequences(lengths=LENGTHS), labels).sum().backward()
    reader = StateDictSource({name: p.grad for name, p in reference.named_parameters()})
    names = dict(global_parameters([gpt]))
    for name, parameter in names.items():
        want = hf_to_local(name, reader.read, reference.config, 0, 1)
        assert (parameter.grad - want).abs().max() <= 1e-5 * want.abs().max(), name
    covered = {hf for name in names for hf in global_to_hf(name, names[name].detach(), reference.config, 1)}
    assert covered == {name for name, _ in reference.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_only_wanted_rows_have_logits(family: str) -> None:
    """Check families that scale or cap their logits in hooks of the output layer."""
    _, gpt = pair(family)
    ids, rows = tokens(), torch.tensor([0, 4, 13, 20])
    whole = run(gpt, ids, PackedSequences(lengths=LENGTHS))
    torch.testing.assert_close(run(gpt, ids, PackedSequences(lengths=LENGTHS, output_rows=rows)), whole[rows])
    assert torch.equal(run(gpt, ids, PackedSequences(lengths=LENGTHS)), whole), "rows must apply to one pack only"


def test_segments_do_not_see_each_other() -> None:
    _, gpt = pair("llama")
    ids = tokens()
    changed = ids.clone()
    changed[5:14] = (changed[5:14] + 1) % VOCAB
    before, after = (run(gpt, x, PackedSequences(lengths=LENGTHS)) for x in (ids, changed))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[5:14], after[5:14])


@pytest.mark.parametrize(
    ("family", "frozen_embedding"),
    [
        *(("qwen3", False), ("qwen3", True), ("granite", True), ("gemma2", False), ("gemma3_text", False)),
        *(("olmo3", True), ("qwen3_5_text", False)),
    ],
)
def test_recomputation_changes_nothing(family: str, frozen_embedding: bool) -> None:
    gradients = []
    for recompute in ("none", "full", "pointwise", "selective"):
        _, gpt = pair(family, recompute=recompute)
        granularity = {"none": None, "full": "full"}.get(recompute, "selective")
        assert gpt.config.recompute_granularity == granularity
        assert gpt.config.recompute_attention == (recompute == "selective")
        gpt.embedding.requires_grad_(not frozen_embedding)
        with megatron_calls():
            run(gpt, tokens(), PackedSequences(lengths=LENGTHS), tokens(seed=1)).sum().backward()
        gradients.append([p.grad for p in gpt.parameters() if p.requires_grad])
        assert all(gradient is not None for gradient in gradients[-1])
    for plain, full, *partial in zip(*gradients, strict=True):
        assert torch.equal(plain, full)
        # The first pass of a recomputed part has no gradient. For RMSNorm, torch then uses a different kernel, which
        # rounds differently. In Qwen3.5, the gradient of a decay is a small difference of large terms.
        tolerance = 1e-5 if family == "qwen3_5_text" else 3e-6
        for found in partial:
            torch.testing.assert_close(found, plain, rtol=0, atol=tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo3", "qwen3_5_text"])
def test_bf16_stays_close(family: str) -> None:
    reference, gpt = pair(family, dtype=torch.bfloat16)
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    expected = run_reference(reference, tokens())
    difference = (run(gpt, tokens(), PackedSequences(lengths=LENGTHS)).float() - expected).abs().mean()
    assert difference < 0.02 * expected.abs().mean()


def test_olmo_rounds_to_bf16_where_transformers_does() -> None:
    """Check that queries are rotated in fp32, and that their norm is rounded after the product with the weight."""
    reference, gpt = pair("olmo3", dtype=torch.bfloat16)
    theirs, ours = reference.model, gpt.decoder.layers[0].self_attention
    query = torch.randn(sum(LENGTHS), 1, 4, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    normed = ours.q_layernorm(query)
    wanted = theirs.layers[0].self_attn.q_norm.bfloat16()(query.flatten(-2)).view_as(query)
    assert normed.dtype == torch.bfloat16 and (normed == wanted).float().mean() > 0.99
    packed, positions = PackedSequences(lengths=LENGTHS), torch.cat([torch.arange(n) for n in LENGTHS])
    rotated = rotate(query[:, 0], *packed.rotation(ours.core_attention.rotary, like=query))
    kind = reference.config.layer_types[0]
    cos, sin = theirs.rotary_emb(query, positions[None], kind)
    heads_first = query[None, :, 0].transpose(1, 2)
    wanted, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated, wanted[0].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "mistral-window", *FEATURED]
)
def test_decoding_with_a_cache_equals_the_whole_forward(family: str) -> None:
    """Decode sequences of different lengths in padded chunks of several tokens. One of the sequences ends early."""
    reference, gpt = pair(family)
    sequences = [tokens(n, seed=n) for n in (7, 4, 12)]
    cache, done = KVCache(num_sequences=3, max_tokens=12), [0, 0, 0]
    passes = [((0, 1, 2), (5, 2, 8), 0), ((0, 1, 2), (1, 1, 1), 1), ((2, 0), (1, 1), 2), ((2, 1), (2, 1), 0)]
    for which, grow, num_padding in passes:
        packed = cache.extend(grow, which, num_padding)
        new = [sequences[s][done[s] : done[s] + g] for s, g in zip(which, grow, strict=True)]
        with torch.no_grad():
            logits = run(gpt, torch.cat([*new, torch.zeros(num_padding, dtype=torch.int64)]), packed)
        for s, g, part in zip(which, grow, logits.split([*grow, num_padding]), strict=False):
            done[s] += g
            want = reference(input_ids=sequences[s][None, : done[s]]).logits[0, -g:]
            torch.testing.assert_close(part, want, rtol=0, atol=1e-5)
    assert done == cache.num_tokens == [7, 4, 12]


def test_cuda_is_replaced_only_inside_the_context() -> None:
    if torch.cuda.is_available():
        pytest.skip("nothing is replaced on a machine with a GPU")
    outside = (torch.cuda.current_device, torch.cuda.manual_seed, torch.zeros(1).type())
    with pytest.raises(KeyError), megatron_calls():
        with megatron_calls():
            pass
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        raise KeyError
    assert outside == (torch.cuda.current_device, torch.cuda.manual_seed, torch.zeros(1).type())
