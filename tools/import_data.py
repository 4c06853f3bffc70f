r"""Convert data in the formats of other programs to a manifest or to shards.

    earshot import --from csv corpus.csv data/corpus
    earshot import --from nemo train.json data/train --follow --set split=train
    earshot import --from hf emotions/ s3://bucket/emotions --shards --map answer=label --set task=er \
        --set "instruction=Which emotion is heard?"
    earshot import --from kaldi data/train data/train-import --check

OUT is a folder. With --shards, it may also be s3://BUCKET/PREFIX (gs://, az://). Without --shards, audio files of types
that shards may contain are not copied. Parts of recordings and files of other types are written as FLAC to OUT/audio.
OUT/skipped.jsonl lists the skipped rows with reasons. Rerun an interrupted command to resume it.

Exit code 0: the data was imported. 1: it was imported, but more rows were skipped than --max-skipped-fraction allows.
2: it was not imported.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from model.errors import UserError, printable_lines
from tools.options import add_plugins, check_at_least, check_output
from trainer.data.shard_build import SKIPPED_NAME, ShardLimits
from trainer.importers.fields import Naming
from trainer.importers.run import ImportReport, run_import
from trainer.importers.sinks import MANIFEST_NAME, ManifestSink, ShardSink, Sink, alone
from trainer.importers.source import Source
from trainer.importers.table import IMPORTERS
from trainer.storage.open import open_store, scheme_of
from trainer.storage.store import LocalStore

_VERSION = 3
"""The version of the files that an import writes. An unfinished import of a different version is not resumed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if too many rows were skipped, 2 after printing a UserError, else 0.
    """
    args = _parser().parse_args(argv)
    try:
        check_at_least(
            1, jobs=args.jobs, max_shard_samples=args.max_shard_samples, max_shard_bytes=args.max_shard_bytes
        )
        report = _run(args)
    except (UserError, OSError) as error:
        print(f"error: {error if isinstance(error, UserError) else _disk_problem(args.source, error)}", file=sys.stderr)
        return 2
    print(json.dumps(_as_dict(args.out, report)) if args.json else printable_lines(_as_text(args, report)))
    return 1 if report.skipped_fraction > args.max_skipped_fraction else 0


def _disk_problem(source: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or source}: {error.strerror or error}; check the path and its permissions")


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:13} {importer.summary}" for name, importer in IMPORTERS.items())
    parser = argparse.ArgumentParser(
        prog="earshot import",
        description=f"{__doc__}\nFormats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="format", required=True, choices=IMPORTERS, metavar="FORMAT", help="see above")
    parser.add_argument("source", type=Path, metavar="SRC", help="the file or folder in that format")
    parser.add_argument(
        "out", metavar="OUT", help="empty folder (or bucket URL), or one with an unfinished import of SRC"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="read the manifest's field FIELD from the field NAME of SRC",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=TEXT",
        help="add this field to all rows that lack it",
    )
    parser.add_argument(
        "--divide",
        default="",
        metavar="SPLIT=SHARE,…",
        help="divide the recordings of rows without a split among these splits, such as dev=0.05,test=0.05; the rest "
        "gets the split train",
    )
    parser.add_argument("--columns", metavar="A,B", help="names of the columns of a table without a header")
    parser.add_argument(
        "--audio", type=Path, metavar="DIR", help="folder to which audio paths are relative (default: SRC's folder)"
    )
    parser.add_argument("--follow", action="store_true", help="also read audio outside of SRC's folder and --audio")
    parser.add_argument("--shards", action="store_true", help="write shards instead of a manifest, in the order of SRC")
    limits = ShardLimits()
    parser.add_argument("--max-shard-samples", type=int, default=limits.max_samples, metavar="N", help="with --shards")
    parser.add_argument("--max-shard-bytes", type=int, default=limits.max_bytes, metavar="N", help="with --shards")
    parser.add_argument("--check", action="store_true", help="write nothing; print what would be imported and skipped")
    jobs = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help="processes (default: one per CPU core)")
    parser.add_argument(
        "--max-skipped-fraction", type=float, default=0.01, metavar="SHARE", help="see the exit codes (default: 0.01)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_plugins(parser)
    return parser


def _run(args: argparse.Namespace) -> ImportReport:
    if not args.source.exists():
        raise UserError(f"{args.source}: does not exist; check SRC")
    if args.audio is not None and not args.audio.is_dir():
        raise UserError(f"--audio {args.audio}: is not a folder")
    names, defaults = _pairs("--map", args.map, "FIELD=NAME"), _pairs("--set", args.set, "FIELD=TEXT")
    shares = _shares(args.divide)
    columns = tuple(name.strip() for name in args.columns.split(",")) if args.columns else ()
    output = None if scheme_of(args.out) else Path(args.out).absolute()
    source = Source(args.source, args.audio, args.follow, columns, names.get("audio", "audio"), output)
    identity = {
        "version": _VERSION,
        "format": args.format,
        "source": str(args.source.resolve()),
        "audio": args.audio and str(args.audio.resolve()),
        "options": [names, defaults, columns, args.follow, *([shares] if shares else [])],
        "shards": args.shards and [args.max_shard_samples, args.max_shard_bytes],
    }
    sink = _sink(args)
    folder = sink.folder if isinstance(sink, ManifestSink) else None
    if isinstance(sink, ShardSink) and isinstance(sink.store, LocalStore):
        folder = sink.store.folder
    with nullcontext() if folder is None else alone(folder), tqdm(unit=" rows", disable=None, leave=False) as bar:
        return run_import(
            IMPORTERS[args.format].rows,
            source,
            Naming(names, defaults, shares),
            sink,
            identity,
            jobs=args.jobs,
            on_progress=lambda done: bar.update(done - bar.n),
        )


def _shares(text: str) -> dict[str, float]:
    """Return the value of `--divide`."""
    shares = {}
    for split, share in _pairs("--divide", text.split(",") if text else [], "SPLIT=SHARE").items():
        try:
            shares[split] = float(share)
        except ValueError:
            raise UserError(f"--divide {text}: {share} is not a number") from None
    if not all(0 < share < 1 for share in shares.values()) or not sum(shares.values()) < 1:
        raise UserError(f"--divide {text}: the shares must be above 0, and their sum below 1")
    return shares


def _sink(args: argparse.Namespace) -> Sink:
    if args.check:
        return Sink()
    if args.shards:
        if not scheme_of(args.out):
            check_output(args.out, Path(args.out), is_folder=True)
        return ShardSink(open_store(args.out), ShardLimits(args.max_shard_samples, args.max_shard_bytes))
    if scheme_of(args.out):
        raise UserError(f"{args.out}: a manifest must be written to a folder; choose a folder, or add --shards")
    check_output(args.out, Path(args.out), is_folder=True)
    return ManifestSink(Path(args.out))


def _pairs(option: str, texts: Sequence[str], form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found or not name or not value:
            raise UserError(f"{option} {text}: must be {form}")
        if name in pairs:
            raise UserError(f"{option} {text}: {name} is given twice; remove one of the two")
        pairs[name] = value
    return pairs


def _as_dict(out: str, report: ImportReport) -> dict[str, object]:
    totals = report.totals
    return {
        "out": out,
        "num_rows": totals.num_rows,
        "num_samples": totals.num_samples,
        "seconds": round(totals.seconds, 3),
        "splits": totals.splits,
        "skipped": totals.skipped,
        "num_changed_ids": report.num_changed_ids,
        "num_resumed_rows": report.num_resumed,
    }


def _as_text(args: argparse.Namespace, report: ImportReport) -> str:
    totals = report.totals
    place = f"{args.out}/{MANIFEST_NAME}" if not args.shards else args.out
    hours = f"{totals.seconds / 3600:.3f} h of audio"
    lines = [f"{place}: {totals.num_samples} samples, {hours}, from {totals.num_rows} rows"]
    if args.check:
        lines.insert(0, "nothing was written (--check); without --check, the import would write:")
    lines.append("splits: " + ", ".join(f"{name} {number}" for name, number in sorted(totals.splits.items())))
    if len(totals.splits) == 1 and not args.divide:
        lines[-1] += "; training needs other samples for evaluation: --divide dev=0.1,test=0.1, or a field split"
    missing = [name for name in _shares(args.divide) if name not in totals.splits]
    if missing:
        lines[-1] += f"; no sample is in {', '.join(missing)}, because there are too few recordings"
    if report.num_resumed:
        lines.append(f"{report.num_resumed} rows had been imported before")
    if report.num_changed_ids:
        lines.append(f"{report.num_changed_ids} ids were changed; the field original_id contains the original id")
    if totals.skipped:
        listed = "" if args.check else f", listed in {args.out}/{SKIPPED_NAME}"
        lines.append(f"skipped: {totals.reasons()}{listed}")
    if report.skipped_fraction > args.max_skipped_fraction:
        lines.append(
            f"exit code 1: {report.skipped_fraction:.1%} of the rows were skipped, more than --max-skipped-fraction "
            f"{args.max_skipped_fraction:g} allows"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
