"""The part of vLLM's interface for multimodal models that an exported plug-in uses, in plain PyTorch.

Names and signatures are the same as in vLLM 0.32. Between the plug-in's methods, the stub only does what determines the
result: it slices fields, replaces placeholders, merges embeddings, and identifies cached clips. The LLM is that of
transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor, BatchFeature

Info = TypeVar("Info")


class MultiModalDataParser:
    def __init__(
        self, *, target_sr: float | None = None, target_channels: int | None = None, expected_hidden_size: int | None
    ) -> None:
        assert (target_sr, target_channels, expected_hidden_size) == (16000, 1, None)


class AudioProcessorItems(list[np.ndarray]):
    def get_all(self) -> list[np.ndarray]:
        return list(self)


class DataItems(dict[str, AudioProcessorItems]):
    def get_all_counts(self) -> dict[str, int]:
        return {modality: len(items) for modality, items in self.items()}

    def get_items(self, modality: str, _kind: type) -> AudioProcessorItems:
        return self[modality]


@dataclass
class ProcessorInputs:
    prompt: list[int]
    mm_data_items: DataItems
    hf_processor_mm_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PromptReplacement:
    modality: str
    target: list[int]
    replacement: Callable[[int], list[int]]


class MultiModalFieldConfig:
    @staticmethod
    def batched(modality: str, *, keep_on_cpu: bool = False) -> Callable[[Tensor], list[Tensor]]:
        assert modality == "audio"
        return lambda values: list(values)

    @staticmethod
    def flat_from_sizes(modality: str, size_per_item: Tensor) -> Callable[[Tensor], list[Tensor]]:
        assert modality == "audio"
        return lambda values: list(values.split(size_per_item.tolist()))


class KwargsItems(dict[str, list[Tensor]]):
    def get_data(self) -> dict[str, list[Tensor]]:
        return dict(self)


class BaseProcessingInfo:
    def __init__(self, folder: str, hf_config: Any) -> None:
        self._config, self._processor = hf_config, AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def get_hf_config(self) -> Any:
        return self._config

    def get_hf_processor(self) -> Any:
        return self._processor

    def get_default_tok_params(self) -> Any:
        return SimpleNamespace(with_kwargs=lambda **kwargs: kwargs)

    def _get_expected_hidden_size(self) -> int | None:
        return None


class BaseDummyInputsBuilder(Generic[Info]):
    def __init__(self, info: Info) -> None:
        self.info = info

    def _get_dummy_audios(self, *, length: int, num_audios: int, overrides: Any = None) -> list[np.ndarray]:
        return [np.zeros((length,))] * num_audios


class BaseMultiModalProcessor(Generic[Info]):
    def __init__(self, info: Info, dummy_inputs: Any) -> None:
        self.info, self.dummy_inputs = info, dummy_inputs
        info.get_data_parser()  # type: ignore[attr-defined]

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        text = self.dummy_inputs.get_dummy_text(mm_counts)
        clips = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)["audio"]
        ids = self.info.get_hf_processor().tokenizer.encode(text)  # type: ignore[attr-defined]
        return ProcessorInputs(ids, DataItems(audio=AudioProcessorItems(clips)))

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> dict[str, Any]:
        mine: Any = self
        options = mine._get_cache_missing_processor_kwargs(
            inputs, {"audio": [False] * len(inputs.mm_data_items["audio"])}
        )
        found: BatchFeature = mine._apply_hf_processor_main(mm_items=inputs.mm_data_items, hf_kwargs=options)
        fields = mine._get_mm_fields_config(found, options)
        items = KwargsItems({name: split(found[name]) for name, split in fields.items() if name in found})
        (update,) = mine._get_prompt_updates(inputs.mm_data_items, options, items)
        ids: list[int] = []
        mask: list[bool] = []
        number = 0
        for token in inputs.prompt:
            is_clip = [token] == update.target
            new = update.replacement(number) if is_clip else [token]
            number += is_clip
            ids, mask = ids + new, mask + [is_clip] * len(new)
        hashed = [repr(dict(inputs.hf_processor_mm_kwargs)) + c.tobytes().hex() for c in inputs.mm_data_items["audio"]]
        return {"prompt_token_ids": ids, "is_audio": mask, "mm_kwargs": items, "mm_hashes": hashed}


class SupportsMultiModal:
    @contextmanager
    def _mark_tower_model(self, vllm_config: Any, modalities: str) -> Any:
        assert modalities == "audio"
        yield

    @contextmanager
    def _mark_language_model(self, vllm_config: Any) -> Any:
        yield

    def embed_input_ids(self, input_ids: Tensor, embeddings: Sequence[Tensor], *, is_multimodal: Tensor) -> Tensor:
        text: Tensor = self.llm.embed_input_ids(input_ids)  # type: ignore[attr-defined]
        return text.masked_scatter(is_multimodal[:, None], torch.cat(list(embeddings))) if len(embeddings) else text


class SupportsPP:
    pass


class LanguageModel(nn.Module):
    """An LLM with the methods of vLLM's models, for one sequence and without a cache."""

    def __init__(self, hf_config: Any) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
        self.make_empty_intermediate_tensors = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.inner.get_input_embeddings()(input_ids)
        return found

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: None, inputs_embeds: Tensor
    ) -> Tensor:
        found = self.inner.model(inputs_embeds=inputs_embeds[None], position_ids=positions[None])
        hidden: Tensor = found.last_hidden_state[0]
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.inner.lm_head(hidden_states)
        cap = getattr(self.inner.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _language_model(*, vllm_config: Any, hf_config: Any, prefix: str, architectures: list[str]) -> LanguageModel:
    assert prefix == "llm" and len(architectures) == 1
    return LanguageModel(hf_config)


class AutoWeightsLoader:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # Tensors of the LLM have their names in transformers.
        given = dict(weights)
        tensors = {
            name.replace("llm.", "llm.inner.", 1) if name.startswith("llm.") else name: t for name, t in given.items()
        }
        found = self.module.load_state_dict(tensors, strict=False)
        assert not found.unexpected_keys and all("lm_head" in key for key in found.missing_keys), found
        return set(given)


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, architecture: str, place: str) -> None:
        self.models[architecture] = place

    def register_processor(self, processor: type, *, info: type, dummy_inputs: type) -> Callable[[type], type]:
        def register(model: type) -> type:
            model.parts = (processor, info, dummy_inputs)  # type: ignore[attr-defined]
            return model

        return register


def install(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Make the stub importable as `vllm`, and return its table of models."""
    registry = Registry()
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": registry},
        "vllm.config": {"VllmConfig": object},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.interfaces": {"SupportsMultiModal": SupportsMultiModal, "SupportsPP": SupportsPP},
        "vllm.model_executor.models.utils": {
            "AutoWeightsLoader": AutoWeightsLoader,
            "init_vllm_registered_model": _language_model,
            "maybe_prefix": lambda prefix, name: f"{prefix}.{name}" if prefix else name,
        },
        "vllm.multimodal": {"MULTIMODAL_REGISTRY": registry},
        "vllm.multimodal.inputs": {"MultiModalFieldConfig": MultiModalFieldConfig},
        "vllm.multimodal.parse": {
            "AudioProcessorItems": AudioProcessorItems,
            "MultiModalDataParser": MultiModalDataParser,
        },
        "vllm.multimodal.processing": {
            "BaseDummyInputsBuilder": BaseDummyInputsBuilder,
            "BaseMultiModalProcessor": BaseMultiModalProcessor,
            "BaseProcessingInfo": BaseProcessingInfo,
            "PromptReplacement": PromptReplacement,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return registry
