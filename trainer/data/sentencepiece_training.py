"""Train SentencePiece tokenizers."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from model.errors import UserError
from trainer.files import sweep_leftovers, write_whole


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: Path, placeholder: str, *, exact: bool = False
) -> None:
    """Train a unigram SentencePiece model and write it to a file atomically.

    Every character of the corpus gets a piece. The first ids are 0 (unknown), 1 (begin), 2 (end), 3 (padding) and 4
    (the placeholder).

    Args:
        texts: The corpus.
        vocab_size: The number of pieces, or the largest number if `exact` is false.
        path: The file to write.
        placeholder: The text of the placeholder token.
        exact: Whether to raise an error if the corpus is too small for `vocab_size` pieces. If false, a small corpus
            yields fewer pieces.

    Raises:
        UserError: If there is no text, or `vocab_size` does not suit the corpus.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: no text to train a tokenizer on; check the split and the filters of the datasets")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=exact,
            character_coverage=1.0,
            user_defined_symbols=[placeholder],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(")] ")[-1].strip().rstrip(".")  # Remove the C++ source line.
        raise UserError(f"{path}: a vocabulary of {vocab_size} cannot be trained ({reason}); change its size") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(path.parent)
    write_whole(path, [model.getvalue()])
