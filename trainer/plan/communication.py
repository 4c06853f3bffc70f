"""The number of bytes that a rank sends in each kind of collective of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from model.llm.names import head_dim
from model.llm.stages import Recompute, stage_chunks
from trainer.config.schema import Recipe
from trainer.engine.ds_config import BUCKET_ELEMENTS
from trainer.engine.placement import place
from trainer.parallel.packs import PackPlan
from trainer.parallel.topology import Topology
from trainer.plan.accelerator import Accelerator
from trainer.plan.experts import expert_parameters, expert_plan
from trainer.plan.mechanisms import AS_BUILT, Mechanisms
from trainer.plan.ranks import DTYPES
from trainer.plan.sizes import PartSizes, Size, SizedModel
from trainer.plan.states import FP32_BYTES
from trainer.plan.workload import EncoderWork

CONTEXT = "LLM, keys and values over context"
"""The name of the traffic between context-parallel ranks."""
ALL_TO_ALL = "LLM, tokens to experts and back"
"""The name of the traffic between the ranks over which FFN experts are spread."""
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
"""The size of an accumulated gradient of the LLM in bytes, by `parallel.grad_reduce_dtype`."""


@dataclass(frozen=True)
class Traffic:
    """One kind of collective, summed over a step."""

    name: str
    """The name of the collective in the output of the plan."""
    ranks: int
    """The number of ranks in each of its process groups."""
    bytes: float
    """The number of bytes that the busiest rank sends in a step."""
    within_node: bool
    """True if all ranks of a group are on one node."""
    members: int = 1
    """The number of a group's ranks on one node. A group can use one network port of the node for each of them."""
    calls: int = 1
    """The number of collectives in a step."""
    ring: bool = True
    """True if the bytes are sent around a ring; False if each message takes one hop."""

    def seconds(self, accelerator: Accelerator) -> float:
        """Return the duration of these collectives in seconds if nothing overlaps with them.

        NCCL chooses the faster of two protocols. The first has full bandwidth. The second has a fifth of the latency
        and a quarter of the bandwidth, so that it is faster for small messages.
        """
        ports = accelerator.network_gb_s * self.members
        rate = accelerator.node_gb_s if self.within_node else min(accelerator.node_gb_s, ports)
        moving = self.bytes / (rate * 1e9 * accelerator.link_efficiency)
        hops = self.ranks - 1 if self.ring else 1
        between = 0 if self.within_node else min(hops, -(-self.ranks // self.members))
        waiting = (hops - between) * accelerator.node_latency_us + between * accelerator.network_latency_us
        waiting *= self.calls * 1e-6
        return min(moving + waiting, 4 * moving + waiting / 5)


def traffic(
    recipe: Recipe,
    model: SizedModel,
    parts: PartSizes,
    topology: Topology,
    work: Sequence[EncoderWork],
    packs: PackPlan,
    per_node: int,
    mechanisms: Mechanisms = AS_BUILT,
) -> list[Traffic]:
    """Return the traffic of a step. Kinds of collectives that send nothing are omitted.

    Each rank in a ring of n ranks sends (n - 1)/n of the gathered bytes (Thakur et al. 2005, Int. J. High Perform.
    Comput. Appl. 19).

    Args:
        recipe: The recipe of the run.
        model: The model that the recipe describes.
        parts: The sizes of the model's parts.
        topology: The layout of the ranks.
        work: The encoders' work; see `encoder_work`.
        packs: The LLM's packs.
        per_node: The number of ranks per node.
        mechanisms: Assumptions that differ from the trainer.
    """
    llm = _llm_traffic(recipe, model, parts, topology, packs, per_node, mechanisms)
    zero = _zero_traffic(recipe, model, parts, topology, work, per_node)
    size, world = DTYPES[recipe.train.precision].itemsize, topology.world
    within = world <= per_node
    tokens = 2 * int(packs.num_tokens.sum()) * model.llm.hidden_size * size / world
    moved = [
        Traffic("clips and features", world, _clips(model, work, size) / world, within, 1, 6, ring=False),
        Traffic("audio embeddings and tokens", world, tokens, within, 1, 3, ring=False),
    ]
    return [t for t in (*llm, *zero, *moved) if t.bytes]


def tensor_units(full_recompute: bool, sequence_parallel: bool = True) -> int:
    """Return how many times the hidden states of a micro-batch pass through a layer's tensor-parallel collectives.

    With sequence parallelism, the forward pass and the backward pass each have two all-gathers and two reduce-scatters
    (Korthikanti et al. 2022, arXiv 2205.05198). The backward pass gathers both inputs once more for the gradients of
    the weights, because a rank keeps only its own part of the inputs. Without sequence parallelism, each pass has two
    all-reduces, each of which counts twice.
    """
    return 4 + 4 + (2 if sequence_parallel else 0) + (4 if full_recompute else 0)


def _llm_traffic(
    recipe: Recipe,
    model: SizedModel,
    parts: PartSizes,
    topology: Topology,
    packs: PackPlan,
    per_node: int,
    mechanisms: Mechanisms,
) -> list[Traffic]:
    train, config = recipe.train, model.llm
    size = DTYPES[train.precision].itemsize
    tp, pp, world = topology.tp, topology.pp, topology.world
    # The packs take the trainer's context parallelism into account, but not the context parallelism of `mechanisms`.
    microbatches = packs.num_microbatches * mechanisms.context
    hidden = packs.pack_tokens / mechanisms.context / topology.cp * config.hidden_size * size
    layers = max(sum(stage_chunks(config.num_hidden_layers, pp, topology.vp, s)) for s in range(pp))
    sent = expert_plan(config, topology, packs.pack_tokens, microbatches, size, train.recompute_llm == "full")
    units = tensor_units(train.recompute_llm == "full", mechanisms.sequence_parallel)
    units += 2 if mechanisms.mlp == "recomputed" else 0
    sends = 2 * microbatches * topology.vp * (pp > 1)
    passes = context_gathers(train.recompute_llm)
    return [
        Traffic(
            "LLM, tensor parallel",
            tp,
            layers * microbatches * units * hidden * _ring(tp),
            tp <= per_node,
            min(tp, per_node),
            layers * microbatches * units,
        ),
        Traffic(
            ALL_TO_ALL,
            topology.ffn_ep,
            0.0 if sent is None else sent.all_to_all_bytes,
            topology.ffn_ep * topology.expert_tp <= per_node,
            min(topology.ffn_ep, per_node),
            layers * microbatches * (6 if train.recompute_llm == "full" else 4),
            ring=False,
        ),
        Traffic(
            CONTEXT,
            topology.cp,
            layers * microbatches * _keys(config, topology, packs.pack_tokens, size, passes),
            tp * topology.cp <= per_node,
            min(topology.cp, max(1, per_node // tp)),
            layers * microbatches * (passes + 1),
        ),
        Traffic(
            "LLM, between stages",
            2 if pp > 1 else 1,
            sends * hidden / tp,
            world <= per_node,
            1,
            sends,
            ring=False,
        ),
        *_replica_traffic(recipe, model, parts, topology, layers, per_node, mechanisms),
    ]


def _replica_traffic(
    recipe: Recipe,
    model: SizedModel,
    parts: PartSizes,
    topology: Topology,
    layers: int,
    per_node: int,
    mechanisms: Mechanisms,
) -> list[Traffic]:
    """Return the traffic between ranks that hold copies of the same weights of the LLM.

    `layers` is the number of layers of the stage that has the most.
    """
    size = DTYPES[recipe.train.precision].itemsize
    tp, pp, dp = topology.tp, topology.pp, topology.without_context.dp
    experts = expert_parameters(model.llm)
    stage = (parts.layers.total - experts) / pp / tp + parts.ends.total / tp / (1 if pp == 1 else 2)
    held = experts / pp / topology.ffn_ep / topology.expert_tp
    copies = max(1, tp * dp // (topology.ffn_ep * topology.expert_tp))
    ring = stage * _ring(dp) + held * _ring(copies)
    in_fp8 = parts.layers.total / pp / tp * _ring(dp) if mechanisms.fp8_weights else 0.0
    learned = parts.llm.learned / parts.llm.total  # only trained parameters are exchanged
    replicas_within = tp * dp <= per_node
    members = dp if replicas_within else min(dp, max(1, per_node // tp))
    gathers = 2 if mechanisms.sharded_weights else 1
    calls = layers * 2 if mechanisms.sharded_weights else 1
    return [
        Traffic(
            "LLM, gradients over replicas",
            dp,
            ring * GRADIENT_BYTES[recipe.parallel.grad_reduce_dtype] * learned,
            replicas_within,
            members,
            max(1, calls // 2),
        ),
        Traffic(
            "LLM, weights over replicas",
            dp,
            (ring - in_fp8 + in_fp8 / size) * size * gathers * learned,
            replicas_within,
            members,
            calls,
        ),
    ]


def context_gathers(recompute: Recompute) -> int:
    """Return how often a layer gathers keys and values over context-parallel ranks for one micro-batch.

    It gathers them in the forward pass, in its recomputation, and in the backward pass (`model.llm.context`).
    """
    return 2 if recompute in ("none", "pointwise") else 3


def _keys(config: PretrainedConfig, topology: Topology, pack_tokens: int, size: int, gathers: int) -> float:
    """Return the bytes of keys and values that a rank sends to context-parallel ranks in one layer for one pack.

    The gradients of keys and values, which are summed in fp32, are included.
    """
    values = 2 * pack_tokens * config.num_key_value_heads / topology.tp * head_dim(config)
    return values * (gathers * size + FP32_BYTES) * _ring(topology.cp)


def _zero_traffic(
    recipe: Recipe,
    model: SizedModel,
    parts: PartSizes,
    topology: Topology,
    work: Sequence[EncoderWork],
    per_node: int,
) -> list[Traffic]:
    """Return ZeRO-3's traffic.

    With `train.gather_audio_weights=per_update`, weights are gathered and gradients are reduced once per update.
    Otherwise, weights are gathered in the forward and the backward pass of every encoder call. If several blocks of
    ranks hold copies of the partitions, each rank then sums its gradients with those of its copies in an all-reduce,
    which sends as many bytes as a reduce-scatter and an all-gather together.
    """
    per_update = recipe.train.gather_audio_weights == "per_update"
    size, ep, shard = DTYPES[recipe.train.precision].itemsize, topology.ep, topology.shard_ranks
    copies = topology.num_shard_copies
    within = topology.world <= per_node or (copies > 1 and per_node % shard == 0)
    placement = place(model.config, ep)
    held = [sum((parts.experts.get(n, Size()) for n in placement.held_by(r)), Size()) for r in range(ep)]
    expert, shared = max(held, key=lambda size: size.total), parts.shared
    calls = {one.names == _expert_names(model): _most_calls(one) for one in work}
    found = []
    for name, part, step, times in (
        ("ZeRO-3", shared, 1, calls.get(False, 1)),
        ("ZeRO-3 of encoder experts", expert, ep, calls.get(True, 0)),
    ):
        sharers = shard // step
        members = sharers if within else max(1, min(sharers, per_node // step))
        weights = size * part.total * _ring(sharers)
        gradients = FP32_BYTES * part.learned * _ring(sharers)
        gathers, reductions = -(-part.total // BUCKET_ELEMENTS), -(-part.learned // BUCKET_ELEMENTS)
        if not per_update:
            weights, gradients = 2 * times * weights, times * gradients
            gathers, reductions = 2 * times * max(1, part.large), times
        found += [
            Traffic(f"{name}, weights", sharers, weights, within, members, gathers),
            Traffic(f"{name}, gradients", sharers, gradients, within, members, reductions),
            Traffic(
                f"{name} over copies, gradients",
                copies,
                2 * FP32_BYTES * part.learned / sharers * _ring(copies),
                topology.world <= per_node,
                copies if topology.world <= per_node else max(1, min(copies, per_node // shard)),
                2 * reductions,
            ),
        ]
    return found


def _expert_names(model: SizedModel) -> tuple[str, ...]:
    return tuple(e.name for e in model.config.experts)


def _most_calls(work: EncoderWork) -> int:
    """Return the largest number of calls of any encoder. All ranks that hold an encoder call it equally often."""
    return max(len(calls) for rank in work.calls for calls in rank)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _clips(model: SizedModel, work: Sequence[EncoderWork], size: int) -> float:
    """Return the bytes of clips and features that all ranks exchange in a step.

    Waveforms are sent to the encoder ranks in fp32, features are sent back, and the gradients of the features are sent
    to the encoder ranks.
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
