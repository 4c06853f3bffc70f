"""Word error rate, answer accuracy and the majority baseline, as pure functions of strings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

ALL = "all"
"""Key of the score over all subsets of a task."""

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SYMBOL_WORDS = {"-": "minus", ".": "point", "%": "percent", "$": "dollars", "£": "pounds", "€": "euros", "¢": "cents"}
_NUMBER = re.compile(r"(?<!\S)[-$£€¢]*\d+(?:\.\d+)*%?(?!\S)")
_LEADING_ZEROS = re.compile(r"(?<![\w.,:$£€¢-])0\d+(?![\w%]|[.,:]\d)")
_EMPTY = "empty"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task on one subset (`ALL`: on all of them)."""

    task: str
    subset: str
    metric: str
    """`wer` (lower is better; may exceed 1) or `accuracy`."""
    num_samples: int
    num_hits: int
    """Word errors for `wer`, correct answers for `accuracy`."""
    num_units: int
    """Reference words for `wer`, samples for `accuracy`."""

    @property
    def value(self) -> float:
        return self.num_hits / self.num_units


def normalise(text: str, language: str = "en") -> str:
    """Whisper's normaliser of the language, then one word per digit; nothing left becomes "empty".

    English: lower case, contractions expanded, brackets and what they hold dropped, fillers dropped, punctuation and
    diacritics dropped. The normaliser first writes number words as figures ("five seven" → "57", "twenty one" → "21");
    each figure is then spelt out ("five seven", "two one"), the same way on both sides, so that a digit string counts
    one word per digit. transformers ships no table of British spellings (it lies in Whisper's tokenizer on the hub),
    so "colour" and "color" differ here. Other languages: Whisper's basic normaliser, which keeps diacritics.
    The steps are those of AudioBench (arXiv 2406.16020), its number expansion apart.
    """
    english, basic = _normalisers()
    # Whisper's normaliser reads "00" as the number 0, but "0 0" as two digits.
    spaced = _LEADING_ZEROS.sub(lambda match: " ".join(match[0]), text)
    plain = english(spaced) if language == "en" else basic(text)
    return " ".join(_NUMBER.sub(_spell_number, plain).split()) or _EMPTY


def word_errors(references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]) -> tuple[int, int]:
    """Substitutions + deletions + insertions and reference words, summed over pairs, after `normalise`."""
    import jiwer

    if not references:
        return 0, 0
    pairs = zip(references, languages, strict=True)
    output = jiwer.process_words(
        [normalise(text, language) for text, language in pairs],
        [normalise(text, language) for text, language in zip(hypotheses, languages, strict=True)],
    )
    num_errors = output.substitutions + output.deletions + output.insertions
    return num_errors, output.hits + output.substitutions + output.deletions


def wer(references: Sequence[str], hypotheses: Sequence[str], language: str = "en") -> float:
    """Word error rate: Σ errors / Σ reference words. At least one pair."""
    num_errors, num_words = word_errors(references, hypotheses, [language] * len(references))
    return num_errors / num_words


def chosen(text: str, choices: Sequence[str]) -> str | None:
    """The choice that `text` names, or None: the one equal to it after normalisation, else the only one it contains.

    Contained means as whole words ("female" does not contain "male"). A text that contains several names none of them.
    """
    plain = normalise(text)
    normal = {choice: normalise(choice) for choice in choices}
    for choice, words in normal.items():
        if words == plain:
            return choice
    found = [choice for choice, words in normal.items() if f" {words} " in f" {plain} "]
    return found[0] if len(found) == 1 else None


def is_correct(prediction: str, meta: Mapping[str, Any]) -> bool:
    """Whether `prediction` answers the sample.

    With `choices`: it names the same choice as `answer` (an answer that names none: normalised equality). With
    `references` (captions): it equals any of them after normalisation. Otherwise: it equals `answer`, likewise.
    """
    language = meta.get("language") or "en"
    choices = meta.get("choices")
    if choices:
        right = chosen(meta["answer"], choices)
        if right is not None:
            return chosen(prediction, choices) == right
    accepted = meta.get("references") or [meta["answer"]]
    plain = normalise(prediction, language)
    return any(normalise(reference, language) == plain for reference in accepted)


