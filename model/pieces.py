"""Pieces of text that are the tokens of a byte-level BPE tokenizer with only its first merges.

A tokenizer with 49,152 tokens has too many for a CTC head that learns from little speech. With a few hundred merges,
its tokens are single letters, frequent syllables and short words. All of them are tokens of the LLM, so that the LLM
already has an embedding for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


class Pieces:
    """The pieces of a tokenizer.

    Args:
        tokenizer: The description of the tokenizer in the format of the library tokenizers (`tokenizer.json`).
        num_pieces: The number of pieces. They are the tokens of single bytes and those that the first merges make.

    Raises:
        ValueError: If the tokenizer is not a byte-level BPE tokenizer, or cannot have this number of pieces.
    """

    def __init__(self, tokenizer: str, num_pieces: int) -> None:
        tree = json.loads(tokenizer)
        model = tree["model"]
        if model["type"] != "BPE" or "ByteLevel" not in json.dumps(tree["pre_tokenizer"]):
            raise ValueError("it is not a byte-level BPE tokenizer")
        vocabulary: dict[str, int] = model["vocab"]
        single = set(ByteLevel.alphabet()) & set(vocabulary)  # Some tokenizers lack bytes that no text contains.
        merges = _first_merges(model["merges"], single, num_pieces)
        tokens = single | {first + second for first, second in merges}
        if len(tokens) < num_pieces:
            raise ValueError(f"it has only {len(tokens)} tokens of bytes and merges")
        self.token_ids: tuple[int, ...] = tuple(sorted(vocabulary[token] for token in tokens))
        """The id of each piece in the tokenizer's vocabulary."""
        self._index = {token: i for i, token in enumerate(self.token_ids)}
        kept = {token: vocabulary[token] for token in tokens}
        tree["model"] = {**model, "vocab": kept, "merges": merges, "unk_token": None, "ignore_merges": False}
        tree["added_tokens"], tree["post_processor"] = [], None  # Text that looks like a special token is plain text.
        self._tokenizer = Tokenizer.from_str(json.dumps(tree))

    def __len__(self) -> int:
        return len(self.token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the numbers of the pieces of text in lower case, in which every word begins with a space."""
        words = "".join(f" {word}" for word in text.lower().split())
        return [self._index[token] for token in self._tokenizer.encode(words, add_special_tokens=False).ids]

    def decode(self, pieces: Sequence[int]) -> str:
        """Return the text of pieces, without the space before the first word."""
        return str(self._tokenizer.decode([self.token_ids[i] for i in pieces])).strip()


def _first_merges(merges: Iterable[Any], single: Iterable[str], num_tokens: int) -> list[tuple[str, str]]:
    """Return the merges of the first tokens, so that there are `num_tokens` together with those of single bytes.

    Several merges can make the same token.
    """
    known, found = set(single), []
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        is_new = first + second not in known
        if first in known and second in known and (not is_new or len(known) < num_tokens):
            known.add(first + second)
            found.append((first, second))
    return found
