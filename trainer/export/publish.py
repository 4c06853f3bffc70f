"""A checkpoint → a folder that transformers loads: written aside, checked, and moved to its name as the last thing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError
from trainer.checkpoint.reader import MANIFEST, hash_file
from trainer.data.tokenizer import Tokenizer
from trainer.export.card import Findings, model_card
from trainer.export.code import CONFIGURATION, MODELING, remote_code, remote_name
from trainer.export.source import Selection, Source
from trainer.export.tokenizer import write_processor, write_tokenizer
from trainer.export.weights import plan_shards, plan_targets, write_weights
from trainer.run_tokenizer import DIGEST

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_WANTED = "export.json"
"""In the folder aside: what is being exported; only the same export goes on there."""


@dataclass(frozen=True)
class Options:
    """What a user chooses."""

    dtype: str = "bf16"
    shard_bytes: int = 5 << 30
    llm_only: bool = False
    activated_only: float = 0.0
    """Experts below this share of routed clips are left out."""
    verify: str | None = None
    """Manifest of samples to compare on."""
    dev: str | None = None
    """Manifest to score the loss of left-out experts on."""
    max_samples: int = 32
    """Of either manifest."""


def export(
    source: Source, out: Path, options: Options, on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> Findings:
    """Write the model of `source` as the folder `out`; `on_bytes` is told (bytes more, bytes in all).

    Raises:
        DamagedError: the checkpoint is.
        UserError: `out` exists; the export differs from the training graph (then it is not published).
    """
    if out.exists():
        raise UserError(f"{out}: exists; remove it or choose another name")
    dtype, selection = DTYPES[options.dtype], source.select(options.activated_only)
    tokenizer = source.tokenizer()
    aside = _room(source, out, options, selection)
    names = source.names(selection, options.llm_only)
    try:
        targets = plan_targets(source.reader, names, dtype, source.rows(selection))
        total = sum(t.num_bytes for t in targets)
        write_weights(source.reader, plan_shards(targets, options.shard_bytes), aside, lambda n: on_bytes(n, total))
    finally:
        source.wait_verified()  # if files are damaged, that is what went wrong
    write_tokenizer(tokenizer, aside)
    settings = generation_config(source, tokenizer)
    settings.save_pretrained(aside)
    found = Findings()
    if options.llm_only:
        _write_llm_config(source, dtype, tokenizer, aside)
    else:
        _write_code(source, selection, dtype, tokenizer, aside)
        found = _measure(source, selection, options, tokenizer, settings, aside)
    summary = source.run_dir / "summary.json"
    known = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    if not options.llm_only:
        card = model_card(source, selection, known, found, options.dtype)
        (aside / "README.md").write_text(card, encoding="utf-8")
    (aside / _WANTED).unlink()
    aside.rename(out)
    return found


def _room(source: Source, out: Path, options: Options, selection: Selection) -> Path:
    """The folder aside; what another export left there is removed."""
    manifest = hash_file(source.folder, MANIFEST)
    wanted = {
        "checkpoint": manifest.checksum,
        "dtype": options.dtype,
        "shard_bytes": options.shard_bytes,
        "llm_only": options.llm_only,
        "dropped": list(selection.dropped),
        # Files are not synced, so after a crash of the machine those that seem finished may not be.
        "boot": _BOOT_ID.read_text(encoding="utf-8").strip(),
    }
    aside = out.parent / f".{out.name}.part"
    note = aside / _WANTED
    if aside.exists() and not (note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted):
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(wanted), encoding="utf-8")
    return aside


def generation_config(source: Source, tokenizer: Tokenizer) -> Any:
    """transformers' GenerationConfig that decodes as evaluation during training does."""
    from transformers import GenerationConfig

    rows = source.extra["model"]["text_config"]["vocab_size"]
    # An LLM may have more rows than its tokenizer has tokens; training never decodes those.
    unused = list(range(tokenizer.vocab_size, rows)) or None
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=source.recipe.eval.max_new_tokens,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=pad,
        suppress_tokens=unused,
    )


def _write_llm_config(source: Source, dtype: torch.dtype, tokenizer: Tokenizer, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = _text_config(source, dtype)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]
    _write_json(folder / "config.json", {**text, "architectures": [architecture], DIGEST: tokenizer.digest})


def _write_code(source: Source, selection: Selection, dtype: torch.dtype, tokenizer: Tokenizer, folder: Path) -> None:
    for name, text in remote_code().items():
        (folder / name).write_text(text, encoding="utf-8")
    description = source.description(selection)
    text_config = _text_config(source, dtype)
    config = {
        "model_type": "earshot",
        "architectures": ["EarshotForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{remote_name(CONFIGURATION)}.EarshotConfig",
            "AutoModelForCausalLM": f"{remote_name(MODELING)}.EarshotForCausalLM",
        },
        "dtype": text_config["dtype"],
        "transformers_version": text_config["transformers_version"],
        **description,
        "text_config": text_config,
        DIGEST: tokenizer.digest,
    }
    _write_json(folder / "config.json", config)
    write_processor(tokenizer, source.recipe.data, source.strides, folder)


def _text_config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Of the LLM, as `PretrainedConfig.to_dict` gave it: to make such objects, transformers loads for seconds."""
    text = source.extra["model"]["text_config"]
    return {**{k: v for k, v in text.items() if k != "_name_or_path"}, "dtype": str(dtype).removeprefix("torch.")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _measure(
    source: Source, selection: Selection, options: Options, tokenizer: Tokenizer, settings: Any, folder: Path
) -> Findings:
    if options.verify is None and (options.dev is None or not selection.dropped):
        return Findings()
    from transformers import AutoProcessor

    from trainer.export.verify import read_samples, scores, verify

    dtype, found = DTYPES[options.dtype], Findings()
    if options.verify is not None:
        samples = read_samples(source, tokenizer, Path(options.verify), options.max_samples)
        found = Findings(verify(folder, source, selection, dtype, samples))
    if options.dev is not None and selection.dropped:
        samples = read_samples(source, tokenizer, Path(options.dev), options.max_samples)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        whole = Selection(tuple(range(len(source.expert_names()))), (), {})
        before, after = (scores(source, s, dtype, processor, settings, samples) for s in (whole, selection))
        found = Findings(found.verified, before, after)
    return found


def summary_of(source: Source, out: Path, options: Options, found: Findings) -> dict[str, Any]:
    """For `--json`."""
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
