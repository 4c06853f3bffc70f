"""Tests that greedy decoding with the distributed model computes the logits and tokens of the single-process model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from model.batch import IGNORE, Batch, Sample
from model.llm.packing import PADDING
from model.speech_llm import SpeechLLM
from tests.distributed.harness import run_ranks
from tests.oracle import greedy, prompt_of
from trainer import parity, parity_cases
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology
from trainer.parity_cases import DS_CONFIG
from trainer.training.evaluate import answer

MAX_NEW_TOKENS = 6
EOS = 7


def body(
    tp: int, pp: int, family: str = "llama", ffn_ep: int = 1, num_samples: int | None = None, vp: int = 1, cp: int = 1
) -> list[Any]:
    """Decode with the engines and with the oracle.

    Args:
        tp: The tensor-parallel size.
        pp: The number of pipeline stages.
        family: The family of the LLM.
        ffn_ep: The number of ranks over which FFN experts are spread.
        num_samples: The number of prompts, all of which are on rank 0; None for prompts on every rank.
        vp: The number of virtual stages.
        cp: The context-parallel size.

    Returns:
        Four values: the answers to this rank's prompts; the oracle's answers to them; the largest difference between
        this replica's logits and the oracle's, relative to the largest logit; and the number of tokens chosen from
        these logits. The last two values are 0 except on the last pipeline stage.
    """
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
    if family != "llama":  # makes the first answer end after one token
        eos = greedy(oracle, samples[0][0], -1, parity_cases.VOCAB_SIZE, 2)[1]
    tokenizer: Any = SimpleNamespace(end_ids=(eos,), vocab_size=parity_cases.VOCAB_SIZE)
    batch = Batch(tuple(samples[rank]))
    members = step.embed(batch).packing.members(groups.without_context.place.dp, 0).tolist()
    seen = record_logits(step.llm)
    answers = answer(step, batch, tokenizer, config)
    everyone = [sample for own in samples for sample in own]
    gaps = [gap(oracle, everyone[members[sequence]], torch.stack(logits)) for sequence, logits in seen.items()]
    expected = [greedy(oracle, s, eos, parity_cases.VOCAB_SIZE, MAX_NEW_TOKENS) for s in samples[rank]]
    return [answers, expected, max(gaps, default=0.0), sum(map(len, seen.values()))]


def record_logits(llm: Any) -> dict[int, list[Tensor]]:
    """Record the logits [V] from which each pass of the LLM chooses a token.

    Returns:
        The recorded logits of all later passes, by the index of the sequence.
    """
    run, seen = llm.forward_only, defaultdict[int, list[Tensor]](list)

    def forward_only(packs: Any, embed: Any, read: Any) -> Any:
        def read_and_record(m: int, logits: Tensor) -> Any:
            whole = gather_from_tensor_model_parallel_region(logits.contiguous())
            last = np.cumsum(packs[m].lengths) - 1
            for sequence, row in zip(packs[m].sequences, last, strict=False):
                if sequence != PADDING:
                    seen[sequence].append(whole[row, : parity_cases.VOCAB_SIZE])
            return read(m, logits)

        return run(packs, embed, read_and_record)

    llm.forward_only = forward_only
    return seen


def gap(oracle: SpeechLLM, prompt: Sample, logits: Tensor) -> float:
    """Return the largest difference between the logits [n, V] of n decoded tokens and the oracle's logits.

    The difference is relative to the oracle's largest logit. The oracle reads the most probable token of each row.
    """
    new = logits.argmax(-1)[:-1]
    ids = torch.cat([prompt.token_ids, new])
    mask = torch.cat([prompt.audio_mask, torch.zeros(len(new), dtype=torch.bool)])
    batch = Batch((replace(prompt, token_ids=ids, audio_mask=mask, labels=torch.full((len(ids),), IGNORE)),))
    with torch.no_grad():
        wanted = oracle.logits(batch, oracle.embed_audio(batch))[0, -len(logits) :, : parity_cases.VOCAB_SIZE]
    return float((logits - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("world", "tp", "pp", "vp", "cp"),
    [(2, 1, 1, 1, 1), (2, 2, 1, 1, 1), (2, 1, 2, 1, 1), (2, 1, 2, 2, 1), (2, 1, 1, 1, 2), (4, 1, 2, 1, 2)],
)
def test_decoding_equals_the_oracle(world: int, tp: int, pp: int, vp: int, cp: int) -> None:
    check(run_ranks(world, body, {"tp": tp, "pp": pp, "vp": vp, "cp": cp}))


def check(ranks: list[list[Any]]) -> None:
    """Check the results of `body`."""
    for answers, expected, difference, _ in ranks:
        assert answers == expected
        assert len({tuple(a) for a in answers}) > 1, "equal answers would prove nothing"
        assert difference <= 1e-5
    num_compared = max(num for *_, num in ranks)
    assert num_compared > sum(len(answers) for answers, *_ in ranks), "logits of later passes must be compared, too"


@pytest.mark.parametrize(
    ("family", "tp", "pp"), [("gpt_oss", 2, 1), ("gpt_oss", 2, 2), ("qwen3_5_text", 2, 1), ("qwen3_5_text", 2, 2)]
)
def test_sinks_windows_and_states_with_a_cache_equal_the_oracle(family: str, tp: int, pp: int) -> None:
    """Check families whose attention sinks or states are divided among ranks. Prompts are longer than the windows."""
    check(run_ranks(tp * pp, body, {"tp": tp, "pp": pp, "family": family}))


@pytest.mark.parametrize(
    ("world", "tp", "pp", "num_samples", "family"),
    [
        (2, 1, 1, None, "mixtral"),
        (2, 1, 1, 1, "mixtral"),
        (4, 2, 1, None, "mixtral"),
        pytest.param(4, 1, 2, None, "mixtral", marks=pytest.mark.slow),
        (2, 1, 1, None, "mixture_balanced"),  # its jitter must not be applied here
    ],
)
def test_replicas_that_share_experts_decode_in_lockstep(
    world: int, tp: int, pp: int, num_samples: int | None, family: str
) -> None:
    """Check replicas whose answers end after different numbers of tokens, and a replica without a prompt."""
    task = {"tp": tp, "pp": pp, "family": family, "ffn_ep": world // pp, "num_samples": num_samples}
    answers = run_ranks(world, body, task)
    assert all(found == expected and difference <= 1e-5 for found, expected, difference, _ in answers)
    assert sum(len(found) for found, *_ in answers) == (num_samples or sum(len(e) for _, e, *_ in answers))
    if num_samples is None:
        assert len({len(a) for found, *_ in answers for a in found}) > 1, "all answers have the same number of tokens"
