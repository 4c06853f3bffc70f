"""FFN experts, with the choice of experts for each token, and the layer in plain PyTorch.

A layer with experts has a router, which scores every expert for every token, and one gated feed-forward network per
expert. A token is sent to the `top_k` experts with the highest scores, and their outputs are summed with the router's
weights. `model.llm.megatron_experts` computes the same on several ranks.

Shapes: n tokens, E experts, k chosen experts per token, H hidden width, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.llm.mixture import Clamp, Mixture


@dataclass(frozen=True)
class Choice:
    """The decisions of a router for n tokens."""

    logits: Tensor
    """The scores [n, E] in fp32."""
    experts: Tensor
    """The indices [n, k] of the chosen experts, the highest score first."""
    weights: Tensor
    """The weights [n, k] of the chosen experts in fp32, with gradient."""


_CERTAIN = 1e4
"""The number that is added to the score of a forced expert. All other probabilities are then exactly 0 in fp32."""


def choose(logits: Tensor, mixture: Mixture) -> Choice:
    """Return the experts that are chosen for each token.

    Args:
        logits: The router's scores [n, E] in fp32.
        mixture: The experts.
    """
    if mixture.forced is not None:
        logits = logits + _CERTAIN * functional.one_hot(
            torch.tensor(mixture.experts.index(mixture.forced), device=logits.device), len(mixture.experts)
        )
    weights, experts = logits.softmax(-1).topk(mixture.top_k, dim=-1)
    if mixture.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Choice(logits, experts, weights)


def gate_experts(gate: Tensor, up: Tensor, clamp: Clamp | None) -> Tensor:
    """Return the input of an expert's down projection, given the outputs of its gate and up projections."""
    if clamp is None:
        return functional.silu(gate) * up
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return (up + 1) * (gate * torch.sigmoid(clamp.alpha * gate))


class MixtureLayer(nn.Module):
    """The feed-forward network of a layer with FFN experts, in a single process.

    Its parameters have the same names as in checkpoints, with one matrix per projection of an expert.

    Args:
        mixture: The experts.
        hidden_size: The hidden width H.
        router: The name of the router within this module. If it contains `{e}`, which stands for the name of the
            expert, it names the router's row for each expert.
        projections: The names of gate, up and down within this module. `{e}` stands for the name of the expert.
    """

    def __init__(self, mixture: Mixture, hidden_size: int, router: str, projections: tuple[str, str, str]) -> None:
        super().__init__()
        self.mixture, self.router_name, self.projections = mixture, router, projections
        self.observe: Callable[[Choice], None] | None = None
        """A function that is called in every forward pass with the choices for its tokens, row by row."""
        self.has_rows = "{e}" in router
        if not self.has_rows:
            _add(self, router, nn.Linear(hidden_size, len(mixture.experts), bias=mixture.biases))
        for expert in mixture.experts:
            gate, up, down = (name.format(e=expert) for name in projections)
            for name in (gate, up):
                _add(self, name, nn.Linear(hidden_size, mixture.width, bias=mixture.biases))
            _add(self, down, nn.Linear(mixture.width, hidden_size, bias=mixture.biases))
            if self.has_rows:
                _add(self, router.format(e=expert), nn.Linear(hidden_size, 1, bias=False))

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the weighted sum of the chosen experts' outputs, in the shape [..., H] of `hidden`.

        With `Mixture.returns_scores`, the weights [n, k] of the chosen experts are returned as well.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        # If all experts share one matrix, all names are equal. Otherwise, each name is that of an expert's row.
        names = dict.fromkeys(self.router_name.format(e=expert) for expert in self.mixture.experts)
        scores = torch.cat([self.get_parameter(f"{name}.weight") for name in names])
        bias = self.get_parameter(f"{self.router_name}.bias").float() if self.mixture.biases else None
        choice = choose(functional.linear(rows.float(), scores.float(), bias), self.mixture)
        if self.observe is not None:
            self.observe(choice)
        output = torch.zeros_like(rows)
        for index, expert in enumerate(self.mixture.experts):
            row, rank = (choice.experts == index).nonzero(as_tuple=True)
            gate, up, down = (self.get_submodule(name.format(e=expert)) for name in self.projections)
            own = rows[row]
            weight = choice.weights[row, rank, None].to(own.dtype)
            found = gate_experts(gate(own), up(own), self.mixture.clamp)
            found = down(found) * weight if self.mixture.biases else down(found * weight)
            output = output.index_add(0, row, found)
        output = output.view_as(hidden)
        return (output, choice.weights) if self.mixture.returns_scores else output


def place_experts(model: Any, mixture: Mixture, modules: Mapping[str, str]) -> None:
    """Replace the feed-forward networks of the layers with experts in a transformers model by `MixtureLayer`.

    Args:
        model: A transformers model with the submodules `model.layers`.
        mixture: The experts.
        modules: The names of the modules in the checkpoint, see `model.llm.families.LLAMA_MODULES`.
    """
    root, _, router = modules["router"].partition(".")
    paths = [modules[role] for role in ("expert_gate", "expert_up", "expert_down")]
    assert all(path.startswith(f"{root}.") for path in paths), paths
    gate, up, down = (path.removeprefix(f"{root}.") for path in paths)
    for number in mixture.layers:
        layer: Any = model.get_submodule(modules["layer"].format(n=number))
        like = next(layer.parameters())
        experts = MixtureLayer(mixture, model.config.hidden_size, router, (gate, up, down))
        del layer.mlp
        setattr(layer, root, experts.to(device=like.device, dtype=like.dtype))
        if root != "mlp":
            # transformers' layer calls `mlp`, but parameters must have the checkpoint's names.
            layer.__dict__["mlp"] = experts


@contextmanager
def observed(model: nn.Module) -> Iterator[list[Choice]]:
    """Collect the choices of all layers with experts during the `with` block, in the order of computation."""
    layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
    found: list[Choice] = []
    try:
        for layer in layers:
            layer.observe = found.append
        yield found
    finally:
        for layer in layers:
            layer.observe = None


def smallest_gap(choices: Sequence[Choice], top_k: int) -> float:
    """Return the smallest difference, over all tokens, between the lowest chosen and the highest unchosen score.

    If the difference is below about 1e-5, two correct computations of a model may choose different experts.

    Returns:
        The difference, or infinity if all experts are chosen or there is no token.
    """
    gaps = [choice.logits.topk(top_k + 1, -1).values for choice in choices if choice.logits.shape[-1] > top_k]
    return min((float((g[:, -2] - g[:, -1]).min()) for g in gaps if len(g)), default=float("inf"))


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a submodule at a dotted path, and create empty parent modules where they are missing."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
