"""Compare distributed training with the single-process model on many topologies.

    earshot parity              all topologies of up to 4 processes, with loss curves of 20 steps
    earshot parity --ranks 2    up to 2 processes
    earshot parity --steps 0    without loss curves
    earshot parity --deepspeed ds_configs/zero3_offload.json    with the DeepSpeed settings of a run
    earshot parity --pack-multiple 24    with train.pack_multiple_tokens = 24, which adds padding to packs
    earshot parity --gathering per_module    with audio weights that are gathered for each module call
    earshot parity --audio-shard 2    with parallel.audio_shard, with several copies of the audio modules
    earshot parity --recompute-calls    with encoder calls that are recomputed in the backward pass
    earshot parity --lora       train low-rank adapters over partly frozen weights
    earshot parity --stages --steps 13    train different parameters in each of several stages
    earshot parity --adapter queries    with a different kind of adapter, followed by normalization
    earshot parity --family mixtral    an LLM with experts, which are distributed over ranks in several ways
    earshot parity --family all --steps 0    all LLM families without experts
    earshot parity --freeze 'llm.*.experts.*'    with some parameters frozen
    earshot parity --modes      all modes of the LLM's engine: virtual and uneven stages, recomputation, overlap
    earshot parity --json       also print one JSON object on the last line

Run this command on a new cluster before the first training run. For each topology and each of six kinds of batches, it
compares the loss and all gradients with those of the single-process model. For an LLM with experts, it also prints the
smallest gap: the smallest difference between the router scores of a chosen and a rejected expert. If the gap is below
about 1e-5, rounding may change the choice.

Exit code 0: all differences are within the limits. 1: a difference exceeds its limit. 2: invalid arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.connectors.kinds import ADAPTERS
from model.errors import UserError
from model.llm.families import LLM_FAMILIES
from tools.options import check_at_least
from tools.parity_measure import KINDS, TOLERANCE, Comparison, Row, measure
from tools.parity_topologies import modes, name, topologies
from trainer.parallel.topology import Topology
from trainer.parity_llms import MIXTURES
from trainer.run.command import module_command
from trainer.run.launch import start_ranks

ALL_DENSE = "all"
"""The value of `--family` for all families without experts. All of them are compared in the same processes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0 if all differences are within the limits, 1 if not, 2 after printing a UserError.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.worker:
            return work(options.worker)
        compared = _comparisons(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    width = 48 if options.modes else 24 if options.family == ALL_DENSE else 12
    print(f"{'topology':{width}} {'batch':26} {'loss':>9} {'gradient':>9}   largest at")
    rows: list[Row] = []
    for comparison in compared:
        for row in check(comparison):
            rows.append(row)
            verdict = "" if row.passed else "   OVER"
            gap = "" if row.gap is None else f"   smallest gap {row.gap:.1e}"
            print(
                f"{row.topology:{width}} {row.kind:26} {row.loss:9.1e} {row.gradient:9.1e}   {row.worst}{gap}{verdict}",
                flush=True,
            )
    passed = all(r.passed for r in rows)
    print("every topology matches the single-process model" if passed else "some topologies differ: see OVER above")
    if options.json:
        print(json.dumps({"passed": passed, "limit": TOLERANCE, "rows": [asdict(r) for r in rows]}))
    return 0 if passed else 1


def check(comparison: Comparison) -> list[Row]:
    """Compare one topology with the single-process model in new processes."""
    topology = comparison.topology
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"
        task = json.dumps([comparison.arguments(), str(out)])
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


def _comparisons(options: argparse.Namespace) -> list[Comparison]:
    """Return the comparisons that the options request, one per topology.

    Raises:
        UserError: If the options have invalid values, or cannot be combined.
    """
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
            "several blocks of this size; increase --ranks"
        )
    rows_of_ranks = math.lcm(*(topology.row_multiple for topology in compared))
    if options.pack_multiple is not None and (options.pack_multiple < 1 or options.pack_multiple % rows_of_ranks):
        raise UserError(
            f"--pack-multiple {options.pack_multiple}: must be a multiple of {rows_of_ranks}, so that packs can be "
            "divided among tensor-parallel and context-parallel ranks"
        )
    _check_deepspeed(options.deepspeed)
    return [
        Comparison(
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
        )
        for topology in compared
    ]


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


def _parser() -> argparse.ArgumentParser:
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
        help=f"family of the LLM (default: llama); for {', '.join(MIXTURES)}, the recipe adds experts to a dense LLM; "
        f"{ALL_DENSE} stands for all families without experts",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="a DeepSpeed JSON file (default: ZeRO-3, which gathers every weight for each use)",
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
        help="kind of adapter; kinds other than convolutions are followed by normalization",
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
        help="parallel.audio_shard; compare only topologies that allow it and have more than N processes",
    )
    parser.add_argument("--recompute-calls", action="store_true", help="train.recompute_encoder_calls")
    parser.add_argument(
        "--modes",
        action="store_true",
        help="compare every mode of the LLM's engine on two kinds of batches: virtual and uneven stages, "
        "recomputation, and overlap of computation with communication between replicas",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
