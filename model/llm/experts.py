"""FFN experts in plain PyTorch: the choice of experts for each token, and the layer.

A layer with experts has a router, which scores every expert for every token, and one gated feed-forward network per
expert. A token is sent to the `top_k` experts with the highest scores, and their outputs are summed with the router's
weights. The router may also choose null experts, which compute nothing. The choice may also depend on biases, which are
updated according to how often each expert was chosen. Shared experts process every token, and their outputs are added.
`model.llm.megatron_experts` computes the same on several ranks.

Shapes: n tokens, E experts, C = E + N choices with N null experts, k chosen experts per token, H hidden width, F width
of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.llm.jitter import TokenNoise, jittered_rows
from model.llm.mixture import SCORE_BIAS, Clamp, Mixture


@dataclass(frozen=True)
class Choice:
    """The decisions of a router for n tokens."""

    logits: Tensor
    """The scores [n, C] in fp32."""
    experts: Tensor
    """The indices [n, k] of the chosen experts, in descending order of `ranking`. Indices from E on are null experts.
    """
    weights: Tensor
    """The weights [n, k] of the chosen experts in fp32, with gradient. The weight of a null expert is 0."""
    ranking: Tensor
    """The values [n, C] in fp32 of which the k highest were chosen: the scores, or the probabilities plus the
    biases."""

    def rows(self, index: slice | Tensor) -> Choice:
        """Return the decisions for some of the tokens."""
        return Choice(self.logits[index], self.experts[index], self.weights[index], self.ranking[index])

    def counts(self) -> Tensor:
        """Return the number of tokens [C] that chose each expert, in fp64."""
        chosen = torch.zeros_like(self.logits).scatter(1, self.experts, 1.0)
        return chosen.sum(0, dtype=torch.float64)  # `bincount` would make the host wait for the device.


_CERTAIN = 1e4
"""The number that is added to the score of a forced expert. All other probabilities are then exactly 0 in fp32."""


def choose(logits: Tensor, mixture: Mixture, score_bias: Tensor | None = None) -> Choice:
    """Return the experts that are chosen for each token.

    Args:
        logits: The router's scores [n, C] in fp32.
        mixture: The experts.
        score_bias: The biases [C] in fp32 that are added to the probabilities for the choice of experts, but not for
            their weights; None for no biases. They are ignored if the choice is forced.
    """
    if mixture.forced is not None:
        score_bias = None
        logits = logits + _CERTAIN * functional.one_hot(
            torch.tensor(mixture.experts.index(mixture.forced), device=logits.device), mixture.num_choices
        )
    probabilities = logits.softmax(-1)
    if score_bias is None:
        ranking = logits.detach()
        weights, experts = probabilities.topk(mixture.top_k, dim=-1)
    else:
        ranking = probabilities.detach() + score_bias
        experts = ranking.topk(mixture.top_k, dim=-1).indices
        weights = probabilities.gather(-1, experts)
    if mixture.num_null:
        weights = weights * (experts < len(mixture.experts))
    if mixture.normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + (total == 0))  # The sum is 0 if a token chose only null experts.
    return Choice(logits, experts, weights, ranking)


@torch.no_grad()
def balance(score_bias: Tensor, counts: Tensor, rate: float) -> None:
    """Update the biases of a router after a training step (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The bias of an expert is raised by `rate` if the expert was chosen less often than the average of all choices, and
    lowered by `rate` if it was chosen more often.

    Args:
        score_bias: The biases [C] in fp32, which are changed in place.
        counts: The number of tokens [C] of the global batch that chose each expert, in fp64, so that the average is
            exact.
        rate: The amount by which a bias changes.
    """
    score_bias.add_((counts.mean() - counts).sign().to(score_bias.dtype), alpha=rate)


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
        modules: The names of the parts within this module, by the roles of `LLMFamily.modules`. `{e}` stands for the
            name of the expert.
        number: The number of the layer.
    """

    def __init__(self, mixture: Mixture, hidden_size: int, modules: Mapping[str, str], number: int) -> None:
        super().__init__()
        self.mixture, self.names, self.number = mixture, dict(modules), number
        self.observe: Callable[[Choice], None] | None = None
        """A function that is called in every forward pass with the choices for the tokens of that pass, row by row."""
        self.noise: TokenNoise | None = None
        """The numbers that identify the tokens of the next forward pass, row by row; None without jitter."""
        self.routers = [path for path, _ in mixture.router_parts(modules["router"])]
        """The names of the router's parts within this module. Their outputs are concatenated."""
        for path, num_rows in mixture.router_parts(modules["router"]):
            part = nn.Linear(hidden_size, num_rows, bias=mixture.biases)
            if mixture.bias_rate:
                part.register_parameter(SCORE_BIAS, nn.Parameter(torch.zeros(num_rows), requires_grad=False))
            _add(self, path, part)
        kinds = (("expert", mixture.experts, mixture.width), ("shared", mixture.shared, mixture.shared_width))
        for kind, experts, width in kinds:
            for expert in experts:
                gate, up, down = self._projections(kind, expert)
                for name in (gate, up):
                    _add(self, name, nn.Linear(hidden_size, width, bias=mixture.biases))
                _add(self, down, nn.Linear(width, hidden_size, bias=mixture.biases))
        for expert in mixture.shared if mixture.shared_gate else ():
            _add(self, modules["shared_score"].format(e=expert), nn.Linear(hidden_size, 1, bias=False))

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the weighted sum of the chosen experts' outputs, in the shape [..., H] of `hidden`.

        With `Mixture.returns_scores`, the weights [n, k] of the chosen experts are returned as well.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores, bias = self._router_values("weight"), self._router_values("bias") if self.mixture.biases else None
        score_bias = self._router_values(SCORE_BIAS) if self.mixture.bias_rate else None
        read = rows.float()
        if self.noise is not None:
            read = jittered_rows(read, self.noise, self.number, self.mixture.jitter)
        choice = choose(functional.linear(read, scores, bias), self.mixture, score_bias)
        if self.observe is not None:
            self.observe(choice)
        output = torch.zeros_like(rows)
        for index, expert in enumerate(self.mixture.experts):
            row, rank = (choice.experts == index).nonzero(as_tuple=True)
            gate, up, down = map(self.get_submodule, self._projections("expert", expert))
            own = rows[row]
            weight = choice.weights[row, rank, None].to(own.dtype)
            found = gate_experts(gate(own), up(own), self.mixture.clamp)
            found = down(found) * weight if self.mixture.biases else down(found * weight)
            output = output.index_add(0, row, found)
        for expert in self.mixture.shared:
            gate, up, down = map(self.get_submodule, self._projections("shared", expert))
            found = down(functional.silu(gate(rows)) * up(rows))
            if self.mixture.shared_gate:
                found = found * self.get_submodule(self.names["shared_score"].format(e=expert))(rows).sigmoid()
            output = output + found
        output = output.view_as(hidden)
        return (output, choice.weights) if self.mixture.returns_scores else output

    def _projections(self, kind: str, expert: str) -> list[str]:
        """Return the names of the gate, up and down projections of an expert. `kind` is `expert` or `shared`."""
        return [self.names[f"{kind}_{role}"].format(e=expert) for role in ("gate", "up", "down")]

    def _router_values(self, kind: str) -> Tensor:
        """Return the weights [C, H], biases [C] or score biases [C] of the router in fp32."""
        return torch.cat([self.get_parameter(f"{path}.{kind}") for path in self.routers]).float()

    def balance(self, choice: Choice) -> None:
        """Update the biases that balance the experts, given the choices for all tokens of a global batch.

        Biases of a router that is not trained are not changed.
        """
        routers: list[Any] = [self.get_submodule(path) for path in self.routers]
        counts = choice.counts()
        change = torch.zeros(len(counts), device=counts.device)
        balance(change, counts, self.mixture.bias_rate)
        for router, own in zip(routers, change.split([len(r.score_bias) for r in routers]), strict=True):
            if router.weight.requires_grad:
                router.score_bias.data += own


def place_experts(model: Any, mixture: Mixture, modules: Mapping[str, str]) -> None:
    """Replace the feed-forward networks of a transformers model with `MixtureLayer` in the layers with experts.

    Args:
        model: A transformers model with the submodules `model.layers`.
        mixture: The experts.
        modules: The names of the modules in the checkpoint; see `model.llm.families.LLAMA_MODULES`.
    """
    root = modules["router"].partition(".")[0]
    own = {role: path for role, path in modules.items() if role.startswith(("router", "expert_", "shared_"))}
    assert all(path.startswith(f"{root}.") for path in own.values()), own
    names = {role: path.removeprefix(f"{root}.") for role, path in own.items()}
    for number in mixture.layers:
        layer: Any = model.get_submodule(modules["layer"].format(n=number))
        like = next(layer.parameters())
        experts = MixtureLayer(mixture, model.config.hidden_size, names, number)
        del layer.mlp
        setattr(layer, root, experts.to(device=like.device, dtype=like.dtype))
        if root != "mlp":
            # transformers' layer calls `mlp`, but parameters must have the checkpoint's names.
            layer.__dict__["mlp"] = experts


def balance_experts(model: nn.Module, choices: Sequence[Choice]) -> None:
    """Update the biases that balance the experts of a model after a training step, if it has such biases.

    Args:
        model: The model.
        choices: The choices of each layer with experts for all tokens of the global batch; see `observed`.
    """
    layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
    for layer, choice in zip(layers, choices, strict=True):
        if layer.mixture.bias_rate:
            layer.balance(choice)


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


@contextmanager
def jittered(model: nn.Module, samples: Tensor | None, length: int) -> Iterator[None]:
    """Apply jitter to the inputs of the routers during the `with` block.

    Args:
        model: The model. In the block, its input must be a padded batch [B, `length`].
        samples: The numbers [B] int64 that identify the samples in a training step; None for no jitter.
        length: The number of positions of the batch.
    """
    layers = [module for module in model.modules() if isinstance(module, MixtureLayer)]
    noise = None
    if samples is not None:
        positions = torch.arange(length, device=samples.device).repeat(len(samples))
        noise = TokenNoise(samples.repeat_interleave(length), positions)
    try:
        for layer in layers:
            layer.noise = noise
        yield
    finally:
        for layer in layers:
            layer.noise = None


def smallest_gap(choices: Sequence[Choice], top_k: int) -> float:
    """Return the smallest difference, over all tokens, between the lowest chosen and the highest unchosen value.

    The values are those by which experts are ranked (`Choice.ranking`). If the difference is below about 1e-5, two
    correct computations of a model may choose different experts.

    Returns:
        The difference, or infinity if all experts are chosen or there is no token.
    """
    gaps = [choice.ranking.topk(top_k + 1, -1).values for choice in choices if choice.ranking.shape[-1] > top_k]
    return min((float((g[:, -2] - g[:, -1]).min()) for g in gaps if len(g)), default=float("inf"))


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a submodule at a dotted path, and create empty parent modules where they are missing."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