def choice_accuracy(predictions: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> float:
    """Share of `predictions` that are correct. At least one."""
    hits = [is_correct(prediction, meta) for prediction, meta in zip(predictions, metas, strict=True)]
    return sum(hits) / len(hits)


def score(task: str, predictions: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> dict[str, TaskScore]:
    """Scores of one task by subset, and over all of them under `ALL`; empty when there are no samples.

    `metas` are the samples' manifest fields (answer, subset, language, choices, references). asr gives word error
    rate; er, aqa, sqa and ac give accuracy (see `is_correct`; for ac that is exact match with any reference).
    """
    assert len(predictions) == len(metas), (len(predictions), len(metas))
    rows: dict[str, list[int]] = {ALL: list(range(len(metas)))} if metas else {}
    for i, meta in enumerate(metas):
        rows.setdefault(_subset(meta), []).append(i)
    return {
        subset: _score_subset(task, subset, [predictions[i] for i in ids], [metas[i] for i in ids])
        for subset, ids in rows.items()
    }


def score_values(scores: Iterable[TaskScore]) -> dict[str, float]:
    """Scores by metric name: `asr/wer` over all subsets, `asr/digits/wer` of one."""
    return {f"{s.task}/{s.metric}" if s.subset == ALL else f"{s.task}/{s.subset}/{s.metric}": s.value for s in scores}


def majority_baseline(
    train_metas: Sequence[Mapping[str, Any]], test_metas: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, TaskScore]]:
    """By task: what always giving the most frequent training answer to the same question scores on `test_metas`.

    The question of a sample is its subset and instruction text. Where the training set never asks it: its subset and
    question type (`qtype`, `slot`); else its subset; else its task. Answers are compared after normalisation; of
    equally frequent ones the alphabetically first is given. Where the sample has choices, only training answers that
    are among them count (so the last resort never guesses outside). What is given is scored like any prediction; a
    caption counts when it is among the references. For asr this is the word error rate of the most frequent text.
    """
    answers: dict[tuple[str, ...], Counter[str]] = {}
    for meta in train_metas:
        for group in _question_groups(meta):
            answers.setdefault(group, Counter())[normalise(meta["answer"], meta.get("language") or "en")] += 1
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for meta in test_metas:
        by_task.setdefault(meta["task"], []).append(meta)
    return {
        task: score(task, [_majority_answer(answers, meta) for meta in metas], metas) for task, metas in by_task.items()
    }


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as aligned columns, headed by the first row's keys; floats with three decimals, numbers to the right."""
    if not rows:
        return ""
    head = list(rows[0])
    cells = [[_cell(row.get(key)) for key in head] for row in rows]
    is_number = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in head]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, is_number, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, cells)])


def score_table(
    scores: Iterable[TaskScore], baseline: Mapping[str, Mapping[str, TaskScore]] | None = None
) -> list[dict[str, object]]:
    """Rows for `format_table`: one per score, with its majority baseline where there is one (not for wer)."""
    rows: list[dict[str, object]] = []
    for s in scores:
        majority = (baseline or {}).get(s.task, {}).get(s.subset)
        row = {"task": s.task, "subset": s.subset, "samples": s.num_samples, "metric": s.metric, "value": s.value}
        if baseline is not None:
            row["majority"] = majority.value if majority is not None and s.metric == "accuracy" else None
        rows.append(row)
    return rows


def _score_subset(task: str, subset: str, predictions: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> TaskScore:
    if task == "asr":
        languages = [meta.get("language") or "en" for meta in metas]
        num_errors, num_words = word_errors([meta["answer"] for meta in metas], predictions, languages)
        return TaskScore(task, subset, "wer", len(metas), num_errors, num_words)
    num_right = sum(is_correct(prediction, meta) for prediction, meta in zip(predictions, metas, strict=True))
    return TaskScore(task, subset, "accuracy", len(metas), num_right, len(metas))


def _majority_answer(answers: Mapping[tuple[str, ...], Counter[str]], meta: Mapping[str, Any]) -> str:
    legal = {normalise(choice) for choice in meta.get("choices") or ()}
    for group in _question_groups(meta):
        counted = {answer: num for answer, num in answers.get(group, {}).items() if not legal or answer in legal}
        if counted:
            return min(counted.items(), key=lambda item: (-item[1], item[0]))[0]
    return ""


def _question_groups(meta: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Keys of the groups a sample belongs to, narrowest first."""
    task, subset = meta["task"], _subset(meta)
    kind = str(meta.get("qtype") or meta.get("slot") or "")
    return [
        ("instruction", task, subset, meta["instruction"]),
        ("kind", task, subset, kind),
        ("subset", task, subset),
        ("task", task),
    ]


def _subset(meta: Mapping[str, Any]) -> str:
    return meta.get("subset") or meta.get("source") or "default"


def _spell_number(match: re.Match[str]) -> str:
    return " ".join(DIGIT_WORDS[int(c)] if c.isdigit() else _SYMBOL_WORDS[c] for c in match[0])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@cache
def _normalisers() -> tuple[Any, Any]:
    # transformers takes over a second to import; runs that never evaluate do not pay for it.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer({}), BasicTextNormalizer()
