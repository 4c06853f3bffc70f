"""The exported model in vLLM, with the export's own code for the audio tower and vLLM's code for the LLM.

An export contains this file. It therefore imports only torch, transformers and vLLM, and nothing from this project. It
follows the interface of multimodal models of vLLM 0.32 and 0.33 (`SupportsMultiModal`, `BaseMultiModalProcessor`).

Shapes: C clips, T audio samples (16 kHz), S audio tokens, P instruction tokens, H width of the LLM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

SAMPLE_RATE = 16000
KEY = "instruction"
"""The request option that contains the instruction, as text or as a list with one text per clip."""
_PROFILED_SECONDS = 30.0
"""The length of clips for which vLLM reserves memory if the longest clip of training is not known."""


class Info(BaseProcessingInfo):  # type: ignore[misc]
    """The properties of the export that vLLM needs before it loads weights."""

    def get_data_parser(self) -> Any:
        """Return the parser that resamples clips to 16 kHz and averages their channels."""
        return MultiModalDataParser(
            target_sr=SAMPLE_RATE, target_channels=1, expected_hidden_size=self._get_expected_hidden_size()
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return the limits on the number of clips per prompt. There is no limit."""
        return {"audio": None}

    def get_default_tok_params(self) -> Any:
        """Return the tokenizer options. It adds no special tokens, because prompts already contain them."""
        return super().get_default_tok_params().with_kwargs(add_special_tokens=False)

    def longest_samples(self) -> int:
        """Return the number of audio samples of the longest clip for which memory is reserved."""
        return round((self.get_hf_processor().max_audio_sec or _PROFILED_SECONDS) * SAMPLE_RATE)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the number of audio tokens of the longest clip."""
        return {"audio": self.get_hf_processor().count_audio_tokens(self.longest_samples())}

    def reads_instructions(self) -> bool:
        """Return whether the router reads the instruction, so that a clip's embeddings depend on it."""
        audio = self.get_hf_config().audio
        return bool(audio["experts"]) and audio["router"]["input"] == "prompt"


