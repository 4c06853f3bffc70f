"""The METEOR metric, as NLTK computes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from trainer.scoring.text import tokenise
from trainer.scoring.wordnet import WordNet


class Meteor:
    """The METEOR metric (Banerjee & Lavie 2005), as Hugging Face's `evaluate` computes it with NLTK's `meteor_score`.

    Words match if they have the same form or Porter stem, or are WordNet synonyms. The parameters are alpha = 0.9,
    beta = 3 and gamma = 0.5, and the best reference counts. NLTK's word tokenizer splits the text. `evaluate` first
    splits text into sentences with a trained model that NLTK downloads. In this class, a sentence ends at ". ", "! " or
    "? ", so the result may differ for text with abbreviations.

    Args:
        wordnet: The folder returned by `find_wordnet`; it is read when the first score is computed.
    """

    def __init__(self, wordnet: Path) -> None:
        self._folder = wordnet

    def __call__(self, hypothesis: str, references: Sequence[str]) -> float:
        """Return the METEOR score of a hypothesis, from 0 to 1, against at least one reference."""
        from nltk.translate.meteor_score import meteor_score

        tokens = [tokenise(reference) for reference in references]
        return float(meteor_score(tokens, tokenise(hypothesis), wordnet=self._wordnet))

    @cached_property
    def _wordnet(self) -> WordNet:
        return WordNet(self._folder)
