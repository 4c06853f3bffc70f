"""Tests of unusual fields and texts: the type of every field is checked, and no text can control the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from model.json_text import BrokenTextError, parse_json
from model.lengths import TokenRate
from tests.trainer.data_corpus import audio_bytes, clip_rows, data_config, row, write_manifest, write_shards
from trainer.data.config import DatasetConfig, TokenizerConfig
from trainer.data.errors import SampleError, sample_errors
from trainer.data.loader import Loader
from trainer.data.manifest import read_manifest
from trainer.data.metadata import MAX_CLIPS, check_metadata
from trainer.data.prepare import prepare
from trainer.data.shard_build import build_shards
from trainer.data.stream import SampleStream
from trainer.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from trainer.evaluation.predictions import read_predictions
from trainer.scoring.fields import LIST_FIELDS, NUMBER_FIELDS, TEXT_FIELDS, field_problem

GOOD = {"task": "asr", "split": "train", "instruction": "?", "answer": "yes"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=6,
)


def is_legal(name: str, value: Any) -> bool:
    if value is None:
        return name not in ("task", "instruction", "answer")
    if name in TEXT_FIELDS:
        return isinstance(value, str)
    if name in LIST_FIELDS:
        return isinstance(value, list) and all(isinstance(t, str) for t in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300


@given(name=st.sampled_from([*TEXT_FIELDS, *LIST_FIELDS, *NUMBER_FIELDS]), value=JSON)
@settings(max_examples=300, deadline=None)
def test_a_field_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    try:
        check_metadata({**GOOD, name: value}, 1)
        refused = None
    except SampleError as error:
        refused = error
    if not is_legal(name, value):
        assert refused is not None and refused.reason == "wrong_type" and name in refused.detail
    elif name not in ("task", "answer") and value not in ("all", ["all"]):
        assert refused is None


@pytest.mark.parametrize("value", [10**400, -1, float("nan"), float("inf"), "3.5", True])
def test_a_duration_is_an_amount(value: Any) -> None:
    assert field_problem({"duration": value}) is not None
    assert field_problem({"duration": 3}) is None


@pytest.mark.parametrize(
    ("fields", "num_clips", "reason"),
    [
        ({}, 0, "no_audio"),
        ({"audio_filepath": "a.flac"}, 0, "no_audio"),
        ({"subset": "all"}, 1, "wrong_type"),
        ({"source": "all"}, 1, "wrong_type"),
        ({}, MAX_CLIPS + 1, "too_many_clips"),
    ],
)
def test_samples_that_no_metric_could_count_are_refused(fields: dict, num_clips: int, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        check_metadata({**GOOD, **fields}, num_clips)
    assert caught.value.reason == reason
    assert "audio_filepath" not in fields or "audio_filepath must be called audio" in caught.value.detail


def test_speech_without_audio_is_not_trained_as_text(tmp_path: Path) -> None:
    rows = [*clip_rows(tmp_path, 3), row("null"), row("empty", audio=[]), row("nemo", audio_filepath="clip-0.flac")]
    report = build_shards(write_manifest(tmp_path, rows), str(tmp_path / "out"), max_skipped_fraction=0.5)
    assert report.num_samples == 3 and report.num_skipped_by_reason == {"no_audio": 3}
    # Shards of earlier versions or of other programs may contain such samples, which are skipped.
    odd = [(row("text"), []), (row("one"), [("flac", audio_bytes(0.1))])]
    write_shards(tmp_path / "old", odd, per_shard=2)
    config = data_config(tmp_path, DatasetConfig(name="old", shards="old"), max_skipped_fraction=0.9)
    with Loader(SampleStream(prepare(config, TokenRate((2,))), seed=0, num_batches=3)) as loader:
        assert {s.key for batch, _ in loader for s in batch.samples} == {"one"}
        assert set(loader.num_skipped) == {"no_audio"}


def test_the_first_bad_line_of_each_reason_is_named_first(tmp_path: Path) -> None:
    rows = clip_rows(tmp_path, 6)
    rows[1]["answer"], rows[2]["choices"], rows[4]["answer"] = " ", [1], ""
    with pytest.raises(UserError) as caught:
        build_shards(write_manifest(tmp_path, rows), str(tmp_path / "out"))
    message = str(caught.value)
    assert "3 of 6 samples cannot be used (2 empty_answer, 1 wrong_type)" in message
    assert "first of each reason: line 2 id clip-1: answer is empty; line 3 id clip-2: choices = [1]" in message


def test_a_wrong_subset_does_not_read_as_a_missing_split(tmp_path: Path) -> None:
    rows = [*clip_rows(tmp_path, 3), *clip_rows(tmp_path, 2, prefix="t", split="test", subset="far")]
    write_manifest(tmp_path, rows)
    for subsets, split in ((("noize",), "train"), (("noise",), "test")):
        wanted = DatasetConfig(name="s", manifest="set.jsonl", subsets=subsets)
        with pytest.raises(
            UserError, match=rf"split '{split}', tasks \[\] and subsets \['{subsets[0]}'\] select nothing"
        ):
            prepare(data_config(tmp_path, wanted, eval_splits=("test",)), TokenRate((2,)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a", "x": ' + b"[" * 100_000, "line 2: not JSON (nested too deeply)"),
        (b'{"id": "a", "x": "\xff"}', "line 2: not JSON (not UTF-8 at byte 18)"),
        (b'{"id": "a", "x": NaN}', "line 2: not JSON (NaN is not a JSON number)"),
        (b'{"id": "a", "split": "s", "audio": "' + b"x" * 5000 + b'"}', "line 2 (id a): no audio file"),
    ],
)
def test_odd_lines_of_a_manifest_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "first", "split": "s"}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path / "m.jsonl")
    assert message in str(caught.value) and len(str(caught.value)) < 1000


def test_half_of_a_surrogate_pair_is_the_problem_of_one_line(tmp_path: Path) -> None:
    good = json.dumps({"id": "a", "split": "s", "answer": "\U0001f600"})
    (tmp_path / "m.jsonl").write_text(good + '\n{"id": "b", "split": "s", "answer": "\\ud800"}\n')
    rows = {r.line: r for r in read_manifest(tmp_path / "m.jsonl")}
    assert rows[1].error is None and rows[2].error is not None and rows[2].error.reason == "wrong_type"
    with pytest.raises(BrokenTextError):
        parse_json('{"\\udc00": 1}')
    assert parse_json(b'\xef\xbb\xbf"\\ud83d\\ude00"') == "\U0001f600"


def test_predictions_have_the_same_types(tmp_path: Path) -> None:
    base = {"key": "k", "task": "asr", "reference": "x", "hypothesis": "y"}
    for name, value in (
        ("subset", "all"),
        ("language", ["en"]),
        ("choices", [1]),
        ("audio_sec", -1),
        ("num_windows", 0),
    ):
        (tmp_path / "p.jsonl").write_text(json.dumps({**base, name: value}))
        with pytest.raises(UserError, match=rf"p.jsonl, line 1: {name} = "):
            read_predictions(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(json.dumps(base).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"line 2: is not JSON \(not UTF-8 at byte 0\)"):
        read_predictions(tmp_path / "p.jsonl")


def test_unexpected_errors_are_those_of_one_sample() -> None:
    with pytest.raises(SampleError, match=r"unexpected: ZeroDivisionError: division by zero"), sample_errors("k"):
        1 / 0  # noqa: B018
    for error in (UserError("x"), OSError(5, "disk"), SampleError("nan", "x")):
        with pytest.raises(type(error)), sample_errors("k"):
            raise error


WORDS = ["<unk>", "<s>", "</s>", "<|im_end|>", "<SpeechHere>", "one", "two", "user", "What", "is", "said?"]
PLAIN = "{% for m in messages %}user {{ m['content'] }}{% endfor %}"


def chat_tokenizer(folder: Path, template: str) -> str:
    """Write a tokenizer with one token per word and a chat template, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<|im_end|>", "<SpeechHere>"], **special
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("text", ["one <|im_end|> two", "one</s>", "<s>"])
def test_tokens_that_control_the_model_are_refused_by_name(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(chat_tokenizer(tmp_path, PLAIN), TokenizerConfig())
    assert tokenizer.encode("one two unknown") == [5, 6, 0]
    with pytest.raises(SampleError, match="special_token_in_text: .* contains <.*>, which controls the model"):
        tokenizer.encode(text)
    with pytest.raises(SampleError, match="placeholder_in_text"):
        tokenizer.encode("<SpeechHere>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('a system message is needed') }}", "fails: TemplateError: a system message is needed"),
        ("{{ messages[1]['content'] }}", "fails: UndefinedError"),
        ("{{ messages[0]['content'][:5] }}", "does not contain the message exactly once"),
        ("{{ messages[0]['content'] * 2 }}", "does not contain the message exactly once"),
        ("{% for m in %}", "fails: TemplateSyntaxError"),
    ],
)
def test_chat_templates_that_change_the_message_are_refused_when_they_are_loaded(
    tmp_path: Path, template: str, words: str
) -> None:
    path = chat_tokenizer(tmp_path, template)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, TokenizerConfig())
    assert words in str(caught.value) and "data.tokenizer.chat_template: false" in str(caught.value)
    assert isinstance(load_tokenizer(path, TokenizerConfig(chat_template=False)), HuggingFaceTokenizer)


def test_a_template_may_fail_for_one_message_only(tmp_path: Path) -> None:
    template = "{% if 'two' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    tokenizer = load_tokenizer(chat_tokenizer(tmp_path, template), TokenizerConfig())
    assert len(tokenizer.prompt("one", 1)) == 2
    with pytest.raises(SampleError, match="unexpected: fails: TemplateError: no"):
        tokenizer.prompt("two", 1)


def test_long_samples_are_skipped(tmp_path: Path) -> None:
    rows = clip_rows(tmp_path, 5)
    rows[0]["answer"], rows[1]["instruction"] = "word " * 200, "x" * 100_000
    write_manifest(tmp_path, rows)
    config = data_config(
        tmp_path, DatasetConfig(name="s", manifest="set.jsonl"), max_skipped_fraction=0.9, max_tokens=60
    )
    with Loader(SampleStream(prepare(config, TokenRate((2,))), seed=0, num_batches=6)) as loader:
        assert {s.key for batch, _ in loader for s in batch.samples} == {"clip-2", "clip-3", "clip-4"}
        assert set(loader.num_skipped) == {"too_many_tokens"}
