"""Overlapping windows of a long recording, and the joining of their transcripts.

The overlap of two neighboring windows is in both transcripts. It is located by the longest sequence of words that
occurs both near the end of one transcript and near the start of the next. The edge of a window may cut a word in two,
so the transcript of the other window is used between the common sequence and the edge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# In scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han), every character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_UNSPACED}]\s*|[^\s{_UNSPACED}]+\s*")
_SLACK = 1.5
"""The factor by which speech in the overlap may be denser than in the whole window."""
_SPARE_WORDS = 2
"""The number of words added to the expected number of words in an overlap."""


def window_spans(num_samples: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Return the first sample and the end of each window of a clip.

    The windows are evenly spaced, have equal length and cover the whole clip.

    Args:
        num_samples: The length of the clip.
        window: The length of a window; a clip that is not longer than this is a single window.
        overlap: The minimum overlap of neighboring windows.
    """
    assert 0 <= overlap < window, (overlap, window)
    if num_samples <= window:
        return [(0, num_samples)]
    num = math.ceil((num_samples - overlap) / (window - overlap))
    begins = [i * (num_samples - window) // (num - 1) for i in range(num)]
    return [(begin, begin + window) for begin in begins]


def join_windows(texts: Sequence[str], shares: Sequence[float]) -> str:
    """Join the transcripts of a recording's windows.

    Args:
        texts: The transcript of each window.
        shares: For each pair of neighboring windows, the overlap as a fraction of a window, between 0 and 1.
    """
    assert len(shares) == max(0, len(texts) - 1), (len(texts), len(shares))
    joined: list[str] = []
    last: list[str] = []
    for text, share in zip(texts, (0.0, *shares)[: len(texts)], strict=True):
        units = _UNIT.findall(text.strip())
        joined = join_units(joined, units, _reach(share, last), _reach(share, units))
        last = units
    return "".join(joined).strip()


def join_units(before: Sequence[str], after: Sequence[str], reach_before: int, reach_after: int) -> list[str]:
    """Join the words of two windows, and keep only one copy of the words in their overlap.

    The overlap is located by the longest common sequence of words. If several sequences are equally long, the one
    nearest to the seam is used. Case and punctuation are ignored. If there is no common word, all words are kept.

    Args:
        before: The words of the earlier window.
        after: The words of the later window.
        reach_before: The number of words at the end of `before` that may be in the overlap.
        reach_after: The number of words at the start of `after` that may be in the overlap.
    """
    start = max(0, len(before) - reach_before)
    tail, head = [_key(w) for w in before[start:]], [_key(w) for w in after[:reach_after]]
    length, end_tail, begin_head = _longest_run(tail, head)
    if length == 0:
        return [*_spaced(before, after), *after]
    end = begin_head + length
    # The space after the common words is taken from `after`, since `before` may have ended there without one.
    space = after[end - 1][len(after[end - 1].rstrip()) :]
    return [*before[: start + end_tail - 1], before[start + end_tail - 1].rstrip() + space, *after[end:]]


def _longest_run(tail: Sequence[str], head: Sequence[str]) -> tuple[int, int, int]:
    """Return the length of the longest common sequence, its end in `tail` and its start in `head`.

    The length is 0 if there is none.
    """
    best = (0, 0, 0)
    nearest = 0
    # lengths[j]: the length of the common sequence that ends with the current word of `tail` and word j - 1 of `head`
    lengths = [0] * (len(head) + 1)
    for i, word in enumerate(tail, 1):
        row = [0] * (len(head) + 1)
        for j, other in enumerate(head, 1):
            if word == other and word:
                row[j] = lengths[j - 1] + 1
                far = (len(tail) - i) + (j - row[j])
                if row[j] > best[0] or (row[j] == best[0] and far < nearest):
                    best, nearest = (row[j], i, j - row[j]), far
        lengths = row
    return best


def _reach(share: float, units: Sequence[str]) -> int:
    """Return the number of words in a window's text that may be in the overlap with a neighboring window.

    It is at most half of the words, so that the overlaps with the two neighbors have no word in common.
    """
    if share <= 0:
        return 0
    return min(math.ceil(_SLACK * share * len(units)) + _SPARE_WORDS, (len(units) + 1) // 2)


def _key(unit: str) -> str:
    """Return a word in lower case without surrounding punctuation.

    A word of punctuation alone is returned unchanged.
    """
    plain = unit.strip().lower()
    return re.sub(r"^\W+|\W+$", "", plain) or plain


def _spaced(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Return `before` with a space at its end if its script separates words with spaces."""
    found = list(before)
    if found and after and re.match(rf"[^\s{_UNSPACED}]", found[-1][-1]):
        found[-1] += " "
    return found
