"""Tests of low-rank adapters in one process: in plain PyTorch, in Megatron's layers, and in comparison with peft."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from model.batch import Batch
from model.config import LLMConfig, LoraConfig
from model.errors import UserError
from model.lengths import TokenRate
from model.llm import frozen
from model.llm.frozen import use_one_product
from model.llm.lora import add_llm_adapters
from model.llm.megatron import build_megatron, embed_tokens
from model.llm.names import local_pieces, tp_dim
from model.llm.packing import PackedSequences
from model.llm.reference import build_reference, resolve_hf_config
from model.llm.weights import StateDictSource, global_parameters, load_megatron
from model.lora import Adapters, adaptable_layers, add_adapters, initial_factor, llm_shapes
from model.speech_llm import SpeechLLM
from trainer.engine.optim import OptimConfig, ParamSetting, PartConfig, setting_of
from trainer.parallel.cpu import megatron_calls
from trainer.parity import build_oracle
from trainer.parity_cases import ADAPTERS, VOCAB_SIZE, drawn_factor, make_sample, tiny_model
from trainer.parity_llms import features

VOCAB, LENGTHS = 97, (5, 9, 1, 6)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
PARTS = (
    LoraConfig("llm.*", rank=3, alpha=6),
    LoraConfig("llm.*.v_proj", rank=2, alpha=5),
    LoraConfig("llm.model.layers.1.mlp.*", rank=2, train_base=True),
)


class Holder(nn.Module):
    """A module that contains the LLM under the same name as the whole model does."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm


