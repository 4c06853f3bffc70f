"""The comparison in fp32 of an exported model with the training graph.

The weights and settings are read from the exported folder, but its copy of the code is not executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.batch import Batch, Sample
from model.config import LLMConfig, ModelConfig
from model.errors import UserError
from model.hub.configuration import EarshotConfig, audio_config
from model.hub.modeling import EarshotForCausalLM
from model.lengths import num_samples
from model.speech_llm import SpeechLLM
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError
from trainer.data.loader import to_sample
from trainer.data.manifest import read_manifest
from trainer.data.metadata import check_metadata, prompt_turns
from trainer.data.sample import make_sample
from trainer.data.tokenizer import Tokenizer
from trainer.export.source import Selection, Source, separate_experts
from trainer.export.tokenizer import read_processor
from trainer.scoring.scores import score, score_values

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verified:
    """The largest absolute differences over all samples."""

    num_samples: int
    logits: float
    """The largest difference in a logit."""
    routing: float
    """The largest difference in a routing weight."""


def read_samples(source: Source, tokenizer: Tokenizer, manifest: Path, limit: int) -> list[Sample]:
    """Read the first `limit` samples of a manifest as evaluation does.

    Raises:
        UserError: If a sample cannot be used, or the manifest contains none.
    """
    samples = list(_samples(source, tokenizer, manifest, limit))
    if not samples:
        raise UserError(f"{manifest}: contains no samples; use another manifest")
    return samples


@torch.no_grad()
def verify(
    folder: Path,
    source: Source,
    selection: Selection,
    dtype: torch.dtype,
    samples: Sequence[Sample],
) -> Verified:
    """Compare an exported model with the training graph, whose weights are rounded to the dtype of the export.

    Args:
        folder: The exported model.
        source: The checkpoint that it was exported from.
        selection: The exported encoders.
        dtype: The type of the exported weights.
        samples: The samples on which to compare.

    Returns:
        The largest differences.

    Raises:
        UserError: If tokens, logits or routing weights differ.
    """
    description = source.description(selection)
    oracle = SpeechLLM(_model_config(description), description["vocab_size"], seed=0).eval()
    source.fill(oracle, list(source.names(selection, llm_only=False)), selection, dtype)
    processor = read_processor(folder)
    exported = EarshotForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    worst = Verified(len(samples), 0.0, 0.0)
    for sample in samples:
        inputs = processor.inputs([prompt_turns(sample.meta, len(sample.clips))], [sample.clips])
        if inputs["input_ids"][0].tolist() != sample.token_ids.tolist():
            raise UserError(
                f"{sample.key}: the tokens of the exported processor differ from those of training, so the model was "
                "not exported; report this as a bug"
            )
        batch = Batch((sample,))
        audio = oracle.embed_audio(batch)
        routing = None if audio is None else audio.routing
        wanted = oracle.logits(batch, audio)
        attention_mask = inputs.pop("attention_mask")
        embedded, found = exported.embed(**inputs)
        logits = exported(inputs_embeds=embedded, attention_mask=attention_mask).logits
        routed = 0.0
        if routing is not None:
            routed = float((found.weights - routing.weights).abs().max())
        worst = replace(
            worst,
            logits=max(worst.logits, float((logits - wanted).abs().max())),
            routing=max(worst.routing, routed),
        )
    if not (worst.logits <= TOLERANCE and worst.routing <= TOLERANCE):
        raise UserError(
            f"{folder}: differs from the training graph by {worst.logits:.1e} in logits and {worst.routing:.1e} in "
            f"routing weights (limit {TOLERANCE:.0e}), so the model was not exported; report this as a bug"
        )
    return worst


def scores(
    source: Source, selection: Selection, dtype: torch.dtype, processor: Any, settings: Any, samples: Sequence[Sample]
) -> dict[str, float]:
    """Score the answers that the model with the selected encoders generates greedily.

    Args:
        source: The checkpoint.
        selection: The encoders of the model.
        dtype: The type to which weights are rounded; the computation is in fp32.
        processor: The exported processor.
        settings: The exported GenerationConfig.
        samples: The samples to answer.

    Returns:
        The scores by name.
    """
    exported = EarshotForCausalLM(EarshotConfig(**source.description(selection))).eval()
    separate_experts(exported)
    source.fill(exported, list(source.names(selection, llm_only=False)), selection, dtype)
    answers: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for sample in samples:
        inputs = processor.inputs([prompt_turns(sample.meta, len(sample.clips))], [sample.clips])
        (text,) = processor.batch_decode(exported.generate(**inputs, generation_config=settings))
        answers.setdefault(sample.task, []).append((text, sample.meta))
    by_task = (score(task, [t for t, _ in found], [m for _, m in found]) for task, found in answers.items())
    return score_values(s for found in by_task for s in found)


def _samples(source: Source, tokenizer: Tokenizer, manifest: Path, limit: int) -> Iterator[Sample]:
    shortest = num_samples(source.recipe.data.min_audio_sec)
    for row in read_manifest(manifest)[:limit]:
        try:
            if row.error is not None:
                raise row.error
            check_metadata(row.metadata, len(row.audio))
            clips = [decode_audio(path.read_bytes()) for path in row.audio]
            padded = tuple(np.pad(c, (0, max(0, shortest - len(c)))) for c in clips)
            yield to_sample(make_sample(row.key, row.metadata, padded, tokenizer, source.rate, evaluate=True))
        except SampleError as error:
            raise UserError(f"{manifest}: line {row.line}: {error}; fix or remove this line") from None


def _model_config(description: dict[str, Any]) -> ModelConfig:
    config = EarshotConfig(**description)
    text = config.text_config.to_diff_dict()
    ignored = ("transformers_version", "architectures", "dtype")
    # Some configs also list private attributes, from which they derive their fields.
    fields = {key: value for key, value in text.items() if key not in ignored and not key.startswith("_")}
    return replace(audio_config(config.audio), llm=LLMConfig(config=fields))
