"""The model card: how to use the model, how it was trained, what it scored, what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.export.source import Selection, Source

if TYPE_CHECKING:
    from trainer.export.verify import Verified  # loads modelling code, which an export by itself does not need


@dataclass(frozen=True)
class Findings:
    """What was measured while exporting."""

    verified: Verified | None = None
    scores_whole: Mapping[str, float] | None = None
    """On the dev set, by the model with all experts."""
    scores_kept: Mapping[str, float] | None = None
    """On the dev set, by the model as exported."""


def model_card(source: Source, selection: Selection, summary: Mapping[str, Any], found: Findings, dtype: str) -> str:
    """README.md; `summary` is the run's (may be empty)."""
    manifest = source.reader.manifest
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: automatic-speech-recognition",
        "tags: [speech, audio, speech-llm, mixture-of-encoders]",
        "---",
        "",
        f"# {source.recipe.name}",
        "",
        "A speech-text language model: routed audio encoders, an adapter and an LLM. The code is in this folder.",
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
        "Reading files needs `soundfile`; 16 kHz waveforms need nothing.",
        "",
        f"Weights: {dtype}, after {manifest.step} steps, from a checkpoint of {manifest.topology['world']} ranks.",
        "",
        *_scores(summary),
        *_dropped_encoders(source, selection, found),
        *_verification(found),
        "## Recipe",
        "",
        "```yaml",
        source.extra["recipe"].rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _scores(summary: Mapping[str, Any]) -> list[str]:
    by_split = summary.get("scores") or {}
    if not by_split:
        return []
    rows = [f"| {split} | {name} | {value:.4g} |" for split, own in by_split.items() for name, value in own.items()]
    return ["## Scores", "", "| split | score | value |", "|---|---|---:|", *rows, ""]


def _dropped_encoders(source: Source, selection: Selection, found: Findings) -> list[str]:
    if not selection.dropped:
        return []
    lines = ["## Encoders left out", "", f"Rarely chosen, so not in these files: {', '.join(selection.dropped)}.", ""]
    lines += ["| task | share of routing lost |", "|---|---:|"]
    lines += [f"| {task} | {100 * share:.2f} % |" for task, share in selection.lost_share.items()]
    if found.scores_whole is not None and found.scores_kept is not None:
        lines += ["", "| score on the dev set | all encoders | these |", "|---|---:|---:|"]
        lines += [f"| {k} | {v:.4g} | {found.scores_kept[k]:.4g} |" for k, v in found.scores_whole.items()]
    return [*lines, ""]


def _verification(found: Findings) -> list[str]:
    if found.verified is None:
        return []
    v = found.verified
    return [
        f"Checked on {v.num_samples} samples against the training graph, in fp32: logits differ by at most "
        f"{v.logits:.1e}, routing weights by {v.routing:.1e}.",
        "",
    ]
