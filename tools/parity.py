"""Compare distributed training with the single-process model on many topologies.

    earshot parity              all topologies of up to 4 processes, with loss curves of 20 steps
    earshot parity --ranks 2    up to 2 processes
    earshot parity --steps 0    without loss curves
    earshot parity --deepspeed ds_configs/zero3_offload.json    with the DeepSpeed settings of a run
    earshot parity --pack-multiple 24    with train.pack_multiple_tokens = 24, which adds padding to packs
    earshot parity --gathering per_module    with weights that are gathered around every call of a module
    earshot parity --audio-shard 2    with parallel.audio_shard, so that blocks of ranks hold copies of the audio side
    earshot parity --recompute-calls    with encoder calls that are recomputed in the backward pass
    earshot parity --lora       train low-rank adapters over partly frozen weights
    earshot parity --stages --steps 11    train different parameters in each of several stages
    earshot parity --adapter queries    with another kind of adapter, followed by normalization
    earshot parity --family mixtral    an LLM with experts, which are distributed over ranks in several ways
    earshot parity --family all --steps 0    all families of LLMs without experts
    earshot parity --freeze 'llm.*.experts.*'    with some parameters frozen
    earshot parity --modes      all modes of the LLM's engine: virtual and uneven stages, recomputation, overlap
    earshot parity --json       also print one JSON object on the last line

Run this command on a new cluster before the first training run. For each topology and each of six kinds of batches, it
compares the loss and all gradients.

Exit code 0: all differences are within the limits. 1: a difference exceeds its limit. 2: invalid arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.connectors.kinds import ADAPTERS
from model.errors import UserError
from model.llm.families import LLM_FAMILIES
from tools.options import check_at_least
from tools.parity_topologies import modes, name, topologies
from trainer.parallel.topology import Topology
from trainer.parity_llms import MIXTURES
from trainer.run.command import module_command
from trainer.run.launch import start_ranks

KINDS = ("mixed", "text_only", "rank_without_audio", "fewer_samples_than_ranks", "one_expert", "conversations")
TOLERANCE = 1e-5
CURVE_TOLERANCE = 1e-4
ALL_DENSE = "all"
"""The value of `--family` for all families without experts. They are compared in the same processes."""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_force_ds_cpu_optimizer": False,
    # No parameter stays gathered after its use, so that every gather is tested.
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    },
}


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


def check(
    topology: Topology,
    num_steps: int,
    family: str,
    kinds: tuple[str, ...] = KINDS,
    deepspeed: str | None = None,
    pack_multiple: int | None = None,
    lora: bool = False,
    adapter: str = "convolutions",
    stages: bool = False,
    freeze: Sequence[str] = (),
    gathering: str = "per_update",
    recompute_calls: bool = False,
    modes: Sequence[Mapping[str, Any]] = ({},),
) -> list[Row]:
    """Compare one topology with the single-process model, in new processes.

    Args:
        topology: The topology.
        num_steps: The length of the loss curves; 0 for none.
        family: The family of the LLM.
        kinds: The kinds of batches.
        deepspeed: A DeepSpeed JSON file; None for `DS_CONFIG`.
        pack_multiple: `train.pack_multiple_tokens`.
        lora: True to train low-rank adapters over partly frozen weights.
        adapter: `model.adapter.kind`.
        stages: True to train different parameters in each of several stages.
        freeze: Patterns for the names of parameters that are not trained.
        gathering: `train.gather_audio_weights`.
        recompute_calls: `train.recompute_encoder_calls`.
        modes: The fields of each `trainer.parity.Mode` to compare. Fields that are not given have their defaults.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        arguments = {
            **{key: getattr(topology, key) for key in ("tp", "pp", "ep", "vp", "cp", "ffn_ep", "ffn_etp", "shard")},
            "num_steps": num_steps,
            "family": family,
            "kinds": kinds,
            "deepspeed": deepspeed,
            "pack_multiple": pack_multiple,
            "lora": lora,
            "adapter": adapter,
            "stages": stages,
            "freeze": list(freeze),
            "gathering": gathering,
            "recompute_calls": recompute_calls,
            "modes": list(modes),
        }
        task = json.dumps([arguments, str(out)])
        code = start_ranks(topology.world, module_command("tools.parity", "--worker", task))
        if code:
            return [Row(name(topology), f"crashed with exit code {code}", float("nan"), float("nan"), "")]
        return [Row(**row) for row in json.loads(out.read_text())]


