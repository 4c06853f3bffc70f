"""The CTC loss (Graves 2006) of the adapter's output with the transcripts as targets.

The loss is divided by the number of target symbols in the global batch. Symbols are the LLM's tokens, the bytes of the
text or pieces of it (`model.ctc_vocabulary`). A second of speech has more bytes than audio tokens, so the head can have
several outputs per audio token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.audio_output import AudioOutput
from model.batch import Batch, Ragged, Sample
from model.config import ModelConfig
from model.connectors.base import adapter_class
from model.errors import UserError
from model.losses.base import AudioLoss, Reduce

NUM_BYTES = 256


EMBEDDING_SCALE = 1.4
"""The initial root mean square of what the CTC outputs of an audio token add to its embedding, if they start with token
embeddings of the LLM. It is twice that of the projector's output, so that the LLM recognizes them after the norm that
follows (`model.adapter.normalize`)."""


def num_symbols(config: ModelConfig, vocab_size: int) -> int:
    """Return the number of symbols of the CTC head, without the blank.

    Args:
        config: The model's config.
        vocab_size: The size of the tokenizer's vocabulary.
    """
    sizes = {"tokens": vocab_size, "bytes": NUM_BYTES, "pieces": config.ctc_pieces}
    return sizes[config.ctc_vocabulary]


class PartwiseLinear(nn.Linear):
    """A linear layer that is applied to each of several equal parts of a vector. The results are concatenated.

    Args:
        num_parts: The number of parts.
        in_features: The width of a part of the input.
        out_features: The width of a part of the output.
    """

    def __init__(self, num_parts: int, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.num_parts = num_parts

    def forward(self, input: Tensor) -> Tensor:
        """Return [N, parts · outputs] for an input [N, parts · inputs]."""
        return super().forward(input.view(len(input), self.num_parts, self.in_features)).flatten(1)


class CTC(AudioLoss):
    """The CTC loss of transcription samples with one clip, if the clip has enough outputs for the answer's symbols."""

    name = "ctc"
    options = {}

    def weight(self, config: ModelConfig) -> float:
        """Return `model.ctc_weight`."""
        return config.ctc_weight

    def head(self, config: ModelConfig, dim: int, vocab_size: int) -> nn.Module:
        """Return a layer that computes the scores of the symbols and the blank for every output."""
        num_parts = adapter_class(config.adapter).num_parts(config.adapter)
        if config.ctc_outputs % num_parts:
            raise UserError(
                f"model.ctc_outputs = {config.ctc_outputs}: must be a multiple of {num_parts}, the number of parts of "
                f"an audio token (the last of model.adapter.strides); set it to {num_parts}"
            )
        outputs = config.ctc_outputs // num_parts
        return PartwiseLinear(num_parts, dim // num_parts, outputs * (num_symbols(config, vocab_size) + 1))

    def targets(self, batch: Batch, config: ModelConfig) -> Ragged:
        """Return the symbols [ΣC] of every clip's answer. A clip that is skipped has no symbols."""
        none = torch.zeros(0, dtype=torch.int64)
        targets = []
        for samples, owner in zip(batch.clips.lengths, batch.clip_owner, strict=True):
            sample = batch.samples[owner]
            num_outputs = config.ctc_outputs * config.adapter.rate.tokens_of_samples(samples)
            is_readable = sample.is_transcription and len(sample.clips) == 1
            symbols = _symbols(sample, config) if is_readable else none
            targets.append(symbols if ctc_feasible(symbols, num_outputs) else none)
        return Ragged.of(targets, like=none)

    def count(self, batch: Batch, config: ModelConfig) -> int:
        """Return the number of symbols of the clips that are not skipped."""
        return len(self.targets(batch, config).values)

    def sum(self, audio: AudioOutput, targets: Ragged | None, config: ModelConfig, reduce: Reduce) -> Tensor:
        """Return the sum of the CTC loss over this rank's clips."""
        assert targets is not None
        head, outputs = audio.heads[self.name], config.ctc_outputs
        logits = head.values.view(len(head.values) * outputs, head.values.shape[1] // outputs)
        return ctc_sum(Ragged(logits, tuple(outputs * n for n in head.lengths)), targets)


class CTCFeedback(nn.Module):
    """A linear layer from the probabilities of the CTC outputs of an audio token to the width of the LLM.

    Args:
        num_outputs: The number of outputs per audio token.
        num_symbols: The number of symbols without the blank.
        llm_dim: The width of the LLM.
        embeddings: Initial vectors [symbols, H] of the symbols, whose root mean square is 1; None for random vectors.
    """

    def __init__(self, num_outputs: int, num_symbols: int, llm_dim: int, embeddings: Tensor | None = None) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.linear = nn.Linear(num_outputs * (num_symbols + 1), llm_dim, bias=False)
        # Together, an audio token's outputs add about as much as the projector, whose output has a root mean square of
        # about 0.7 (docs/connectors.md). The blank, the most frequent symbol, adds nothing at first.
        nn.init.normal_(self.linear.weight, std=0.7 / num_outputs**0.5)
        with torch.no_grad():
            by_output = self.linear.weight.view(llm_dim, num_outputs, num_symbols + 1)
            by_output[:, :, -1] = 0.0
            if embeddings is not None:
                by_output[:, :, :-1] = EMBEDDING_SCALE / num_outputs**0.5 * embeddings.T[:, None]

    def forward(self, logits: Tensor) -> Tensor:
        """Return vectors [S, H] for the scores [S, outputs · symbols] of S audio tokens."""
        scores = logits.view(len(logits), self.num_outputs, logits.shape[1] // self.num_outputs)
        vectors: Tensor = self.linear(scores.float().softmax(-1).to(logits.dtype).flatten(1))
        return vectors


def _symbols(sample: Sample, config: ModelConfig) -> Tensor:
    """Return the symbols [C] of a sample's answer."""
    if config.ctc_vocabulary == "tokens":
        return sample.answer
    if config.ctc_vocabulary == "pieces":
        return sample.pieces
    text = " ".join(sample.answer_text.lower().split())
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def ctc_feasible(targets: Tensor, num_outputs: int) -> bool:
    """Return whether `num_outputs` outputs suffice for `targets` [C]. A blank must separate two equal symbols."""
    repeats = int((targets[1:] == targets[:-1]).sum())
    return 0 < len(targets) and len(targets) + repeats <= num_outputs


def ctc_sum(logits: Ragged, targets: Ragged) -> Tensor:
    """Return the sum of the CTC loss over clips, in fp32.

    With `torch.use_deterministic_algorithms`, PyTorch's CTC loss raises an error in the backward pass on CUDA. The same
    loss is then computed from deterministic operations.

    Args:
        logits: The outputs [ΣS, symbols + 1], one sequence per clip. The last class is the blank.
        targets: The symbols [ΣC] of each clip. A clip without symbols is skipped. All other clips must be feasible
            (`ctc_feasible`).
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
"""A finite substitute for log 0. With -inf, the gradient of the logarithm of a sum of zeros would be NaN."""


def _ctc_of_steps(log_probs: Tensor, num_steps: tuple[int, ...], targets: Ragged) -> Tensor:
    """Return the sum of the CTC loss, computed by the forward recursion over the states blank, symbol, blank and so on.

    Args:
        log_probs: The log probabilities [S, B, symbols + 1]. The last class is the blank.
        num_steps: The number of outputs of each of the B clips.
        targets: The symbols [ΣC], at least one per clip.
    """
    device = log_probs.device
    tokens = targets.padded()  # [B, C]
    emitted = log_probs.gather(2, tokens[None].expand(len(log_probs), -1, -1))
    blanks = log_probs[:, :, -1:]
    may_follow = torch.cat([torch.zeros_like(tokens[:, :1], dtype=torch.bool), tokens[:, 1:] != tokens[:, :-1]], dim=1)
    never = log_probs.new_full((len(tokens), 1), _NEVER)
    # Before the first output, every path is at the first blank.
    at_blank = torch.cat([torch.zeros_like(never), never.expand(-1, tokens.shape[1])], dim=1)  # [B, C + 1]
    at_token = never.expand(-1, tokens.shape[1])  # [B, C]
    num_outputs = torch.tensor(num_steps, device=device)[:, None]
    for step in range(len(log_probs)):
        before = torch.cat([never, at_token], dim=1)
        skipped = torch.where(may_follow, before[:, :-1], never)
        new_token = torch.logaddexp(torch.logaddexp(at_token, at_blank[:, :-1]), skipped) + emitted[step]
        new_blank = torch.logaddexp(at_blank, before) + blanks[step]
        runs = step < num_outputs
        at_token, at_blank = torch.where(runs, new_token, at_token), torch.where(runs, new_blank, at_blank)
    last = torch.tensor(targets.lengths, device=device)[:, None]
    return -torch.logaddexp(at_blank.gather(1, last), at_token.gather(1, last - 1)).sum()
