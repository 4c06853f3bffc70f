"""Tests of the single-process model: independence of samples, definitions of losses, and the use of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.audio_tower import AudioTower
from model.batch import IGNORE, Batch, Sample
from model.config import LLMConfig, ModelConfig, RouterConfig
from model.errors import UserError
from model.lengths import TokenRate
from model.llm.reference import resolve_hf_config
from model.llm.weights import StateDictSource, embedding_rms
from model.speech_llm import SpeechLLM
from trainer.parity_cases import VOCAB_SIZE, make_sample, tiny_model

RATE = TokenRate((2, 2, 2))


def samples(*clips: int) -> list[Sample]:
    return [make_sample(i, n, RATE, seed=5) for i, n in enumerate(clips)]


@pytest.fixture(scope="module")
def model() -> SpeechLLM:
    return SpeechLLM(tiny_model(), VOCAB_SIZE, seed=1)


def test_other_samples_never_change_a_samples_logits(model: SpeechLLM) -> None:
    together = Batch(tuple(samples(1, 0, 2, 1)))
    audio = model.embed_audio(together)
    logits = model.logits(together, audio)
    for i, sample in enumerate(together.samples):
        alone = Batch((sample,))
        own_audio = model.embed_audio(alone)
        expected = model.logits(alone, own_audio)[0]
        torch.testing.assert_close(logits[i, : sample.num_tokens], expected, atol=1e-4, rtol=1e-4)


def test_next_token_loss_is_the_mean_over_all_targets(model: SpeechLLM) -> None:
    batch = Batch(tuple(samples(1, 0, 2)))
    audio = model.embed_audio(batch)
    logits = model.logits(batch, audio)
    token_losses = []
    for row, sample in zip(logits, batch.samples, strict=True):
        log_probs = row[: sample.num_tokens].log_softmax(-1)
        token_losses += [-log_probs[i, label] for i, label in enumerate(sample.labels.tolist()) if label != IGNORE]
    expected = torch.stack(token_losses).mean()
    torch.testing.assert_close(model(batch)["next_token"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_tokens_are_weighted_by_the_length_of_the_answer(exponent: float) -> None:
    config = replace(tiny_model(), losses={"next_token": {"length_exponent": exponent}})
    model = SpeechLLM(config, VOCAB_SIZE, seed=1)
    batch = Batch(tuple(samples(1, 0, 2)))
    lengths = torch.tensor([s.num_targets for s in batch.samples])
    assert len(set(lengths.tolist())) > 1
    means = torch.stack([model(Batch((sample,)))["next_token"] for sample in batch.samples])
    weights = lengths ** (1 - exponent)
    torch.testing.assert_close(model(batch)["next_token"], (means * weights).sum() / weights.sum())


def test_text_only_batch_has_no_audio_losses(model: SpeechLLM) -> None:
    losses = model(Batch(tuple(samples(0, 0))))
    assert losses.decisions is None and all(losses[name] == 0 for name in ("routing", "ctc", "distillation"))
    assert losses.total == losses["next_token"]


def test_only_chosen_experts_compute(model: SpeechLLM) -> None:
    batch = Batch(tuple(samples(1, 1, 1)))
    seen: dict[str, int] = {}

    def run(names, clips, wanted):  # noqa: ANN001, ANN202
        seen.update(zip(names, wanted.sum(0).tolist(), strict=True))
        return model.audio.encode_here(names, clips, wanted)

    out = model.audio(batch.clips, batch.prompts, encode=run)
    assert out.routing is not None
    assert seen == {
        "whisper": 3,
        **dict(zip(model.audio.expert_names, out.routing.active.sum(0).tolist(), strict=True)),
    }


def test_expert_that_no_clip_chose_gets_no_gradient() -> None:
    model = SpeechLLM(tiny_model(), VOCAB_SIZE, seed=1)
    with torch.no_grad():
        model.audio.router.independent.logits.copy_(torch.tensor([9.0, 0.0, 0.0]))
        model.audio.router.dependent.bias.copy_(torch.tensor([9.0, -9.0, -9.0]))
    model(Batch(tuple(samples(1, 1)))).total.backward()
    gradients = {n: p.grad is not None for n, p in model.audio.experts.named_parameters() if p.requires_grad}
    assert all(has for name, has in gradients.items() if name.startswith("hubert.projection"))
    assert not any(has for name, has in gradients.items() if name.startswith("wavlm."))


@pytest.mark.parametrize("gate_input", ["primary", "log_mel", "prompt"])
def test_every_gate_input_learns(gate_input: str) -> None:
    config = replace(tiny_model(), router=RouterConfig(input=gate_input))  # type: ignore[arg-type]
    model = SpeechLLM(config, VOCAB_SIZE, seed=1)
    model(Batch(tuple(samples(1, 2)))).total.backward()
    assert model.audio.router.dependent.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("gate_input", ["log_mel", "prompt"])
def test_all_routed_has_no_primary(gate_input: str) -> None:
    base = tiny_model()
    encoders = (replace(base.primary, name="whisper"), *base.experts)
    router = RouterConfig(mode="all_routed", input=gate_input, top_k=2)  # type: ignore[arg-type]
    model = SpeechLLM(replace(base, primary=None, experts=encoders, router=router), VOCAB_SIZE, seed=1)
    losses = model(Batch(tuple(samples(1, 0, 2))))
    losses.total.backward()
    assert model.audio.primary is None and losses.decisions is not None
    assert losses.decisions.chosen.sum(-1).unique().tolist() == [2]


def test_a_model_without_experts_has_no_router() -> None:
    tower = AudioTower(replace(tiny_model(), experts=()), 32, VOCAB_SIZE)
    assert not hasattr(tower, "router")


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_normalized_audio_embeddings_are_as_large_as_token_embeddings(scale: float) -> None:
    base = tiny_model("llama", "queries")
    config = {**base.llm.config, "initializer_range": scale * base.llm.config["initializer_range"]}
    model = SpeechLLM(replace(base, llm=LLMConfig(config=config)), VOCAB_SIZE, seed=1)
    batch = Batch(tuple(samples(1, 2)))
    tokens = model.llm.get_input_embeddings().weight
    found = model.audio(batch.clips, batch.prompts).embeddings.values
    assert float(found.square().mean().sqrt() / tokens.square().mean().sqrt()) == pytest.approx(1, rel=0.02)


def test_the_size_of_token_embeddings_is_measured_over_the_whole_table() -> None:
    table = torch.arange(40_000.0)[:, None] / 40_000
    found = embedding_rms(StateDictSource({"model.embed_tokens.weight": table}), resolve_hf_config(tiny_model().llm))
    assert found == pytest.approx(float(table.square().mean().sqrt()), rel=0.1)


def test_invalid_models_are_refused_in_one_line() -> None:
    base = tiny_model()
    with pytest.raises(UserError, match="top_k = 4: must be within 1..3"):
        replace(base, router=RouterConfig(top_k=4))
    with pytest.raises(UserError, match="model.primary is missing"):
        ModelConfig()
    with pytest.raises(UserError, match="must be unique"):
        replace(base, experts=(base.experts[0], base.experts[0]))


@torch.no_grad()
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_bf16_works_whichever_expert_is_chosen(chosen: int) -> None:
    tower = SpeechLLM(tiny_model(), VOCAB_SIZE, seed=0).eval().audio.to(torch.bfloat16)
    tower.router.independent.logits.copy_(torch.eye(3)[chosen] * 9)
    tower.router.dependent.bias.copy_(torch.eye(3)[chosen] * 99)
    batch = Batch(tuple(samples(1)))
    found = tower(batch.clips, batch.prompts)
    assert found.routing is not None and found.routing.active.tolist() == [[chosen == k for k in range(3)]]
    assert found.embeddings.values.dtype == torch.bfloat16
