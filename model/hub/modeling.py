"""The exported model for transformers' Auto classes.

It consists of the audio tower and the LLM, and its parameters have the same names as in training.

Shapes: B samples, L tokens of the longest sample, C clips, T audio samples (16 kHz), H width of the LLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import logging

from model.audio_tower import AudioTower
from model.batch import Ragged
from model.hub.configuration import EarshotConfig, audio_config
from model.llm.experts import place_experts
from model.llm.families import modules_of
from model.llm.mixture import SCORE_BIAS, described
from model.router import Routing


class EarshotForCausalLM(PreTrainedModel, GenerationMixin):
    """A model that reads speech and text and writes text.

    `processor(audio, text)` computes the inputs of `forward` and `generate`. `generate` returns only new tokens.
    """

    config_class = EarshotConfig
    _supports_sdpa = True
    _no_split_modules: list[str] = []
    _keep_in_fp32_modules_strict = [SCORE_BIAS]

    def __init__(self, config: EarshotConfig) -> None:
        super().__init__(config)
        # `from_pretrained(dtype=…)` sets the default dtype. Otherwise, the LLM would have the dtype of its config.
        self.llm = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        mixture = described(config.text_config)
        if mixture is not None:
            place_experts(self.llm, mixture, modules_of(config.text_config))
        self.audio = AudioTower(audio_config(config.audio), config.text_config.hidden_size, config.vocab_size)
        if config.text_config.tie_word_embeddings:
            self._tied_weights_keys = {"llm.lm_head.weight": "llm.model.embed_tokens.weight"}
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load a model as transformers does, but without its progress bar."""
        was_enabled = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            return super().from_pretrained(*arguments, **options)
        finally:
            if was_enabled:
                logging.enable_progress_bar()

    def get_input_embeddings(self) -> Any:
        """Return the LLM's token embeddings."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Return the LLM's output layer."""
        return self.llm.get_output_embeddings()

    def embed(
        self,
        input_ids: Tensor,
        audio_mask: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the input embeddings of the LLM [B, L, H] and the routing of the clips.

        Args:
            input_ids: [B, L], with a placeholder for each audio token.
            audio_mask: [B, L] bool, true at the placeholders.
            audio_values: [ΣT], the concatenated clips, sample after sample.
            audio_lengths: [C], the lengths of the clips in audio samples.
            instruction_ids: The concatenated tokens of each clip's instruction.
            instruction_lengths: [C], the lengths of the instructions in tokens.

        Returns:
            The embeddings, and the routing, which is None if there are no clips or no experts.
        """
        text = self.get_input_embeddings()(input_ids)
        if audio_values is None or audio_lengths is None or len(audio_lengths) == 0:
            return text, None
        assert audio_mask is not None and instruction_ids is not None and instruction_lengths is not None
        clips = Ragged(audio_values, tuple(audio_lengths.tolist()))
        instructions = Ragged(instruction_ids, tuple(instruction_lengths.tolist()))
        found = self.audio(clips, instructions)
        # `masked_scatter` fills positions row by row, and the clips are in the order of samples.
        return text.masked_scatter(audio_mask[..., None], found.embeddings.values.to(text.dtype)), found.routing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        audio_mask: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the LLM's output for the embedded prompts. For the arguments and shapes, see `embed`."""
        if audio_values is not None:
            assert input_ids is not None
            inputs_embeds, _ = self.embed(
                input_ids, audio_mask, audio_values, audio_lengths, instruction_ids, instruction_lengths
            )
            input_ids = None
        return self.llm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **kwargs,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        audio_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue left-padded prompts. The audio is encoded once.

        For the arguments and shapes, see `embed`. `kwargs` are options for transformers' `generate`.

        Returns:
            The new tokens [B, at most max_new_tokens], without the prompt.
        """
        embedded, _ = self.embed(
            input_ids, audio_mask, audio_values, audio_lengths, instruction_ids, instruction_lengths
        )
        inputs: Any = {"inputs_embeds": embedded, "attention_mask": attention_mask}
        return super().generate(**inputs, **kwargs)  # type: ignore[misc]
