"""Train a SentencePiece tokenizer.

    earshot tokenizer data/asr.jsonl data/text.txt --vocab-size 512 --out tokenizer.model

An INPUT is a manifest (.jsonl) or a plain text file with one sentence per line. The command uses the instructions,
messages, answers and references of one split of a manifest.

Exit code 0: the tokenizer was written. 2: it was not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.errors import UserError
from model.json_text import parse_json
from tools.options import check_output
from trainer.data.config import PLACEHOLDER, TokenizerConfig
from trainer.data.metadata import earlier_texts, with_last_turn
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.tokenizer import load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="manifests (.jsonl) or plain text files")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="exact number of pieces in the vocabulary"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, ending in .model")
    parser.add_argument("--split", default="train", help="split of the manifests to use (default: train)")
    parser.add_argument(
        "--placeholder",
        default=PLACEHOLDER,
        metavar="TOKEN",
        help=f"token that marks audio in prompts (default: {PLACEHOLDER})",
    )
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
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path"
        ) from None
    if path.suffix != ".jsonl":
        yield from lines
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error}); write one object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: is not a JSON object; write one object per line")
        if row.get("split") == split:
            references = row.get("references")
            row = with_last_turn(row)
            texts = (row.get("instruction"), row.get("answer"), *(references if isinstance(references, list) else ()))
            yield from (t for t in texts if isinstance(t, str))
            yield from earlier_texts(row)


if __name__ == "__main__":
    sys.exit(main())
