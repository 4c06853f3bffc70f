"""Ask an exported model about an audio file.

    python -m tools.transcribe OUT audio.flac --prompt "Transcribe the speech."

Runs the code in OUT, as `trust_remote_code` does: use it on folders that you trust.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROMPT = "Transcribe the speech."


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line that tells what to mend."""
    parser = argparse.ArgumentParser(prog="python -m tools.transcribe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="OUT", help="folder that tools.export made")
    parser.add_argument("audio", nargs="*", help="audio files (none: the prompt alone)")
    parser.add_argument("--prompt", default=PROMPT, help=f"instruction (default: {PROMPT!r})")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: as the model was evaluated)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    missing = [p for p in options.audio if not Path(p).is_file()]
    if missing or not (Path(options.folder) / "processor_config.json").is_file():
        what = (
            f"{missing[0]}: no such file" if missing else f"{options.folder}: no processor_config.json; export it first"
        )
        print(f"error: {what}", file=sys.stderr)
        return 2
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(options.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.folder, trust_remote_code=True).eval()
    longest = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    for path in options.audio or [None]:
        try:
            inputs = processor(audio=path, text=options.prompt)
        except (ValueError, RuntimeError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        (text,) = processor.batch_decode(model.generate(**inputs, **longest))
        print(text if len(options.audio) < 2 else f"{path}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
