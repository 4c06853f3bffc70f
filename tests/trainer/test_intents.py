"""Tests of the scores of intents and slots in spoken commands."""

from __future__ import annotations

import json

import pytest

from trainer.scoring.intents import command_of
from trainer.scoring.scores import score, task_metrics


def test_intents_and_slots_are_counted_separately() -> None:
    answer = json.dumps({"intent": "set_alarm", "slots": {"time": "seven", "day": ["Monday", "Friday"]}})
    said = (
        answer,
        'Sure: {"intent": "Set alarm", "slots": {"time": "eight", "day": "monday"}}',
        "set_alarm",
        '{"intent": "play_music"}',
        "{broken",
    )
    metas = [{"answer": answer}] * len(said)
    accuracy, slot_f1, exact = task_metrics("intent", said, metas)
    assert accuracy.statistics[:, 0].tolist() == [1, 1, 1, 0, 0]
    assert exact.statistics[:, 0].tolist() == [1, 0, 0, 0, 0]
    assert slot_f1.statistics.tolist() == [[3, 3, 3], [1, 2, 3], [0, 0, 3], [0, 0, 3], [0, 0, 3]]
    values = {s.metric: s.value for s in score("intent", said, metas)}
    assert values["slot_f1"] == pytest.approx(2 * 4 / (5 + 15))


def test_without_slots_the_intent_alone_decides() -> None:
    metas = [{"answer": "play_music", "choices": ["play_music", "set_alarm"]}] * 3
    accuracy, slot_f1, exact = task_metrics("intent", ["B", "(A)", '{"intent": "play music"}'], metas)
    assert accuracy.statistics[:, 0].tolist() == exact.statistics[:, 0].tolist() == [0, 1, 1]
    assert slot_f1.value(slot_f1.statistics.sum(0)) == 1


@pytest.mark.parametrize(
    "text", ['{"intent": 3}', '{"slots": {"a": "b"}}', "[1]", "{}", "", '{"intent": "x", "slots": [1]}']
)
def test_odd_answers_are_intents_or_have_no_slots(text: str) -> None:
    command = command_of(text)
    assert not command.slots and command.intent == ("x" if "x" in text else text)


def test_values_that_are_not_text() -> None:
    command = command_of('{"intent": "x", "slots": {"n": 3, "deep": {"a": [1]}, "none": null}}')
    assert command.slots.total() == 3 and command.slots["n", "three"] == 1
