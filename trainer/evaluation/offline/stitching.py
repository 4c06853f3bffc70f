"""Long audio in overlapping windows, and one transcript of the windows' transcripts. Pure: no model, no audio.

What two neighbours both heard is found as the longest run of words that ends one text and begins the next, give or take
the words that a window's edge has cut in two. Such words are left out with the half that did not hear them whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han): every character stands for itself.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_UNSPACED}]\s*|[^\s{_UNSPACED}]+\s*")
_SLACK = 1.5
"""How many times more words than its share of the window's seconds an overlap may hold."""
_SPARE_WORDS = 2


def window_spans(num_samples: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """(begin, end) of the windows of a clip, in samples, evenly spaced and of equal length.

    They cover the clip without a gap, neighbours share at least `overlap`; a clip of at most `window` is one window.
    """
    assert 0 <= overlap < window, (overlap, window)
    if num_samples <= window:
        return [(0, num_samples)]
    num = math.ceil((num_samples - overlap) / (window - overlap))
    begins = [i * (num_samples - window) // (num - 1) for i in range(num)]
    return [(begin, begin + window) for begin in begins]


def join_windows(texts: Sequence[str], shares: Sequence[float]) -> str:
    """One text of the windows' `texts`; `shares[i]`: the part of a window, 0 to 1, that windows i and i + 1 share."""
    assert len(shares) == max(0, len(texts) - 1), (len(texts), len(shares))
    joined: list[str] = []
    last: list[str] = []
    for text, share in zip(texts, (0.0, *shares)[: len(texts)], strict=True):
        units = _UNIT.findall(text.strip())
        joined = join_units(joined, units, _reach(share, last), _reach(share, units))
        last = units
    return "".join(joined).strip()


def join_units(before: Sequence[str], after: Sequence[str], reach_before: int, reach_after: int) -> list[str]:
    """`before` and `after` with what both have in the overlap once.

    The overlap is the last `reach_before` words of one and the first `reach_after` of the other. Of equally long common
    runs the one nearest to the seam counts. Without a common word, nothing is left out. Case and punctuation do not
    matter to the comparison, and no word outside of the overlap is ever touched.
    """
    start = max(0, len(before) - reach_before)
    tail, head = [_key(w) for w in before[start:]], [_key(w) for w in after[:reach_after]]
    length, end_tail, begin_head = _longest_run(tail, head)
    if length == 0:
        return [*_spaced(before, after), *after]
    end = begin_head + length
    # The space after the run is as `after` writes it: where `before` ended, it had none to write.
    space = after[end - 1][len(after[end - 1].rstrip()) :]
    return [*before[: start + end_tail - 1], before[start + end_tail - 1].rstrip() + space, *after[end:]]


def _longest_run(tail: Sequence[str], head: Sequence[str]) -> tuple[int, int, int]:
    """(its length, where it ends in `tail`, where it begins in `head`): 0 where nothing is common."""
    best = (0, 0, 0)
    nearest = 0
    # lengths[j]: of the common run that ends with the current word of `tail` and word j - 1 of `head`
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
    """Words of a window's text that may lie in an overlap of `share` of it: its fair share with some to spare, and at
    most half of the text, so that the words of two overlaps are never the same."""
    if share <= 0:
        return 0
    return min(math.ceil(_SLACK * share * len(units)) + _SPARE_WORDS, (len(units) + 1) // 2)


def _key(unit: str) -> str:
    """What is compared; punctuation alone is compared as it is."""
    plain = unit.strip().lower()
    return re.sub(r"^\W+|\W+$", "", plain) or plain


def _spaced(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """`before` with a space at its end, where words are written with spaces."""
    found = list(before)
    if found and after and re.match(rf"[^\s{_UNSPACED}]", found[-1][-1]):
        found[-1] += " "
    return found
