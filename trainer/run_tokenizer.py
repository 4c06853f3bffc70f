"""The tokenizer that weights belong to: kept next to a run's checkpoints, found again, and told from any other.

An id means a piece of text only together with the weights that were trained with it. So a run that resumes, a run that
begins with the weights of another one, and everything that reads a checkpoint or an export take the tokenizer, the
templates and the placeholder of those weights. A digest of them is in every checkpoint and every export.
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
from trainer.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from trainer.storage.open import join_url, open_store
from trainer.storage.store import Store

DIGEST = "tokenizer_digest"
"""Key of the digest, in a checkpoint's state.json and in an export's config.json."""
FOLDER = "tokenizer"
"""In a run, next to its checkpoints, where its tokenizer is a Hugging Face one."""
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
"""Files of an export that a tokenizer may consist of."""
_KEYS = ("placeholder", "template", "text_template", "chat_template")
"""Fields of `TokenizerConfig` that belong to the weights."""


@dataclass(frozen=True)
class OwnedTokenizer:
    """The tokenizer that some weights were trained with; plain values, so that it can be sent to other ranks."""

    owner: str
    """The checkpoint or the export."""
    config: TokenizerConfig
    """With the placeholder and the templates of the weights."""
    digest: str | None
    """None: the weights were saved before checkpoints held a digest."""
    files: Mapping[str, bytes]
    """The kept tokenizer; empty: none was kept."""
    where: str
    """Of `files`, for messages."""
    named: str | None
    """The path or hub id that the checkpoint names; it is read if there are no `files`."""

    def put_into(self, cache_dir: str) -> str:
        """Return a path that `load_tokenizer` reads; `files` are put below `cache_dir`, under a name of their content.

        Raises:
            UserError: there is no tokenizer; `cache_dir` cannot be written.
        """
        if not self.files:
            if self.named is None:
                raise UserError(
                    f"{self.owner}: neither holds nor names its tokenizer; put it next to the checkpoints as "
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
        """Return the tokenizer at `path`, which `put_into` returned.

        Raises:
            UserError: it cannot be read, or it is not the one that the weights were trained with.
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
    """Compare a tokenizer with the digest that weights were saved with; None: there is nothing to compare with.

    Raises:
        UserError: the weights were trained with another tokenizer, template or placeholder.
    """
    if digest is not None and tokenizer.digest != digest:
        raise UserError(
            f"{where}: not the tokenizer that {owner} was trained with (digest {tokenizer.digest[:12]} instead of "
            f"{digest[:12]}: vocabulary, template or placeholder differ); put the run's own tokenizer there"
        )


def find_owned(recipe: Recipe) -> OwnedTokenizer | None:
    """Return the tokenizer of the weights that `recipe` goes on with; None: it begins with new weights.

    Raises:
        UserError: `checkpoint.start_from` names neither a run nor a checkpoint nor an export.
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
        owned = replace(owned, named=moved_to)  # the digest, where there is one, tells whether it is the same
    return owned


def _is_readable(owned: OwnedTokenizer) -> bool:
    """Whether there is a tokenizer where the checkpoint says that it is."""
    try:
        return owned.named is not None and load_tokenizer(owned.named, owned.config) is not None
    except UserError:
        return False


def of_checkpoint(folder: Folder, run_dir: str | None = None) -> OwnedTokenizer:
    """Return the tokenizer of a checkpoint: kept next to the run's checkpoints or in `run_dir`, else the one it names.

    Args:
        folder: the checkpoint.
        run_dir: of the run, where the checkpoints lie elsewhere.

    Raises:
        UserError: the checkpoint's state cannot be read.
    """
    try:
        extra = read_extra(folder)
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{folder.url}/{STATE}: cannot be read ({error}); take another checkpoint") from None
    if "recipe" not in extra:
        raise UserError(f"{folder.url}/{STATE}: does not hold its recipe; continue the run for a step")
    config = parse_stored_recipe(extra["recipe"], f"{folder.url}/{STATE}").data.tokenizer
    beside = folder.url.rpartition("/")[0].rpartition("/")[0] or "."
    files: Mapping[str, bytes] = {}
    where = ""
    for place in dict.fromkeys(filter(None, (beside, run_dir))):
        if not files and (files := _kept_files(store := open_store(place))):
            where = f"{store.url}/{TOKENIZER if TOKENIZER in files else FOLDER}"
    files = {name.removeprefix(f"{FOLDER}/"): data for name, data in files.items()}
    return OwnedTokenizer(folder.url, config, extra.get(DIGEST), files, where, extra.get("tokenizer"))


def of_export(url: str) -> OwnedTokenizer:
    """Return the tokenizer in an exported folder.

    Raises:
        UserError: the folder is not a whole export.
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
    """Return what an export's processor_config.json says of placeholder and templates."""
    return TokenizerConfig(
        placeholder=settings["placeholder"],
        template=settings["prompt_with_audio"],
        text_template=settings["prompt_without_audio"],
        chat_template=settings["as_chat"],
    )


