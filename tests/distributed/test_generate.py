"""Greedy decoding with the distributed model gives the same tokens as the single-process model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from model.batch import Batch
from tests.distributed.harness import run_ranks
from tests.oracle import greedy, prompt_of
from tools.parity import DS_CONFIG
from trainer import parity
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology
from trainer.training.evaluate import answer

MAX_NEW_TOKENS = 6
EOS = 7


def body(tp: int, pp: int) -> list[list[list[int]]]:
    rank, world, device = connect()
    groups = build_groups(Topology(world, tp, pp), rank, device, parity.SEED)
    model = parity.tiny_model()
    step = parity.build_step(model, groups, DS_CONFIG, 1)
    oracle = parity.build_oracle(model).eval()
    step.audio.train(False)
    step.llm.train(False)
    samples = [[prompt_of(s) for s in own] for own in parity.make_samples("mixed", world, model.adapter.rate)]
    samples[0] = samples[0][:2]
    config: Any = SimpleNamespace(max_new_tokens=MAX_NEW_TOKENS)
    tokenizer: Any = SimpleNamespace(eos_id=EOS, vocab_size=parity.VOCAB_SIZE)
    answers = answer(step, Batch(tuple(samples[rank])), tokenizer, config)
    return [answers, [greedy(oracle, s, EOS, parity.VOCAB_SIZE, MAX_NEW_TOKENS) for s in samples[rank]]]


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_decoding_equals_the_oracle(world: int, tp: int, pp: int) -> None:
    for answers, expected in run_ranks(world, body, {"tp": tp, "pp": pp}):
        assert answers == expected
        assert len({tuple(a) for a in answers}) > 1, "the same answer to everything shows nothing"
