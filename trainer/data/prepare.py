"""From the recipe's data section to what loaders read: shards made of manifests, the tokenizer trained if asked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from trainer.data.config import DataConfig, SetConfig
from trainer.data.manifest import (
    MAX_SHARD_BYTES,
    MAX_SHARD_SAMPLES,
    SKIPPED_NAME,
    BuildReport,
    Row,
    build_shards,
    read_manifest,
)
from trainer.data.shards import FORMAT_VERSION, INDEX_NAME, Selection, ShardSet
from trainer.data.source import SetReader
from trainer.data.store import LocalStore
from trainer.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece


@dataclass(frozen=True)
class PreparedSet:
    """One set's shard folders by split."""

    config: SetConfig
    splits: tuple[str, ...]
    """Splits that the set has."""
    folders: dict[str, Path]
    """Made from a manifest: one folder per split that the manifest has. Given as shards: the same for every split."""
    left_out: dict[str, int]
    """Samples of the training split that are not in its shards, by reason; listed in its folder's skipped.jsonl."""

    def open(self, split: str) -> SetReader | None:
        """Reader of the set's selection of `split`; None if it has no such sample."""
        if split not in self.folders:
            return None
        selection = Selection(split, self.config.tasks, self.config.subsets)
        reader = SetReader(self.config, ShardSet(LocalStore(self.folders[split])), selection)
        return reader if reader.num_samples else None


@dataclass(frozen=True)
class PreparedData:
    """What `Loader` and `eval_samples` read."""

    config: DataConfig
    sets: tuple[PreparedSet, ...]
    tokenizer: Tokenizer
    tokenizer_path: str
    """A file, directory or hub id; for export."""
    strides: tuple[int, ...]
    ctc: bool

    def open_training(self) -> tuple[SetReader, ...]:
        """One reader per set, for its training split. UserError if a set has nothing to read."""
        return tuple(_open_training(s) for s in self.sets)


