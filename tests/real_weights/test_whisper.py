"""Tests of published Whisper weights: the conversion is correct, and the encoder computes the same as transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.registry import build_encoder
from model.lengths import num_frames
from tests.real_weights.kit import clip_of, rows_of

TOLERANCE = 2e-5
"""The largest difference, relative to the largest feature. At most 1.5e-6 has been measured."""

Published = Callable[[str], Path]
pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("name", "subsets"), [("whisper-tiny.en", ["timit_sample", "ljspeech"]), ("whisper-base", ["digit_strings"])]
)
def test_features_of_whole_windows_equal_those_of_transformers(
    name: str, subsets: list[str], published: Published, kit: Path
) -> None:
    folder = published(name)
    clips = [clip_of(kit, rows_of(kit, subset)[0]) for subset in subsets]
    reference = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.encoder.eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    mel = extractor([clip.numpy() for clip in clips], sampling_rate=16000, return_tensors="pt").input_features
    encoder = build_encoder(EncoderConfig("whisper", "whisper", weights=str(folder), length_mode="full")).eval()
    with torch.no_grad():
        wanted = reference(mel).last_hidden_state
        found = encoder(Ragged.of(clips))
    for one, want, clip in zip(found.split(), wanted, clips, strict=True):
        want = want[: num_frames(len(clip))]
        difference = float((one - want).abs().max() / want.abs().max())
        print(f"{name}: {difference:.2e}")
        assert one.shape == want.shape and difference <= TOLERANCE


@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
def test_the_converted_model_transcribes(name: str, published: Published, kit: Path) -> None:
    folder, row = published(name), rows_of(kit, "ljspeech")[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    mel = extractor(clip_of(kit, row).numpy(), sampling_rate=16000, return_tensors="pt").input_features
    languages = {"language": "en", "task": "transcribe"} if name == "whisper-base" else {}
    tokens = model.generate(mel, max_new_tokens=64, **languages)[0]
    assert letters_of(tokenizer.decode(tokens, skip_special_tokens=True)) == letters_of(row["answer"])


def letters_of(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))