def merged(model: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """Return the merged weights W + (alpha / rank)·B·A of all layers that have an adapter, by name."""
    found, tensors = {}, dict(model.named_parameters())
    for name, _ in adaptable_layers(model, ""):
        part = adapters.of_layer(name)
        if part is not None:
            product = tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
            found[f"{name}.weight"] = tensors[f"{name}.weight"] + part.alpha / part.rank * product
    return found


def close(found: Tensor, wanted: Tensor, limit: float = 1e-5) -> bool:
    return float((found - wanted).abs().max()) <= limit * float(wanted.abs().max())


def test_the_whole_model_computes_with_merged_weights() -> None:
    model = build_oracle(tiny_model(), ADAPTERS)
    plain = SpeechLLM(tiny_model(), VOCAB_SIZE, seed=3)
    batch = Batch(tuple(make_sample(i, 1, TokenRate((2, 2, 2)), seed=5) for i in range(2)))
    names = [n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B"))]
    assert sum(n.startswith("audio.primary") for n in names) == 8 and any("wavlm" in n for n in names)
    loss = model(batch).total
    wanted = functional_call(plain, merged(model, ADAPTERS.adapters), (batch,)).total
    assert abs(float(loss) - float(plain(batch).total)) > 1e-3, "the adapters must change the loss"
    parameters = [dict(model.named_parameters())[n] for n in names]
    assert close(loss, wanted, 1e-6)
    for name, found, expected in zip(
        names,
        torch.autograd.grad(loss, parameters, allow_unused=True),
        torch.autograd.grad(wanted, parameters, allow_unused=True),
        strict=True,
    ):
        assert (found is None) == (expected is None), name
        assert found is None or (found - expected).abs().max() <= 1e-5, name


def test_fused_projections_are_frozen_together_and_adapters_are_not() -> None:
    parts = (
        LoraConfig("llm.*.q_proj"),
        LoraConfig("llm.*.o_proj", train_base=True),
        LoraConfig("audio.primary.*.q_proj"),
    )
    adapters = Adapters.of(parts, seed=1)
    model = SpeechLLM(tiny_model(), VOCAB_SIZE, seed=1)
    before = dict(model.named_parameters())
    frozen = {n for n, p in before.items() if not p.requires_grad}
    add_adapters(model, "", adapters)
    after = {n: p for n, p in model.named_parameters() if not p.requires_grad and n not in frozen}
    kinds = {n.partition(".")[0] + "." + n.partition(".self_attn.")[2] for n in after}
    fused = {f"llm.{p}_proj.weight" for p in "qkv"}
    assert kinds == fused | {"audio.q_proj.weight", "audio.q_proj.bias"}


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_layers() -> None:
    names = [name for name, _ in adaptable_layers(SpeechLLM(tiny_model(), VOCAB_SIZE, seed=1), "")]
    Adapters.of((LoraConfig("llm.*.q_proj"), LoraConfig("audio.experts.hubert.*")), 1).check(names)
    with pytest.raises(
        UserError, match=r"lora: pattern = llm.\*.query_proj: .*nearest names are [^,]*\.self_attn\.q_proj"
    ):
        Adapters.of((LoraConfig("llm.*.q_proj"), LoraConfig("llm.*.query_proj")), 1).check(names)
    with pytest.raises(UserError, match="matches no linear layer"):
        Adapters.of((LoraConfig("audio.projector*"),), 1).check(names)
    with pytest.raises(UserError, match="rank = 0"):
        LoraConfig("llm.*", rank=0)


def test_initial_factors_depend_on_seed_and_name_alone() -> None:
    first, again = (initial_factor("a.lora_A", (4, 64), seed=1) for _ in range(2))
    assert first.equal(again) and not first.equal(initial_factor("b.lora_A", (4, 64), seed=1))
    assert not first.equal(initial_factor("a.lora_A", (4, 64), seed=2))
    assert first.abs().max() <= 1 / 8 and first.abs().max() > 0.1
    assert not initial_factor("a.lora_B", (64, 4), seed=1).any()


def test_only_patterns_that_name_adapters_freeze_them() -> None:
    name = "llm.model.layers.0.self_attn.q_proj."
    general = OptimConfig(parts=(PartConfig("llm.*", frozen=True, lr=1e-5),))
    assert setting_of(general, name + "weight", 2).frozen
    assert setting_of(general, name + "lora_A", 2) == ParamSetting(False, 1e-5, general.weight_decay)
    named = OptimConfig(parts=(PartConfig("llm.*.lora_?", frozen=True),))
    assert setting_of(named, name + "lora_B", 2).frozen and not setting_of(named, name + "weight", 2).frozen


def test_peft_computes_the_same() -> None:
    peft = pytest.importorskip("peft")
    holder, other = (Holder(build_reference(LLMConfig(config={**SHAPE, "model_type": "llama"}), 5)) for _ in range(2))
    adapters = Adapters((LoraConfig("llm.*.[qv]_proj", rank=3, alpha=6),), drawn_factor)
    add_adapters(holder, "", adapters)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.inject_adapter_in_model(config, other.llm)
    ours, theirs = dict(holder.named_parameters()), dict(wrapped.named_parameters())
    pairs = []
    for name, parameter in ours.items():
        if name.endswith(("lora_A", "lora_B")):
            twin = theirs[name.removeprefix("llm.") + ".default.weight"]
            with torch.no_grad():
                twin.copy_(parameter)
            pairs.append((name, parameter, twin))
    assert len(pairs) == 2 * 2 * SHAPE["num_hidden_layers"]
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    outputs = [m(input_ids=ids, use_cache=False).logits for m in (holder.llm, wrapped)]
    assert close(*outputs, 1e-6)
    for output in outputs:
        output.square().sum().backward()
    for name, mine, twin in pairs:
        assert close(mine.grad, twin.grad), name


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    with megatron_calls():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen3_5_text"])
def test_megatron_computes_the_same(one_rank: None, family: str) -> None:
    adapters = Adapters(PARTS, drawn_factor)
    fields = {**SHAPE, "model_type": family, **features(family, SHAPE["num_hidden_layers"])}
    reference: Any = build_reference(LLMConfig(config=fields), seed=5)
    with megatron_calls():
        gpt: Any = build_megatron(reference.config, tp_size=1, pp_size=1, first_stage=True, last_stage=True)[0]
        load_megatron([gpt], StateDictSource(reference.state_dict()), reference.config, tp_rank=0, tp_size=1)
        add_llm_adapters(gpt, reference.config, adapters, tp_rank=0, tp_size=1)
    add_adapters(Holder(reference), "", adapters)
    ids = torch.randint(0, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    with megatron_calls():
        x, packed = embed_tokens(gpt, ids), PackedSequences(lengths=LENGTHS)
        found = gpt(input_ids=None, position_ids=None, attention_mask=None, decoder_input=x, packed_seq_params=packed)[
            0
        ]
        found.square().sum().backward()
    wanted = torch.cat([reference(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)])
    wanted.square().sum().backward()
    assert close(found, wanted)
    tensors, checked = dict(reference.named_parameters()), set()
    for name, parameter in global_parameters([gpt]):
        row = 0
        for piece in local_pieces(name, reference.config, 0, 1):
            twin = tensors[str(piece.hf_name)]
            assert parameter.requires_grad == twin.requires_grad, piece
            if parameter.requires_grad and twin.grad is not None:
                rows = twin.grad[piece.index].shape[0]
                assert close(parameter.grad[row : row + rows], twin.grad[piece.index]), (name, piece)
                row += rows
                checked.add(piece.hf_name)
    factors = {n for n in tensors if "lora" in n}
    assert factors <= checked and any("gate_proj" in n or ".w1" in n for n in factors)
    if family != "mixtral":  # the pattern names `mlp`, where Mixtral has `block_sparse_moe`
        assert "model.layers.1.mlp.up_proj.weight" in checked


def test_a_frozen_weight_is_multiplied_once_and_not_once_per_row(one_rank: None) -> None:
    """Check an output gradient with the strides of a transposed tensor, which attention may cause."""
    layer = frozen.LinearWithFrozenWeight
    with megatron_calls():
        use_one_product()
        assert layers.LinearWithFrozenWeight is layer, "Megatron's layers must use the same class"
        weight, x = torch.randn(6, 4), torch.randn(5, 1, 4, requires_grad=True)
        output = layers.linear_with_frozen_weight(x, weight, None, False, False, False, None)
        grad = torch.randn(1, 6, 5).permute(2, 0, 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            output.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (grad.reshape(5, 6) @ weight)[:, None])
    called = {event.key for event in profiler.key_averages()}
    assert "aten::mm" in called and "aten::bmm" not in called


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tensor_ranks_share_every_element_of_a_factor(tp_size: int) -> None:
    hf_config = resolve_hf_config(LLMConfig(config={**SHAPE, "model_type": "llama"}))
    shapes = llm_shapes(hf_config, Adapters(PARTS))
    layers = {"self_attention.linear_qkv": "qkv", "self_attention.linear_proj": "o", "mlp.linear_fc2": "down"}
    for layer, projections in layers.items():
        for projection in (projections,) if len(projections) != 3 else projections:
            for factor in ("lora_A", "lora_B"):
                name = f"decoder.layers.0.{layer}.{factor}.{projection}_proj"
                seen: Tensor | None = None
                for rank in range(tp_size):
                    for piece in local_pieces(name, hf_config, rank, tp_size):
                        seen = torch.zeros(shapes[str(piece.hf_name)]) if seen is None else seen
                        seen[piece.index] += 1
                assert seen is not None and bool((seen == (1 if tp_dim(name) is not None else tp_size)).all()), name