def work(task: str) -> int:
    """Run one rank of `check`."""
    arguments, out = json.loads(task)
    rows = measure(**arguments)
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(rows))
    return 0


def measure(
    tp: int,
    pp: int,
    ep: int,
    vp: int,
    num_steps: int,
    family: str,
    kinds: Sequence[str],
    deepspeed: str | None,
    pack_multiple: int | None = None,
    lora: bool = False,
    adapter: str = "convolutions",
    stages: bool = False,
    ffn_ep: int = 1,
    ffn_etp: int | None = None,
    freeze: Sequence[str] = (),
    gathering: str = "per_update",
    recompute_calls: bool = False,
    modes: Sequence[Mapping[str, Any]] = ({},),
    cp: int = 1,
    shard: int | None = None,
) -> list[dict[str, Any]]:
    """Compare the topology of this launch with the single-process model.

    Collective: every rank of the world must call it.

    Args:
        tp: The tensor-parallel size.
        pp: The pipeline-parallel size.
        ep: The expert-parallel size.
        vp: The number of virtual stages.
        num_steps: The length of the loss curves; 0 for none.
        family: The family of the LLM.
        kinds: The kinds of batches.
        deepspeed: A DeepSpeed JSON file; None for `DS_CONFIG`.
        pack_multiple: `train.pack_multiple_tokens`.
        lora: True to train low-rank adapters over partly frozen weights.
        adapter: `model.adapter.kind`.
        stages: True to train different parameters in each of several stages.
        ffn_ep: The number of ranks over which the FFN experts of a layer are distributed.
        ffn_etp: The number of ranks that share an FFN expert; None for `tp`.
        freeze: Patterns for the names of parameters that are not trained.
        gathering: `train.gather_audio_weights`.
        recompute_calls: `train.recompute_encoder_calls`.
        modes: The fields of each `trainer.parity.Mode` to compare.
        cp: The context-parallel size.
        shard: `parallel.audio_shard`.

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

    rank, world, device = connect(timeout_sec=300)
    topology = Topology(world, tp, pp, ep, ffn_ep, ffn_etp, vp, cp, shard)
    groups = build_groups(topology, rank, device, parity_cases.SEED)
    ds_config = build_ds_config(Path(deepspeed), precision="fp32") if deepspeed else DS_CONFIG
    chosen = parity_cases.STAGED if stages else parity_cases.ADAPTERS if lora else parity_cases.ALL_WEIGHTS
    learned = parity_cases.without(chosen, freeze)
    rows = []
    for fields in modes:
        mode = parity.Mode(**fields)
        model = parity_cases.tiny_model(mode.family or family, adapter, mode.num_layers)
        step = parity.build_step(
            model,
            groups,
            ds_config,
            max(1, num_steps),
            pack_multiple=pack_multiple,
            learned=learned,
            gathering="per_module" if gathering == "per_module" else "per_update",
            recompute_calls=recompute_calls,
            mode=mode,
        )
        oracle = parity.build_oracle(model, learned)
        label = " ".join(filter(None, (name(topology), mode.label)))
        for kind in kinds:
            with parity.favoured(step, 1 if kind == "one_expert" else None):
                found = parity.compare(step, oracle, parity_cases.make_samples(kind, world, model.adapter.rate))
            rows.append(Row(label, kind, found.loss, found.gradient, found.worst, found.gap))
        if num_steps:
            worst_loss, worst_norm = parity.loss_curves(step, oracle, num_steps)
            rows.append(Row(label, f"curve of {num_steps} steps", worst_loss, worst_norm, "gradient norm"))
        step.audio.engine.destroy()
    dist.barrier()
    dist.destroy_process_group()
    return [asdict(row) for row in rows]


def _compared_modes(
    options: argparse.Namespace, topology: Topology, dense: Sequence[str]
) -> Sequence[Mapping[str, Any]]:
    """Return the fields of each `trainer.parity.Mode` to compare. `dense` lists the families without experts."""
    if options.modes:
        return modes(topology)
    return [{"family": family} for family in dense] if options.family == ALL_DENSE else ({},)


def _check_deepspeed(path: str | None) -> None:
    """Check a DeepSpeed JSON file here, since an invalid file would fail on every rank of every topology.

    Raises:
        UserError: If the file cannot be used.
    """
    if path is not None:
        from trainer.engine.imports import lean_imports

        with lean_imports():
            from trainer.engine.ds_config import build_ds_config
        build_ds_config(Path(path), precision="fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 if all differences are within the limits, 1 if not, 2 after printing a UserError.
    """
    parser = argparse.ArgumentParser(
        prog="earshot parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="maximum number of processes (default: 4)")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="length of the loss curves; 0 for none (default: 20)"
    )
    parser.add_argument(
        "--family",
        default="llama",
        choices=(*LLM_FAMILIES, *MIXTURES, ALL_DENSE),
        help=f"family of the LLM (default: llama); in {', '.join(MIXTURES)}, the recipe adds experts to a dense LLM; "
        f"{ALL_DENSE} stands for all families without experts",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="a DeepSpeed JSON file (default: ZeRO-3 that gathers every weight again for each use)",
    )
    parser.add_argument(
        "--pack-multiple", type=int, metavar="N", help="train.pack_multiple_tokens, a multiple of 8 (default: none)"
    )
    parser.add_argument(
        "--lora", action="store_true", help="train low-rank adapters (recipe section `lora`) over partly frozen weights"
    )
    parser.add_argument(
        "--freeze", action="append", default=[], metavar="PATTERN", help="parameters that are not trained (repeatable)"
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="train different parameters in each of several stages (section `stages`)",
    )
    parser.add_argument(
        "--adapter",
        default="convolutions",
        choices=tuple(ADAPTERS),
        help="kind of the adapter; kinds other than convolutions are followed by normalization",
    )
    parser.add_argument(
        "--gathering",
        default="per_update",
        choices=("per_update", "per_module"),
        help="train.gather_audio_weights (default: per_update)",
    )
    parser.add_argument(
        "--audio-shard",
        type=int,
        metavar="N",
        help="parallel.audio_shard; compares the topologies with more than N processes that allow it",
    )
    parser.add_argument("--recompute-calls", action="store_true", help="train.recompute_encoder_calls")
    parser.add_argument(
        "--modes",
        action="store_true",
        help="compare every mode of the LLM's engine on two kinds of batches: virtual and uneven stages, "
        "recomputation, and overlap of the exchange between replicas",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.worker:
            return work(options.worker)
        check_at_least(1, ranks=options.ranks)
        if options.audio_shard is not None:
            check_at_least(1, audio_shard=options.audio_shard)
            if options.gathering == "per_module":
                raise UserError("--audio-shard: cannot be combined with --gathering per_module; remove one of them")
        check_at_least(0, steps=options.steps)
        dense = [name for name, family in LLM_FAMILIES.items() if family.experts is None]
        has_experts = options.family not in (*dense, ALL_DENSE)
        if options.modes and (has_experts or options.stages or options.family == ALL_DENSE):
            raise UserError(
                "--modes: cannot be combined with --stages, --family all or an LLM with experts; remove one of them"
            )
        compared = topologies(options.ranks, has_experts, 2 if options.modes else 1, options.audio_shard)
        if not compared:
            raise UserError(
                f"--audio-shard {options.audio_shard}: no topology of up to --ranks {options.ranks} processes has "
                "several blocks of this many; raise --ranks"
            )
        rows_of_ranks = math.lcm(*(topology.row_multiple for topology in compared))
        if options.pack_multiple is not None and (options.pack_multiple < 1 or options.pack_multiple % rows_of_ranks):
            raise UserError(
                f"--pack-multiple {options.pack_multiple}: must be a multiple of {rows_of_ranks}, so that packs can be "
                "divided among tensor and context ranks"
            )
        _check_deepspeed(options.deepspeed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    width = 48 if options.modes else 24 if options.family == ALL_DENSE else 12
    print(f"{'topology':{width}} {'batch':26} {'loss':>9} {'gradient':>9}   largest at")
    rows: list[Row] = []
    for topology in compared:
        for row in check(
            topology,
            options.steps,
            options.family,
            ("mixed", "text_only") if options.modes else KINDS,
            options.deepspeed,
            options.pack_multiple,
            options.lora,
            options.adapter,
            options.stages,
            options.freeze,
            options.gathering,
            options.recompute_calls,
            _compared_modes(options, topology, dense),
        ):
            rows.append(row)
            verdict = "" if row.passed else "   OVER"
            gap = "" if row.gap is None else f"   smallest gap {row.gap:.1e}"
            print(
                f"{row.topology:{width}} {row.kind:26} {row.loss:9.1e} {row.gradient:9.1e}   {row.worst}{gap}{verdict}",
                flush=True,
            )
    passed = all(r.passed for r in rows)
    print("every topology equals the single-process model" if passed else "some topologies differ: see OVER above")
    if options.json:
        print(json.dumps({"passed": passed, "limit": TOLERANCE, "rows": [asdict(r) for r in rows]}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
