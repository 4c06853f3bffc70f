"""The prompt around the audio: rendered as text with one placeholder per clip, cut there, filled up with one per slot.

Shared by training (`trainer/data`) and by the exported processor, so that both see the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


def render(template: str, instruction: str, placeholder: str, num_clips: int) -> str:
    """`template` with `{instruction}` and, for all clips, `{audio}` filled in."""
    # One pass over the template, not two replacements: an instruction may itself contain "{audio}".
    before, after = template.split("{instruction}")
    audio = placeholder * num_clips
    return before.replace("{audio}", audio) + instruction + after.replace("{audio}", audio)


def cut(ids: Sequence[int], placeholder_id: int) -> list[list[int]]:
    """Tokens before, between and after the placeholders."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == placeholder_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def fill(
    pieces: Sequence[Sequence[int]], audio_tokens: Sequence[int], placeholder_id: int
) -> tuple[list[int], list[bool]]:
    """Return (token ids, which of them take an audio embedding): `pieces` with `audio_tokens[i]` placeholders after the
    i-th piece."""
    assert len(pieces) == len(audio_tokens) + 1, (len(pieces), len(audio_tokens))
    ids, mask = list(pieces[0]), [False] * len(pieces[0])
    for num_audio_tokens, piece in zip(audio_tokens, pieces[1:], strict=True):
        ids += [placeholder_id] * num_audio_tokens + list(piece)
        mask += [True] * num_audio_tokens + [False] * len(piece)
    return ids, mask
