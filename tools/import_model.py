"""Import a published speech LLM for further training with earshot.

    earshot import-model Qwen2-Audio-7B-Instruct models/qwen2_audio
    earshot import-model ultravox-v0_5-llama-3_2-1b models/ultravox --part Llama-3.2-1B-Instruct
    earshot train models/qwen2_audio/recipe.yaml data.root=DIR

FOLDER is the folder of the published model, with config.json, safetensors files and tokenizer. The command writes OUT
in the layout of `earshot export`, with the same weights under different names and a recipe that starts from them. If
FOLDER only refers to its LLM or its encoder, specify the folder of this part with `--part`. The supported architectures
are Qwen2-Audio, Qwen3-ASR, Ultravox, Voxtral and Audio Flamingo 3.

Exit code 0: the model was imported. 2: it was not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from tools.options import check_output, plain_faults
from trainer.__main__ import be_calm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 after printing a UserError, else 0.
    """
    options = _parser().parse_args(arguments)
    be_calm()
    try:
        check_output(str(options.out), options.out.parent, is_folder=True)
        with plain_faults(options.out):
            return _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _run(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from trainer.export.published.importing import RECIPE, Prompt, import_model

    logging.set_verbosity_error()  # transformers warns about unknown architectures, such as Ultravox.

    prompt = Prompt(options.placeholder, options.template, False if options.no_chat_template else None)
    done = import_model(
        options.folder,
        options.out,
        options.part,
        prompt,
        lambda file: print(f"converting {file}", file=sys.stderr, flush=True),
    )
    print(f"{options.out}: {done.title}, {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB")
    print(f"continue training with: earshot train {options.out / RECIPE} data.root=DIR")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="earshot import-model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder of the published model")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument(
        "--part",
        metavar="FOLDER",
        type=Path,
        action="append",
        default=[],
        help="folder of the LLM or encoder to which FOLDER only refers; may be given twice",
    )
    parser.add_argument("--placeholder", metavar="TOKEN", help="the token that stands for audio (default: the model's)")
    parser.add_argument(
        "--template", metavar="TEXT", help="the prompt, with {audio} and {instruction} (default: the model's)"
    )
    parser.add_argument("--no-chat-template", action="store_true", help="do not wrap prompts in the chat template")
    return parser


if __name__ == "__main__":
    sys.exit(main())
