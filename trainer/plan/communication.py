"""The number of bytes that a rank sends in each kind of collective of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.schema import Recipe
from trainer.engine.placement import place
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.ranks import DTYPES
from trainer.plan.sizes import Size, SizedModel
from trainer.plan.states import FP32_BYTES
from trainer.plan.workload import EncoderWork


@dataclass(frozen=True)
class Traffic:
    """One kind of collective, summed over a step."""

    name: str
    ranks: int
    """The number of ranks in each of its process groups."""
    bytes: float
    """The bytes that the busiest rank sends in a step."""
    within_node: bool
    """True if all ranks of a group are on one node."""


def traffic(
    recipe: Recipe,
    model: SizedModel,
    sizes: dict[str, Size],
    topology: Topology,
    work: Sequence[EncoderWork],
    packs: PackPlan,
    per_node: int,
) -> list[Traffic]:
    """Return the traffic of a step, one entry per kind of collective that sends anything.

    Each rank in a ring of n ranks sends (n - 1)/n of the gathered bytes (Thakur et al. 2005, Int. J. High Perform.
    Comput. 19). Sequence parallelism gathers the hidden states twice and scatters them twice, per layer and pass
    (Korthikanti et al. 2022, arXiv 2205.05198). Recomputing a layer counts as one more pass.

    Args:
        recipe: the recipe of the run.
        model: the model that the recipe describes.
        sizes: parameter counts by parameter name, see `parameter_sizes`.
        topology: the layout of the ranks.
        work: the encoders' work, see `encoder_work`.
        packs: the LLM's packs.
        per_node: the number of ranks per node.
    """
    train, config = recipe.train, model.llm
    size = DTYPES[train.precision].itemsize
    tp, pp, dp, world = topology.tp, topology.pp, topology.dp, topology.world
    hidden = packs.pack_tokens * config.hidden_size * size
    layers, microbatches = config.num_hidden_layers // pp, packs.num_microbatches
    passes = 3 if train.recompute_llm else 2
    stage = sum(s.total for n, s in sizes.items() if n.startswith("llm.model.layers.")) / pp / tp
    ends = sum(s.total for n, s in sizes.items() if n in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"))
    stage += ends / tp / (1 if pp == 1 else 2)
    llm_learns = any(s.learned for n, s in sizes.items() if n.startswith("llm."))
    experts = [p for p in (_held(sizes, place(model.config, topology.ep).held_by(r)) for r in range(topology.ep))]
    expert, shared = max(experts, key=lambda s: s.total), _shared(sizes)
    calls = {one.names == _expert_names(model): _most_calls(one) for one in work}
    shared_calls, expert_calls = calls.get(False, 1), calls.get(True, 0)
    expert_ring, ring = _ring(world // topology.ep), _ring(world)
    found = [
        Traffic("LLM, sequence parallel", tp, layers * microbatches * passes * 4 * hidden * _ring(tp), tp <= per_node),
        Traffic(
            "LLM, between stages", 2 if pp > 1 else 1, 2 * microbatches * hidden / tp * (pp > 1), world <= per_node
        ),
        Traffic(
            "LLM, gradients and weights over replicas",
            dp,
            stage * (FP32_BYTES + size) * _ring(dp) if llm_learns else 0.0,
            world <= per_node,
        ),
        # Weights are gathered in every call of an encoder, both forward and backward.
        Traffic(
            "ZeRO-3, weights",
            world,
            2 * size * (shared.total * ring * shared_calls + expert.total * expert_ring * expert_calls),
            world <= per_node,
        ),
        Traffic(
            "ZeRO-3, gradients",
            world,
            FP32_BYTES * (shared.learned * ring * shared_calls + expert.learned * expert_ring * expert_calls),
            world <= per_node,
        ),
        Traffic("clips and features", world, _clips(model, work, size) / world, world <= per_node),
        Traffic(
            "audio embeddings and tokens",
            world,
            2 * int(packs.num_tokens.sum()) * config.hidden_size * size / world,
            world <= per_node,
        ),
    ]
    return [t for t in found if t.bytes]


def _expert_names(model: SizedModel) -> tuple[str, ...]:
    return tuple(e.name for e in model.config.experts)


def _most_calls(work: EncoderWork) -> int:
    """Return the most calls of any encoder on any rank; all ranks that hold an encoder call it equally often."""
    return max(len(calls) for rank in work.calls for calls in rank)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _clips(model: SizedModel, work: Sequence[EncoderWork], size: int) -> float:
    """Return the bytes of clips and features that all ranks exchange in a step.

    Waveforms travel in fp32 to the encoder ranks. Features return, and their gradients travel back once more.
    """
    total = 0.0
    for one in work:
        width = model.config.expert_dim if one.names == _expert_names(model) else _primary_dim(model)
        total += one.moved_samples * FP32_BYTES + 2 * one.moved_frames * width * size
    return total


def _primary_dim(model: SizedModel) -> int:
    from model.encoders.registry import encoder_dim

    assert model.config.primary is not None
    return encoder_dim(model.config.primary)


def _held(sizes: dict[str, Size], names: Sequence[str]) -> Size:
    return sum((s for n, s in sizes.items() if n.startswith("audio.experts.") and n.split(".")[2] in names), Size())


def _shared(sizes: dict[str, Size]) -> Size:
    return sum((s for n, s in sizes.items() if n.startswith("audio.") and n.split(".")[1] != "experts"), Size())
