"""Tests of the loss table, of distillation and of the samples that its teacher reads, and of the CTC loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.audio_output import AudioOutput
from model.batch import IGNORE, Batch, Ragged, Sample
from model.config import AdapterConfig
from model.connectors.base import build_adapter
from model.connectors.stacked_convolutions import StackedConvolutions
from model.errors import UserError
from model.lengths import TokenRate
from model.losses.base import alone
from model.losses.ctc import CTC, PartwiseLinear
from model.losses.distillation import Distillation
from model.losses.table import LOSSES, active_losses, text_fields
from model.losses.vocabulary import Vocabulary
from model.speech_llm import SpeechLLM
from trainer.data.loader import to_sample
from trainer.data.sample import EncodedSample
from trainer.parity_cases import VOCAB_SIZE, make_sample, tiny_model

RATE = TokenRate((2, 2, 2))


def sample(task: str, **texts: list[int]) -> Sample:
    """Return a sample with the prompt 1 2, three audio tokens between these two, and the answer 7 8."""
    return Sample(
        key="k",
        task=task,
        clips=(torch.ones(3 * 8 * 320),),
        token_ids=torch.tensor([1, 0, 0, 0, 2, 7, 8]),
        audio_mask=torch.tensor([False, True, True, True, False, False, False]),
        labels=torch.tensor([IGNORE] * 4 + [7, 8, 3]),
        prompt_ids=torch.tensor([2]),
        texts={name: torch.tensor(ids, dtype=torch.int64) for name, ids in texts.items()},
        is_transcription=task == "asr",
    )


def test_every_loss_is_in_the_table_under_its_name() -> None:
    assert all(name == loss.name for name, loss in LOSSES.items())


def test_only_active_losses_ask_for_texts() -> None:
    config = tiny_model()
    assert [loss.name for loss in active_losses(config)] == ["next_token", "routing", "ctc", "distillation"]
    assert text_fields(config) == ("transcript",)
    off = replace(config, losses={}, ctc_weight=0.0, experts=())
    assert [loss.name for loss in active_losses(off)] == ["next_token"] and text_fields(off) == ()


@pytest.mark.parametrize(
    ("given", "transcript"),
    [(sample("asr"), [7, 8]), (sample("sqa", transcript=[5]), [5]), (sample("asr", transcript=[5]), [7, 8])],
)
def test_the_teacher_reads_the_transcript_in_place_of_the_audio(given: Sample, transcript: list[int]) -> None:
    found = Distillation().reference(given)
    assert found is not None and found.clips == () and not found.audio_mask.any()
    assert found.token_ids.tolist() == [1, *transcript, 2, 7, 8]
    assert found.labels.tolist() == [IGNORE] * (1 + len(transcript)) + [7, 8, 3]


def test_the_teacher_keeps_a_label_at_the_last_audio_token() -> None:
    given = sample("sqa", transcript=[5, 6])
    ids, mask = given.token_ids[[0, 1, 2, 3, 5, 6]], given.audio_mask[[0, 1, 2, 3, 5, 6]]
    given = replace(given, token_ids=ids, audio_mask=mask, labels=torch.tensor([IGNORE] * 3 + [7, 8, 3]))
    found = Distillation().reference(given)
    assert found is not None and found.labels.tolist() == [IGNORE] * 2 + [7, 8, 3]


def test_samples_without_a_transcript_have_no_teacher() -> None:
    loss, config = Distillation(), tiny_model()
    others = [sample("sqa"), sample("sqa", transcript=[]), make_sample(0, 2, RATE, 0), make_sample(0, 0, RATE, 0)]
    assert [loss.reference(s) for s in others] == [None] * 4
    assert loss.count(Batch((*others, sample("asr"))), config) == 3


def test_divergence_by_hand() -> None:
    config = replace(tiny_model(), losses={"distillation": {"weight": 1.0, "temperature": 2.0}})
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    minus_infinity = torch.full((4, 1), -torch.inf)  # a column that pads the vocabulary
    padded = [torch.cat([logits, minus_infinity], dim=1).requires_grad_() for logits in (student, teacher)]
    labels = torch.zeros(4, dtype=torch.int64)
    found = Distillation().token_losses(padded[0], labels, padded[1], Vocabulary(), config)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1))
    found.sum().backward()
    torch.testing.assert_close(padded[0].grad[:, :-1], (q - p) / 2)
    assert padded[0].grad[:, -1].tolist() == [0.0] * 4 and padded[1].grad is None


def test_distillation_teaches_the_audio_side_but_not_through_the_teacher() -> None:
    config = replace(tiny_model(), losses={"distillation": {"weight": 1.0}})
    model = SpeechLLM(config, VOCAB_SIZE, seed=1)
    model(Batch((sample("sqa", transcript=[50]),)))["distillation"].backward()
    embedded = model.llm.get_input_embeddings().weight.grad
    assert embedded[2].abs().sum() > 0 and embedded[50].abs().sum() == 0  # only the teacher reads token 50
    assert model.audio.projector.weight.grad.abs().sum() > 0


def test_ctc_spells_bytes_with_several_outputs_per_audio_token() -> None:
    config = replace(tiny_model(), ctc_vocabulary="bytes", ctc_outputs=2)
    given = replace(sample("asr"), answer_text="  Hé  O")  # 3 audio tokens make 6 outputs
    batch = Batch((given,))
    found = CTC().targets(batch, config)
    assert bytes(found.values.tolist()).decode() == "hé o" and CTC().count(batch, config) == 5
    assert not len(CTC().targets(batch, replace(config, ctc_outputs=1)).values), "3 outputs cannot spell 5 bytes"
    assert not len(CTC().targets(Batch((replace(given, task="sqa", is_transcription=False),)), config).values)
    head = CTC().head(config, dim=8, vocab_size=49152)
    assert head.weight.shape == (2 * 257, 8)


def test_ctc_has_one_head_for_all_parts_of_an_audio_token() -> None:
    """Check that audio tokens of two parts have the CTC outputs that the parts would have as tokens of their own."""
    torch.manual_seed(0)
    stacked = AdapterConfig("stacked_convolutions", 8, strides=(3, 2))
    config = replace(tiny_model(), adapter=stacked, ctc_vocabulary="bytes", ctc_outputs=4)
    adapter, head = build_adapter(stacked, 3), CTC().head(config, dim=16, vocab_size=9)
    assert isinstance(adapter, StackedConvolutions) and isinstance(head, PartwiseLinear)
    assert adapter.dim == 16 and head.weight.shape == (2 * 257, 8)
    features = Ragged(torch.randn(7 + 12, 3), (7, 12))  # 7 frames make 3 outputs of the convolution, and 2 audio tokens
    tokens = adapter(features)
    assert tokens.lengths == (2, 2)
    outputs = adapter.convolutions(features)
    assert outputs.lengths == (3, 4)
    for own, of_tokens in zip(outputs.split(), tokens.split(), strict=True):
        parts = torch.nn.functional.linear(own, head.weight, head.bias)
        found = head(of_tokens).view(-1, 2 * 257)
        torch.testing.assert_close(found[: len(own)], parts)
        torch.testing.assert_close(found[len(own) :], head.bias.expand(len(found) - len(own), -1))
    with pytest.raises(UserError, match=r"model.ctc_outputs = 3: must be a multiple of 2, .*; set it to 2"):
        CTC().head(replace(config, ctc_outputs=3), dim=16, vocab_size=9)


def test_ctc_reads_the_outputs_of_an_audio_token_in_order() -> None:
    config = replace(tiny_model(), ctc_vocabulary="bytes", ctc_outputs=2)
    logits = torch.full((2, 2, 257), -20.0)  # two audio tokens with two outputs each
    for (token, output), symbol in zip(((0, 0), (0, 1), (1, 0), (1, 1)), (*b"ab", 256, *b"c"), strict=True):
        logits[token, output, symbol] = 20.0
    none = Ragged(torch.zeros(2, 1), (2,))
    audio = AudioOutput(none, None, none, {"ctc": Ragged(logits.flatten(1), (2,))})

    def loss_of(text: bytes) -> float:
        return float(CTC().sum(audio, Ragged(torch.tensor(list(text)), (len(text),)), config, alone))

    assert loss_of(b"abc") < 1e-3 and loss_of(b"acb") > 10


def test_the_loader_passes_the_text_of_the_answer_on() -> None:
    ids = np.array([5, 6], dtype=np.int64)
    meta = {"task": "asr", "answer": "Two words"}
    encoded = EncodedSample("k", meta, (), ids, ids > 9, ids, ids, (), {}, True, "Two words", ids[:0])
    assert to_sample(encoded).answer_text == "Two words"
    assert to_sample(replace(encoded, answer="")).answer_text == "", "an evaluation must not see the answer"
