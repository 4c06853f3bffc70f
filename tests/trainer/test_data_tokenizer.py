"""Tests of tokens and labels, compared with tensors written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.batch import IGNORE, Sample
from model.errors import UserError
from model.lengths import TokenRate
from trainer.data.config import MOWE_TEMPLATE, PLACEHOLDER, TokenizerConfig
from trainer.data.errors import SampleError
from trainer.data.loader import to_sample
from trainer.data.sample import make_sample
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.tokenizer import Tokenizer, load_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "<pad>", PLACEHOLDER, "what", "is", "said", "?", "one", "two", "[U]", "[A]", "listen"]
"""The vocabulary. The ids are what 5, is 6, said 7, ? 8, one 9, two 10, [U] 11, [A] 12 and listen 13."""

CHAT = "{% for m in messages %}[U] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[A]{% endif %}"


def word_tokenizer(folder: Path, chat: str | None = None, placeholder: bool = True, eos: bool = True) -> Path:
    words = [w for w in WORDS if placeholder or w != PLACEHOLDER]
    inner = RustTokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>" if eos else None, pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER] if placeholder else []})
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return folder


def word_config(**fields: object) -> TokenizerConfig:
    return TokenizerConfig(**{"template": "listen {audio} {instruction}", **fields})  # type: ignore[arg-type]


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(str(word_tokenizer(tmp_path / "hf")), word_config())


META = {"task": "asr", "instruction": "what is said ?", "answer": "one two"}


def tensors(key: str, meta: dict, clips: tuple[torch.Tensor, ...], *args: object, **kwargs: object) -> Sample:
    """Return a sample in the form that the model reads."""
    return to_sample(make_sample(key, meta, tuple(c.numpy() for c in clips), *args, **kwargs))  # type: ignore[arg-type]


def clip(num_audio_tokens: int) -> torch.Tensor:
    """Return a clip that has `num_audio_tokens` after a stride of 2. Each has 640 samples, except for the last."""
    return torch.ones(640 * num_audio_tokens - 639)


def test_one_clip(words: Tokenizer) -> None:
    sample = tensors("k", META, (clip(3),), words, TokenRate((2,)))
    #                                     bos lstn audio    what is said ? one two
    assert sample.token_ids.tolist() == [1, 13, 4, 4, 4, 5, 6, 7, 8, 9, 10]
    assert sample.audio_mask.tolist() == [False] * 2 + [True] * 3 + [False] * 6
    assert sample.labels.tolist() == [IGNORE] * 8 + [9, 10, 2]
    assert sample.prompt_ids.tolist() == [5, 6, 7, 8]
    assert sample.answer.tolist() == [9, 10]
    assert sample.num_targets == 3


def test_several_clips_keep_their_order(words: Tokenizer) -> None:
    sample = tensors("k", META, (clip(2), clip(1)), words, TokenRate((2,)))
    assert sample.token_ids.tolist() == [1, 13, 4, 4, 4, 5, 6, 7, 8, 9, 10]
    assert int(sample.audio_mask.sum()) == 3


def test_text_only_has_no_audio_part(words: Tokenizer) -> None:
    sample = tensors("k", {**META, "task": "text"}, (), words, TokenRate((2,)))
    assert sample.token_ids.tolist() == [1, 5, 6, 7, 8, 9, 10]
    assert sample.labels.tolist() == [IGNORE] * 4 + [9, 10, 2]
    assert not sample.audio_mask.any()


@pytest.mark.parametrize(("given", "expected"), [("one", {"transcript": [9]}), (None, {})])
def test_further_texts_are_tokenised_where_there_are_any(
    words: Tokenizer, given: object, expected: dict[str, list[int]]
) -> None:
    meta = META if given is None else {**META, "transcript": given}
    sample = tensors("k", meta, (clip(1),), words, TokenRate((2,)), text_fields=("transcript",))
    assert {name: ids.tolist() for name, ids in sample.texts.items()} == expected
    assert tensors("k", meta, (clip(1),), words, TokenRate((2,))).texts == {}


def test_evaluation_has_the_training_prompt_and_nothing_of_the_answer(words: Tokenizer) -> None:
    trained = tensors("k", META, (clip(2),), words, TokenRate((2,)))
    asked = tensors("k", META, (clip(2),), words, TokenRate((2,)), evaluate=True)
    length = asked.num_tokens
    assert asked.token_ids.tolist() == trained.token_ids[:length].tolist()
    assert trained.token_ids[length:].tolist() == [9, 10]
    assert asked.num_targets == 0
    assert asked.answer.tolist() == []
    assert asked.audio_mask.tolist() == trained.audio_mask[:length].tolist()
    assert asked.meta["answer"] == "one two"


def test_chat_template_wraps_the_prompt(tmp_path: Path) -> None:
    path = str(word_tokenizer(tmp_path / "hf", chat=CHAT))
    sample = tensors("k", META, (clip(2),), load_tokenizer(path, word_config()), TokenRate((2,)))
    assert sample.token_ids.tolist() == [11, 13, 4, 4, 5, 6, 7, 8, 12, 9, 10]
    plain = load_tokenizer(path, word_config(chat_template=False))
    assert tensors("k", META, (clip(2),), plain, TokenRate((2,))).token_ids[0] == 1


def test_a_single_tokenizer_json_with_and_without_its_config(tmp_path: Path) -> None:
    folder = word_tokenizer(tmp_path / "hf", chat=CHAT)
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"), word_config())
    assert tokenizer.prompt("what", 1) == [[11, 13], [5, 12]]
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(str(folder / "tokenizer.json"), word_config())


def test_missing_placeholder_and_missing_file_are_one_line_errors_with_a_remedy(tmp_path: Path) -> None:
    path = str(word_tokenizer(tmp_path / "hf", placeholder=False))
    with pytest.raises(UserError, match=r"'<SpeechHere>' is not a single token; add it"):
        load_tokenizer(path, word_config())
    assert (
        load_tokenizer(path, word_config(placeholder="listen", template="{audio} {instruction}")).placeholder_id == 12
    )
    train_sentencepiece(["some words of text"] * 9, 40, tmp_path / "t.model", "<other>")
    with pytest.raises(UserError, match=r"'<SpeechHere>' is not a single token"):
        load_tokenizer(str(tmp_path / "t.model"), word_config())
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad.model: not a readable SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"), word_config())
    with pytest.raises(UserError, match=r"none/x.json: no such file"):
        load_tokenizer("none/x.json", word_config())


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"model": 3}', '{"version": "1.0"}'])
def test_file_that_is_not_a_tokenizer_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer.json: transformers cannot read it \("):
        load_tokenizer(str(tmp_path / "tokenizer.json"), word_config())


def test_bug_is_not_reported_as_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(PreTrainedTokenizerFast, "__init__", broken)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(AttributeError, match="no such thing"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), word_config())


def test_a_placeholder_in_a_sample_is_an_error_of_that_sample(words: Tokenizer) -> None:
    for field in ("instruction", "answer"):
        with pytest.raises(SampleError, match="placeholder_in_text"):
            tensors("k", {**META, field: f"what {PLACEHOLDER}"}, (clip(1),), words, TokenRate((2,)))
    with pytest.raises(SampleError, match="placeholder_in_text"):
        words.prompt(PLACEHOLDER, 0)


def test_an_instruction_may_look_like_a_template(words: Tokenizer) -> None:
    assert words.prompt("{audio} {instruction}", 1) == [[1, 13], [0, 0]]


def test_sentencepiece_round_trip_with_the_published_prompt(tmp_path: Path) -> None:
    config = TokenizerConfig(path=str(tmp_path / "t.model"))
    texts = [
        "Please write what you hear.",
        "seven five nine",
        "zażółć gęślą jaźń",
        MOWE_TEMPLATE.format(audio="", instruction=""),
    ]
    train_sentencepiece(texts * 20, 90, tmp_path / "t.model", PLACEHOLDER)
    tokenizer = load_tokenizer(config.path or "", config)
    assert tokenizer.vocab_size <= 90
    assert tokenizer.decode(tokenizer.encode("seven zażółć five")) == "seven zażółć five"
    first, second = tokenizer.prompt("what you hear", 1)
    assert first[0] == tokenizer.bos_id
    assert tokenizer.decode(first) == "Given the following speech tokens: <speech>"
    assert tokenizer.decode(second) == "</speech> what you hear"
    special = [
        tokenizer.bos_id,
        *tokenizer.encode("five"),
        tokenizer.placeholder_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    ]
    assert tokenizer.decode([i for i in special if i is not None]) == "five"
    assert tokenizer.decode([*tokenizer.encode("five"), tokenizer.vocab_size + 3]) == "five\ufffd"


def test_training_is_deterministic_and_needs_text(tmp_path: Path) -> None:
    texts = [f"sentence number {i} with words" for i in range(99)]
    for name in ("a", "b"):
        train_sentencepiece(iter(texts), 60, tmp_path / f"{name}.model", PLACEHOLDER)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    with pytest.raises(UserError, match="no text to train"):
        train_sentencepiece([" "], 60, tmp_path / "c.model", PLACEHOLDER)
    with pytest.raises(UserError, match="a vocabulary of 8 cannot be trained"):
        train_sentencepiece(texts, 8, tmp_path / "c.model", PLACEHOLDER)


@pytest.mark.parametrize(
    "fields", [{"template": "{instruction}"}, {"text_template": "{audio}{instruction}"}, {"placeholder": "a b"}]
)
def test_bad_templates_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"data.tokenizer\."):
        TokenizerConfig(**fields)  # type: ignore[arg-type]
