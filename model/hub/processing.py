"""The exported processor, which makes the model's inputs from audio and an instruction, as in training.

Shapes: B samples, L tokens of the longest, C clips, T audio samples (16 kHz).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from model.chat import render_chat
from model.lengths import SAMPLE_RATE, TokenRate, num_samples
from model.prompt import cut, fill, render

Clip = Any
"""The path of an audio file, or a waveform [T] at 16 kHz (array, list or tensor)."""


class EarshotProcessor(ProcessorMixin):
    """The processor of tokenizer, prompt and audio.

    Args:
        tokenizer: The tokenizer of the LLM.
        placeholder: The token that is repeated once for each audio token of a clip.
        prompt_with_audio: The prompt of samples with audio, which contains `{audio}` and `{instruction}`.
        prompt_without_audio: The prompt of samples without audio.
        as_chat: True to wrap prompts in the tokenizer's chat template.
        strides: The strides of the model's adapter.
        tokens_per_group: The number of audio tokens for every group of frames that the strides leave.
        min_audio_sec: The length to which shorter clips are padded with silence at the end.
        max_audio_sec: The length of the longest clips in training; longer clips are accepted. None: unknown.
    """

    def __init__(
        self,
        tokenizer: Any,
        placeholder: str,
        prompt_with_audio: str,
        prompt_without_audio: str,
        as_chat: bool,
        strides: Sequence[int],
        min_audio_sec: float = 0.0,
        max_audio_sec: float | None = None,
        tokens_per_group: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, chat_template=kwargs.get("chat_template"))
        self.placeholder = placeholder
        self.prompt_with_audio, self.prompt_without_audio = prompt_with_audio, prompt_without_audio
        self.as_chat, self.strides, self.tokens_per_group = as_chat, tuple(strides), tokens_per_group
        self.min_audio_sec, self.max_audio_sec = min_audio_sec, max_audio_sec
        self.placeholder_id = tokenizer.convert_tokens_to_ids(placeholder)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(  # type: ignore[override]
        self,
        audio: Clip | Sequence[Clip | Sequence[Clip]] | None = None,
        text: str | Sequence[str] = "",
        sampling_rate: int = SAMPLE_RATE,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Return the inputs of `generate` and `forward`, with prompts padded on the left.

        Args:
            audio: One clip; or, for each of several samples, a clip or a list of clips. None: text only.
            text: The instruction, or one for each sample.
            sampling_rate: The rate of waveforms; only 16000 is accepted.
            return_tensors: only `pt` is accepted.

        Raises:
            ValueError: If the rate or the kind of tensors differs, audio cannot be used, the numbers of samples and
                instructions differ, or an instruction contains the placeholder or a token that controls the model.
        """
        if sampling_rate != SAMPLE_RATE or return_tensors != "pt":
            raise ValueError(
                f"sampling_rate = {sampling_rate}, return_tensors = {return_tensors!r}: 16000 and 'pt' only"
            )
        texts = [text] if isinstance(text, str) else list(text)
        if audio is None:
            samples: list[list[np.ndarray]] = [[] for _ in texts]
        elif _is_clip(audio):
            samples = [[self._clip(audio)]]
        else:
            samples = [[self._clip(a)] if _is_clip(a) else [self._clip(c) for c in a] for a in audio]
        if len(texts) == 1:
            texts *= len(samples)
        if len(texts) != len(samples):
            raise ValueError(f"{len(samples)} samples of audio and {len(texts)} instructions: give one for each")
        # Many samples have the same instruction, so each text is tokenized once.
        pieces = {key: self._pieces(*key) for key in {(t, len(own)) for t, own in zip(texts, samples, strict=True)}}
        prompts = [
            fill(pieces[t, len(own)], [self.count_audio_tokens(len(c)) for c in own], self.placeholder_id)
            for t, own in zip(texts, samples, strict=True)
        ]
        longest = max(len(ids) for ids, _ in prompts)
        rows = [(longest - len(ids), ids, mask) for ids, mask in prompts]
        inputs = {
            "input_ids": torch.tensor([[self.pad_id] * n + ids for n, ids, _ in rows]),
            "attention_mask": torch.tensor([[0] * n + [1] * len(ids) for n, ids, _ in rows]),
            "audio_mask": torch.tensor([[False] * n + mask for n, _, mask in rows]),
        }
        clips = [clip for own in samples for clip in own]
        if clips:
            encoded = {t: self._encode(t) for t in set(texts)}
            spoken = [encoded[t] for t, own in zip(texts, samples, strict=True) for _ in own]
            inputs |= {
                "audio_values": torch.from_numpy(np.concatenate(clips)),
                "audio_lengths": torch.tensor([len(c) for c in clips]),
                "instruction_ids": torch.tensor([i for ids in spoken for i in ids], dtype=torch.int64),
                "instruction_lengths": torch.tensor([len(ids) for ids in spoken]),
            }
        return BatchFeature(inputs)

    def count_text_tokens(self, num_clips: int, text: str = "") -> int:
        """Return the number of tokens of a prompt without its audio tokens.

        Args:
            num_clips: The number of clips.
            text: The instruction.

        Raises:
            ValueError: If `text` contains the placeholder or a token that controls the model.
        """
        return sum(map(len, self._pieces(text, num_clips)))

    def count_audio_tokens(self, clip_samples: int) -> int:
        """Return the number of audio tokens of a clip of `clip_samples` audio samples."""
        rate = TokenRate(self.strides, self.tokens_per_group)
        return rate.tokens_of_samples(max(num_samples(self.min_audio_sec), clip_samples))

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Return the texts of generated tokens, without special tokens and placeholders."""
        rows = [[int(t) for t in row if int(t) != self.placeholder_id] for row in sequences]
        texts: list[str] = self.tokenizer.batch_decode(rows, **{"skip_special_tokens": True, **kwargs})
        return texts

    def _pieces(self, instruction: str, num_clips: int) -> list[list[int]]:
        """Return the tokens of a prompt before, between and after its clips."""
        if self.placeholder in instruction:
            raise ValueError(f"{instruction!r} contains {self.placeholder}, which stands for audio")
        special_ids = self._special_ids()
        for token in self._encode(instruction):
            if token in special_ids:
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise ValueError(f"{instruction!r} contains {name}, which controls the model")
        template = self.prompt_with_audio if num_clips else self.prompt_without_audio
        text = render(template, instruction, self.placeholder, num_clips)
        if self.as_chat:
            text = render_chat(self.tokenizer, text)
        begin = self.tokenizer.bos_token_id
        ids = ([] if begin is None or self.as_chat else [begin]) + self._encode(text)
        return cut(ids, self.placeholder_id)

    def _special_ids(self) -> set[int]:
        """Return the ids that control the model, which no instruction may contain."""
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return {*self.tokenizer.all_special_ids, *added} - {self.placeholder_id, self.tokenizer.unk_token_id}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _clip(self, clip: Clip) -> np.ndarray:
        wave = _read(os.fspath(clip)) if isinstance(clip, str | os.PathLike) else np.asarray(clip, dtype=np.float32)
        if wave.ndim != 1 or len(wave) == 0 or not np.isfinite(wave).all():
            raise ValueError(f"audio of shape {wave.shape}: give [T] finite values at {SAMPLE_RATE} Hz, T > 0")
        return np.pad(wave, (0, max(0, num_samples(self.min_audio_sec) - len(wave))))


def _is_clip(audio: Any) -> bool:
    if isinstance(audio, str | os.PathLike | np.ndarray | torch.Tensor):
        return not hasattr(audio, "ndim") or audio.ndim == 1
    return bool(audio) and isinstance(audio[0], int | float)


def _read(path: str) -> np.ndarray:
    """Return the mean of a file's channels [T] at 16 kHz."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError(f"{path}: pip install soundfile to read files, or pass a waveform") from error
    frames, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0]
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(wave)
    try:
        import soxr
    except ImportError as error:
        raise ValueError(f"{path}: {rate} Hz; pip install soxr, or convert it to {SAMPLE_RATE} Hz") from error
    return np.ascontiguousarray(soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ"), dtype=np.float32)
