"""Initialize a new run with the weights of another run, of one of its checkpoints, or of an export.

The new run takes the weights, and Adam's moments if `checkpoint.start_optimizer` is true. The schedule, the random
generators and the data start from the beginning. Some parts of the model may be new: encoders, the loss heads such
as CTC, low-rank adapters, FFN experts in the LLM's layers, and additional rows of the LLM's vocabulary. New parts keep
their initial or pre-trained weights. The router's entries for an added encoder are the mean of its entries for the
other encoders. They take effect gradually (`model.router.ENTRY_OFFSET`), so that the loss of the first step equals that
of the original model. If the original model has no encoder experts, the router is new as well. With `model.router.join:
add`, the loss of the first step is the same in this case, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from model.config import LoraConfig, ModelConfig, is_factor
from model.errors import UserError
from model.llm.mixture import SCORE_BIAS
from model.lora import Adapters
from trainer.checkpoint.layout import PARAM, Shard
from trainer.checkpoint.origin import Origin
from trainer.checkpoint.rect import Rect, matrix_of

_ENTERING = "audio.router.steps_to_enter"
_BY_EXPERT = (
    "audio.router.independent.logits",
    "audio.router.dependent.weight",
    "audio.router.dependent.bias",
    _ENTERING,
)
"""Tensors with one row per encoder expert."""
_ROUTING = ("audio.router.", "audio.stream_projection.")
"""The prefixes of the tensors that a model has if and only if it has encoder experts."""
_HEAD = re.compile(r"audio\.(\w+)_head\.")
"""The pattern of tensor names in the head of a loss."""
_HEAD_KEYS = "data.tokenizer, model.adapter, model.ctc_vocabulary, model.ctc_pieces or model.ctc_outputs"
"""The recipe keys that determine the size of a head."""
_FFN_EXPERT = re.compile(r"llm\..+\.experts\.([^.]+)\.")
"""The pattern of FFN expert tensor names. A new expert starts with the weights that `model.llm.experts` names."""
_BY_TOKEN = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")
"""Tensors with one row per id of the LLM's vocabulary."""
_KEYS = (
    ("audio.primary.", "model.primary"),
    ("audio.experts.", "model.experts"),
    ("audio.router.", "model.router"),
    ("audio.stream_projection.", "model.router.join"),
    ("audio.adapter.", "model.adapter"),
    ("audio.projector.", "model.adapter or model.llm"),
    ("audio.feature_norm.", "model.adapter.normalize"),
    ("audio.output_norm.", "model.adapter.normalize"),
    ("audio.ctc_feedback.", "model.ctc_feedback, model.ctc_vocabulary, model.ctc_pieces or model.ctc_outputs"),
    ("llm.", "model.llm"),
)
"""Pairs of a prefix of tensor names and the recipe key that determines the tensors' size."""


@torch.no_grad()
def fill_weights(
    origin: Origin, shards: Sequence[Shard], model: ModelConfig, heartbeat: Callable[[str], None] = lambda what: None
) -> tuple[str, ...]:
    """Fill this rank's shards with the weights of `origin`.

    Args:
        origin: The weights to start from.
        shards: This rank's shards of the new run's model.
        model: The configuration of the new run's model.
        heartbeat: A function that is called with a description of each shard before it is read.

    Returns:
        Descriptions of the parts on this rank that are new and keep their initial weights.

    Raises:
        UserError: If a part of the model that must not be new is missing from `origin` or has a different size there.
    """
    before, now = origin.experts, tuple(e.name for e in model.experts)
    added = tuple(name for name in now if name not in before)
    own = tuple(f"audio.experts.{name}." for name in added)
    new = [f"encoder {name}" for name in added]
    for shard in shards:
        heartbeat(f"the read of {shard.name}")
        if shard.name.startswith(_ROUTING) and not before and origin.shape(shard.name) is None:
            new.append("the router")
        elif shard.name in _BY_EXPERT:
            rows = _rows(origin, shard, before, now, model.router.added_encoder_warmup_steps)
            whole = matrix_of(shard.shape)
            shard.values[PARAM].copy_(rows.view(whole.rows, whole.cols)[shard.rect.within(whole)])
        elif own and shard.name.startswith(own):
            continue
        elif (head := _HEAD.match(shard.name)) and origin.shape(shard.name) is None:
            new.append(f"the head of the loss {head[1]}")
        elif shard.name.endswith(SCORE_BIAS) and origin.shape(shard.name) is None:
            new.append("the biases that balance the experts of the LLM")
        elif (expert := _FFN_EXPERT.match(shard.name)) and origin.shape(shard.name) is None:
            new.append(f"expert {expert[1]} of the LLM")
        elif is_factor(shard.name) and origin.shape(shard.name) is None:
            new.append(f"adapters of {_part(shard.name)}")
        elif shard.name in _BY_TOKEN and (num_new := _num_new_rows(origin, shard)) > 0:
            _read_old_rows(origin, shard, shard.shape[0] - num_new)
            new.append(f"{num_new} rows of {shard.name.removeprefix('llm.')}")
        else:
            _check(origin, shard)
            origin.read(shard.name, shard.rect, shard.values[PARAM])
    return tuple(dict.fromkeys(new))