def prepare(
    config: DataConfig,
    strides: tuple[int, ...],
    *,
    ctc: bool = False,
    on_built: Callable[[BuildReport], None] = lambda report: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreparedData:
    """Make what is not there yet. Idempotent; several processes may call it at once.

    Args:
        config: the recipe's data section.
        strides: of the model's adapter.
        ctc: whether ASR samples carry CTC targets (`model.ctc_weight` > 0).
        on_built: called with the account of every shard set that had to be made.
        on_progress: called with (samples done, samples in all) while one is made.

    Raises:
        UserError: see `build_shards`, `load_tokenizer`, `train_sentencepiece`; a set without samples to train on; an
            evaluation split that no set has.
    """
    if not config.sets:
        raise UserError("data.sets is empty: give at least one set with a manifest or shards")
    sets = tuple(_prepare_set(config, s, on_built, on_progress) for s in config.sets)
    for split in config.eval_splits:
        if not any(s.open(split) for s in sets):
            known = sorted({k for s in sets for k in s.splits})
            raise UserError(f"data.eval_splits: no set has samples of split '{split}'; splits there are: {known}")
    path = config.tokenizer.path or str(_trained_tokenizer(config, sets))
    return PreparedData(config, sets, load_tokenizer(path, config.tokenizer), path, strides, ctc)


def _prepare_set(
    config: DataConfig,
    part: SetConfig,
    on_built: Callable[[BuildReport], None],
    on_progress: Callable[[int, int], None],
) -> PreparedSet:
    root = Path(config.root)
    wanted = dict.fromkeys((part.split, *config.eval_splits))
    if part.shards is not None:
        folder = root / part.shards
        if not (folder / INDEX_NAME).is_file():
            raise UserError(f"data.sets '{part.name}': no {folder / INDEX_NAME}; make shards with tools.make_shards")
        splits = sorted({g.split for g in ShardSet(LocalStore(folder)).groups})
        return PreparedSet(part, tuple(splits), dict.fromkeys(wanted, folder), _left_out(folder))
    assert part.manifest is not None
    manifest = root / part.manifest
    rows = _rows_by_split(manifest)
    present = sorted(rows)
    if part.split not in present:
        raise UserError(f"data.sets '{part.name}': {manifest} has no split '{part.split}'; it has {present}")
    folders = {}
    for split in wanted:
        if split in present:
            folders[split] = Path(config.cache_dir) / "shards" / _build_name(manifest, split, rows[split])
            if not (folders[split] / INDEX_NAME).is_file():
                on_built(_build(config, manifest, folders[split], split, on_progress))
            _check_left_out(config, manifest, folders[split])
    return PreparedSet(part, tuple(present), folders, _left_out(folders[part.split]))


def _build(
    config: DataConfig, manifest: Path, folder: Path, split: str, on_progress: Callable[[int, int], None]
) -> BuildReport:
    return build_shards(
        manifest,
        folder,
        split=split,
        max_skipped_fraction=config.max_skipped_fraction,
        num_workers=config.num_workers,
        on_progress=on_progress,
    )


def _rows_by_split(manifest: Path) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for row in read_manifest(manifest):
        if row.error is None:
            rows.setdefault(row.metadata["split"], []).append(row)
    return rows


def _build_name(manifest: Path, split: str, rows: list[Row]) -> str:
    """Folder name that changes with the manifest, the split, the audio files and the way shards are made."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {MAX_SHARD_SAMPLES} {MAX_SHARD_BYTES} {split}\n".encode())
    digest.update(manifest.read_bytes())
    for row in rows:
        for path in row.audio:
            status = path.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return f"{manifest.stem}-{split}-{digest.hexdigest()[:16]}"


def _left_out(folder: Path) -> dict[str, int]:
    path = folder / SKIPPED_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(Counter(json.loads(line)["reason"] for line in lines))


def _check_left_out(config: DataConfig, manifest: Path, folder: Path) -> None:
    """A folder made under a more lenient fraction is not a way around a stricter one."""
    num_left_out = sum((counts := _left_out(folder)).values())
    total = num_left_out + len(ShardSet(LocalStore(folder)))
    if num_left_out > config.max_skipped_fraction * total:
        raise UserError(
            f"data.max_skipped_fraction = {config.max_skipped_fraction}: {num_left_out} of {total} samples of "
            f"{manifest} cannot be used ({counts}), see {folder / SKIPPED_NAME}; mend them or raise the fraction"
        )


def _open_training(part: PreparedSet) -> SetReader:
    reader = part.open(part.config.split)
    if reader is None:
        shards = ShardSet(LocalStore(next(iter(part.folders.values()))))
        known = sorted({f"{g.split}/{g.task}/{g.subset}" for g in shards.groups})
        raise UserError(
            f"data.sets '{part.config.name}': split '{part.config.split}', tasks {list(part.config.tasks)} and subsets "
            f"{list(part.config.subsets)} select nothing; there are: {', '.join(known)}"
        )
    return reader


def _trained_tokenizer(config: DataConfig, sets: tuple[PreparedSet, ...]) -> Path:
    readers = [_open_training(s) for s in sets]
    tokenizer = config.tokenizer
    settings = [tokenizer.train_vocab_size, tokenizer.placeholder, tokenizer.template, tokenizer.text_template]
    key = json.dumps([settings, [[r.shards.digest, repr(r.selection)] for r in readers]])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(config.cache_dir) / "tokenizers" / f"{name}.model"
    if not path.is_file():
        train_sentencepiece(_texts(config, readers), tokenizer.train_vocab_size, path, tokenizer.placeholder)
    return path


def _texts(config: DataConfig, readers: list[SetReader]) -> Iterator[str]:
    """All text that training shows the model, and the other references of the same answers."""
    template = config.tokenizer.template.replace("{audio}", " ")
    for reader in readers:
        for shard in range(len(reader.num_per_shard)):
            for index in reader.selected(shard):
                metadata = reader.shards.metadata(shard, index)
                yield template.replace("{instruction}", str(metadata.get("instruction", "")))
                yield str(metadata.get("answer", ""))
                yield from (str(r) for r in metadata.get("references") or ())