def adopt(recipe: Recipe, owned: OwnedTokenizer) -> Recipe:
    """Return `recipe` with the placeholder and the templates of the weights.

    A key that has its default value counts as not given.

    Raises:
        UserError: the recipe gives another value.
    """
    ours, default = recipe.data.tokenizer, TokenizerConfig()
    for key in _KEYS:
        given, wanted = getattr(ours, key), getattr(owned.config, key)
        if given not in (wanted, getattr(default, key)):
            raise UserError(
                f"data.tokenizer.{key} = {given!r}: {owned.owner} was trained with {wanted!r}; give the key that "
                "value, or train from new weights (another name, no checkpoint.start_from)"
            )
    values = {f.name: getattr(owned.config if f.name in _KEYS else ours, f.name) for f in fields(ours)}
    return replace(recipe, data=replace(recipe.data, tokenizer=TokenizerConfig(**values)))


def check_named(recipe: Recipe, owned: OwnedTokenizer, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer that an adopted `recipe` names, if it names one, with that of the weights.

    Raises:
        UserError: it is another one, or it cannot be read.
    """
    path = recipe.data.tokenizer.path
    if path is None:
        return
    try:
        named = load_tokenizer(path, recipe.data.tokenizer)
    except UserError:
        # The copy that was kept serves a run whose original has been moved away since.
        if owned.files and path == owned.config.path:
            return
        raise
    if named.digest != tokenizer.digest:
        raise UserError(
            f"data.tokenizer.path = {path}: another tokenizer than {owned.owner} was trained with; set it to null (the "
            "run's own is taken), or train from new weights (another name, no checkpoint.start_from)"
        )


def keep_tokenizer(tokenizer: Tokenizer, recipe: Recipe, run_dir: Path, *, is_new: bool) -> None:
    """Put a copy of the tokenizer into the run's folder and next to its checkpoints: its original may be moved away.

    Args:
        tokenizer: of the run.
        recipe: of the run.
        run_dir: its folder.
        is_new: whether the run has no checkpoint yet: what lies there is another run's then.
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
    """What is kept, by name in the run's folder; nothing for a tokenizer that does not survive being written."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {TOKENIZER: tokenizer.path.read_bytes()}
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.inner.save_pretrained(scratch)
        if load_tokenizer(scratch, tokenizer.config).digest != tokenizer.digest:
            return {}
        return {f"{FOLDER}/{p.name}": p.read_bytes() for p in sorted(Path(scratch).iterdir()) if p.is_file()}


def _kept_files(store: Store, first_only: bool = True) -> dict[str, bytes]:
    """Files of the kept tokenizer, by name in the run's folder."""
    files = {TOKENIZER: store.get(TOKENIZER)} if store.exists(TOKENIZER) else {}
    if files and first_only:
        return files
    return files | {name: store.get(name) for name in store.list(f"{FOLDER}/")}


def _newest_whole(url: str, retry_sec: float) -> Folder | None:
    """The newest checkpoint whose state is as it was written; None: there is none."""
    found = open_checkpoints(url, retry_sec)
    for step in reversed(found.steps()):
        folder = found.folder(step)
        try:
            check_files(folder, read_manifest(folder), [STATE])
        except DamagedError:
            continue  # the manager names it when it looks for the checkpoint to load
        return folder
    return None
