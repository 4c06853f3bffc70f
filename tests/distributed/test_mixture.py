"""Tests of a dense LLM that gets FFN experts from several donors.

If all tokens are sent to one expert, the LLM must compute the same as the run that is the expert's donor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import LLMConfig, LoraConfig, is_factor
from model.errors import UserError
from model.llm.mixture import ExpertConfig, ExpertRouterConfig
from tests.distributed.harness import run_ranks
from tests.tools.exportable import write_run
from trainer.config.schema import Recipe
from trainer.donors import provenance
from trainer.parity_cases import VOCAB_SIZE, tiny_model

LENGTHS = (7, 5, 4)
DONORS = {"speech": 3.0, "sound": 40.0}
"""The donors, and the `alpha` of their low-rank adapters. Because of it, their feed-forward networks differ."""


def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an LLM `base`, two runs that train low-rank adapters for it, and the logits of all three models."""
    folder: Path = tmp_path_factory.mktemp("donors")
    logits = {}
    for name, alpha in DONORS.items():
        lora = (LoraConfig("llm.*.mlp.*", rank=2, alpha=alpha),)
        llm: Any = write_run(folder / name, lora=lora).llm
        with torch.no_grad():
            ids = tokens().split(LENGTHS)
            logits[name] = torch.cat([llm(part[None], use_cache=False).logits[0] for part in ids])
            for parameter_name, parameter in llm.named_parameters():
                if is_factor(parameter_name):
                    parameter.zero_()
            logits["text"] = torch.cat([llm(part[None], use_cache=False).logits[0] for part in ids])
    own = {n: p.detach().contiguous() for n, p in llm.named_parameters() if not is_factor(n)}
    (folder / "base").mkdir()
    save_file(own, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    llm.config.save_pretrained(folder / "base")
    save_file(logits, folder / "logits.safetensors")
    difference = (logits["speech"] - logits["sound"]).abs().max()
    assert difference > 1e-2 and (logits["speech"] - logits["text"]).abs().max() > 1e-2, difference
    return folder


def llm_config(folder: str | Path, forced: str | None) -> LLMConfig:
    experts = [ExpertConfig(name, f"{folder}/{name}") for name in DONORS]
    return LLMConfig(
        weights=f"{folder}/base",
        experts=(*experts, ExpertConfig("text"), ExpertConfig("spare")),
        moe_layers="all",
        router=ExpertRouterConfig(forced=forced),
    )


def forced_logits(folder: str, tp: int, pp: int, ffn_ep: int) -> dict[str, float]:
    """Send all tokens to one expert, and return the largest difference from the logits of its donor.

    Returns:
        The differences on this rank, by the name of the expert.
    """
    from dataclasses import replace

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from model.llm.megatron import embed_tokens
    from model.llm.packing import PackedSequences
    from model.llm.reference import resolve_hf_config, weight_source
    from trainer.donors import find_donors
    from trainer.engine.llm import LLMEngine
    from trainer.engine.optim import OptimConfig
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import ParallelConfig, build_topology

    rank, world, device = connect()
    topology = build_topology(ParallelConfig(world, tp, pp, ffn_expert=ffn_ep), world)
    wanted, found = load_file(f"{folder}/logits.safetensors"), {}
    for forced in (*DONORS, "text"):
        groups = build_groups(topology, rank, device, 1)
        config = llm_config(folder, forced)
        recipe = Recipe(name="mixture", model=replace(tiny_model(), llm=config))
        hf_config = resolve_hf_config(config)
        source = weight_source(config, hf_config, 1, find_donors(recipe, hf_config, groups).sources)
        engine = LLMEngine(hf_config, source, OptimConfig(), groups, torch.float32)
        engine.train(False)

        def embed(_pack: int, engine: Any = engine) -> Tensor:
            return embed_tokens(engine.chunks[0], tokens())

        def read(_pack: int, logits: Tensor) -> Tensor:
            return gather_from_tensor_model_parallel_region(logits.contiguous())[:, :VOCAB_SIZE]

        outputs = engine.forward_only([PackedSequences(lengths=LENGTHS)], embed, read)
        found[forced] = max((float((out - wanted[forced]).abs().max()) for out in outputs), default=0.0)
        dist.barrier()  # a rank that ends early would break the connections of the others
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(("world", "tp", "pp", "ffn_ep"), [(1, 1, 1, 1), (4, 2, 1, 4), (4, 1, 2, 2)])
def test_an_expert_equals_the_run_it_comes_from(runs: Path, world: int, tp: int, pp: int, ffn_ep: int) -> None:
    for found in run_ranks(world, forced_logits, {"folder": str(runs), "tp": tp, "pp": pp, "ffn_ep": ffn_ep}):
        assert len(found) == 3 and all(difference <= 1e-4 for difference in found.values()), found


def test_the_origin_of_every_expert_is_known(runs: Path) -> None:
    found = {one["name"]: one for one in provenance(llm_config(runs, None), seed=1)}
    assert found["speech"]["run"] == "speech" and found["speech"]["step"] == 40
    assert found["text"]["run"] == "" and found["text"]["origin"] == "base"
    digests = [one["tensors"] for one in found.values()]
    assert digests[2] == digests[3] and len(set(digests)) == 3, "text and spare must start with the same weights"
    assert len({found[name]["recipe"] for name in DONORS}) == len({found[name]["checkpoint"] for name in DONORS}) == 2


def test_a_donor_of_another_architecture_is_refused(runs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", "qwen3")
    config = LLMConfig(weights=f"{runs}/base", experts=(ExpertConfig("a", f"{tmp_path}/other"), ExpertConfig("b")))
    with pytest.raises(UserError, match=r"\(a\): from = .*other: its LLM has model_type = qwen3 instead of llama"):
        provenance(config, seed=1)
    config = LLMConfig(weights=f"{runs}/base", experts=(ExpertConfig("a", f"{tmp_path}/none"), ExpertConfig("b")))
    with pytest.raises(UserError, match="none"):
        provenance(config, seed=1)
