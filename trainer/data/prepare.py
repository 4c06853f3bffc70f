"""Prepare a recipe's data for loading: build shards from manifests, and train a tokenizer if needed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from model.lengths import TokenRate
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.config_files import check_files
from trainer.data.dataset_reader import DatasetReader
from trainer.data.manifest import Row, read_manifest
from trainer.data.metadata import earlier_texts, has_earlier_answers
from trainer.data.node_cache import QUEUE_BYTES, NodeCache
from trainer.data.row_check import check_fields
from trainer.data.sample import earlier_answers_error
from trainer.data.sentencepiece_training import train_sentencepiece
from trainer.data.shard_build import SKIPPED_NAME, BuildReport, ShardLimits, build_shards, source_digest
from trainer.data.shards import INDEX_NAME, Selection, ShardIndex, ShardSet, read_index
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.storage.open import join_url, open_store, scheme_of
from trainer.storage.store import LocalStore, MissingError

_NUM_FIRST = 100


def open_shards(url: str, index: ShardIndex, config: DataConfig) -> ShardSet:
    """Open shards without sending a request. Shards in a bucket are read through the node's cache if it is enabled."""
    store = open_store(url, config.retry_sec)
    if isinstance(store, LocalStore) or not config.node_cache_gib:
        return ShardSet(store, index)
    folder = config.node_cache_dir or f"{tempfile.gettempdir()}/earshot-cache-{os.getuid()}"
    max_bytes, queue_bytes = round(config.node_cache_gib * 2**30), QUEUE_BYTES // max(1, config.num_workers)
    return ShardSet(store, index, cache=_open_cache(Path(folder), max_bytes, queue_bytes))


@cache
def _open_cache(folder: Path, max_bytes: int, queue_bytes: int) -> NodeCache:
    """Return the cache of this process. All datasets share it, which bounds the memory of its queue."""
    return NodeCache(folder, max_bytes, queue_bytes)


@dataclass(frozen=True)
class PreparedDataset:
    """The shards of one dataset by split."""

    config: DatasetConfig
    splits: tuple[str, ...]
    """The splits that the dataset has."""
    shards: dict[str, tuple[str, ShardIndex]]
    """Split → (URL, index) of its shards. Every split of a manifest has its own folder of shards. If the recipe gives
    the dataset as shards, all splits have the same URL and index."""
    skipped_samples: dict[str, int]
    """Reason → number of samples of the manifest's training split that are not in the shards. The file skipped.jsonl
    next to the shards lists them."""

    def open(self, split: str, config: DataConfig) -> DatasetReader | None:
        """Return a reader for the samples of `split` that the recipe selects, or None if it selects none."""
        if split not in self.shards:
            return None
        url, index = self.shards[split]
        selection = Selection(split, self.config.tasks, self.config.subsets)
        reader = DatasetReader(self.config, open_shards(url, index, config), selection, config.read_kib << 10)
        return reader if reader.num_samples else None


@dataclass(frozen=True)
class PreparedData:
    """The prepared data, which `Loader` and `eval_samples` read."""

    config: DataConfig
    datasets: tuple[PreparedDataset, ...]
    tokenizer: Tokenizer
    tokenizer_path: str
    """The file, directory or hub id of the tokenizer."""
    rate: TokenRate
    """The adapter's rule for the number of audio tokens."""
    text_fields: tuple[str, ...]
    """The additional fields of the manifests that are tokenized because losses need them."""
    ctc_pieces: int | None
    """The value of `model.ctc_pieces`, if transcripts are divided into pieces for a CTC head; None otherwise."""
    max_tokens: int | None
    """The largest number of tokens of a sample; None for no limit."""

    def open_training(self) -> tuple[DatasetReader, ...]:
        """Return one reader per dataset; each reads the dataset's training split.

        Raises:
            UserError: If a dataset has no samples to train on.
        """
        return tuple(_open_training(s, self.config) for s in self.datasets)

    def num_by_language(self) -> Counter[tuple[str, str]]:
        """Return the number of training samples by (task, language). The language of a sample without one is empty."""
        counts: Counter[tuple[str, str]] = Counter()
        for part in self.datasets:
            selection = Selection(part.config.split, part.config.tasks, part.config.subsets)
            for group in part.shards[part.config.split][1].groups:
                if selection.matches(group):
                    # The index of shards contains the text "None" where a manifest has null.
                    language = "" if group.language == str(None) else group.language
                    counts[group.task, language] += group.num_samples
        return counts


