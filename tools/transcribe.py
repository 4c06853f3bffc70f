"""Transcribe audio files, or ask a model a question about audio files.

    earshot transcribe out/model audio.flac                               a recording of any length
    earshot transcribe runs/demo a.wav b.wav --prompt "Who is speaking?"      a question about each recording

MODEL is a folder from `earshot export`, a checkpoint or a run. Recordings longer than a window are transcribed in
overlapping windows, and the transcripts are joined. With --prompt, the model receives each recording as a whole, unless
--window is given.

Exit code 0: all files have an answer. 2: a file or the model cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError, printable_lines
from tools.options import check_at_least, check_model
from trainer.__main__ import be_calm

if TYPE_CHECKING:
    from trainer.evaluation.offline.answer import Answerer

PROMPT = "Transcribe the speech."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="earshot transcribe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="an exported folder, a checkpoint, or a run")
    parser.add_argument(
        "audio",
        nargs="*",
        type=Path,
        metavar="AUDIO",
        help="audio files; without audio files, the model only receives the prompt",
    )
    parser.add_argument("--prompt", default=PROMPT, help=f"instruction (default: {PROMPT!r})")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of tokens of an answer (default: as in the training run)",
    )
    parser.add_argument(
        "--window",
        type=float,
        metavar="SEC",
        help="length of the windows into which longer recordings are split "
        "(default: that of the longest training clip, but at most 30 seconds)",
    )
    parser.add_argument(
        "--overlap", type=float, metavar="SEC", help="minimum overlap of windows (default: a sixth of a window)"
    )
    options = parser.parse_args(arguments)
    be_calm()
    try:
        return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    check_at_least(1, max_new_tokens=options.max_new_tokens)
    check_model(options.model)
    if missing := [path for path in options.audio if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file; check the path")
    import torch

    from trainer.evaluation.offline.answer import Answerer, Decoding, Windows
    from trainer.evaluation.offline.model import DTYPES, default_dtype, find_model, load_model

    origin = find_model(options.model)
    windows = Windows.of(origin, options.window, options.overlap)
    in_windows = options.prompt == PROMPT or options.window is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(origin, DTYPES[default_dtype(device)], device)
    longest = options.max_new_tokens or origin.max_new_tokens
    answerer = Answerer(loaded, windows, Decoding(longest, 1, batch_samples=16, batch_sec=480.0))
    ended = 0
    for path in options.audio or [None]:
        text, finished = _answer(answerer, path, options.prompt, in_windows)
        ended += not finished
        print(printable_lines(text if len(options.audio) < 2 else f"{path}: {text}"))
    if ended:
        answers = "1 answer was" if ended == 1 else f"{ended} answers were"
        print(f"{answers} cut off at {longest} tokens; raise --max-new-tokens", file=sys.stderr)
    return 0


def _answer(answerer: Answerer, path: Path | None, prompt: str, in_windows: bool) -> tuple[str, bool]:
    """Return the answer, and whether it ended before the maximum length. The use of windows is reported on stderr."""
    from trainer.data.decode import decode_audio
    from trainer.data.errors import SampleError
    from trainer.evaluation.offline.answer import Question

    try:
        clips = () if path is None else (decode_audio(path.read_bytes()),)
        (answer,) = answerer([Question(str(path), clips, {"instruction": prompt}, in_windows)])
        if isinstance(answer, SampleError):
            raise answer
    except SampleError as error:
        raise UserError(f"{path or 'prompt'}: {error}") from None
    if answer.num_windows > 1:
        windows = answerer.windows
        print(
            f"{path}: {answer.audio_sec:.1f} s were transcribed in {answer.num_windows} overlapping windows of "
            f"{windows.window_sec:g} s; no audio was cut off",
            file=sys.stderr,
        )
    return answer.hypothesis, answer.finished


if __name__ == "__main__":
    sys.exit(main())
