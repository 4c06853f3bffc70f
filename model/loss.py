"""The loss terms, all as sums, so that sums of ranks add up to those of the global batch.

L = L_next-token + w_r·L_MoWE + w_c·L_CTC. The next-token loss is Σ token losses / target tokens of the *global* batch;
the CTC loss is Σ clip losses / CTC target tokens of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import IGNORE, Ragged


@dataclass(frozen=True)
class Counts:
    """What the loss terms of a (global) batch are divided by."""

    targets: int
    """Labelled token positions."""
    ctc_targets: int
    """Answer tokens of the clips that take a CTC loss."""
    clips: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.targets + other.targets, self.ctc_targets + other.ctc_targets, self.clips + other.clips)


def next_token_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ cross entropy of `logits` [N, vocabulary] at `labels` [N] (IGNORE takes no part), in fp32."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")


def ctc_feasible(targets: Tensor, num_audio_tokens: int) -> bool:
    """Whether `num_audio_tokens` outputs can spell `targets` [C]: a repeated token needs a blank between."""
    repeats = int((targets[1:] == targets[:-1]).sum())
    return 0 < len(targets) and len(targets) + repeats <= num_audio_tokens


def ctc_sum(logits: Ragged, targets: Ragged) -> Tensor:
    """Σ CTC loss (Graves 2006) over clips, in fp32.

    Where torch is restricted to deterministic algorithms, its own CTC loss raises in the backward pass on CUDA; the
    same loss is then computed from operations that are deterministic.

    Args:
        logits: [ΣS, vocabulary + 1]; the last class is the blank.
        targets: [ΣC] token ids per clip; none: the clip takes no part. Every clip with targets must be feasible.
    """
    rows = [i for i, n in enumerate(targets.lengths) if n]
    if not rows:
        return logits.values.sum() * 0.0
    chosen, wanted = logits.select(rows), targets.select(rows)
    log_probs = chosen.padded().float().log_softmax(-1).transpose(0, 1)
    if torch.are_deterministic_algorithms_enabled():
        return _ctc_of_steps(log_probs, chosen.lengths, wanted)
    return F.ctc_loss(
        log_probs,
        wanted.values,
        torch.tensor(chosen.lengths),
        torch.tensor(wanted.lengths),
        blank=log_probs.shape[-1] - 1,
        reduction="sum",
    )


_NEVER = -1e30
"""Logarithm of a probability of zero: with -inf, the gradient of a sum of zeros would be NaN."""


def _ctc_of_steps(log_probs: Tensor, lengths: tuple[int, ...], targets: Ragged) -> Tensor:
    """Σ CTC loss by the forward recursion, slot by slot, over states blank, token, blank, … of every clip.

    Args:
        log_probs: [S, B, vocabulary + 1]; the last class is the blank.
        lengths: slots of each of the B clips.
        targets: [ΣC] token ids, at least one per clip.
    """
    device = log_probs.device
    tokens = targets.padded()  # [B, C]
    emitted = log_probs.gather(2, tokens[None].expand(len(log_probs), -1, -1))
    blanks = log_probs[:, :, -1:]
    may_follow = torch.cat([torch.zeros_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] != tokens[:, :-1]], dim=1)
    never = log_probs.new_full((len(tokens), 1), _NEVER)
    # Before the first slot a path stands before the first blank: as if that blank had just been there.
    at_blank = torch.cat([torch.zeros_like(never), never.expand(-1, tokens.shape[1])], dim=1)  # [B, C + 1]
    at_token = never.expand(-1, tokens.shape[1])  # [B, C]
    num_audio_tokens = torch.tensor(lengths, device=device)[:, None]
    for slot in range(len(log_probs)):
        before = torch.cat([never, at_token], dim=1)
        skipped = torch.where(may_follow, before[:, :-1], never)
        new_token = torch.logaddexp(torch.logaddexp(at_token, at_blank[:, :-1]), skipped) + emitted[slot]
        new_blank = torch.logaddexp(at_blank, before) + blanks[slot]
        runs = slot < num_audio_tokens
        at_token, at_blank = torch.where(runs, new_token, at_token), torch.where(runs, new_blank, at_blank)
    last = torch.tensor(targets.lengths, device=device)[:, None]
    return -torch.logaddexp(at_blank.gather(1, last), at_token.gather(1, last - 1)).sum()
