"""The model card of an exported model: how to use the model, its scores, its dropped encoders and its recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config.provenance import KEY as ORIGINS
from trainer.config.provenance import read_origins
from trainer.export.source import Selection, Source

if TYPE_CHECKING:
    from trainer.export.verify import Verified  # This module imports modeling code, which a plain export does not need.


@dataclass(frozen=True)
class Findings:
    """The measurements of an export."""

    verified: Verified | None = None
    """The result of `--verify`; None if it was not requested."""
    scores_whole: Mapping[str, float] | None = None
    """The dev scores of the model with all encoders; None if no encoder was dropped or no dev dataset was given."""
    scores_kept: Mapping[str, float] | None = None
    """The dev scores of the exported model; None if `scores_whole` is None."""


def model_card(source: Source, selection: Selection, summary: Mapping[str, Any], found: Findings, dtype: str) -> str:
    """Return the text of README.md.

    Args:
        source: The checkpoint.
        selection: The exported encoders.
        summary: The content of the run's summary.json; it may be empty.
        found: The measurements of the export.
        dtype: The name of the weights' dtype.
    """
    manifest = source.reader.manifest
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", source.extra["recipe"])), default=0))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: automatic-speech-recognition",
        "tags: [speech, audio, speech-llm, mixture-of-encoders]",
        "---",
        "",
        f"# {source.recipe.name}",
        "",
        "A speech-text language model with routed audio encoders, an adapter and an LLM. Its code is in this folder.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoProcessor",
        "",
        'processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
        'inputs = processor(audio="audio.flac", text="Transcribe the speech.")',
        "print(processor.batch_decode(model.generate(**inputs))[0])",
        "```",
        "",
        "Audio files are read with `soundfile`. Waveforms at 16 kHz can be passed without it.",
        "",
        f"The weights are {dtype}. A run on {manifest.topology['world']} ranks saved them after {manifest.step} steps.",
        "",
        *_scores(summary),
        *_experts(source),
        *_dropped_encoders(source, selection, found),
        *_verification(found),
        "## Recipe",
        "",
        f"{fence}yaml",
        _without_paths(source.extra["recipe"]).rstrip(),
        fence,
        "",
    ]
    return "\n".join(lines)


def _scores(summary: Mapping[str, Any]) -> list[str]:
    by_split = summary.get("scores")
    if not isinstance(by_split, Mapping):
        return []
    rows = [
        f"| {_cell(split)} | {_cell(name)} | {value:.4g} |"
        for split, own in by_split.items()
        if isinstance(own, Mapping)
        for name, value in own.items()
        if isinstance(value, int | float) and not _is_doubled(name, own)
    ]
    if not rows:
        return []
    return ["## Scores", "", "| split | score | value |", "|---|---|---:|", *rows, ""]


def _is_doubled(name: str, scores: Mapping[str, Any]) -> bool:
    """Return whether a score `TASK/SUBSET/METRIC` equals the score of the task because the task has only one subset."""
    if name.count("/") != 2:
        return False  # It is a score of a whole task, or a number such as `num_unfinished`.
    task, _, metric = name.split("/")
    others = [n for n in scores if n.startswith(f"{task}/") and n.endswith(f"/{metric}") and n.count("/") == 2]
    return len(others) == 1 and scores.get(f"{task}/{metric}") == scores[name]


def _without_paths(recipe: str) -> str:
    """Return a recipe as YAML in which paths on this machine are shortened to their last part."""
    return re.sub(r"(?<![\w:/.])(?:~|\.{1,2})?(?:/[^\s'\",\]}]+)+/([^\s/'\",\]}]+)", r"…/\1", recipe)


def _cell(text: str) -> str:
    """Return text as code for a cell of a Markdown table. Characters that Markdown could interpret are replaced."""
    return f"`{re.sub(r'[`|<>]|[^ -~]', '?', text)}`"


def _experts(source: Source) -> list[str]:
    """Return a table of the FFN experts and the origins of their initial weights."""
    origins = read_origins(source.extra.get(ORIGINS), source.folder.url)
    if not origins:
        return []
    lines = ["## Experts in the LLM", "", "| expert | began as | step | datasets | recipe | checkpoint | tensors |"]
    lines += ["|---|---|---:|---|---|---|---|"]
    for one in origins:
        # Other users have no access to this machine, so only the last part of a path is useful to them.
        origin, *datasets = (path.rstrip("/").rpartition("/")[2] for path in (one.origin, *one.datasets))
        texts = (one.name, one.run or origin, str(one.step or ""), ", ".join(datasets))
        digests = (digest[:16] for digest in (one.recipe, one.checkpoint, one.tensors))
        lines.append("| " + " | ".join(_cell(text) if text else "" for text in (*texts, *digests)) + " |")
    return [*lines, "", "The digests are the first 16 characters of SHA-256 sums.", ""]


def _dropped_encoders(source: Source, selection: Selection, found: Findings) -> list[str]:
    if not selection.dropped:
        return []
    lines = ["## Dropped encoders", ""]
    lines += [
        f"The router chose these encoders rarely, so they were dropped: {', '.join(map(_cell, selection.dropped))}.",
        "",
    ]
    lines += ["| task | share of routing lost |", "|---|---:|"]
    lines += [f"| {_cell(task)} | {100 * share:.2f} % |" for task, share in selection.lost_share.items()]
    if found.scores_whole is not None and found.scores_kept is not None:
        lines += ["", "| score on the dev dataset | all encoders | exported encoders |", "|---|---:|---:|"]
        lines += [f"| {k} | {v:.4g} | {found.scores_kept[k]:.4g} |" for k, v in found.scores_whole.items()]
    return [*lines, ""]


def _verification(found: Findings) -> list[str]:
    if found.verified is None:
        return []
    v = found.verified
    return [
        f"The exported model was compared with the training graph on {v.num_samples} samples in fp32. Logits differ by "
        f"at most {v.logits:.1e} and routing weights by at most {v.routing:.1e}.",
        "",
    ]