def prepare(
    config: DataConfig,
    rate: TokenRate,
    *,
    text_fields: tuple[str, ...] = (),
    ctc_pieces: int | None = None,
    max_tokens: int | None = None,
    tokenizer_path: str | None = None,
    on_built: Callable[[BuildReport], None] = lambda report: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreparedData:
    """Build the shards and train the tokenizer of a recipe, unless they exist already.

    Several processes may call this function at the same time.

    Args:
        config: The recipe's `data` section.
        rate: The adapter's rule for the number of audio tokens.
        text_fields: The additional fields of the manifests that are tokenized (`model.losses.table.text_fields`).
        ctc_pieces: See `PreparedData.ctc_pieces`.
        max_tokens: The largest number of tokens of a sample; None selects `config.max_tokens`.
        tokenizer_path: The tokenizer of existing weights, which overrides `config.tokenizer`; None if there are no
            weights yet.
        on_built: A function that is called with a report after shards have been built.
        on_progress: A function that is called with the number of finished samples and the number of all samples while
            shards are being built.

    Raises:
        UserError: If shards cannot be made, the tokenizer cannot be read or trained, a dataset has no samples to train
            on, or an evaluation split has no samples in any dataset.
    """
    _check_datasets(config)
    datasets = tuple(_prepare_dataset(config, s, on_built, on_progress) for s in config.datasets)
    for part in datasets:
        _open_training(part, config)
    _check_eval_splits(config, datasets)
    path = tokenizer_path or config.tokenizer.path or str(_trained_tokenizer(config, datasets))
    limit = config.max_tokens if max_tokens is None else max_tokens
    tokenizer = load_tokenizer(path, config.tokenizer)
    check_loss_turns(config, tokenizer)
    if ctc_pieces is not None:
        tokenizer.pieces(ctc_pieces)  # This raises an error before the model is built.
    return PreparedData(config, datasets, tokenizer, path, rate, text_fields, ctc_pieces, limit)


def check_loss_turns(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Check that earlier answers of conversations can have labels, if the recipe asks for these labels.

    Only the first samples of each dataset are checked here. Later samples are checked when they are loaded.

    Raises:
        UserError: If there are conversations whose earlier answers the chat template changes, or a manifest or an index
            cannot be read.
    """
    if tokenizer.keeps_answers or config.loss_turns == "last":
        return
    for part in config.datasets:
        if any(has_earlier_answers(metadata) for metadata in _first_metadata(config, part)):
            raise earlier_answers_error(tokenizer, config.loss_turns)


def _first_metadata(config: DataConfig, part: DatasetConfig) -> list[dict[str, Any]]:
    """Return the fields of the first samples of a dataset. Samples that cannot be read are omitted."""
    if part.shards is not None:
        reader = _open_training(_given_shards(config, part, (part.split,)), config)
        return list(islice(reader.metadata(), _NUM_FIRST))
    path = Path(config.root) / str(part.manifest)
    try:
        with path.open("rb") as file:
            lines = list(islice(file, _NUM_FIRST))
    except OSError as error:
        raise UserError(f"data.datasets '{part.name}': {path}: {error.strerror}; check data.root") from None
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(parse_json(line))
    return [metadata for metadata in found if isinstance(metadata, dict)]


def check_stored(config: DataConfig) -> None:
    """Check that manifests and shards contain the samples that the recipe reads. Nothing is built.

    Raises:
        UserError: If a manifest or an index is missing or cannot be read, a dataset contains no samples to train on, an
            evaluation split has no samples in any dataset, or too many rows of a manifest have unusable fields.
    """
    _check_datasets(config)
    check_files(config)
    given: list[PreparedDataset] = []
    in_manifests: set[str] = set()
    for part in config.datasets:
        if part.shards is not None:
            given.append(_given_shards(config, part, (part.split, *config.eval_splits)))
            _open_training(given[-1], config)
        elif part.manifest is not None:
            manifest = Path(config.root) / part.manifest
            rows = _rows_by_split(part, manifest)
            in_manifests |= set(rows)
            for split in dict.fromkeys((part.split, *config.eval_splits)):
                check_fields(str(manifest), rows.get(split, ()), config.max_skipped_fraction)
    _check_eval_splits(config, given, in_manifests)


def _check_datasets(config: DataConfig) -> None:
    if not config.datasets:
        raise UserError("data.datasets is empty: specify at least one dataset with a manifest or shards")


def _check_eval_splits(
    config: DataConfig, datasets: Sequence[PreparedDataset], in_manifests: Set[str] = frozenset()
) -> None:
    for split in config.eval_splits:
        if split not in in_manifests and not any(s.open(split, config) for s in datasets):
            if (part := next((s for s in datasets if split in s.splits), None)) is not None:
                raise _nothing_selected(part, split)
            known = sorted({k for s in datasets for k in s.splits} | in_manifests)
            raise UserError(
                f"data.eval_splits: no dataset has samples of split '{split}'; existing splits: {known}; name some of "
                "them here, in eval.split and in eval.final_split, or make splits with `earshot import --divide`"
            )


def _prepare_dataset(
    config: DataConfig,
    part: DatasetConfig,
    on_built: Callable[[BuildReport], None],
    on_progress: Callable[[int, int], None],
) -> PreparedDataset:
    wanted = dict.fromkeys((part.split, *config.eval_splits))
    if part.shards is not None:
        return _given_shards(config, part, tuple(wanted))
    assert part.manifest is not None
    if scheme_of(config.root):
        raise UserError(
            f"data.datasets '{part.name}': data.root = {config.root} is not a local folder, which manifests need; "
            "use shards instead of a manifest"
        )
    manifest = Path(config.root) / part.manifest
    rows = _rows_by_split(part, manifest)
    present = sorted(rows)
    shards = {}
    for split in wanted:
        if split in present:
            name = f"{manifest.stem}-{split}-{source_digest(rows[split], ShardLimits())[:16]}"
            folder = Path(config.cache_dir) / "shards" / name
            if not (folder / INDEX_NAME).is_file():
                _build(config, manifest, folder, split, on_built, on_progress)
            shards[split] = (str(folder), read_index(open_store(str(folder))))
            _check_skipped_samples(config, manifest, *shards[split])
    return PreparedDataset(part, tuple(present), shards, _skipped_samples(shards[part.split][0]))


def _given_shards(config: DataConfig, part: DatasetConfig, wanted: tuple[str, ...]) -> PreparedDataset:
    url = join_url(config.root, str(part.shards))
    try:
        index = read_index(open_store(url, config.retry_sec))
    except MissingError as error:
        raise UserError(
            f"data.datasets '{part.name}': there is no {url}/{INDEX_NAME}; make shards with `earshot shards make`, or "
            f"index existing ones with `earshot shards inspect --build-index` ({error})"
        ) from None
    splits = sorted({g.split for g in index.groups})
    return PreparedDataset(part, tuple(splits), dict.fromkeys(wanted, (url, index)), {})


def _build(
    config: DataConfig,
    manifest: Path,
    folder: Path,
    split: str,
    on_built: Callable[[BuildReport], None],
    on_progress: Callable[[int, int], None],
) -> None:
    try:
        report = build_shards(
            manifest,
            str(folder),
            split=split,
            max_skipped_fraction=config.max_skipped_fraction,
            num_workers=config.num_workers,
            on_progress=on_progress,
        )
    except UserError:
        if not (folder / INDEX_NAME).is_file():  # Another process may have built the shards.
            raise
    else:
        on_built(report)


def _rows_by_split(part: DatasetConfig, manifest: Path) -> dict[str, list[Row]]:
    """Return the rows of a dataset's manifest by split.

    Raises:
        UserError: If the manifest cannot be read, or has no rows to train on.
    """
    rows: dict[str, list[Row]] = {}
    found = read_manifest(manifest)
    for row in found:
        if row.error is None:
            rows.setdefault(row.metadata["split"], []).append(row)
    if found and not rows:
        first = min(found, key=lambda row: row.line)
        raise UserError(
            f"{manifest}, line {first.line}: {first.error}; no line of the manifest can be used, so correct its lines"
        )
    if part.split not in rows:
        raise UserError(f"data.datasets '{part.name}': {manifest} has no split '{part.split}'; it has {sorted(rows)}")
    return rows


def _skipped_samples(url: str) -> dict[str, int]:
    try:
        lines = open_store(url).get(SKIPPED_NAME).splitlines()
    except MissingError:
        return {}
    return dict(Counter(_reason(f"{url}/{SKIPPED_NAME}", line) for line in lines))


def _reason(where: str, line: bytes) -> str:
    try:
        return str(parse_json(line)["reason"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{where}: damaged; delete its folder and rerun the same command to build new shards") from None


def _check_skipped_samples(config: DataConfig, manifest: Path, url: str, index: ShardIndex) -> None:
    """Check the fraction of skipped samples, since existing shards may have been built with a higher limit.

    Raises:
        UserError: If more than `data.max_skipped_fraction` of the samples were skipped.
    """
    num_skipped_samples = sum((counts := _skipped_samples(url)).values())
    total = num_skipped_samples + index.num_samples
    if num_skipped_samples > config.max_skipped_fraction * total:
        raise UserError(
            f"data.max_skipped_fraction = {config.max_skipped_fraction}: {num_skipped_samples} of {total} samples of "
            f"{manifest} cannot be used ({counts}), see {url}/{SKIPPED_NAME}; fix the samples or raise the fraction"
        )


def _open_training(part: PreparedDataset, config: DataConfig) -> DatasetReader:
    reader = part.open(part.config.split, config)
    if reader is None:
        raise _nothing_selected(part, part.config.split)
    return reader


def _nothing_selected(part: PreparedDataset, split: str) -> UserError:
    known = sorted({f"{g.split}/{g.task}/{g.subset}" for _, index in part.shards.values() for g in index.groups})
    return UserError(
        f"data.datasets '{part.config.name}': split '{split}', tasks {list(part.config.tasks)} and subsets "
        f"{list(part.config.subsets)} select nothing; the dataset has: {', '.join(known)}"
    )


def _trained_tokenizer(config: DataConfig, datasets: tuple[PreparedDataset, ...]) -> Path:
    readers = [_open_training(s, config) for s in datasets]
    tokenizer = config.tokenizer
    settings = [tokenizer.train_vocab_size, tokenizer.placeholder, tokenizer.template, tokenizer.text_template]
    key = json.dumps([settings, [[r.shards.index.digest, repr(r.selection)] for r in readers]])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / "tokenizers" / f"{name}.model"
    if not path.is_file():
        train_sentencepiece(_texts(config, readers), tokenizer.train_vocab_size, path, tokenizer.placeholder)
    return path


def _texts(config: DataConfig, readers: list[DatasetReader]) -> Iterator[str]:
    """Yield the prompts and answers of all training samples, and the alternative references of the answers."""
    template = config.tokenizer.template.replace("{audio}", " ")
    for reader in readers:
        for metadata in reader.metadata():
            yield template.replace("{instruction}", str(metadata.get("instruction", "")))
            yield str(metadata.get("answer", ""))
            references = metadata.get("references")
            yield from (r for r in (references if isinstance(references, list) else ()) if isinstance(r, str))
            yield from earlier_texts(metadata)
