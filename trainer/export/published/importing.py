"""Convert a published speech LLM to the layout of an export, from which a run can start.

Tensors keep their values and dtypes. Only their names change. Weight files are converted one at a time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from model.errors import UserError
from trainer.config.evaluation import EvalConfig
from trainer.data.config import DataConfig, TokenizerConfig
from trainer.data.tokenizer import Tokenizer, load_tokenizer, read_transformers
from trainer.data.tokenizer_digest import save_without_code
from trainer.export.publish import write_model_files
from trainer.export.published.folder import Published, audio_tree, find_tensors, read_json, read_published
from trainer.export.tokenizer import write_tokenizer
from trainer.files import locked

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Prompt:
    """Prompt settings that replace the defaults of an architecture. None keeps the default."""

    placeholder: str | None = None
    template: str | None = None
    as_chat: bool | None = None


@dataclass(frozen=True)
class Imported:
    """A summary of an imported model."""

    title: str
    num_tensors: int
    num_bytes: int


def import_model(
    folder: Path,
    out: Path,
    parts: Sequence[Path] = (),
    prompt: Prompt = Prompt(),
    on_file: Callable[[Path], None] = lambda file: None,
) -> Imported:
    """Convert a published model to a folder from which a run can start, and write a recipe for this run.

    Args:
        folder: The published model.
        out: The folder to create.
        parts: Folders of the LLM and the encoder, which are searched for tensors that `folder` does not contain.
        prompt: The prompt settings that differ from the defaults of the architecture.
        on_file: A function that is called with each weight file before it is converted.

    Returns:
        A summary.

    Raises:
        UserError: If the architecture is unknown, tensors are missing or do not fit, the tokenizer lacks
            tokens of the prompt, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; remove it or choose another name")
    published = read_published(folder, parts)
    tensors = find_tensors(published, parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.part"
    try:
        with locked(out.parent / f".{out.name}.lock", wait=False):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                _write_text_side(published, prompt, temporary)
                num_bytes = 0
                files = list(dict.fromkeys(tensor.file for tensor in tensors))
                weight_map: dict[str, str] = {}
                for number, file in enumerate(files, 1):
                    on_file(file)
                    name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else _SINGLE
                    names = {tensor.published: tensor.own for tensor in tensors if tensor.file == file}
                    num_bytes += _convert(file, names, temporary / name)
                    weight_map |= dict.fromkeys(names.values(), name)
                if len(files) > 1:
                    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
                    (temporary / f"{_SINGLE}.index.json").write_text(json.dumps(index, indent=1) + "\n")
                _write_recipe(published, out, temporary)
                temporary.rename(out)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except BlockingIOError:
        raise UserError(f"{out}: another command is writing it; wait for it, or choose another name") from None
    return Imported(published.architecture.title, len(tensors), num_bytes)


_SINGLE = "model.safetensors"


def _convert(file: Path, names: dict[str, str], target: Path) -> int:
    """Copy tensors to a new file under different names, and return their size in bytes."""
    with safe_open(str(file), framework="pt") as opened:
        tensors = {own: opened.get_tensor(name) for name, own in names.items()}
    save_file(tensors, target, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_text_side(published: Published, prompt: Prompt, folder: Path) -> None:
    """Write the config, the code, the tokenizer, the processor and the generation settings of the model."""
    inner = _read_tokenizer(published, prompt)
    settings = _settings(published, prompt, inner)
    with tempfile.TemporaryDirectory() as scratch:
        save_without_code(inner, scratch)
        tokenizer = load_tokenizer(scratch, settings)
        if tokenizer.vocab_size > published.hf_config.vocab_size:
            raise UserError(
                f"{published.folder}: its tokenizer has {tokenizer.vocab_size} tokens, but the LLM has only "
                f"{published.hf_config.vocab_size} rows; download the folder again"
            )
        write_tokenizer(tokenizer, folder)
    data = replace(_data(published), tokenizer=settings)
    description = published.description(tokenizer.vocab_size)
    write_model_files(description.tree(), description.audio, tokenizer, data, _dtype(published), folder)
    _write_generation_config(published, tokenizer, folder)


def _write_generation_config(published: Published, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the settings for greedy generation. Evaluations use them too.

    Generation stops at an end token of the original model, or at a token that ends answers in training.
    """
    stored = published.folder / "generation_config.json"
    given: dict[str, Any] = read_json(stored) if stored.is_file() else {}
    ends = given.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    unused = list(range(tokenizer.vocab_size, published.hf_config.vocab_size))
    content = {
        "do_sample": False,
        "max_new_tokens": given.get("max_new_tokens", EvalConfig().max_new_tokens),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted({*ends, *tokenizer.end_ids}),
        "pad_token_id": tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        "suppress_tokens": unused or None,
    }
    (folder / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_tokenizer(published: Published, prompt: Prompt) -> Any:
    """Return the transformers tokenizer of a published model, with the chat template of its processor."""
    inner = read_transformers(str(published.folder), str(published.folder))
    for role, token in published.architecture.special_tokens.items():
        if getattr(inner, role) is None and token in inner.get_vocab():
            setattr(inner, role, token)
    as_chat = published.architecture.as_chat if prompt.as_chat is None else prompt.as_chat
    if as_chat:
        template = _stored_template(published.folder) or inner.chat_template or published.architecture.chat_template
        if template is None:
            raise UserError(
                f"{published.folder}: has no chat template; add chat_template.jinja, or pass --no-chat-template"
            )
        inner.chat_template = template
    return inner


def _stored_template(folder: Path) -> str | None:
    """Return the chat template of a folder's processor, or None if there is none."""
    if (plain := folder / "chat_template.jinja").is_file():
        return plain.read_text(encoding="utf-8")
    if (stored := folder / "chat_template.json").is_file():
        template = read_json(stored).get("chat_template")
        return template if isinstance(template, str) else None
    return None


def _settings(published: Published, prompt: Prompt, inner: Any) -> TokenizerConfig:
    """Return the tokenizer settings.

    Raises:
        UserError: If the tokenizer has no token that can stand for audio.
    """
    architecture = published.architecture
    candidates = architecture.placeholders if prompt.placeholder is None else (prompt.placeholder,)
    known = [token for token in candidates if inner.convert_tokens_to_ids(token) not in (None, inner.unk_token_id)]
    if not known:
        raise UserError(
            f"{published.folder}: none of {', '.join(candidates)} is a token of its tokenizer; pass "
            "--placeholder TOKEN with a token that no text contains"
        )
    return TokenizerConfig(
        placeholder=known[0],
        template=architecture.template if prompt.template is None else prompt.template,
        text_template=architecture.text_template,
        chat_template=architecture.as_chat if prompt.as_chat is None else prompt.as_chat,
    )


def _data(published: Published) -> DataConfig:
    """Return data settings that allow the clip lengths that the original model accepts."""
    architecture, primary = published.architecture, published.model.primary
    assert primary is not None
    shortest = primary.window_sec if architecture.pads_clips else architecture.min_audio_sec
    return DataConfig(min_audio_sec=shortest, max_audio_sec=architecture.max_windows * primary.window_sec)


def _dtype(published: Published) -> str:
    """Return the dtype of the weights, as stated in config.json."""
    return str(published.config.get("dtype") or published.config.get("torch_dtype") or "float32")


def _write_recipe(published: Published, out: Path, folder: Path) -> None:
    """Write a recipe for a short run that starts from the imported model, with the settings that the model requires."""
    data = _data(published)
    tree = {
        "name": published.config["model_type"],
        "model": {**audio_tree(published.model), "llm": {"config": dict(published.model.llm.config)}},
        "data": {
            "datasets": [{"name": "train", "manifest": "train.jsonl"}],
            "min_audio_sec": data.min_audio_sec,
            "max_audio_sec": data.max_audio_sec,
        },
        "optim": {"lr": 1.0e-5},
        "train": {"steps": 1000},
        "checkpoint": {"start_from": str(out.absolute())},
    }
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)
    (folder / RECIPE).write_text(_HEADER.format(title=published.architecture.title, out=out) + text, encoding="utf-8")


_HEADER = """\
# {title}, as imported by `earshot import-model`. To continue training:
#   earshot train {out}/recipe.yaml data.root=DIR        DIR/train.jsonl is a manifest (docs/data.md)
# The tokenizer, the placeholder and the prompt come from the imported folder.
"""
