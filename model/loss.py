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

    Args:
        logits: [ΣS, vocabulary + 1]; the last class is the blank.
        targets: [ΣC] token ids per clip; none: the clip takes no part. Every clip with targets must be feasible.
    """
    rows = [i for i, n in enumerate(targets.lengths) if n]
    if not rows:
        return logits.values.sum() * 0.0
    chosen, wanted = logits.select(rows), targets.select(rows)
    log_probs = chosen.padded().float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(
        log_probs,
        wanted.values,
        torch.tensor(chosen.lengths),
        torch.tensor(wanted.lengths),
        blank=log_probs.shape[-1] - 1,
        reduction="sum",
    )
