"""Tests that greedy decoding with the distributed model generates the same tokens as the single-process model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from model.batch import Batch
from tests.distributed.harness import run_ranks
from tests.oracle import greedy, prompt_of
from tools.parity import DS_CONFIG
from trainer import parity, parity_cases
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology
from trainer.training.evaluate import answer

MAX_NEW_TOKENS = 6
EOS = 7


def body(
    tp: int, pp: int, family: str = "llama", ffn_ep: int = 1, num_samples: int | None = None, vp: int = 1, cp: int = 1
) -> list[list[list[int]]]:
    """Return the answers to this rank's prompts and those of the oracle; `num_samples` keeps the first prompts."""
    rank, world, device = connect()
    topology = Topology(world, tp, pp, 1, ffn_ep, 1 if ffn_ep > 1 else tp, vp, cp)
    groups = build_groups(topology, rank, device, parity_cases.SEED)
    model = parity_cases.tiny_model(family)
    step = parity.build_step(model, groups, DS_CONFIG, 1)
    oracle = parity.build_oracle(model).eval()
    step.audio.train(False)
    step.llm.train(False)
    samples = [[prompt_of(s) for s in own] for own in parity_cases.make_samples("mixed", world, model.adapter.rate)]
    samples[0] = samples[0][:2]
    if num_samples is not None:
        samples = [samples[0][:num_samples], *([] for _ in samples[1:])]
    config: Any = SimpleNamespace(max_new_tokens=MAX_NEW_TOKENS)
    eos = EOS
    if family != "llama":  # the first answer ends after one token
        eos = greedy(oracle, samples[0][0], -1, parity_cases.VOCAB_SIZE, 2)[1]
    tokenizer: Any = SimpleNamespace(end_ids=(eos,), vocab_size=parity_cases.VOCAB_SIZE)
    answers = answer(step, Batch(tuple(samples[rank])), tokenizer, config)
    return [answers, [greedy(oracle, s, eos, parity_cases.VOCAB_SIZE, MAX_NEW_TOKENS) for s in samples[rank]]]


@pytest.mark.parametrize(
    ("world", "tp", "pp", "vp", "cp"),
    [(2, 1, 1, 1, 1), (2, 2, 1, 1, 1), (2, 1, 2, 1, 1), (2, 1, 2, 2, 1), (2, 1, 1, 1, 2), (4, 1, 2, 1, 2)],
)
def test_decoding_equals_the_oracle(world: int, tp: int, pp: int, vp: int, cp: int) -> None:
    for answers, expected in run_ranks(world, body, {"tp": tp, "pp": pp, "vp": vp, "cp": cp}):
        assert answers == expected
        assert len({tuple(a) for a in answers}) > 1, "the same answer to everything shows nothing"


@pytest.mark.parametrize(
    ("world", "tp", "pp", "num_samples"),
    [(2, 1, 1, None), (2, 1, 1, 1), (4, 2, 1, None), pytest.param(4, 1, 2, None, marks=pytest.mark.slow)],
)
def test_replicas_that_share_experts_decode_in_lockstep(world: int, tp: int, pp: int, num_samples: int | None) -> None:
    """The prompts of the replicas end after different numbers of tokens, or a replica has no prompt."""
    task = {"tp": tp, "pp": pp, "family": "mixtral", "ffn_ep": world // pp, "num_samples": num_samples}
    answers = run_ranks(world, body, task)
    assert all(found == expected for found, expected in answers)
    assert sum(len(found) for found, _ in answers) == (num_samples or sum(len(e) for _, e in answers))
    if num_samples is None:
        assert len({len(a) for found, _ in answers for a in found}) > 1, "all answers end after the same token"
