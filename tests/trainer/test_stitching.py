"""Tests of the windows over a recording, and of joining the windows' transcripts without duplicated or lost words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.offline.stitching import join_units, join_windows, window_spans

WORD = st.text(alphabet="abcdefgh", min_size=1, max_size=5)
WORDS = st.lists(WORD, max_size=12)


@given(st.integers(1, 5000), st.integers(2, 400), st.data())
def test_windows_cover_everything_and_overlap(num: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    spans = window_spans(num, window, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == num
    assert all(end - begin == min(window, num) for begin, end in spans)
    assert all(a_end - b_begin >= overlap for (_, a_end), (b_begin, _) in zip(spans, spans[1:], strict=False))
    # No window is unnecessary.
    assert len(spans) == 1 or (len(spans) - 1) * (window - overlap) + overlap < num


@given(st.integers(8, 120), st.integers(8, 30), st.data())
def test_perfect_transcripts_of_windows_give_the_text_back(num: int, window: int, data: st.DataObject) -> None:
    """Check words of the same length, none of which occurs twice within two windows."""
    overlap = data.draw(st.integers(1, window // 2))
    words = [f"w{i}" for i in range(num)]
    spans = window_spans(num, window, overlap)
    pairs = zip(spans, spans[1:], strict=False)
    shares = [(a_end - b_begin) / (b_end - b_begin) for (_, a_end), (b_begin, b_end) in pairs]
    if max(shares, default=0.0) > 0.5:
        return  # the last windows of a short recording overlap more than a setting can
    texts = [" ".join(words[begin:end]) for begin, end in spans]
    assert join_windows(texts, shares) == " ".join(words)


@given(WORDS, WORDS, st.integers(0, 12), st.integers(0, 12))
def test_no_word_outside_of_the_overlap_is_lost(before: list[str], after: list[str], m: int, n: int) -> None:
    m, n = min(m, len(before)), min(n, len(after))
    joined = [unit.strip() for unit in join_units(before, after, m, n)]
    assert joined[: len(before) - m] == before[: len(before) - m]
    assert joined[len(joined) - (len(after) - n) :] == after[n:]
    assert set(joined) <= {*before, *after}
    assert len(joined) <= len(before) + len(after)
    if not set(before[len(before) - m :]) & set(after[:n]):
        assert joined == [*before, *after]


@given(WORDS, WORDS, WORDS)
def test_common_words_occur_once(left: list[str], common: list[str], right: list[str]) -> None:
    before, after = [f"l{w}" for w in left] + common, common + [f"r{w}" for w in right]
    joined = [unit.strip() for unit in join_units(before, after, len(common), len(common))]
    assert joined == [f"l{w}" for w in left] + common + [f"r{w}" for w in right]


@given(st.lists(WORD, min_size=1, max_size=30))
def test_single_window_is_unchanged_and_empty_ones_add_nothing(words: list[str]) -> None:
    text = " ".join(words)
    assert join_windows([text], []) == text
    assert join_windows([text, "", ""], [0.2, 0.2]) == text
    assert join_windows(["", text], [0.2]) == text
    assert join_windows([], []) == ""


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        # a word that is cut at the edge of one window is taken from the other window
        (["the quick brown fox jum", "ick brown fox jumps over it"], "the quick brown fox jumps over it"),
        # case and punctuation are ignored, and the first window's are kept
        (["He came home. Then,", "then he slept well all night"], "He came home. Then, he slept well all night"),
        # without common words, nothing is dropped
        (["one two three four", "five six seven eight"], "one two three four five six seven eight"),
        # a common word outside the overlap does not count
        (["no a b c d e f g", "h i j k l m n no"], "no a b c d e f g h i j k l m n no"),
        # in languages without spaces, each character is a word
        (["今日は天気が", "天気がいいです"], "今日は天気がいいです"),
        (["hello 天気", "天気 world today"], "hello 天気 world today"),
    ],
)
def test_by_hand(texts: list[str], wanted: str) -> None:
    assert join_windows(texts, [0.5]) == wanted


def test_repetitions_beyond_the_overlap_are_kept() -> None:
    """Check repeated words, such as eight times "five" in the windows 0-5 and 3-8, which have two words in common."""
    assert join_windows(["a b c five five five", "five five five x y z"], [0.5]) == "a b c five five five x y z"
    joined = join_units(["five"] * 5, ["five"] * 5, 2, 2)
    assert [unit.strip() for unit in joined] == ["five"] * 8
