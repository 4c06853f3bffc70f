"""Make WebDataset shards of a manifest: python -m tools.make_shards MANIFEST.jsonl OUT_URL [--split train].

OUT_URL is a folder or s3://BUCKET/PREFIX (gs://, az://). A build that was cut short goes on by the same command.
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
from tools.options import check_output
from trainer.data.shard_build import SKIPPED_NAME, BuildReport, ShardLimits, build_shards
from trainer.storage.open import scheme_of


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: OUT is complete. 2: it is not; one line on stderr says why."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_shards", description=__doc__)
    parser.add_argument("manifest", type=Path, help="JSONL in the kit's format; audio paths relative to its folder")
    parser.add_argument("out", help="folder or bucket URL; it must be empty, or hold an unfinished build of the same")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument("--max-shard-samples", type=int, default=ShardLimits().max_samples)
    parser.add_argument("--max-shard-bytes", type=int, default=ShardLimits().max_bytes)
    parser.add_argument("--max-skipped-fraction", type=float, default=0.01, help="fail if more cannot be used")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that check clips")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
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
        f"{report.num_shards} shard(s)" + (f", {report.num_resumed} of them made before" if report.num_resumed else "")
    )
    if report.skipped:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(report.num_skipped_by_reason.items()))
        text += f"; left out: {counts}, listed in {report.url}/{SKIPPED_NAME}"
    return text


if __name__ == "__main__":
    sys.exit(main())
