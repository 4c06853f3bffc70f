"""The tokenizer with which weights were trained. A copy of it is stored next to a run's checkpoints.

Weights can be used only with the token ids with which they were trained. Therefore, a run that resumes, a run that
starts from the weights of another run, and all tools that read a checkpoint or an export use the original tokenizer,
templates and placeholder. Every checkpoint and every export contains a digest of these three, so that a different
tokenizer is detected.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.checkpoint.catalog import SUBFOLDER, TOKENIZER, find_checkpoint, open_checkpoints, read_extra
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.origin import is_export, read_export_config
from trainer.checkpoint.reader import STATE, DamagedError, check_files, read_manifest
from trainer.config.load import parse_stored_recipe
from trainer.config.schema import Recipe
from trainer.data.config import TokenizerConfig
from trainer.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from trainer.data.tokenizer_digest import save_without_code
from trainer.storage.open import join_url, open_store
from trainer.storage.store import Store

DIGEST = "tokenizer_digest"
"""The key of the digest in a checkpoint's state.json and in an export's config.json."""
FOLDER = "tokenizer"
"""The name of the folder in a run's folder that contains the run's tokenizer, if it is a Hugging Face tokenizer."""
PROCESSOR = "processor_config.json"
_EXPORTED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""The files of an export that may belong to its tokenizer."""
_KEYS = ("placeholder", "template", "text_template", "chat_template")
"""The fields of `TokenizerConfig` that must be the same as when the weights were trained."""


@dataclass(frozen=True)
class OwnedTokenizer:
    """The tokenizer of a checkpoint or export, as plain values that can be sent to other ranks."""

    owner: str
    """The URL of the checkpoint or export that contains the weights."""
    config: TokenizerConfig
    """The tokenizer settings, with the placeholder and the templates of the weights."""
    digest: str | None
    """The tokenizer's digest, or None if the weights were saved by a version that stored none."""
    files: Mapping[str, bytes]
    """The contents of the files of the stored copy, by name; empty if there is no copy."""
    where: str
    """The location of the copy, for messages."""
    named: str | None
    """The path or hub id that the checkpoint names, which is used if there is no copy; None for an export."""

    def put_into(self, cache_dir: str) -> str:
        """Write the stored copy to a cache folder, and return a path that `load_tokenizer` can read.

        If there is no stored copy, return `named`.

        Args:
            cache_dir: The cache folder. The name of the file or folder in it is a hash of the content.

        Raises:
            UserError: If there is neither a copy nor `named`, or if `cache_dir` cannot be written.
        """
        if not self.files:
            if self.named is None:
                raise UserError(
                    f"{self.owner}: neither contains nor names its tokenizer; put a copy next to the checkpoints as "
                    f"{TOKENIZER} or as a folder {FOLDER}"
                )
            return self.named
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.files.items())
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        store = open_store(str(Path(cache_dir) / "tokenizers" / f"kept-{name}"))
        for file, data in self.files.items():
            if not store.exists(file) or store.get(file) != data:
                store.put(file, [data])
        only = next(iter(self.files))
        return f"{store.url}/{only}" if len(self.files) == 1 else store.url

    def load(self, path: str) -> Tokenizer:
        """Load the tokenizer and verify its digest.

        Args:
            path: The path that `put_into` returned.

        Raises:
            UserError: If the tokenizer cannot be read, or is not the one with which the weights were trained.
        """
        try:
            found = load_tokenizer(path, self.config)
        except UserError as error:
            place = self.where if self.files else path
            raise UserError(
                f"{self.owner}: its tokenizer, {place}, cannot be read; put it back, or put a copy next to the "
                f"checkpoints as {TOKENIZER} or as a folder {FOLDER} ({error})"
            ) from None
        check_digest(found, self.digest, self.owner, self.where if self.files else path)
        return found


def check_digest(tokenizer: Tokenizer, digest: str | None, owner: str, where: str) -> None:
    """Check that weights were trained with a given tokenizer.

    Args:
        tokenizer: The tokenizer, including its templates and placeholder.
        digest: The digest that was saved with the weights; None skips the check.
        owner: The checkpoint or export, for the message.
        where: The location of the tokenizer, for the message.

    Raises:
        UserError: If the digests differ.
    """
    if digest is not None and tokenizer.digest != digest:
        raise UserError(
            f"{where}: is not the tokenizer that {owner} was trained with (digest {tokenizer.digest[:12]} instead of "
            f"{digest[:12]}: vocabulary, template or placeholder differ); put the run's own tokenizer there"
        )


