"""The export of a checkpoint as a folder that transformers loads.

The folder is written under a temporary name and verified. Renaming it is the last step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.errors import UserError
from model.llm.mixture import FIELD
from trainer.checkpoint.reader import MANIFEST, hash_file
from trainer.data.config import DataConfig
from trainer.data.tokenizer import Tokenizer
from trainer.export.adapter import WEIGHTS as ADAPTER_WEIGHTS
from trainer.export.adapter import adapter_names, fuse_expert_factors, write_adapter_config
from trainer.export.card import Findings, model_card
from trainer.export.code import CONFIGURATION, MODELING, remote_code, remote_name
from trainer.export.published.exporting import original_names, read_original, write_original_files
from trainer.export.serving.folder import write_vllm_folder
from trainer.export.source import LLM, Selection, Source
from trainer.export.tokenizer import read_processor, write_processor, write_tokenizer
from trainer.export.weights import plan_shards, plan_targets, stack_targets, write_weights
from trainer.files import locked, write_whole
from trainer.run_tokenizer import DIGEST

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_REQUEST = "export.json"
"""The file in the temporary folder that describes the export. An export resumes in the folder only if its own
description is identical."""


@dataclass(frozen=True)
class Options:
    """The options for an export."""

    dtype: str = "bf16"
    """The dtype of the weights, as a key of `DTYPES`."""
    shard_bytes: int = 5 << 30
    """The maximum size of a weight file in bytes. A single tensor that is larger is stored in a file of its own."""
    llm_only: bool = False
    """Whether to export only the LLM."""
    original: str | None = None
    """The folder of a published model. The export then has the layout of this model; None selects earshot's layout."""
    adapter: bool = False
    """Whether to export only the LLM's low-rank adapters, in peft's format, without merging them."""
    activated_only: float = 0.0
    """The fraction of routed clips below which an encoder expert is dropped; 0 keeps all experts."""
    verify: str | None = None
    """A manifest with samples on which to compare the export with the training graph; None skips the comparison."""
    dev: str | None = None
    """A manifest with samples on which to measure the effect of dropped encoders; None skips the measurement."""
    max_samples: int = 32
    """The maximum number of samples to read from each of the two manifests."""


