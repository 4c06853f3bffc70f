"""Pack the samples of a manifest into WebDataset shards with an index.

    earshot shards make data/asr.jsonl data/shards --split train
    earshot shards make data/asr.jsonl s3://bucket/shards

OUT is a folder or s3://BUCKET/PREFIX (also gs:// and az://). Rerun an interrupted command to resume it.

Exit code 0: the shards are complete. 2: they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from model.errors import UserError
from tools.options import add_plugins, check_output
from trainer.data.shard_build import SKIPPED_NAME, BuildReport, ShardLimits, build_shards
from trainer.storage.open import scheme_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.max_shard_samples < 1 or args.max_shard_bytes < 1:
        parser.error("--max-shard-samples and --max-shard-bytes must be at least 1")
    try:
        if not scheme_of(args.out):
            check_output(args.out, Path(args.out), is_folder=True)
        with tqdm(unit=" samples", disable=None, leave=False) as bar:

            def on_progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            report = build_shards(
                args.manifest,
                args.out,
                split=args.split,
                limits=ShardLimits(args.max_shard_samples, args.max_shard_bytes),
                max_skipped_fraction=args.max_skipped_fraction,
                num_workers=args.workers,
                on_progress=on_progress,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_as_json(report) if args.json else _as_text(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot shards make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifest", type=Path, metavar="MANIFEST", help="JSONL file; its audio paths are relative to its folder"
    )
    parser.add_argument(
        "out", metavar="OUT", help="folder or bucket URL, empty or with an unfinished build of the same manifest"
    )
    parser.add_argument("--split", help="pack only this split (default: all splits)")
    parser.add_argument(
        "--max-shard-samples",
        type=int,
        default=ShardLimits().max_samples,
        metavar="N",
        help=f"maximum number of samples in a shard (default: {ShardLimits().max_samples})",
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=ShardLimits().max_bytes,
        metavar="N",
        help=f"maximum size of a shard in bytes (default: {ShardLimits().max_bytes})",
    )
    parser.add_argument(
        "--max-skipped-fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="fail if more than this fraction of the samples cannot be used (default: 0.01)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of threads that check clips (default: one per CPU core)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_plugins(parser)
    return parser


def _as_json(report: BuildReport) -> str:
    return json.dumps(
        {
            "url": report.url,
            "num_resumed_shards": report.num_resumed,
            "num_samples": report.num_samples,
            "num_shards": report.num_shards,
            "seconds": round(report.seconds, 3),
            "skipped": report.num_skipped_by_reason,
        }
    )


def _as_text(report: BuildReport) -> str:
    text = (
        f"{report.url}: {report.num_samples} samples, {report.seconds / 3600:.3f} h of audio, "
        f"{report.num_shards} shard(s)"
        + (f", of which {report.num_resumed} already existed" if report.num_resumed else "")
    )
    if report.skipped:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(report.num_skipped_by_reason.items()))
        text += f"; skipped samples: {counts}, listed in {report.url}/{SKIPPED_NAME}"
    return text


if __name__ == "__main__":
    sys.exit(main())
