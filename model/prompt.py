"""The prompt around the audio.

The prompt is rendered as text with one placeholder per clip. Its tokens are cut at these placeholders and joined again
with one placeholder per audio token. Training (`trainer/data`) and the exported processor share this code, so that both
produce the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


def render(template: str, instruction: str, placeholder: str, num_clips: int) -> str:
    """Return `template` with the instruction in place of `{instruction}` and placeholders in place of `{audio}`."""
    # The instruction is inserted last because it may itself contain "{audio}".
    before, after = template.split("{instruction}")
    audio = placeholder * num_clips
    return before.replace("{audio}", audio) + instruction + after.replace("{audio}", audio)


def cut(ids: Sequence[int], placeholder_id: int) -> list[list[int]]:
    """Split `ids` at the placeholders, and return the tokens before, between and after the placeholders."""
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
    """Join `pieces`, inserting one placeholder for each audio token between them.

    Args:
        pieces: The token ids before, between and after the clips.
        audio_tokens: The number of audio tokens of each clip. Clip i is inserted after piece i.
        placeholder_id: The token id of the placeholder.

    Returns:
        The token ids, and a flag for each that is true at a placeholder.
    """
    assert len(pieces) == len(audio_tokens) + 1, (len(pieces), len(audio_tokens))
    ids, mask = list(pieces[0]), [False] * len(pieces[0])
    for num_audio_tokens, piece in zip(audio_tokens, pieces[1:], strict=True):
        ids += [placeholder_id] * num_audio_tokens + list(piece)
        mask += [True] * num_audio_tokens + [False] * len(piece)
    return ids, mask