class DummyInputs(BaseDummyInputsBuilder[Info]):  # type: ignore[misc]
    """The inputs with which vLLM measures the memory of the largest request."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a prompt that consists only of placeholders for clips."""
        return str(self.info.get_hf_processor().placeholder) * mm_counts.get("audio", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Return silent clips of the maximum length."""
        count, options = mm_counts.get("audio", 0), mm_options.get("audio")
        return {
            "audio": self._get_dummy_audios(length=self.info.longest_samples(), num_audios=count, overrides=options)
        }


class Processor(BaseMultiModalProcessor[Info]):  # type: ignore[misc]
    """The processor, which computes the audio tower's inputs and repeats a clip's placeholder for each audio token."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of `DummyInputs`, with empty instructions."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {KEY: ""}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request.

        Args:
            inputs: The request, whose prompt has one placeholder per clip.
            timing_ctx: vLLM's timer.

        Raises:
            ValueError: If the router reads the instruction, and the instruction cannot be determined from the request.
        """
        # vLLM reuses the embeddings of a clip if these options are equal, so they must contain the instruction.
        inputs.hf_processor_mm_kwargs = self._options(inputs)
        return super().apply(inputs, timing_ctx)

    def _options(self, inputs: Any) -> dict[str, Any]:
        """Return the options for a request, with one instruction per clip if the router reads instructions."""
        options = dict(inputs.hf_processor_mm_kwargs)
        given = options.pop(KEY, None)
        num_clips = inputs.mm_data_items.get_all_counts().get("audio", 0)
        if not self.info.reads_instructions() or not num_clips:
            return options
        if given is None:
            given = _instruction(self.info.get_hf_processor(), list(inputs.prompt), num_clips)
        texts = [given] * num_clips if isinstance(given, str) else list(given)
        if len(texts) != num_clips:
            raise ValueError(f"mm_processor_kwargs.{KEY}: has {len(texts)} texts for {num_clips} clips")
        return {**options, KEY: texts}

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        options = inputs.hf_processor_mm_kwargs
        if KEY not in options:
            return dict(options)
        pairs = zip(options[KEY], mm_is_cached["audio"], strict=True)
        return {**options, KEY: [text for text, is_cached in pairs if not is_cached]}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        if not mm_items.get_all_counts().get("audio", 0):
            return BatchFeature()
        clips = mm_items.get_items("audio", AudioProcessorItems).get_all()
        texts = hf_kwargs.get(KEY, [""] * len(clips))
        return BatchFeature(self.info.get_hf_processor().clip_inputs(clips, texts))

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        nothing = torch.zeros(0, dtype=torch.int64)
        slices, whole = MultiModalFieldConfig.flat_from_sizes, MultiModalFieldConfig.batched
        return {
            "audio_values": slices("audio", hf_inputs.get("audio_lengths", nothing)),
            "audio_lengths": whole("audio", keep_on_cpu=True),
            "instruction_ids": slices("audio", hf_inputs.get("instruction_lengths", nothing)),
            "instruction_lengths": whole("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        processor = self.info.get_hf_processor()
        lengths = out_mm_kwargs.get_data().get("audio_lengths", ())

        def placeholders(item: int) -> list[int]:
            return [processor.placeholder_id] * processor.count_audio_tokens(int(lengths[item]))

        return [PromptReplacement(modality="audio", target=[processor.placeholder_id], replacement=placeholders)]


def _instruction(processor: Any, prompt: list[int], num_clips: int) -> str:
    """Return the instruction of a prompt with a single user message.

    Args:
        processor: The export's processor.
        prompt: The tokens of the prompt, with one placeholder per clip.
        num_clips: The number of clips.

    Raises:
        ValueError: If no instruction produces this prompt.
    """
    # The tokens at the beginning and the end that the prompt shares with two other prompts surround the instruction.
    prompts = [prompt, *(processor.prompt_ids(text, num_clips) for text in ("What is said?", "Answer yes or no."))]
    before, after = _common(prompts), _common([ids[::-1] for ids in prompts])
    text = processor.tokenizer.decode(prompt[before : len(prompt) - after]).strip()
    try:
        fits = processor.prompt_ids(text, num_clips) == prompt
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            "the router reads the instruction, and the prompt does not have the form used in training; pass the "
            f"instruction of each clip as mm_processor_kwargs.{KEY}"
        )
    return str(text)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens at the beginning that all prompts have in common."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class EarshotForCausalLM(nn.Module, SupportsMultiModal, SupportsPP):  # type: ignore[misc]
    """The exported model.

    Args:
        vllm_config: vLLM's config.
        prefix: The prefix of the names of modules.

    Raises:
        ValueError: If a recipe added experts to the LLM, which vLLM does not support.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config = model_config.hf_config
        text = config.text_config
        if getattr(text, "ffn_experts", None) is not None:
            raise ValueError(
                f"{model_config.model}: vLLM does not compute the experts that the recipe added to the LLM"
            )
        code = _modeling(model_config)
        marks: Any = self  # vLLM does not annotate these methods.
        with marks._mark_tower_model(vllm_config, "audio"):
            self.audio = code.AudioTower(code.audio_config(config.audio), text.hidden_size, config.vocab_size).eval()
        with marks._mark_language_model(vllm_config):
            self.llm = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "llm"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )
        self._ragged = code.Ragged
        self.make_empty_intermediate_tensors = self.llm.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return None, because the chat template writes placeholders (`--chat-template-content-format openai`)."""
        return None

    @torch.no_grad()
    def embed_multimodal(self, **kwargs: Any) -> Sequence[Tensor]:
        """Return the audio embeddings [S, H] of each clip, given the fields of `Processor`."""
        if kwargs.get("audio_values") is None:
            return []
        device = self.audio.projector.weight.device
        clips = self._ragged(_joined(kwargs["audio_values"]).to(device), _sizes(kwargs["audio_lengths"]))
        instructions = self._ragged(
            _joined(kwargs["instruction_ids"]).to(device), _sizes(kwargs["instruction_lengths"])
        )
        found: Sequence[Tensor] = self.audio(clips, instructions).embeddings.split()
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Return the hidden states of the LLM."""
        return self.llm(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits of hidden states."""
        logits: Tensor | None = self.llm.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of the export, whose names begin with `audio.` and `llm.`, and return their names."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        return loaded


def _modeling(model_config: Any) -> ModuleType:
    """Return the module of the export's modeling code.

    Raises:
        ValueError: If vLLM was not started with `--trust-remote-code`.
    """
    if not model_config.trust_remote_code:
        raise ValueError(f"{model_config.model}: contains code of its own; add --trust-remote-code if you trust it")
    reference = model_config.hf_config.auto_map["AutoModelForCausalLM"]
    # If transformers has loaded the config, the folder and "--" precede the name.
    reference = reference.rpartition("--")[2]
    found = get_class_from_dynamic_module(reference, model_config.model, revision=model_config.revision)
    return sys.modules[found.__module__]


def _joined(value: Tensor | Sequence[Tensor]) -> Tensor:
    """Return a field of all clips in one tensor. vLLM passes a list of tensors if their lengths differ."""
    return value.flatten() if isinstance(value, Tensor) else torch.cat([part.flatten() for part in value])


def _sizes(value: Tensor | Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(_joined(value).tolist())
