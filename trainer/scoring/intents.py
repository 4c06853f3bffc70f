"""Metrics of spoken commands: the intent, and the slots that fill in its details.

An answer is a JSON object such as `{"intent": "set_alarm", "slots": {"time": "seven"}}`. The value of a slot may be a
list of strings. Any other text is interpreted as an intent without slots.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.scoring.choices import chosen
from trainer.scoring.metric import Metric, mean
from trainer.scoring.text import answer_words


@dataclass(frozen=True)
class Command:
    """The intent and the slots of a spoken command."""

    intent: str
    slots: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The number of times that each slot has each value, as (name, value)."""


def intent_metrics(hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics of commands; higher is better.

    `accuracy` is the share of commands whose intent is correct. `slot_f1` is the micro-averaged F1 score over pairs of
    a slot's name and its value, as in Wang et al. 2005 ("Spoken language understanding", section on evaluation). It
    applies to all samples, and is 1 if neither the answers nor the references have slots. `exact_match` is the share of
    commands whose intent and slots are all correct. Names and values are compared after normalization.

    Args:
        hypotheses: The model's answer to each sample.
        metas: The manifest fields of each sample; answer, choices (of the intent) and language are used.
    """
    right, whole = [], []
    slots = np.zeros((len(hypotheses), 3))
    for i, (hypothesis, meta) in enumerate(zip(hypotheses, metas, strict=True)):
        language, choices = meta.get("language") or "en", meta.get("choices") or ()
        said, wanted = command_of(hypothesis, language), command_of(meta["answer"], language)
        right.append(_same_intent(said.intent, wanted.intent, choices, language))
        slots[i] = (said.slots & wanted.slots).total(), said.slots.total(), wanted.slots.total()
        whole.append(right[-1] and said.slots == wanted.slots)
    return [mean("accuracy", right), Metric("slot_f1", slots, _micro_f1), mean("exact_match", whole)]


def command_of(text: str, language: str = "en") -> Command:
    """Return the command that `text` contains.

    Args:
        text: An answer, in which other text may surround the JSON object.
        language: The language of the values of slots.
    """
    begin, end = text.find("{"), text.rfind("}")
    try:
        tree = json.loads(text[begin : end + 1]) if 0 <= begin < end else None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or not isinstance(tree.get("intent"), str):
        return Command(text)
    found: Counter[tuple[str, str]] = Counter()
    slots = tree.get("slots")
    for name, value in slots.items() if isinstance(slots, dict) else ():
        for one in value if isinstance(value, list) else [value]:
            found[name.strip().lower(), " ".join(answer_words(_as_text(one), language))] += 1
    return Command(tree["intent"], found)


def _same_intent(said: str, wanted: str, choices: Sequence[str], language: str) -> bool:
    expected = chosen(wanted, choices, language)
    if expected is not None:
        return chosen(said, choices, language) == expected
    return answer_words(said.replace("_", " "), language) == answer_words(wanted.replace("_", " "), language)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _micro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2·both / (said + wanted) from sums of these numbers, or 1 without slots: `[..., 3]` → `[...]`."""
    total = sums[..., 1] + sums[..., 2]
    return np.divide(2 * sums[..., 0], total, out=np.ones_like(total), where=total > 0)
