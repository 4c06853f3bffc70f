"""Tests that samples with one question and answer have the same tokens, masks and labels as at commit 3a02bc2."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch, Sample
from model.speech_llm import SpeechLLM
from tests.trainer.chat_tokenizers import write_chat_tokenizer
from trainer.data.config import MOWE_TEMPLATE, PLACEHOLDER, TokenizerConfig
from trainer.data.loader import to_sample
from trainer.data.sample import make_sample
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.parity_cases import tiny_model

TEXTS = ("What is said?", " two  spaces\nand a line ", "Was it 3:15? Ünïcode 日本", "a")
RATE = tiny_model().adapter.rate
DIGESTS = {
    "sentencepiece": "edef1de25d73712c03d7684281651e4fb71d20359c00b550c94b202981f5a1e4",
    "chatml": "cb35788fd645d8eec1d8cb1cd76e65a3d11d0b25fd0806a826d6d47e14cfad6b",
    "llama": "0620cc0ec832ade6ef883fb7e8f83dda5e378fa7251ee073719d2efa6e804d54",
    "gemma": "cba88bc47aaf0293dbfea2bb7d7ab492972163c158eb5c218699d8a35251e01a",
    "phi": "56d0868ff6bbe7faa67d7c0376e11d10638f5e85e00791e67edff53d810401b9",
    "thinking": "1b9ff8a83dea693b7447e35127b041560f368d55f63910a8b2354911ac102ce5",
}
"""The SHA-256 of all tensors of the samples, by the name of the tokenizer."""
LOSS = 4.231105804443359
"""The loss of the first six samples with the tokenizer `sentencepiece`."""


def tokenizer_named(name: str, folder: Path) -> Tokenizer:
    if name != "sentencepiece":
        return load_tokenizer(str(write_chat_tokenizer(folder / name, name)), TokenizerConfig())
    texts = [*TEXTS, MOWE_TEMPLATE.format(audio="", instruction="")]
    train_sentencepiece(texts * 20, 60, folder / "t.model", PLACEHOLDER)
    return load_tokenizer(str(folder / "t.model"), TokenizerConfig())


def samples_of(tokenizer: Tokenizer) -> list[Sample]:
    rng, made = np.random.default_rng(0), []
    for i in range(24):
        clips = tuple(rng.standard_normal(2000 + 1500 * n).astype(np.float32) for n in range((1, 0, 2)[i % 3]))
        task = ("asr", "text", "sqa")[i % 3]
        meta = {"task": task, "instruction": TEXTS[i % 4], "answer": TEXTS[(i // 4) % 4], "transcript": TEXTS[i % 3]}
        encoded = make_sample(f"s{i}", meta, clips, tokenizer, RATE, text_fields=("transcript",), evaluate=i >= 16)
        made.append(to_sample(encoded))
    return made


@pytest.mark.parametrize("name", list(DIGESTS))
def test_tokens_masks_labels_and_losses_stay_the_same(name: str, tmp_path: Path) -> None:
    samples, digest = samples_of(tokenizer := tokenizer_named(name, tmp_path)), hashlib.sha256()
    batch = Batch(tuple(samples))
    for s in samples:
        digest.update(repr((s.key, s.task, s.answer.tolist(), s.answer_text, s.is_transcription)).encode())
        for tensor in (s.token_ids, s.audio_mask, s.labels, s.prompt_ids, *s.texts.values()):
            digest.update(tensor.numpy().tobytes())
    digest.update(repr((batch.prompts.lengths, batch.prompts.values.tolist(), batch.clip_owner)).encode())
    assert digest.hexdigest() == DIGESTS[name]
    if name == "sentencepiece":
        model = SpeechLLM(tiny_model(), tokenizer.vocab_size, seed=0).eval()
        with torch.no_grad():
            assert float(model(Batch(tuple(samples[:6]))).total) == pytest.approx(LOSS, rel=1e-6)