def find_owned(recipe: Recipe) -> OwnedTokenizer | None:
    """Return the tokenizer of the weights from which a run resumes or starts.

    Returns:
        The tokenizer; None if the run has no checkpoint and the recipe does not set `checkpoint.start_from`.

    Raises:
        UserError: If `checkpoint.start_from` is neither a run nor a checkpoint nor an export.
    """
    newest = _newest_whole(join_url(recipe.run_url, SUBFOLDER), recipe.checkpoint.retry_sec)
    if newest is not None:
        run_dir = str(Path(recipe.train.run_dir) / recipe.name)
        owned = of_checkpoint(newest, run_dir)
    elif (start := recipe.checkpoint.start_from) is not None:
        owned = of_export(start) if is_export(start) else of_checkpoint(find_checkpoint(start))
    else:
        return None
    moved_to = recipe.data.tokenizer.path
    if moved_to is not None and not owned.files and not _is_readable(owned):
        owned = replace(owned, named=moved_to)  # The digest, if there is one, shows whether it is the same tokenizer.
    return owned


def _is_readable(owned: OwnedTokenizer) -> bool:
    """Return whether the tokenizer that the checkpoint names can be read."""
    try:
        return owned.named is not None and load_tokenizer(owned.named, owned.config) is not None
    except UserError:
        return False


def of_checkpoint(folder: Folder, run_dir: str | None = None) -> OwnedTokenizer:
    """Return the tokenizer of a checkpoint: the copy that its run stored or, without a copy, the one that it names.

    Args:
        folder: The checkpoint.
        run_dir: The run's folder, which is searched for a copy after the folder above the checkpoints; None to search
            only the latter.

    Raises:
        UserError: If the checkpoint's state cannot be read.
    """
    try:
        extra = read_extra(folder)
    except (OSError, EOFError) as error:
        raise UserError(f"{folder.url}/{STATE}: cannot be read ({error}); use another checkpoint") from None
    if extra.get("recipe") is None:
        raise UserError(f"{folder.url}/{STATE}: does not contain its recipe; resume the run for one step to add it")
    config = parse_stored_recipe(extra["recipe"], f"{folder.url}/{STATE}").data.tokenizer
    above = folder.url.rpartition("/")[0].rpartition("/")[0] or "."
    files: Mapping[str, bytes] = {}
    where = ""
    for place in dict.fromkeys(filter(None, (above, run_dir))):
        if not files and (files := _kept_files(store := open_store(place))):
            where = f"{store.url}/{TOKENIZER if TOKENIZER in files else FOLDER}"
    files = {name.removeprefix(f"{FOLDER}/"): data for name, data in files.items()}
    return OwnedTokenizer(folder.url, config, extra.get(DIGEST), files, where, extra.get("tokenizer"))


def of_export(url: str) -> OwnedTokenizer:
    """Return the tokenizer of an export.

    Raises:
        UserError: If the folder is not a complete export.
    """
    config, store = read_export_config(url), open_store(url)
    try:
        settings = json.loads(store.get(PROCESSOR))
        ours = exported_config(settings)
    except (UserError, ValueError, KeyError) as error:
        raise UserError(f"{url}/{PROCESSOR}: cannot be read ({error}); export the run again") from None
    files = {name: store.get(name) for name in _EXPORTED if store.exists(name)}
    return OwnedTokenizer(url, ours, config.get(DIGEST), files, url, None)


def exported_config(settings: Mapping[str, Any]) -> TokenizerConfig:
    """Return the placeholder and the templates in the content of an export's processor_config.json.

    Raises:
        KeyError: If one of them is missing.
    """
    return TokenizerConfig(
        placeholder=settings["placeholder"],
        template=settings["prompt_with_audio"],
        text_template=settings["prompt_without_audio"],
        chat_template=settings["as_chat"],
    )


