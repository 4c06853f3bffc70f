"""Train a SentencePiece model: python -m tools.train_tokenizer INPUT [INPUT …] --vocab-size N --out FILE.model.

An INPUT is a manifest (.jsonl: instructions, answers and references of its training split are used) or plain text, one
sentence per line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.errors import UserError
from tools.options import check_output
from trainer.data.config import PLACEHOLDER, TokenizerConfig
from trainer.data.tokenizer import load_tokenizer, train_sentencepiece


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: the model is written. 2: nothing was; one line on stderr says why."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_tokenizer", description=__doc__)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces, exactly")
    parser.add_argument("--out", type=Path, required=True, help="file to write, ending in .model")
    parser.add_argument("--split", default="train", help="split of manifests that is used (default: train)")
    parser.add_argument("--placeholder", default=PLACEHOLDER, help=f"audio placeholder token (default: {PLACEHOLDER})")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix != ".model":
            raise UserError(f"--out {args.out}: the name must end in .model")
        check_output(f"--out {args.out}", args.out)
        config = TokenizerConfig(path=str(args.out), placeholder=args.placeholder)
        texts = (text for path in args.inputs for text in _texts(path, args.split))
        train_sentencepiece(texts, args.vocab_size, args.out, args.placeholder, exact=True)
        tokenizer = load_tokenizer(str(args.out), config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {tokenizer.vocab_size} pieces; use it with data.tokenizer.path={args.out}")
    return 0


def _texts(path: Path, split: str) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if path.suffix != ".jsonl":
        yield from lines
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); one object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; one object per line")
        if row.get("split") == split:
            texts = (row.get("instruction"), row.get("answer"), *(row.get("references") or ()))
            yield from (t for t in texts if isinstance(t, str))


if __name__ == "__main__":
    sys.exit(main())
