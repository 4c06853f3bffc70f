"""Tensors that stack the weights or biases of a projection for all experts of a layer, as in transformers.

In training checkpoints, each projection of an expert is a separate matrix [outputs, inputs]. GPT-OSS is published with
the tensors of transformers' `GptOssExperts`: matrices are transposed, and the columns of gate and up alternate. In
transformers, the models of the other families also have stacked parameters, but their published checkpoints contain
separate matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from model.llm.families import family_of, mixture_of, modules_of
from model.llm.names import Index
from model.llm.weights import WeightSource


@dataclass(frozen=True)
class Part:
    """The part of a published tensor that corresponds to one tensor of an expert."""

    name: str
    """The name of the expert's tensor."""
    expert: int
    """The index of the expert in the first dimension of the published tensor."""
    columns: slice
    """The columns of this part in the last dimension of the published tensor."""
    transposed: bool
    """True if the expert's tensor is the transpose of this part."""

    def of(self, stacked: Tensor) -> Tensor:
        """Return a view of the expert's tensor within the published tensor."""
        return self.of_expert(stacked[self.expert])

    def of_expert(self, published: Tensor) -> Tensor:
        """Return a view of the expert's tensor, given the slice of the published tensor for this expert."""
        part = published[..., self.columns]
        return part.T if self.transposed else part

    def put(self, values: Tensor, whole: Tensor) -> None:
        """Copy the values of the expert's tensor, in any shape, into the published tensor."""
        own = self.of(whole)
        own.copy_(values.view(own.shape))

    def of_row(self, row: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the expert's tensor, given the slice of the published tensor for this expert.

        Args:
            row: The slice, flattened to one dimension.
            shape: The shape of the expert's tensor.
        """
        return self.of_expert(row.view(shape[1], -1) if self.transposed else row)


@dataclass(frozen=True)
class Stacked:
    """A published tensor that contains tensors of all experts of a layer."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def stacked_tensors(hf_config: PretrainedConfig) -> dict[str, Stacked]:
    """Return the published tensors that contain tensors of several experts, by name.

    For most families, there are none.
    """
    mixture = mixture_of(hf_config)
    if mixture is None or not family_of(hf_config).stacks_experts:
        return {}
    modules, hidden, width, count = modules_of(hf_config), hf_config.hidden_size, mixture.width, len(mixture.experts)
    whole, found = slice(None), dict[str, Stacked]()
    sides = {
        "gate_up_proj": (hidden, 2 * width, {"expert_gate": slice(0, None, 2), "expert_up": slice(1, None, 2)}),
        "down_proj": (width, hidden, {"expert_down": whole}),
    }
    for n in mixture.layers:
        prefix = modules["layer"].format(n=n)
        root = f"{prefix}.{modules['expert_gate'].partition('.{e}')[0]}"
        for name, (rows, columns, roles) in sides.items():
            for kind in ("weight", "bias"):
                parts = tuple(
                    Part(f"{prefix}.{modules[role].format(e=expert)}.{kind}", e, own, kind == "weight")
                    for e, expert in enumerate(mixture.experts)
                    for role, own in roles.items()
                )
                shape = (count, rows, columns) if kind == "weight" else (count, columns)
                found[f"{root}.{name}{'_bias' if kind == 'bias' else ''}"] = Stacked(shape, parts)
    return found


@dataclass(frozen=True)
class FusedProjection:
    """A parameter in transformers that contains one projection, or both gate and up, for all experts of a layer."""

    num_experts: int
    num_outputs: int
    """The number of outputs per expert. If the parameter contains both gate and up, the outputs of both are counted."""
    parts: dict[str, tuple[int, slice]]
    """For each projection of an expert, by its name in checkpoints: the index of the expert, and the slice of the
    parameter's outputs that belongs to the projection."""


EXPERTS_MODULE = "mlp.experts"
"""The name of the module that holds a layer's experts in transformers, which all families with experts share."""


def fused_projections(hf_config: PretrainedConfig) -> dict[str, FusedProjection]:
    """Return the parameters of an LLM in transformers that contain projections of experts, by name.

    They are in layer order. The result is empty for an LLM without experts.
    """
    mixture = mixture_of(hf_config)
    if mixture is None:
        return {}
    modules, width = modules_of(hf_config), mixture.width
    both = (
        (slice(0, None, 2), slice(1, None, 2))
        if family_of(hf_config).stacks_experts
        else (slice(width), slice(width, None))
    )
    sides = {
        "gate_up_proj": (2 * width, {"expert_gate": both[0], "expert_up": both[1]}),
        "down_proj": (hf_config.hidden_size, {"expert_down": slice(None)}),
    }
    found = {}
    for n in mixture.layers:
        prefix = modules["layer"].format(n=n)
        for name, (num_outputs, roles) in sides.items():
            parts = {
                f"{prefix}.{modules[role].format(e=expert)}": (e, outputs)
                for e, expert in enumerate(mixture.experts)
                for role, outputs in roles.items()
            }
            found[f"{prefix}.{EXPERTS_MODULE}.{name}"] = FusedProjection(len(mixture.experts), num_outputs, parts)
    return found


class StackedSource:
    """A `WeightSource` that presents the stacked experts of an LLM under the names of separate experts.

    Args:
        published: The published weights.
        hf_config: The LLM.
    """

    def __init__(self, published: WeightSource, hf_config: PretrainedConfig) -> None:
        self._published = published
        tensors = stacked_tensors(hf_config)
        self._parts = {part.name: (name, part) for name, stacked in tensors.items() for part in stacked.parts}
        self._wanted = {name: stacked.shape for name, stacked in tensors.items()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Implement `WeightSource`. The result is None if the published tensor does not have the expected shape."""
        if name not in self._parts:
            return self._published.shape(name)
        stacked, part = self._parts[name]
        if self._published.shape(stacked) != self._wanted[stacked]:
            return None
        *rows, columns = self._wanted[stacked][1:]
        size = len(range(columns)[part.columns])
        return (size, *rows)

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`."""
        if name not in self._parts:
            return self._published.read(name, index)
        stacked, part = self._parts[name]
        whole = (slice(None),) * (len(self._wanted[stacked]) - 1)
        own = self._published.read(stacked, (slice(part.expert, part.expert + 1), *whole))[0]
        return part.of_expert(own)[index]

    def where(self, name: str) -> str:
        """Implement `WeightSource`."""
        stacked, _ = self._parts.get(name, (name, None))
        return self._published.where(stacked)