def adopt(recipe: Recipe, owned: OwnedTokenizer) -> Recipe:
    """Return the recipe with the placeholder and the templates of the weights.

    A key that has its default value in the recipe is treated as not set.

    Raises:
        UserError: If the recipe sets a value with which the weights were not trained.
    """
    ours, default = recipe.data.tokenizer, TokenizerConfig()
    for key in _KEYS:
        given, wanted = getattr(ours, key), getattr(owned.config, key)
        if given not in (wanted, getattr(default, key)):
            raise UserError(
                f"data.tokenizer.{key} = {given!r}: {owned.owner} was trained with {wanted!r}; set the key to "
                "that value, or train from new weights (use another name, and remove checkpoint.start_from)"
            )
    values = {f.name: getattr(owned.config if f.name in _KEYS else ours, f.name) for f in fields(ours)}
    return replace(recipe, data=replace(recipe.data, tokenizer=TokenizerConfig(**values)))


def check_named(recipe: Recipe, owned: OwnedTokenizer, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer that a recipe names, if any, is the tokenizer of the weights.

    Args:
        recipe: A recipe that `adopt` returned.
        owned: The description of the weights' tokenizer.
        tokenizer: The weights' tokenizer.

    Raises:
        UserError: If the recipe's tokenizer is a different one or cannot be read.
    """
    path = recipe.data.tokenizer.path
    if path is None:
        return
    try:
        named = load_tokenizer(path, recipe.data.tokenizer)
    except UserError:
        # The original may have been moved in the meantime. The stored copy is used instead.
        if owned.files and path == owned.config.path:
            return
        raise
    if named.digest != tokenizer.digest:
        raise UserError(
            f"data.tokenizer.path = {path}: is not the tokenizer that {owned.owner} was trained with; set it to null "
            "to use the original tokenizer, or train from new weights (use another name, and remove "
            "checkpoint.start_from)"
        )


def keep_tokenizer(tokenizer: Tokenizer, recipe: Recipe, run_dir: Path, *, is_new: bool) -> None:
    """Store a copy of the tokenizer in the run's folder and next to its checkpoints, since the original may be moved.

    Args:
        tokenizer: The run's tokenizer.
        recipe: The run's recipe.
        run_dir: The run's folder.
        is_new: Whether the run has no checkpoint yet. An existing copy is replaced if true, and kept if false.
    """
    files = _files_of(tokenizer)
    for place in dict.fromkeys((str(run_dir), recipe.run_url)):
        store = open_store(place, recipe.checkpoint.retry_sec)
        before = _kept_files(store, first_only=False)
        if before == files or (before and not is_new):
            continue
        for name in before.keys() - files.keys():
            store.delete(name)
        for name, content in files.items():
            store.put(name, [content])


def _files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the contents of the files that make up a copy of a tokenizer, by name in the run's folder.

    The result is empty for a Hugging Face tokenizer that differs after it has been written and read back.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {TOKENIZER: tokenizer.path.read_bytes()}
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        save_without_code(tokenizer.inner, scratch)
        if load_tokenizer(scratch, tokenizer.config).digest != tokenizer.digest:
            return {}
        return {f"{FOLDER}/{p.name}": p.read_bytes() for p in sorted(Path(scratch).iterdir()) if p.is_file()}


def _kept_files(store: Store, first_only: bool = True) -> dict[str, bytes]:
    """Return the contents of the files of the stored copy, by name in the run's folder.

    Args:
        store: The run's folder.
        first_only: Whether to ignore a Hugging Face tokenizer if there is a SentencePiece model.
    """
    files = {TOKENIZER: store.get(TOKENIZER)} if store.exists(TOKENIZER) else {}
    if files and first_only:
        return files
    return files | {name: store.get(name) for name in store.list(f"{FOLDER}/")}


def _newest_whole(url: str, retry_sec: float) -> Folder | None:
    """Return the newest checkpoint whose state is undamaged, or None if there is none."""
    found = open_checkpoints(url, retry_sec)
    for step in reversed(found.steps()):
        folder = found.folder(step)
        try:
            check_files(folder, read_manifest(folder), [STATE])
        except DamagedError:
            continue  # The checkpoint manager reports the damage when it loads the newest checkpoint.
        return folder
    return None
