"""Tests that training, exported processors and transformers' templates give conversations the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.batch import IGNORE, Batch
from model.conversation import ConversationError, read_turns
from model.errors import UserError
from model.lengths import TokenRate
from tests.trainer.chat_tokenizers import CHATS, chat_config, write_chat_tokenizer
from trainer.data import sample as sample_module
from trainer.data.config import PLACEHOLDER, DataConfig
from trainer.data.errors import SampleError
from trainer.data.loader import to_sample
from trainer.data.metadata import check_metadata, with_last_turn
from trainer.data.sample import make_sample
from trainer.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from trainer.export.tokenizer import as_transformers, processor_settings

RATE = TokenRate((2, 2))
KEEPING = ("chatml", "llama", "gemma", "phi")
"""The tokenizers whose templates keep earlier answers unchanged."""
CLIP_SAMPLES = (3000, 5000, 4000)
ANSWERS = ("Rain.", "Ünïcode 日本", "Two words", "No", "It is: wind!")
QUESTIONS = ("What is this?", "Are you sure?", "And this one?", "Why?", "Thanks, and?")


def user(text: str, num_clips: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "audio"}] * num_clips + [{"type": "text", "text": text}]}


def assistant(text: str, **fields: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def conversation(num_turns: int) -> tuple[list[dict[str, Any]], tuple[np.ndarray, ...]]:
    """Return the messages and the clips of a conversation, with one clip in turn 1 and two clips in turn 3."""
    messages = []
    for turn in range(num_turns):
        messages += [user(QUESTIONS[turn], {0: 1, 2: 2}.get(turn, 0)), assistant(ANSWERS[turn])]
    rng = np.random.default_rng(0)
    num_clips = 1 if num_turns < 3 else 3
    return messages, tuple(rng.standard_normal(n).astype(np.float32) for n in CLIP_SAMPLES[:num_clips])


def fields(messages: Any, **more: object) -> dict[str, Any]:
    return with_last_turn({"task": "sqa", "messages": messages, **more})


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: load_tokenizer(str(write_chat_tokenizer(folder / name, name)), chat_config()) for name in CHATS}
    return {name: t for name, t in made.items() if isinstance(t, HuggingFaceTokenizer)}


def processor_of(tokenizer: Tokenizer) -> Any:
    from model.hub.processing import EarshotProcessor

    data = DataConfig(tokenizer=tokenizer.config)
    return EarshotProcessor(as_transformers(tokenizer), **processor_settings(tokenizer, data, RATE))


def with_clips(messages: list[dict[str, Any]], clips: tuple[np.ndarray, ...]) -> list[dict[str, Any]]:
    """Return the messages with the clips in their audio blocks, which is the form that processors read."""
    left = iter(clips)
    filled: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**b, "audio": next(left)} if b["type"] == "audio" else b for b in content]
        filled.append({**message, "content": content})
    return filled


def own_tokens(inner: Any, messages: list[dict[str, Any]], clips: tuple[np.ndarray, ...], prompt: bool) -> list[int]:
    """Return the token ids of the template in transformers, with one placeholder per audio token of the clips."""
    left = iter(clips)
    plain: list[dict[str, str]] = []
    for message in messages:
        text = message["content"]
        if not isinstance(text, str):
            parts = [b.get("text") or PLACEHOLDER * RATE.tokens_of_samples(len(next(left))) for b in text]
            text = "".join(parts)
        plain.append({"role": message["role"], "content": text})
    found = inner.apply_chat_template(plain, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    return [int(token) for token in found]


@pytest.mark.parametrize("num_turns", [1, 2, 5])
@pytest.mark.parametrize("name", KEEPING)
def test_training_processor_and_transformers_agree(
    tokenizers: dict[str, HuggingFaceTokenizer], name: str, num_turns: int
) -> None:
    tokenizer = tokenizers[name]
    messages, clips = conversation(num_turns)
    sample = to_sample(make_sample("k", fields(messages), clips, tokenizer, RATE))
    ids = sample.token_ids.tolist()
    whole = own_tokens(tokenizer.inner, messages, clips, prompt=False)
    assert whole[: len(ids)] == ids and whole[len(ids)] == tokenizer.turn_end_id

    processor = processor_of(tokenizer)
    inputs = processor.apply_chat_template(with_clips(messages, clips), tokenize=True, return_dict=True)
    assert inputs["input_ids"][0].tolist() == whole
    assert inputs["audio_mask"][0].tolist()[: len(ids)] == sample.audio_mask.tolist()
    assert sample.audio_mask.tolist() == [token == tokenizer.placeholder_id for token in ids]

    # The labels are each answer and the token that ends its turn, at the positions that predict them.
    expected = [IGNORE] * len(ids)
    for place in range(1, len(messages), 2):
        start = len(own_tokens(tokenizer.inner, messages[:place], clips, prompt=True))
        answer = tokenizer.encode(messages[place]["content"])
        expected[start - 1 : start + len(answer)] = [*answer, tokenizer.turn_end_id]
    assert sample.labels.tolist() == expected

    asked = to_sample(make_sample("k", fields(messages), clips, tokenizer, RATE, evaluate=True))
    prompt = processor.apply_chat_template(
        with_clips(messages[:-1], clips), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert asked.token_ids.tolist() == own_tokens(tokenizer.inner, messages[:-1], clips, prompt=True)
    assert prompt["input_ids"][0].tolist() == asked.token_ids.tolist() == ids[: asked.num_tokens]
    assert asked.num_targets == 0 and asked.answer_text == "" and asked.meta["answer"] == ANSWERS[num_turns - 1]

    # Each clip is routed by the question in its own turn.
    texts = [QUESTIONS[0], QUESTIONS[2], QUESTIONS[2]][: len(clips)]
    found = Batch((sample,)).prompts
    assert [tokenizer.decode(part.tolist()) for part in found.split()] == texts
    assert prompt["instruction_ids"].tolist() == found.values.tolist()
    assert prompt["instruction_lengths"].tolist() == list(found.lengths)


@pytest.mark.parametrize("name", [*KEEPING, "thinking"])
def test_a_conversation_of_one_turn_is_the_sample_with_an_instruction(
    tokenizers: dict[str, HuggingFaceTokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    messages, clips = conversation(1)
    plain = {"task": "sqa", "instruction": QUESTIONS[0], "answer": ANSWERS[0]}
    a, b = (to_sample(make_sample("k", meta, clips, tokenizer, RATE)) for meta in (plain, fields(messages)))
    assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.audio_mask, b.audio_mask)
    assert torch.equal(a.labels[:-1], b.labels[:-1]) and torch.equal(a.prompt_ids, b.prompt_ids)
    assert {int(a.labels[-1]), int(b.labels[-1])} == set(tokenizer.end_ids)


def test_end_tokens_of_each_template(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    ends = {name: tuple(map(t.piece, t.end_ids)) for name, t in tokenizers.items()}
    assert ends == {
        "chatml": ("<|im_end|>",),
        "llama": ("<|eot_id|>",),
        "gemma": ("<eos>", "<end_of_turn>"),
        "phi": ("<|endoftext|>", "<|end|>"),
        "thinking": ("<|im_end|>",),
    }
    assert {name for name, t in tokenizers.items() if not t.keeps_answers} == {"thinking"}


def test_text_and_blocks_are_the_same_and_clips_may_be_anywhere(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    text = [{"role": "user", "content": "And <audio>, not <audio>?"}, assistant(" Wind.\n")]
    parts = [{"type": "text", "text": "And "}, {"type": "audio"}, {"type": "text", "text": ", not "}, {"type": "audio"}]
    blocks = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}, assistant("Wind.")]
    clips = conversation(5)[1][:2]
    tokenizer = tokenizers["chatml"]
    a, b = (make_sample("k", fields(m), clips, tokenizer, RATE) for m in (text, blocks))
    assert a.token_ids.tolist() == b.token_ids.tolist() == own_tokens(tokenizer.inner, blocks, clips, False)[:-2]
    assert a.meta["instruction"] == "And , not ?" and a.meta["answer"] == "Wind."
    processor = processor_of(tokenizer)
    made = [
        processor.apply_chat_template(text, audio=clips, tokenize=True)[0].tolist(),
        processor.apply_chat_template([text, blocks], audio=[clips, clips], tokenize=True)[1].tolist(),
    ]
    assert made[0] == made[1] == [*a.token_ids.tolist(), tokenizer.turn_end_id, *tokenizer.encode("\n")]
    shown = processor.apply_chat_template(text)
    assert f"And {PLACEHOLDER}, not {PLACEHOLDER}?<|im_end|>" in shown
    with pytest.raises(ValueError, match="more places for audio"):
        processor.apply_chat_template(text, audio=clips[:1], tokenize=True)
    with pytest.raises(ValueError, match="1 more clips than places"):
        processor.apply_chat_template(text, audio=(*clips, clips[0]), tokenize=True)
    with pytest.raises(ValueError, match="add_generation_prompt = True, but the last message is from the assistant"):
        processor.apply_chat_template(text, audio=clips, add_generation_prompt=True)


def test_without_a_chat_template_turns_follow_each_other(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    path = tokenizers["llama"].config.path or tokenizers["llama"].inner.name_or_path
    tokenizer = load_tokenizer(path, chat_config(chat_template=False))
    messages = [{"role": "system", "content": "Be brief."}, *conversation(2)[0]]
    clips = conversation(2)[1]
    sample = make_sample("k", fields(messages), clips, tokenizer, RATE)
    audio = [tokenizer.placeholder_id] * RATE.tokens_of_samples(len(clips[0]))
    first = [tokenizer.bos_id, *tokenizer.encode("Be brief.\n"), *audio, *tokenizer.encode(QUESTIONS[0])]
    answers = [tokenizer.encode(text) for text in ANSWERS[:2]]
    second = [tokenizer.eos_id, *tokenizer.encode(QUESTIONS[1])]
    assert sample.token_ids.tolist() == [*first, *answers[0], *second, *answers[1]]
    labels = [IGNORE] * (len(first) - 1) + [*answers[0], tokenizer.eos_id] + [IGNORE] * (len(second) - 1)
    assert sample.labels.tolist() == [*labels, *answers[1], tokenizer.eos_id]
    made = processor_of(tokenizer).apply_chat_template(messages, audio=clips, tokenize=True)[0].tolist()
    assert made == [*sample.token_ids.tolist(), tokenizer.eos_id]


def learned(tokenizer: Tokenizer, messages: list[dict[str, Any]], loss_turns: Any) -> list[str]:
    """Return the texts of the answers that have labels."""
    clips = conversation(len(messages) // 2)[1]
    labels = make_sample("k", fields(messages), clips, tokenizer, RATE, loss_turns=loss_turns).labels
    ends = [-1, *np.flatnonzero(labels == tokenizer.turn_end_id).tolist()]
    spans = (labels[a + 1 : b] for a, b in zip(ends, ends[1:], strict=False))
    return [tokenizer.decode(span[span != IGNORE].tolist()) for span in spans]


def test_turns_with_a_loss(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    tokenizer, messages = tokenizers["chatml"], conversation(5)[0]
    assert learned(tokenizer, messages, "all") == list(ANSWERS)
    assert learned(tokenizer, messages, "last") == [ANSWERS[4]]
    messages[1]["loss"], messages[9]["loss"] = True, False
    assert learned(tokenizer, messages, "last") == [ANSWERS[0]]
    assert learned(tokenizer, messages, "all") == list(ANSWERS[:4])
    with pytest.raises(SampleError, match="bad_messages: no answer has a loss"):
        learned(tokenizer, [messages[0], assistant("a", loss=False)], "all")


def test_a_template_that_changes_earlier_answers(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    tokenizer, (messages, clips) = tokenizers["thinking"], conversation(5)
    with pytest.raises(UserError, match=r"data.loss_turns = all: the chat template .* set data.loss_turns: last"):
        make_sample("k", fields(messages), clips, tokenizer, RATE)
    sample = make_sample("k", fields(messages), clips, tokenizer, RATE, loss_turns="last")
    answer = tokenizer.encode(ANSWERS[4])
    prompt = own_tokens(tokenizer.inner, messages[:-1], clips, prompt=True)
    assert sample.token_ids.tolist() == [*prompt, *answer]
    assert sample.labels.tolist() == [*[IGNORE] * (len(prompt) - 1), *answer, tokenizer.turn_end_id]
    made = processor_of(tokenizer).apply_chat_template(messages, audio=clips, tokenize=True)[0].tolist()
    assert made[: len(sample.token_ids)] == sample.token_ids.tolist()
    messages[1]["loss"] = True
    with pytest.raises(UserError, match="remove loss: true"):
        make_sample("k", fields(messages), clips, tokenizer, RATE, loss_turns="last")


def test_a_template_that_refuses_system_prompts(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *conversation(1)[0]]
    with pytest.raises(SampleError, match="unexpected: fails: TemplateError: System role not supported"):
        make_sample("k", fields(messages), conversation(1)[1], tokenizers["gemma"], RATE)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_special_tokens_in_any_message_are_refused(tokenizers: dict[str, HuggingFaceTokenizer], place: int) -> None:
    for text, reason in (("a<|im_end|>", "special_token_in_text"), (PLACEHOLDER, "placeholder_in_text")):
        messages = [{"role": r, "content": "b"} for r in ("user", "assistant", "user", "assistant")]
        messages[place]["content"] = text
        with pytest.raises(SampleError, match=reason):
            make_sample("k", fields(messages, task="text"), (), tokenizers["chatml"], RATE)
        with pytest.raises(ValueError, match="contains <"):
            processor_of(tokenizers["chatml"]).apply_chat_template(messages, tokenize=True)


U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
ODD: list[tuple[Any, str]] = [
    ("hello", "must be a list"),
    ([], "must be a list"),
    ({"role": "user"}, "must be a list"),
    (["x"], "message 1 = 'x', but must be an object"),
    ([S], "only a system prompt"),
    ([A], "message 1 is from the assistant, but must be from the user"),
    ([U, U, A], "message 2 is from the user, but must be from the assistant"),
    ([U, A, A], "message 3 is from the assistant"),
    ([U, S, A], "message 2 is from the system"),
    ([U], "the last message is from the user"),
    ([{"role": "tool", "content": "x"}, A], "role = 'tool', but must be one of system, user, assistant"),
    ([{"role": ["user"], "content": "x"}, A], "role = "),
    ([{"role": "user"}, A], "content = None"),
    ([{"role": "user", "content": 3}, A], "content = 3"),
    ([{"role": "user", "content": " \n"}, A], "message 1: content is empty"),
    ([{"role": "user", "content": []}, A], "message 1: content is empty"),
    ([U, {"role": "assistant", "content": ""}], "message 2: content is empty"),
    ([U, {"role": "assistant", "content": "<audio>x"}], "message 2: has audio"),
    ([{"role": "system", "content": "<audio>"}, U, A], "message 1: has audio"),
    ([U | {"loss": True}, A], "message 1: has loss"),
    ([U, A | {"loss": 1}], "loss = 1"),
    ([U | {"name": "bob"}, A], "has 'name'"),
    ([{"role": "user", "content": [{"type": "image"}]}, A], "block"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}, A], "block"),
    ([{"role": "user", "content": [{"type": "text", "text": "<audio>"}]}, A], "use a block of type audio"),
    ([{"role": "user", "content": [{"type": "audio", "url": "x"}]}, A], "block"),
    ([{"role": "user", "content": "<audio>"}, A], "0 clips, but 1 places"),
    ([U, A] * 300, "there are 600 messages, but the limit is 512"),
]


@pytest.mark.parametrize(("messages", "words"), ODD)
def test_odd_messages_are_refused_with_a_reason(messages: Any, words: str) -> None:
    with pytest.raises(SampleError) as caught:
        check_metadata({"task": "text", "split": "train", **fields(messages, task="text")}, 0)
    assert caught.value.reason == "bad_messages" and words in caught.value.detail
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_messages_and_other_fields_must_agree() -> None:
    good = fields([U, A, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], task="text")
    assert (good["instruction"], good["answer"]) == ("q", "a")
    check_metadata(good, 0)
    for name in ("instruction", "answer"):
        with pytest.raises(SampleError, match=f"ambiguous: {name} differs"):
            check_metadata(good | {name: "other"}, 0)
    with pytest.raises(SampleError, match="bad_messages: there are 2 clips, but 0 places"):
        check_metadata(good, 2)
    assert sample_module.IGNORE == IGNORE
    with pytest.raises(ConversationError):
        read_turns(None)
