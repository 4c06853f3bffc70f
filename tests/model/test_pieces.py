"""Tests of the pieces of text that a CTC head recognizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.llm.weights import StateDictSource, symbol_embeddings
from model.pieces import Pieces

TEXTS = ["the cat sat on the mat", "the other cat sees the theatre", "naïve cats at the café eat that"] * 3


def trained(special: bool = True) -> dict[str, Any]:
    """Return the description of a byte-level BPE tokenizer with 30 merges."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 30 + special,
        special_tokens=["<end>"] if special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    found: dict[str, Any] = json.loads(inner.to_str())
    return found


def test_pieces_are_tokens_of_the_tokenizer_and_spell_the_text() -> None:
    tree = trained()
    pieces, vocabulary = Pieces(json.dumps(tree), 268), tree["model"]["vocab"]
    assert len(pieces) == 268 and vocabulary["<end>"] not in pieces.token_ids
    allowed = {first + second for first, second in tree["model"]["merges"][:12]} | set(
        pre_tokenizers.ByteLevel.alphabet()
    )
    assert {vocabulary[token] for token in allowed} == set(pieces.token_ids)
    text = "The  cat, naïve, SAT on\nthe Mat"
    encoded = pieces.encode(text)
    assert pieces.decode(encoded) == "the cat, naïve, sat on the mat" and len(encoded) < len(text)
    whole = Tokenizer.from_str(json.dumps(tree)).encode(" the cat").ids
    assert [
        Pieces(json.dumps(tree), 286).token_ids[i] for i in Pieces(json.dumps(tree), 286).encode("the cat")
    ] == whole


def test_text_that_looks_like_a_special_token_is_plain_text() -> None:
    tree = trained()
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 400, "content": "<tool>", "special": False})
    pieces = Pieces(json.dumps(tree), 268)
    for text in ("the <END> of <tool> the", "<end>"):
        assert pieces.decode(pieces.encode(text)) == text.lower()


def test_several_merges_of_the_same_token_count_once() -> None:
    tree = trained(special=False)
    first, second = tree["model"]["merges"][0]
    plain = Pieces(json.dumps(tree), 268)
    tree["model"]["merges"].insert(1, [first, second])
    tree["model"]["merges"].insert(1, ["not a token of the alphabet", "x"])
    again = Pieces(json.dumps(tree), 268)
    assert again.token_ids == plain.token_ids and again.encode("the theatre") == plain.encode("the theatre")


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="only 286 tokens"):
        Pieces(json.dumps(trained()), 287)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        Pieces(words.to_str(), 300)


def test_embeddings_of_symbols_are_rows_of_the_llm_with_a_root_mean_square_of_one() -> None:
    table, ids = 0.3 * torch.randn(1000, 4), (0, 1, 5, 255, 256, 900, 999)
    found = symbol_embeddings(StateDictSource({"model.embed_tokens.weight": table}), ids)
    wanted = table[list(ids)]
    torch.testing.assert_close(found, wanted / wanted.square().mean().sqrt())
