"""Export a checkpoint as a folder that transformers loads.

    earshot export runs/demo out/model                           the newest checkpoint of a run
    earshot export runs/demo out/llm --llm-only                  only the LLM, which needs no remote code
    earshot export runs/demo out/lora --llm-only --adapter       only the LLM's adapters, for peft
    earshot export runs/demo out/model --original FOLDER         in the layout of the published model in FOLDER
    earshot export runs/demo out/model --verify dev.jsonl        fail if the export differs from the training graph
    earshot export runs/demo out/small --activated-only 0.01 --dev dev.jsonl
                                                                         drop encoders chosen for under 1 % of clips

The command needs no GPU. The folder has a temporary name until the export is complete. Rerun an interrupted command to
resume it.

Exit code 0: the model was exported. 2: it was not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from tools.options import check_at_least, check_model, check_output, plain_faults
from trainer.__main__ import be_calm

if TYPE_CHECKING:
    from trainer.export.publish import Findings, Options
    from trainer.export.source import Source


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    options = _parser().parse_args(arguments)
    be_calm()
    try:
        _check(options)
        check_model(options.checkpoint)
        with plain_faults(options.out):
            return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.activated_only < 1:
        raise UserError(f"--activated-only {options.activated_only:g}: must be a fraction of at least 0 and below 1")
    if not 0 < options.shard_gib < math.inf:
        raise UserError(f"--shard-gib {options.shard_gib:g}: must be above 0")
    check_at_least(1, samples=options.samples)
    if options.adapter and not options.llm_only:
        raise UserError("--adapter: peft loads the adapters of the LLM alone; add --llm-only, or use --merge")
    if options.original is not None:
        for flag in ("llm_only", "adapter", "verify", "activated_only"):
            if getattr(options, flag):
                name = flag.replace("_", "-")
                raise UserError(
                    f"--original {options.original}: cannot be combined with --{name}; remove one of the two"
                )
    if options.dev is not None and not options.activated_only:
        raise UserError(
            f"--dev {options.dev}: needs --activated-only, whose effect it measures; use --verify to compare the export"
        )
    for name, value in (("verify", options.verify), ("dev", options.dev)):
        if options.llm_only and value is not None:
            raise UserError(f"--{name} {value}: needs the whole model, not --llm-only; remove one of the two")
    check_output(options.out, Path(options.out).parent, is_folder=True)


def _run(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.reader import DamagedError
    from trainer.export.publish import Options, summary_of
    from trainer.telemetry.metrics import peak_memory_bytes

    options = Options(
        dtype=arguments.dtype,
        shard_bytes=round(arguments.shard_gib * 2**30),
        llm_only=arguments.llm_only,
        adapter=arguments.adapter,
        original=arguments.original,
        activated_only=arguments.activated_only,
        verify=arguments.verify,
        dev=arguments.dev,
    )
    if arguments.samples is not None:
        options = replace(options, max_samples=arguments.samples)
    started = time.perf_counter()
    try:
        source, found = _export(arguments, options)
    except DamagedError as error:
        raise UserError(f"{arguments.checkpoint}: is damaged: {error}; use another checkpoint") from None
    out = Path(arguments.out)
    summary = summary_of(source, out, options, found)
    summary |= {"seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak_memory_bytes()["host"]}
    print(f"{out}: {summary['num_bytes'] / 1e6:.1f} MB from step {summary['step']} in {summary['seconds']:.1f} s")
    if arguments.json:
        print(json.dumps(summary))
    return 0


def _export(arguments: argparse.Namespace, options: Options) -> tuple[Source, Findings]:
    from tqdm import tqdm

    from trainer.export.publish import export
    from trainer.export.source import Source

    source = Source(arguments.checkpoint, arguments.tokenizer, arguments.run)
    with tqdm(unit="B", unit_scale=True, desc="export", disable=not sys.stderr.isatty()) as bar:

        def on_bytes(more: int, total: int) -> None:
            bar.total = total
            bar.update(more)

        return source, export(source, Path(arguments.out), options, on_bytes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run (its newest checkpoint): a folder or s3://…"
    )
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument("--llm-only", action="store_true", help="export only the LLM, in its Hugging Face format")
    adapters = parser.add_mutually_exclusive_group()
    parser.add_argument(
        "--original",
        metavar="FOLDER",
        help="export in the layout of the published model in FOLDER, from which the run was imported",
    )
    adapters.add_argument(
        "--merge", action="store_true", help="merge low-rank adapters into the weights of their layers (the default)"
    )
    adapters.add_argument(
        "--adapter", action="store_true", help="with --llm-only: export only the LLM's adapters, as a folder for peft"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the weights (default: bf16)")
    parser.add_argument(
        "--shard-gib", type=float, default=5.0, help="maximum size of a file of weights, in GiB (default: 5)"
    )
    parser.add_argument(
        "--activated-only",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="drop encoder experts that were chosen for less than this fraction of the clips (default: 0, which keeps "
        "all)",
    )
    parser.add_argument(
        "--dev", metavar="MANIFEST", help="score the model on this manifest with and without the dropped experts"
    )
    parser.add_argument(
        "--verify", metavar="MANIFEST", help="compare the export with the training graph on samples of this manifest"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="number of samples to read from each of these manifests (default: 32)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="the run's tokenizer, if it is not in the run's folder")
    parser.add_argument("--run", metavar="DIR", type=Path, help="the run's folder, if CHECKPOINT is not in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