def export(
    source: Source, out: Path, options: Options, on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> Findings:
    """Export a checkpoint as a folder.

    Args:
        source: The checkpoint.
        out: The folder to create.
        options: The options for the export.
        on_bytes: A function that is called with the number of bytes written since the last call and the total number.

    Returns:
        The measurements of the export.

    Raises:
        DamagedError: If the checkpoint is damaged.
        UserError: If `out` exists, the checkpoint cannot be exported with these options, or the export differs from the
            training graph. In all cases, `out` is not created.
    """
    if out.exists():
        raise UserError(f"{out}: already exists; remove it or choose another name")
    if (options.llm_only or options.adapter) and FIELD in source.model.text_config:
        option = "--llm-only" if options.llm_only else "--adapter"
        raise UserError(
            f"{source.folder.url}: {option}: the recipe added experts to the LLM, and no family of transformers "
            f"describes such an LLM; export the whole model, without {option}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out.parent / f".{out.name}.lock", wait=False):
            return _export(source, out, options, on_bytes)
    except BlockingIOError:
        raise UserError(f"{out}: another export is writing it; wait for it, or choose another name") from None


def _export(source: Source, out: Path, options: Options, on_bytes: Callable[[int, int], None]) -> Findings:
    dtype, selection = DTYPES[options.dtype], source.select(options.activated_only)
    original = None if options.original is None else read_original(source, Path(options.original))
    tokenizer = source.tokenizer()
    temporary = _temporary_folder(source, out, options, selection)
    names = adapter_names(source) if options.adapter else source.names(selection, options.llm_only)
    if original is not None:
        names = original_names(original)
    try:
        targets = plan_targets(source.reader, names, dtype, source.rows(selection), source.adapters())
        if options.adapter:
            targets = fuse_expert_factors(source, targets)
        else:
            targets = stack_targets(targets, source.stacked(), "" if options.llm_only else LLM)
        total = sum(t.num_bytes for t in targets)
        shards = {ADAPTER_WEIGHTS: targets} if options.adapter else plan_shards(targets, options.shard_bytes)
        write_weights(source.reader, shards, temporary, lambda n: on_bytes(n, total))
    finally:
        source.wait_verified()  # If a file is damaged, this error is more useful than any error above.
    found = Findings()
    if original is not None:
        write_original_files(original, str(dtype).removeprefix("torch."), temporary)
    else:
        found = _write_own_files(source, selection, options, tokenizer, temporary)
    (temporary / _REQUEST).unlink()
    if out.exists():  # Renaming would replace an empty folder.
        raise UserError(f"{out}: was created during the export; remove it, or choose another name")
    temporary.rename(out)
    return found


def _write_own_files(
    source: Source, selection: Selection, options: Options, tokenizer: Tokenizer, temporary: Path
) -> Findings:
    """Write all files except weights, and measure the export."""
    dtype = DTYPES[options.dtype]
    write_tokenizer(tokenizer, temporary)
    settings = generation_config(source, tokenizer)
    if not options.adapter:
        settings.save_pretrained(temporary)
    found = Findings()
    if options.adapter:
        write_adapter_config(source, temporary)
    elif options.llm_only:
        _write_llm_config(source, dtype, tokenizer, temporary)
    else:
        _write_code(source, selection, dtype, tokenizer, temporary)
        found = _measure(source, selection, options, tokenizer, settings, temporary)
    if not options.llm_only:
        card = model_card(source, selection, _summary(source), found, options.dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return found


def _summary(source: Source) -> dict[str, Any]:
    """Return the content of the run's summary.json; empty if there is none.

    Raises:
        UserError: If the file is not a JSON object.
    """
    path = source.run_dir / "summary.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete or restore the file") from None
    return found if isinstance(found, dict) else {}


def _temporary_folder(source: Source, out: Path, options: Options, selection: Selection) -> Path:
    """Create the temporary folder, removing the files of a different export.

    Raises:
        UserError: If the path exists and was not written by an export.
    """
    manifest = hash_file(source.folder, MANIFEST)
    wanted = {
        "checkpoint": manifest.checksum,
        "dtype": options.dtype,
        "shard_bytes": options.shard_bytes,
        "llm_only": options.llm_only,
        "adapter": options.adapter,
        "original": options.original,
        "dropped": list(selection.dropped),
        # Files are not synced to disk. After a machine crash, a file may be incomplete even if it has its final
        # name.
        "boot": _BOOT_ID.read_text(encoding="utf-8").strip(),
    }
    temporary = out.parent / f".{out.name}.part"
    note = temporary / _REQUEST
    if os.path.lexists(temporary):
        if temporary.is_symlink() or not (note.is_file() or not any(temporary.iterdir())):
            raise UserError(
                f"{temporary}: was not written by an interrupted export; move it away, or choose another name"
            )
        if _read_note(note) != wanted:
            shutil.rmtree(temporary)
    temporary.mkdir(exist_ok=True)
    write_whole(note, [json.dumps(wanted).encode()])
    return temporary


def _read_note(note: Path) -> object:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def generation_config(source: Source, tokenizer: Tokenizer) -> Any:
    """Return the transformers `GenerationConfig` with the generation settings of the training run's evaluations."""
    from transformers import GenerationConfig

    rows = source.model.text_config["vocab_size"]
    # An LLM may have more embedding rows than its tokenizer has tokens. The additional ids must not be generated.
    unused = list(range(tokenizer.vocab_size, rows)) or None
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=source.recipe.eval.max_new_tokens,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id if len(tokenizer.end_ids) == 1 else list(tokenizer.end_ids),
        pad_token_id=pad,
        suppress_tokens=unused,
    )


def _write_llm_config(source: Source, dtype: torch.dtype, tokenizer: Tokenizer, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = _text_config(source, dtype)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]
    _write_json(folder / "config.json", {**text, "architectures": [architecture], DIGEST: tokenizer.digest})


def _write_code(source: Source, selection: Selection, dtype: torch.dtype, tokenizer: Tokenizer, folder: Path) -> None:
    description = source.description(selection)
    name = str(dtype).removeprefix("torch.")
    write_model_files(description, source.model.audio, tokenizer, source.recipe.data, name, folder)


def write_model_files(
    description: Mapping[str, Any], audio: ModelConfig, tokenizer: Tokenizer, data: DataConfig, dtype: str, folder: Path
) -> None:
    """Write the config, the code and the processor of an exported model. The tokenizer must already be in the folder.

    The plug-in for vLLM is also written, unless the recipe added FFN experts to the LLM, which vLLM does not support.

    Args:
        description: The arguments of `EarshotConfig`.
        audio: The config of the audio modules.
        tokenizer: The tokenizer.
        data: The processor's settings.
        dtype: The name of the weights' dtype.
        folder: The folder to write to.
    """
    encoders = [description["audio"]["primary"], *description["audio"]["experts"]]
    families = {encoder["family"] for encoder in encoders if encoder is not None}
    for name, text in remote_code(families, audio.adapter.kind).items():
        (folder / name).write_text(text, encoding="utf-8")
    text_config = {**description["text_config"], "dtype": dtype, "transformers_version": _version()}
    config = {
        **{key: description[key] for key in ("audio", "vocab_size")},
        "text_config": text_config,
        "model_type": "earshot",
        "architectures": ["EarshotForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{remote_name(CONFIGURATION)}.EarshotConfig",
            "AutoModelForCausalLM": f"{remote_name(MODELING)}.EarshotForCausalLM",
        },
        "dtype": text_config["dtype"],
        "transformers_version": text_config["transformers_version"],
        DIGEST: tokenizer.digest,
    }
    _write_json(folder / "config.json", config)
    write_processor(tokenizer, data, audio.adapter.rate, folder)
    if FIELD not in text_config:
        write_vllm_folder(folder)


def _text_config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of the LLM's config.json, except its architecture."""
    return {**source.model.text_config, "dtype": str(dtype).removeprefix("torch."), "transformers_version": _version()}


def _version() -> str:
    import transformers

    return transformers.__version__


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _measure(
    source: Source, selection: Selection, options: Options, tokenizer: Tokenizer, settings: Any, folder: Path
) -> Findings:
    if options.verify is None and (options.dev is None or not selection.dropped):
        return Findings()
    from trainer.export.verify import read_samples, scores, verify

    dtype, found = DTYPES[options.dtype], Findings()
    if options.verify is not None:
        samples = read_samples(source, tokenizer, Path(options.verify), options.max_samples)
        found = Findings(verify(folder, source, selection, dtype, samples))
    if options.dev is not None and selection.dropped:
        samples = read_samples(source, tokenizer, Path(options.dev), options.max_samples)
        processor = read_processor(folder)
        whole = Selection(tuple(range(len(source.expert_names()))), (), {})
        before, after = (scores(source, s, dtype, processor, settings, samples) for s in (whole, selection))
        found = Findings(found.verified, before, after)
    return found


def summary_of(source: Source, out: Path, options: Options, found: Findings) -> dict[str, Any]:
    """Return the summary of an export that `--json` prints."""
    files = [p for p in out.iterdir() if p.suffix == ".safetensors"]
    return {
        "out": str(out),
        "step": source.reader.manifest.step,
        "num_files": len(files),
        "num_bytes": sum(p.stat().st_size for p in files),
        "options": asdict(options),
        "verified": None if found.verified is None else asdict(found.verified),
        "scores_whole": found.scores_whole,
        "scores_kept": found.scores_kept,
    }