@torch.no_grad()
def fill_moments(origin: Origin, shards: Sequence[Shard]) -> int:
    """Fill this rank's moments with the moments in `origin`. Tensors without moments of the same shape are not changed.

    Returns:
        The number of updates that the moments have seen, which is the maximum over all tensors in `origin`.

    Raises:
        UserError: If `origin` has no moments.
    """
    learned = origin.learned()
    if not learned:
        raise UserError(
            f"checkpoint.start_optimizer = true: {origin.url}: holds no optimizer state; name a run or a "
            "checkpoint that has one, or set it to false"
        )
    for shard in shards:
        if shard.name in learned and origin.shape(shard.name) == shard.shape:
            for kind in shard.values.keys() - {PARAM}:
                origin.read_moment(shard.name, kind, shard.rect, shard.values[kind])
    return max(learned.values())


def check_adapters(origin: Origin, names: Collection[str], model: ModelConfig, lora: Sequence[LoraConfig]) -> None:
    """Check that the new model has all low-rank adapters of the origin's encoders and LLM, with the same factors.

    Args:
        origin: The weights to start from.
        names: The names of all tensors of the new model.
        model: The new model.
        lora: The section `lora` of the new run.

    Raises:
        UserError: If the new model lacks an adapter, because the adapter's training would otherwise be lost without a
            message, or if it scales an adapter by a different factor, because no tensor stores the factor.
    """
    former, own = Adapters(origin.lora), Adapters(tuple(lora))
    kept = ("llm.", "audio.primary.", *(f"audio.experts.{e.name}." for e in model.experts))
    for name in origin.names():
        if is_factor(name) and name.startswith(kept) and name not in names:
            raise UserError(
                f"checkpoint.start_from: {origin.url}: holds the adapter {name}, which the recipe's section lora does "
                "not ask for; use the section of that run, or export the run (earshot export merges adapters) and "
                "start from the export"
            )
        before, now = (adapters.of_layer(name.rpartition(".")[0]) for adapters in (former, own))
        if is_factor(name) and name in names and before and now and before.scale != now.scale:
            raise UserError(
                f"checkpoint.start_from: {origin.url}: {name} was trained with alpha / rank = {before.scale:g}, but "
                f"lora '{now.pattern}' has {now.scale:g}; set alpha to {before.scale * now.rank:g}, or export the run "
                "(earshot export merges adapters) and start from the export"
            )


def _part(name: str) -> str:
    """Return the part of the model that a tensor belongs to, such as llm or audio.experts.hubert."""
    side, part, *rest = name.split(".")
    if side == "llm":
        return side
    return f"{side}.{part}.{rest[0]}" if part == "experts" else f"{side}.{part}"


def _rows(
    origin: Origin, shard: Shard, before: Sequence[str], now: Sequence[str], added_encoder_warmup_steps: int
) -> Tensor:
    """Return a tensor with one row for each current encoder expert, based on the rows of the original experts.

    Args:
        origin: The weights to start from.
        shard: A shard of the tensor.
        before: The names of the original encoder experts.
        now: The names of the current encoder experts.
        added_encoder_warmup_steps: The value of `model.router.added_encoder_warmup_steps`.

    Returns:
        The whole tensor in fp32, [current encoder experts, …].
    """
    _check(origin, shard, (len(before), *shard.shape[1:]))
    whole = matrix_of((len(before), *shard.shape[1:]))
    old = torch.empty(whole.rows, whole.cols, dtype=origin.dtype(shard.name))
    origin.read(shard.name, whole, old)
    old = old.float()
    new = torch.full_like(old[0], float(added_encoder_warmup_steps)) if shard.name == _ENTERING else old.mean(0)
    return torch.stack([old[before.index(name)] if name in before else new for name in now])


def _num_new_rows(origin: Origin, shard: Shard) -> int:
    """Return how many more rows the model's tensor has than the origin's, or 0 if other dimensions differ."""
    shape = origin.shape(shard.name)
    return shard.shape[0] - shape[0] if shape is not None and shape[1:] == shard.shape[1:] else 0


def _read_old_rows(origin: Origin, shard: Shard, num_old: int) -> None:
    common = shard.rect.overlap(Rect(0, 0, num_old, matrix_of(shard.shape).cols))
    if common is not None:
        origin.read(shard.name, common, shard.values[PARAM][common.within(shard.rect)])


def _check(origin: Origin, shard: Shard, wanted: tuple[int, ...] | None = None) -> None:
    found, wanted = origin.shape(shard.name), wanted or shard.shape
    if found == wanted:
        return
    key = next((key for start, key in _KEYS if shard.name.startswith(start)), "model")
    key = _HEAD_KEYS if _HEAD.match(shard.name) else key
    if shard.name.startswith("audio.adapter.") and not origin.experts:
        key = "model.router.join: add, if encoders were added, or model.adapter"
    key = "lora" if is_factor(shard.name) else key
    what = f"holds no {shard.name}" if found is None else f"{shard.name} has shape {found}, but this run needs {wanted}"
    raise UserError(
        f"checkpoint.start_from: {origin.url}: {what}; set {key} as it was for these weights "
        "(only encoders, loss heads and additional rows of the LLM's vocabulary may be new)"
    )
