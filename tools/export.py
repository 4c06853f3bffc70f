"""Write a checkpoint as a model folder that transformers loads.

    python -m tools.export CHECKPOINT OUT                     a checkpoint, or a run: its newest
    python -m tools.export CHECKPOINT OUT --llm-only          the LLM alone: stock transformers needs no code of ours
    python -m tools.export RUN OUT --activated-only 0.01 --dev MANIFEST
                                                              without encoders that got under 1 % of the clips
    python -m tools.export RUN OUT --verify MANIFEST          published only if it equals the training graph

Needs no GPU and no process group. Written aside and moved at the end; started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from tools.options import check_at_least, check_output

if TYPE_CHECKING:
    from trainer.export.publish import Findings, Options
    from trainer.export.source import Source


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line that tells what to mend."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _check(options)
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.activated_only < 1:
        raise UserError(f"--activated-only {options.activated_only:g}: must be a share, at least 0 and below 1")
    if not 0 < options.shard_gib < math.inf:
        raise UserError(f"--shard-gib {options.shard_gib:g}: must be above 0")
    check_at_least(1, samples=options.samples)
    if options.dev is not None and not options.activated_only:
        raise UserError(f"--dev {options.dev}: needs --activated-only, whose cost it measures; see --verify, too")
    for name, value in (("verify", options.verify), ("dev", options.dev)):
        if options.llm_only and value is not None:
            raise UserError(f"--{name} {value}: needs the whole model, not --llm-only; leave one out")
    check_output(options.out, Path(options.out).parent, is_folder=True)


def _run(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.reader import DamagedError
    from trainer.export.publish import Options, summary_of
    from trainer.telemetry.metrics import peak_memory_bytes

    options = Options(
        dtype=arguments.dtype,
        shard_bytes=round(arguments.shard_gib * 2**30),
        llm_only=arguments.llm_only,
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
        raise UserError(f"{arguments.checkpoint}: damaged: {error}; take another checkpoint") from None
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
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run (its newest): a folder or s3://…"
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--llm-only", action="store_true", help="a plain Llama, Mistral or Qwen folder")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--shard-gib", type=float, default=5.0, help="largest weight file (default 5)")
    parser.add_argument(
        "--activated-only",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out encoders chosen for less of the clips",
    )
    parser.add_argument("--dev", metavar="MANIFEST", help="with --activated-only: score before and after on it")
    parser.add_argument("--verify", metavar="MANIFEST", help="compare with the training graph on its samples")
    parser.add_argument("--samples", type=int, help="of either manifest, at most (default 32)")
    parser.add_argument("--tokenizer", metavar="PATH", help="the run's tokenizer, where the run's folder lacks it")
    parser.add_argument("--run", metavar="DIR", type=Path, help="the run's folder, where CHECKPOINT is not in it")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
