"""The tensors of FFN experts and their routers in Hugging Face, and the part of each on a rank.

Names of Megatron parameters are relative to a layer, as in `model.llm.names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import PretrainedConfig

from model.llm.delta_names import Index
from model.llm.families import mixture_of, modules_of
from model.llm.mixture import SCORE_BIAS

_ROUTER = re.compile(rf"^mlp\.router\.(weight|bias|{SCORE_BIAS})$")
_SHARED = re.compile(r"^mlp\.shared_experts\.networks\.(\d+)\.(linear_fc[12])\.weight$")
_SHARED_SCORE = "mlp.shared_experts.score_weight"
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")


def expert_shapes(hf_config: PretrainedConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a layer's router and experts by name, in order."""
    mixture, modules, hidden = mixture_of(hf_config), modules_of(hf_config), hf_config.hidden_size
    assert mixture is not None, "the LLM has no experts"
    shapes: dict[str, tuple[int, ...]] = {}
    kinds = {"weight": True, "bias": mixture.biases, SCORE_BIAS: mixture.bias_rate > 0}
    for kind in (kind for kind, exists in kinds.items() if exists):
        for name, num_rows in _router_tensors(hf_config, layer, kind):
            shapes[name] = (num_rows, hidden) if kind == "weight" else (num_rows,)
    width = mixture.width
    for expert in mixture.experts:
        sizes = {"expert_gate": (width, hidden), "expert_up": (width, hidden), "expert_down": (hidden, width)}
        for role, size in sizes.items():
            shapes[_name(modules, role, "weight", layer, expert)] = size
            if mixture.biases:
                shapes[_name(modules, role, "bias", layer, expert)] = size[:1]
    width = mixture.shared_width
    sizes = {"shared_gate": (width, hidden), "shared_up": (width, hidden), "shared_down": (hidden, width)}
    sizes |= {"shared_score": (1, hidden)} if mixture.shared_gate else {}
    for expert in mixture.shared:
        shapes |= {_name(modules, role, "weight", layer, expert): size for role, size in sizes.items()}
    return shapes


def expert_parts(
    parameter: str, layer: int, hf_config: PretrainedConfig, tp_rank: int, tp_size: int
) -> list[tuple[str, Index]] | None:
    """Return the tensors of which a Megatron parameter on a rank consists, in order, and the part of each.

    Args:
        parameter: The name of the parameter.
        layer: The number of the layer.
        hf_config: The LLM.
        tp_rank: The tensor-parallel rank. For experts that the router chooses, the rank in expert tensor parallelism.
        tp_size: The tensor-parallel size or, for these experts, the size of expert tensor parallelism.

    Returns:
        The names and parts; None if the parameter belongs to neither a router nor an expert.
    """
    whole = slice(None)
    if (router := _ROUTER.match(parameter)) is not None:
        columns = (whole,) if router[1] == "weight" else ()
        return [(name, (slice(0, rows), *columns)) for name, rows in _router_tensors(hf_config, layer, router[1])]
    mixture, modules = mixture_of(hf_config), modules_of(hf_config)
    if parameter == _SHARED_SCORE:
        assert mixture is not None, "the LLM has no experts"
        names = [_name(modules, "shared_score", "weight", layer, expert) for expert in mixture.shared]
        return [(name, (slice(0, 1), whole)) for name in names]
    if (found := _SHARED.match(parameter)) is not None:
        assert mixture is not None, "the LLM has no experts"
        role, kind, name, width = "shared", "weight", mixture.shared[int(found[1])], mixture.shared_width
    elif (found := _EXPERT.match(parameter)) is not None:
        assert mixture is not None, "the LLM has no experts"
        role, kind, name, width = "expert", found[3], mixture.experts[int(found[1])], mixture.width
    else:
        return None
    own = slice(tp_rank * (width // tp_size), (tp_rank + 1) * (width // tp_size))
    if found[2] == "linear_fc2":
        index: Index = (whole, own) if kind == "weight" else (whole,)
        return [(_name(modules, f"{role}_down", kind, layer, name), index)]
    index = (own, whole) if kind == "weight" else (own,)
    return [(_name(modules, f"{role}_{side}", kind, layer, name), index) for side in ("gate", "up")]


def _router_tensors(hf_config: PretrainedConfig, layer: int, kind: str) -> list[tuple[str, int]]:
    """Return the name and the number of rows of each tensor of a layer's router, in order.

    Args:
        hf_config: The LLM.
        layer: The number of the layer.
        kind: `weight`, `bias` or `score_bias`.
    """
    modules, mixture = modules_of(hf_config), mixture_of(hf_config)
    assert mixture is not None, "the LLM has no experts"
    prefix = modules["layer"].format(n=layer)
    return [(f"{prefix}.{path}.{kind}", num_rows) for path, num_rows in mixture.router_parts(modules["router"])]


def _name(modules: Mapping[str, str], role: str, kind: str, layer: int, expert: str) -> str:
    """Return the name of a tensor of an expert, given its role in `LLMFamily.modules` and the last part of its name."""
    return f"{modules['layer'].format(n=layer)}.{modules[role].format(e=expert)}.{kind}"
