"""Tests that commands, options, recipe keys, files and links in the documents exist. Some commands are executed."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from model.errors import UserError
from tools import cli
from trainer.config.load import load_recipe, recipe_names

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "BENCHMARKS.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
    ROOT / "ds_configs" / "README.md",
]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PROGRAMS = ("earshot", "python", "make", "sbatch", "slurm/submit.sh", "slurm/sweep.sh")
FOLDERS = ("bench", "docs", "ds_configs", "model", "slurm", "tests", "tools", "trainer")


@dataclass(frozen=True)
class Documented:
    """A command in a document."""

    where: str
    words: tuple[str, ...]
    """The words of the command, without comments and environment variables."""

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def commands_in(text: str, where: str) -> Iterator[Documented]:
    """Yield the commands in console blocks (lines that begin with `$`) and in inline code."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.findall(r"^\$ (.*)", block.replace("\\\n", " "), re.MULTILINE)]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in lines:
        for part in re.split(r"\s&&\s", re.sub(r"\s#.*|\s… .*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:  # other code with a single quotation mark
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words and words[0] in PROGRAMS and words[1:]:
                yield Documented(where, tuple(w for w in words if w != "…"))


def all_commands() -> list[Documented]:
    found = [
        command
        for document in DOCUMENTS
        for command in commands_in(document.read_text(encoding="utf-8"), str(document.relative_to(ROOT)))
    ]
    return list(dict.fromkeys(found))


COMMANDS = all_commands()


@lru_cache
def help_of(module: str) -> str:
    """Return what `python -m MODULE --help` prints."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    return text.getvalue()


def options_of(module: str) -> set[str]:
    """Return the options in a module's `--help`, or in its source if the module is a benchmark."""
    if module.startswith(("tools.", "trainer.__main__", "trainer.job")):
        return set(re.findall(r"--[a-z][a-z-]*", help_of(module)))
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return set(re.findall(r"\"(--[a-z][a-z-]*)", Path(spec.origin).read_text(encoding="utf-8")))


def problems(command: Documented) -> Iterator[str]:
    """Yield a description of each mistake in a command."""
    program, *words = command.words
    if program == "make":
        yield from (f"no target {w} in the Makefile" for w in words if "=" not in w and w not in TARGETS)
        return
    if program in ("sbatch", "slurm/submit.sh", "slurm/sweep.sh"):
        if program == "slurm/sweep.sh":
            words = [w.split(",")[0] for w in words]  # keeps the first value of each list
        scripts = [w for w in words if w.endswith(".sh")]
        yield from (f"no script {s}" for s in scripts if not (ROOT / s).is_file())
        yield from recipe_problems(words, "mowe_70b")
        return
    if program == "python":
        if words[0] != "-m" or not words[1:]:
            return
        module, words = words[1], words[2:]
        if importlib.util.find_spec(module) is None:
            yield f"no module {module}"
            return
        if module.partition(".")[0] not in ("bench", "tools", "trainer"):
            return
        module = {"trainer": "trainer.__main__", "trainer.job": "trainer.job.__main__"}.get(module, module)
        if module == "trainer.restart":
            module = "trainer.run.restart"
    else:
        if words[0].startswith("-"):
            if words[0] not in ("--help", "--version"):
                yield f"earshot has no option {words[0]}"
            return
        found, words = cli._find(words)
        if found is None:
            yield "no such command of earshot"
            return
        module = found.module
    known = options_of(module)
    given = [w.split("=")[0] for w in words if w.startswith("--")]
    yield from (f"{module} has no option {option}" for option in given if option not in known | {"--help"})
    if module in ("trainer.__main__", "tools.plan"):
        yield from recipe_problems(words, None)


def recipe_problems(words: list[str], default: str | None) -> Iterator[str]:
    """Yield the error from a command whose recipe has an unknown key or an invalid value.

    Commands with plug-ins are not checked here, because the tests of plug-ins run them.
    """
    if any(w.startswith("plugins=") for w in words):
        return
    recipe = next((w for w in words if w in recipe_names()), default)
    keys = [w for w in words if "=" in w and not w.startswith("--") and ":" not in w.split("=")[0]]
    named = [k for k in keys if re.match(r"[a-z_]+(\.|=)", k)]
    of_options = [value for option, value in itertools.pairwise(words) if option in ("--accelerator", "--sweep")]
    named = [k for k in named if k not in of_options]
    try:
        load_recipe(recipe or "debug", named)
    except UserError as error:
        yield str(error)


def test_commands_are_found() -> None:
    text = "Run `earshot plan X`.\n```console\n$ A=b make demo && earshot train X \\\n    a.b=1   # why\nprinted\n```\n"
    found = [c.words for c in commands_in(text, "here")]
    assert found == [("make", "demo"), ("earshot", "train", "X", "a.b=1"), ("earshot", "plan", "X")]
    assert len(COMMANDS) > 100, len(COMMANDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make demos", "no target demos"),
        ("earshot trian X", "no such command"),
        ("earshot plan debug --fitt", "no option --fitt"),
        ("earshot train debug optim.lrr=1", "optim.lrr"),
        ("python -m tools.nothing", "no module"),
        ("python -m bench.padding --nothing", "no option --nothing"),
        ("sbatch slurm/nothing.sh", "no script"),
    ],
)
def test_a_wrong_command_is_found(line: str, message: str) -> None:
    assert message in "\n".join(problems(Documented("here", tuple(shlex.split(line)))))


@pytest.mark.parametrize("where", sorted({c.where for c in COMMANDS}))
def test_documented_commands_exist(where: str) -> None:
    wrong = [f"{c}: {problem}" for c in COMMANDS if c.where == where for problem in problems(c)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.words[1] == "recipe" and "SECTION" not in c.words and "NAME" not in c.words],
    ids=str,
)
def test_documented_questions_about_recipes_are_answered(
    command: Documented, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [w for w in command.words[1:] if w != ">" and not w.startswith("docs/")]
    if words == ["recipe", "--keys"] or words == ["recipe", "--show"]:
        words = words[:1]
    assert cli.main(words) == 0
    assert capsys.readouterr().out


def test_documented_init_writes_what_the_documents_say(tmp_path: Path) -> None:
    assert cli.main(["init", str(tmp_path / "mine")]) == 0
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"slurm", "ds_configs", "recipe.yaml"}


def test_documented_files_exist() -> None:
    pattern = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./*-]+?)(?:::?[\w:]+)?`")
    wrong = [
        f"{document.relative_to(ROOT)}: {path}"
        for document in DOCUMENTS
        if document.name != "CHANGELOG.md"  # names files that have been removed since
        for path in pattern.findall(document.read_text(encoding="utf-8"))
        if not any(ROOT.glob(path.rstrip("/")))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_is_on_the_map() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [p.parent.relative_to(ROOT) for p in (ROOT / "trainer").glob("*/__init__.py")]
    assert packages
    assert not [p for p in packages if f"`{p}/`" not in text]


def test_links_lead_to_files() -> None:
    wrong = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        if not (document.parent / link).exists()
    ]
    assert not wrong, "\n".join(wrong)
