"""Access to the tensors of the LLM in Megatron's memory by the names that Hugging Face uses.

A tensor-parallel shard of a parameter is a sequence of rectangles of Hugging Face tensors
(`model.llm.names.local_pieces`). The distributed optimizer assigns each data-parallel rank a flat range of the shard.
The rank holds the fp32 weights and Adam's moments of this range, which also consists of rectangles. Rows that pad the
vocabulary belong to no Hugging Face tensor. They are zero, remain zero, and are neither saved nor loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from model.llm.mixture import SCORE_BIAS
from model.llm.names import tp_dim
from trainer.checkpoint import adam
from trainer.checkpoint.layout import PARAM, Shard
from trainer.checkpoint.rect import Rect, matrix_of, rects_of_range
from trainer.parallel.cpu import megatron_calls

if TYPE_CHECKING:
    from trainer.engine.llm import LLMEngine

PREFIX = "llm."


def shards(engine: LLMEngine) -> list[Shard]:
    """Return all shards that this rank holds, as views of the engine's memory.

    After writing to the views, every rank must call `refresh`. The views are cached, because an LLM with many experts
    has tens of thousands of tensors. A shard whose memory and number of updates are unchanged is the same object as in
    the last call.
    """
    cache: dict[str, _Cut] = engine.saved_views
    tied = engine.hf_config.tie_word_embeddings
    ranges = {id(p): (optimizer, main, start) for optimizer, p, main, start in _ranges(engine)}
    found: list[Shard] = []
    for name, parameter in engine.parameters():
        if id(parameter) in ranges:
            optimizer, main, start = ranges[id(parameter)]
            flats = {PARAM: main, **adam.moments(optimizer, main)}
            step: int | None = adam.num_updates(optimizer, main)
        elif engine.settings[id(parameter)].frozen:
            flats, start, step = {PARAM: parameter}, 0, None
        else:
            continue
        addresses = tuple(flat.data_ptr() for flat in flats.values())
        known = cache.get(name)
        if known is None or known.addresses != addresses:
            # Norms are held by every tensor-parallel rank, and tied embeddings by the first and the last stage.
            is_whole = tp_dim(name) is None
            saved_here = not (is_whole and engine.split(name)[0]) and not (tied and name == "output_layer.weight")
            if step is None:
                saved_here = saved_here and engine.copy_index(name) == 0
            views = {kind: flat.data.view(-1) for kind, flat in flats.items()}
            cut = list(_shards_of(engine, name, parameter, start, views, step, saved_here))
            if name.endswith(SCORE_BIAS):  # This bias has no gradient, but every step changes it.
                cut = [replace(shard, frozen=False) for shard in cut]
            known = _Cut(addresses, cut)
            cache[name] = known
        elif known.shards and known.shards[0].step != step:
            known.shards = [shard.changed(shard.values, step) for shard in known.shards]
        found += known.shards
    return found


@dataclass
class _Cut:
    """A Megatron parameter, cut at the boundaries of Hugging Face tensors."""

    addresses: tuple[int, ...]
    """The addresses of this rank's part of the parameter and of its moments."""
    shards: list[Shard]


def set_steps(engine: LLMEngine, steps: dict[str, int]) -> None:
    """Set the number of updates of every trainable parameter."""
    names = {id(p): name for name, p in engine.parameters()}
    for optimizer, parameter, main, _ in _ranges(engine):
        adam.set_num_updates(optimizer, main, steps[engine.hf_name(names[id(parameter)])])


def reset_moments(engine: LLMEngine) -> None:
    """Set Adam's moments and the number of updates of every trainable parameter to zero."""
    for optimizer, _, main, _ in _ranges(engine):
        adam.reset(optimizer, main)


def refresh(engine: LLMEngine) -> None:
    """Copy the fp32 weights to the weights that the forward pass reads.

    Collective: every rank of the data-parallel group must call it.
    """
    if engine.optimizer is None:
        return
    with megatron_calls():
        for optimizer in engine.optimizer.chained_optimizers:
            optimizer._copy_main_params_to_model_params()
        for model in engine.models:
            model.start_param_sync(force_sync=True)


def tensor_names(engine: LLMEngine) -> set[str]:
    """Return the names of all tensors of the LLM. The result is the same on every rank."""
    return {PREFIX + name for name in engine.shapes}


def _ranges(engine: LLMEngine) -> Iterator[tuple[Any, nn.Parameter, Tensor, int]]:
    """Yield the optimizer, the model parameter, this rank's fp32 part of the parameter, and the offset of this part.

    The offset is the index of the part's first element in the flattened parameter.
    """
    if engine.optimizer is None:
        return
    for optimizer in engine.optimizer.chained_optimizers:
        if optimizer.is_stub_optimizer:
            continue
        for parameter, (group, place) in optimizer.model_param_group_index_map.items():
            main = optimizer.optimizer.param_groups[group]["params"][place]
            span = optimizer._get_model_param_range_map(parameter)["param"]
            assert main.numel() == span.size, (main.shape, str(span))
            yield optimizer.optimizer, parameter, main, span.start


def _shards_of(
    engine: LLMEngine,
    name: str,
    parameter: nn.Parameter,
    start: int,
    flats: dict[str, Tensor],
    step: int | None,
    saved_here: bool,
) -> Iterator[Shard]:
    """Cut a range of this rank's shard of a Megatron parameter at the boundaries of Hugging Face tensors.

    Args:
        engine: The LLM's engine.
        name: Megatron's name of the parameter.
        parameter: The parameter.
        start: The first element of the range in the flat parameter.
        flats: The values in the range [elements], by kind of value.
        step: The number of updates, or None if the parameter is not trained.
        saved_here: Whether this rank saves the range.
    """
    shapes = engine.shapes
    stop, base = start + flats[PARAM].numel(), 0
    for piece in engine.pieces(name):
        if piece.hf_name is None:
            rows = piece.index[0]
            base += (rows.stop - rows.start) * engine.hf_config.hidden_size
            continue
        shape = shapes[piece.hf_name]
        box = rect_of(piece.index, matrix_of(shape))
        low, high = max(start - base, 0), min(stop - base, box.numel)
        if low < high:
            for offset, rect in rects_of_range(box, low, high):
                at = base + low + offset - start
                values = {kind: flat[at : at + rect.numel].view(rect.rows, rect.cols) for kind, flat in flats.items()}
                yield Shard(PREFIX + piece.hf_name, shape, rect, values, step, saved_here, frozen=step is None)
        base += box.numel
    assert base == parameter.numel(), (name, base, parameter.shape)


def rect_of(index: tuple[slice, ...], whole: Rect) -> Rect:
    """Return the rectangle that slices of the first two dimensions select from a tensor's matrix."""
    row, row_stop, _ = index[0].indices(whole.rows)
    col, col_stop, _ = (index[1] if len(index) > 1 else slice(None)).indices(whole.cols)
    return Rect(row, col, row_stop - row, col_stop - col)
