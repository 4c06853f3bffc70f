"""METEOR as NLTK computes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from trainer.scoring.text import tokenise
from trainer.scoring.wordnet import WordNet


class Meteor:
    """METEOR (Banerjee & Lavie 2005) by NLTK's `meteor_score`, as Hugging Face's `evaluate` calls it.

    Words match by form, Porter stem or WordNet synonym; alpha 0.9, beta 3, gamma 0.5; the best reference counts. Texts
    are split by NLTK's word tokenizer. `evaluate` finds sentences within a text by a trained model that NLTK
    downloads; here a sentence ends at ". ", "! " or "? ", so the two may differ after an abbreviation within a text.

    Args:
        wordnet: folder from `find_wordnet`, read at the first score.
    """

    def __init__(self, wordnet: Path) -> None:
        self._folder = wordnet

    def __call__(self, hypothesis: str, references: Sequence[str]) -> float:
        """Between 0 and 1. At least one reference."""
        from nltk.translate.meteor_score import meteor_score

        tokens = [tokenise(reference) for reference in references]
        return float(meteor_score(tokens, tokenise(hypothesis), wordnet=self._wordnet))

    @cached_property
    def _wordnet(self) -> WordNet:
        return WordNet(self._folder)
