"""Tests of the model with conversations: each clip is routed by its turn, and the answers of all turns are learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import IGNORE, Batch, Sample
from model.config import RouterConfig
from model.speech_llm import SpeechLLM
from tests.oracle import greedy
from tests.trainer.chat_tokenizers import chat_config, write_chat_tokenizer
from trainer.data.loader import to_sample
from trainer.data.metadata import with_last_turn
from trainer.data.sample import make_sample
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.parity_cases import VOCAB_SIZE, make_conversation, tiny_model
from trainer.parity_cases import make_sample as parity_sample

PITCHES = {"l": 200, "h": 3000}
NUM_STEPS, BATCH_SAMPLES = 150, 16


def conversation(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """Return a conversation about two tones. It asks if the first is high or low, and if the second is the same."""
    names = rng.choice(list(PITCHES), 2).tolist()
    time = np.arange(4000) / 16000
    phases = rng.uniform(0, 6, 2)
    clips = tuple(
        (0.3 * np.sin(2 * np.pi * PITCHES[n] * time + p)).astype(np.float32) for n, p in zip(names, phases, strict=True)
    )
    texts = ("<audio>?", names[0], "<audio>!", "s" if names[0] == names[1] else "o")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return with_last_turn({"task": "sqa", "messages": messages}), clips


def sample_of(tokenizer: Tokenizer, rng: np.random.Generator, **fields: Any) -> Sample:
    meta, clips = conversation(rng)
    return to_sample(make_sample("k", meta, clips, tokenizer, tiny_model().adapter.rate, **fields))


def test_each_clip_is_routed_by_the_question_of_its_turn() -> None:
    config = replace(tiny_model(), router=RouterConfig(input="prompt", noise_std=0.0))
    rate, index = config.adapter.rate, 3
    model = SpeechLLM(config, VOCAB_SIZE, seed=0).eval()
    both = make_conversation(index, 2, rate, 0)
    turns = [parity_sample(2 * index + turn, num_clips, rate, 0) for turn, num_clips in enumerate((1, 2))]
    assert not torch.equal(turns[0].prompt_ids, turns[1].prompt_ids) and len(both.clips) == 3
    with torch.no_grad():
        found, wanted = (model.embed_audio(Batch(samples)) for samples in ((both,), tuple(turns)))
    assert found is not None and wanted is not None and found.routing is not None and wanted.routing is not None
    assert torch.equal(found.routing.weights, wanted.routing.weights)
    assert not torch.equal(found.routing.weights[0], found.routing.weights[1])


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_conversation_of_two_turns_is_learned(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, "chatml")), chat_config())
    torch.manual_seed(0)
    tiny = tiny_model(num_layers=2)
    llm = replace(tiny.llm, config={**tiny.llm.config, "vocab_size": tokenizer.vocab_size})
    config = replace(tiny, llm=llm, ctc_weight=0.0, losses={}, experts=())
    model = SpeechLLM(config, tokenizer.vocab_size, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        batch = Batch(tuple(sample_of(tokenizer, rng) for _ in range(BATCH_SAMPLES)))
        loss = model(batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    right = []
    for _ in range(20):
        meta, clips = conversation(rng)
        rate = config.adapter.rate
        whole = to_sample(make_sample("k", meta, clips, tokenizer, rate))
        asked = to_sample(make_sample("k", meta, clips, tokenizer, rate, evaluate=True))
        said = greedy(model, asked, tokenizer.turn_end_id, tokenizer.vocab_size, 3)
        with torch.no_grad():
            logits = model.logits(Batch((whole,)), model.embed_audio(Batch((whole,))))[0]
        kept = whole.labels != IGNORE
        both = bool((logits.argmax(-1)[kept] == whole.labels[kept]).all())
        right.append((tokenizer.decode(said) == meta["answer"], both))
    assert all(a and b for a, b in right)
