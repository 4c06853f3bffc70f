"""What every rank of `earshot parity` does: the comparison of one topology with the single-process model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tools.parity_topologies import name
from trainer.parallel.topology import Topology

KINDS = ("mixed", "text_only", "rank_without_audio", "fewer_samples_than_ranks", "one_expert", "conversations")
TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One topology, and the settings with which it is compared with the single-process model."""

    topology: Topology
    num_steps: int = 0
    """The length of the loss curves; 0 for none."""
    family: str = "llama"
    """The family of the LLM."""
    kinds: Sequence[str] = KINDS
    """The kinds of batches, from `KINDS`."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file; None for `trainer.parity_cases.DS_CONFIG`."""
    pack_multiple: int | None = None
    """`train.pack_multiple_tokens`."""
    lora: bool = False
    """True to train low-rank adapters over partly frozen weights."""
    adapter: str = "convolutions"
    """`model.adapter.kind`."""
    stages: bool = False
    """True to train different parameters in each of several stages."""
    freeze: Sequence[str] = ()
    """Patterns for the names of parameters that are not trained."""
    gathering: Literal["per_update", "per_module"] = "per_update"
    """`train.gather_audio_weights`."""
    recompute_calls: bool = False
    """`train.recompute_encoder_calls`."""
    modes: Sequence[Mapping[str, Any]] = ({},)
    """The fields of each `trainer.parity.Mode` to compare. Fields that are not given have their defaults."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `measure`, which are JSON values except that sequences may be tuples."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """The comparison of one topology on one kind of batch."""

    topology: str
    """The name of the topology, followed by the mode of the LLM's engine if it is not the default mode."""
    kind: str
    """One of `KINDS`, or `curve of N steps`."""
    loss: float
    """The relative difference of the loss. For a curve, it is the largest of all steps."""
    gradient: float
    """The largest relative difference of a gradient. For a curve, it is the largest of a gradient norm."""
    worst: str
    """The parameter with the largest difference."""
    gap: float | None = None
    """The smallest difference of router scores that decided to which FFN experts a token was sent; None for an LLM
    without experts, and for a curve."""

    @property
    def passed(self) -> bool:
        """True if the differences are within the limits: 1e-5 for a batch, 1e-4 for the losses of a curve.

        NaN does not pass.
        """
        if self.kind.startswith("curve"):
            return self.loss <= CURVE_TOLERANCE
        return self.loss <= TOLERANCE and self.gradient <= TOLERANCE


def measure(topology: Mapping[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Compare the topology of this launch with the single-process model.

    Collective: every rank of the world must call it.

    Args:
        topology: The fields of the `Topology`.
        settings: The other fields of a `Comparison`.

    Returns:
        The fields of each `Row`.
    """
    from trainer.engine.imports import lean_imports

    with lean_imports():
        from trainer import parity, parity_cases
        from trainer.engine.ds_config import build_ds_config
        from trainer.parallel.groups import build_groups, connect
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    import torch.distributed as dist

    wanted = Comparison(Topology(**topology), **settings)
    rank, world, device = connect(timeout_sec=300)
    groups = build_groups(wanted.topology, rank, device, parity_cases.SEED)
    ds_config = parity_cases.DS_CONFIG
    if wanted.deepspeed:
        ds_config = build_ds_config(Path(wanted.deepspeed), precision="fp32")
    chosen = parity_cases.ALL_WEIGHTS
    if wanted.stages or wanted.lora:
        chosen = parity_cases.STAGED if wanted.stages else parity_cases.ADAPTERS
    learned = parity_cases.without(chosen, wanted.freeze)
    rows = []
    for fields in wanted.modes:
        mode = parity.Mode(**fields)
        model = parity_cases.tiny_model(mode.family or wanted.family, wanted.adapter, mode.num_layers)
        step = parity.build_step(
            model,
            groups,
            ds_config,
            max(1, wanted.num_steps),
            pack_multiple=wanted.pack_multiple,
            learned=learned,
            gathering=wanted.gathering,
            recompute_calls=wanted.recompute_calls,
            mode=mode,
        )
        oracle = parity.build_oracle(model, learned)
        label = " ".join(filter(None, (name(wanted.topology), mode.label)))
        for kind in wanted.kinds:
            with parity.favoured(step, 1 if kind == "one_expert" else None):
                found = parity.compare(step, oracle, parity_cases.make_samples(kind, world, model.adapter.rate))
            rows.append(Row(label, kind, found.loss, found.gradient, found.worst, found.gap))
        if wanted.num_steps:
            worst_loss, worst_norm = parity.loss_curves(step, oracle, wanted.num_steps)
            rows.append(Row(label, f"curve of {wanted.num_steps} steps", worst_loss, worst_norm, "gradient norm"))
        step.audio.engine.destroy()
    dist.barrier()
    dist.destroy_process_group()
    return [asdict(row) for row in rows]
