"""Tests that transcripts become the pieces that a CTC head learns (`model.ctc_vocabulary: pieces`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batch import Batch
from model.errors import UserError
from model.lengths import TokenRate
from model.losses.ctc import CTC
from tests.trainer.chat_tokenizers import chat_config, write_chat_tokenizer
from trainer.data.loader import to_sample
from trainer.data.sample import make_sample
from trainer.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from trainer.parity_cases import tiny_model

RATE = TokenRate((2,))
CLIP = np.zeros(48_000, dtype=np.float32)


def fields(task: str) -> dict[str, Any]:
    return {"task": task, "instruction": "What is said?", "answer": "Two  cafés"}


def test_a_transcript_has_pieces_and_other_answers_have_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, "chatml")), chat_config())
    pieces = tokenizer.pieces(256)
    spoken = make_sample("k", fields("asr"), (CLIP,), tokenizer, RATE, pieces=pieces)
    assert pieces.decode(spoken.pieces.tolist()) == "two cafés"
    for sample in (
        make_sample("k", fields("asr"), (CLIP,), tokenizer, RATE),
        make_sample("k", fields("asr"), (CLIP,), tokenizer, RATE, pieces=pieces, evaluate=True),
        make_sample("k", fields("sqa"), (CLIP,), tokenizer, RATE, pieces=pieces),
    ):
        assert not len(sample.pieces)
    config = replace(tiny_model(), ctc_vocabulary="pieces", ctc_pieces=257)
    assert CTC().targets(Batch((to_sample(spoken),)), config).values.tolist() == spoken.pieces.tolist()


def test_a_tokenizer_without_such_pieces_is_an_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, "chatml")), chat_config())
    with pytest.raises(
        UserError, match=r"model.ctc_pieces = 300: .* because it has only 256 tokens of bytes and merges; lo"
    ):
        tokenizer.pieces(300)
    with pytest.raises(
        UserError, match=r"model.ctc_pieces = 300: .* because it is not a byte-level BPE tokenizer; lower"
    ):
        SentencePieceTokenizer.pieces(tokenizer, 300)  # type: ignore[arg-type]
