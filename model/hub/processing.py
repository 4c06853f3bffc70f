"""The exported processor, which computes the model's inputs from audio and an instruction or messages, as in training.

Shapes: B samples, L tokens of the longest sample, C clips, T audio samples (16 kHz).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from model.chat import render_chat
from model.conversation import Message, PromptFormat, Turn, audio_blocks, clip_texts, question, read_turns
from model.lengths import SAMPLE_RATE, TokenRate, num_samples
from model.prompt import cut, fill

Clip = Any
"""The path to an audio file, or a waveform [T] at 16 kHz (array, list or tensor)."""


class EarshotProcessor(ProcessorMixin):
    """The processor of an exported model, which combines tokenizer, prompt and audio.

    Args:
        tokenizer: The tokenizer of the LLM.
        placeholder: The token that is repeated once for each audio token of a clip.
        prompt_with_audio: The prompt of samples with audio, which contains `{audio}` and `{instruction}`.
        prompt_without_audio: The prompt of samples without audio.
        as_chat: True to wrap prompts in the tokenizer's chat template.
        strides: The strides of the model's adapter.
        tokens_per_group: The number of audio tokens for each group of frames. The product of the strides is the size of
            a group.
        drops_rest: True if frames at the end of a clip that do not fill a group are dropped.
        block_frames: The number of frames after which the grouping restarts; 0 for no blocks.
        min_audio_sec: The length in seconds to which shorter clips are padded with silence at the end.
        max_audio_sec: The length in seconds of the longest clips in training; None if it is unknown. Longer clips are
            also accepted.
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
        drops_rest: bool = False,
        block_frames: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, chat_template=kwargs.get("chat_template"))
        self.placeholder = placeholder
        self.prompt_with_audio, self.prompt_without_audio = prompt_with_audio, prompt_without_audio
        self.as_chat, self.strides, self.tokens_per_group = as_chat, tuple(strides), tokens_per_group
        self.drops_rest, self.block_frames = drops_rest, block_frames
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
            audio: One clip; or, for each of several samples, a clip or a list of clips. None for text without audio.
            text: The instruction, or one instruction for each sample.
            sampling_rate: The rate of waveforms; only 16000 is accepted.
            return_tensors: Only `pt` is accepted.

        Raises:
            ValueError: If `sampling_rate` or `return_tensors` has a different value, audio cannot be used, the numbers
                of samples and instructions differ, or an instruction contains the placeholder or a special token.
        """
        if sampling_rate != SAMPLE_RATE or return_tensors != "pt":
            raise ValueError(
                f"sampling_rate = {sampling_rate}, return_tensors = {return_tensors!r}: must be 16000 and 'pt'"
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
            raise ValueError(
                f"there are {len(samples)} samples of audio, but {len(texts)} instructions; pass one for each sample"
            )
        return self._inputs([(question(t, len(own)),) for t, own in zip(texts, samples, strict=True)], samples)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        audio: Sequence[Clip] | Sequence[Sequence[Clip]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
    ) -> Any:
        """Return a conversation, or a batch of conversations, as text or as the inputs of `generate` and `forward`.

        Args:
            conversation: The messages, as in `transformers.ProcessorMixin.apply_chat_template`. A message has `role`
                and `content`: text, or blocks `{"type": "text", "text": …}` and `{"type": "audio", "audio": CLIP}`. In
                text, `<audio>` stands for a clip. After an optional system prompt, user and assistant alternate.
            audio: The clips that the messages themselves do not contain, in order; for a batch, a list for each
                conversation.
            add_generation_prompt: Whether the header of the next answer is appended. It must be true if the last
                message is from the user, and false if it is from the assistant.
            tokenize: Whether to return tokens instead of text. The text has one placeholder per clip.
            return_dict: Whether to return all inputs instead of `input_ids` alone.
            return_tensors: Only `pt` is accepted.

        Returns:
            The text, or `input_ids` [B, L], or a `BatchFeature` with the inputs. Prompts have the same tokens as in
            training. Whole conversations also have the same tokens, up to the end of the last answer. Conversations are
            padded on the left.

        Raises:
            ValueError: If messages have a different form, contain the placeholder or a special token, or have more or
                fewer places for audio than there are clips, or if `add_generation_prompt` does not match the last
                message.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors = {return_tensors!r}: must be 'pt'")
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        batch: Any = conversation if is_batch else [conversation]
        given: Any = audio if is_batch else [audio]
        turns = [read_turns(messages) for messages in batch]
        for own in turns:
            if (own[-1].role == "user") != add_generation_prompt:
                raise ValueError(
                    f"add_generation_prompt = {add_generation_prompt}, but the last message is from the {own[-1].role}"
                )
        if not tokenize:
            texts = [self._text(own) for own in turns]
            return texts if is_batch else texts[0]
        clips = [
            [self._clip(clip) for clip in _clips(messages, more)]
            for messages, more in zip(batch, given or [None] * len(batch), strict=True)
        ]
        inputs = self._inputs(turns, clips)
        return inputs if return_dict else inputs["input_ids"]

    def inputs(self, conversations: Sequence[tuple[Turn, ...]], samples: Sequence[Sequence[Clip]]) -> BatchFeature:
        """Return the inputs of `generate` and `forward` for conversations.

        Args:
            conversations: The turns of each conversation.
            samples: The clips of each conversation.

        Raises:
            ValueError: If audio cannot be used, the number of clips differs from the number of places for them, or text
                contains the placeholder or a special token.
        """
        return self._inputs(conversations, [[self._clip(clip) for clip in own] for own in samples])

    def _inputs(
        self, conversations: Sequence[tuple[Turn, ...]], samples: Sequence[Sequence[np.ndarray]]
    ) -> BatchFeature:
        # Many samples have the same instruction, so each distinct text is tokenized only once.
        pieces = {turns: self._pieces(turns) for turns in dict.fromkeys(conversations)}
        for turns, own in zip(conversations, samples, strict=True):
            if len(pieces[turns]) != len(own) + 1:
                num_places = len(pieces[turns]) - 1
                raise ValueError(f"there are {len(own)} clips, but {num_places} places for them in the messages")
        prompts = [
            fill(pieces[turns], [self.count_audio_tokens(len(c)) for c in own], self.placeholder_id)
            for turns, own in zip(conversations, samples, strict=True)
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
            inputs |= self.clip_inputs(clips, [text for turns in conversations for text in clip_texts(turns)])
        return BatchFeature(inputs)

    def clip_inputs(self, clips: Sequence[Clip], instructions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the inputs of `EarshotForCausalLM.embed` for the audio tower, without tokens and mask.

        Args:
            clips: At least one clip.
            instructions: The text of the message that each clip belongs to.

        Raises:
            ValueError: If audio cannot be used.
        """
        waves = [self._clip(clip) for clip in clips]
        encoded = {text: self._encode(text) for text in set(instructions)}
        return {
            "audio_values": torch.from_numpy(np.concatenate(waves)),
            "audio_lengths": torch.tensor([len(wave) for wave in waves]),
            "instruction_ids": torch.tensor([i for text in instructions for i in encoded[text]], dtype=torch.int64),
            "instruction_lengths": torch.tensor([len(encoded[text]) for text in instructions]),
        }

    def prompt_ids(self, text: str, num_clips: int) -> list[int]:
        """Return the tokens of a prompt with one placeholder per clip.

        Args:
            text: The instruction.
            num_clips: The number of clips.

        Raises:
            ValueError: If `text` contains the placeholder or a special token.
        """
        pieces = self._pieces((question(text, num_clips),))
        return fill(pieces, [1] * num_clips, self.placeholder_id)[0]

    def count_text_tokens(self, num_clips: int, text: str = "") -> int:
        """Return the number of tokens of a prompt without its audio tokens.

        Args:
            num_clips: The number of clips.
            text: The instruction.

        Raises:
            ValueError: If `text` contains the placeholder or a special token.
        """
        return self.count_tokens_of((question(text, num_clips),))

    def count_tokens_of(self, turns: tuple[Turn, ...]) -> int:
        """Return the number of tokens of a conversation without its audio tokens.

        Raises:
            ValueError: If text contains the placeholder or a special token.
        """
        return sum(map(len, self._pieces(turns)))

    def count_audio_tokens(self, clip_samples: int) -> int:
        """Return the number of audio tokens of a clip of `clip_samples` audio samples."""
        rate = TokenRate(self.strides, self.tokens_per_group, self.drops_rest, self.block_frames)
        return rate.tokens_of_samples(max(num_samples(self.min_audio_sec), clip_samples))

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Return the text of each sequence of generated tokens, without special tokens and placeholders."""
        rows = [[int(t) for t in row if int(t) != self.placeholder_id] for row in sequences]
        texts: list[str] = self.tokenizer.batch_decode(rows, **{"skip_special_tokens": True, **kwargs})
        return texts

    def _pieces(self, turns: tuple[Turn, ...]) -> list[list[int]]:
        """Return the tokens of a conversation before, between and after its clips."""
        special_ids = self._special_ids()
        for text in dict.fromkeys(text for turn in turns for text in (*turn.texts, turn.text)):
            if self.placeholder in text:
                raise ValueError(f"{text!r} contains {self.placeholder}, which stands for audio")
            for token in self._encode(text):
                if token in special_ids:
                    name = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(f"{text!r} contains {name}, a special token that controls the model")
        form = self._format()
        if turns[-1].role == "user":
            segments = form.segments(turns)
        else:
            segments = [*form.segments(turns[:-1]), self._encode(turns[-1].text), form.closing(turns)]
        return cut([token for segment in segments for token in segment], self.placeholder_id)

    def _format(self) -> PromptFormat:
        begin = self.tokenizer.bos_token_id
        return PromptFormat(
            template=self.prompt_with_audio,
            text_template=self.prompt_without_audio,
            placeholder=self.placeholder,
            placeholder_id=self.placeholder_id,
            begin=() if begin is None else (begin,),
            end_id=self.tokenizer.eos_token_id,
            encode=self._encode,
            chat=self._render if self.as_chat else None,
        )

    def _render(self, messages: Sequence[Message], prompts: bool) -> str:
        return render_chat(self.tokenizer, messages, prompts=prompts)

    def _text(self, turns: tuple[Turn, ...]) -> str:
        """Return a conversation as text, with one placeholder per clip."""
        form = self._format()
        if form.chat is not None:
            return form.chat(form.messages(turns), turns[-1].role == "user")
        ids = [token for piece in self._pieces(turns) for token in (*piece, self.placeholder_id)][:-1]
        text: str = self.tokenizer.decode(ids)
        return text

    def _special_ids(self) -> set[int]:
        """Return the ids of the special tokens that no text may contain."""
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return {*self.tokenizer.all_special_ids, *added} - {self.placeholder_id, self.tokenizer.unk_token_id}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _clip(self, clip: Clip) -> np.ndarray:
        wave = _read(os.fspath(clip)) if isinstance(clip, str | os.PathLike) else np.asarray(clip, dtype=np.float32)
        if wave.ndim != 1 or len(wave) == 0 or not np.isfinite(wave).all():
            raise ValueError(f"audio of shape {wave.shape}: must be [T], T > 0, with finite values at {SAMPLE_RATE} Hz")
        return np.pad(wave, (0, max(0, num_samples(self.min_audio_sec) - len(wave))))


def _clips(messages: Any, more: Sequence[Clip] | None) -> Iterator[Clip]:
    """Yield the clips of a conversation in order. Blocks without a clip use the given clips."""
    waiting = list(more or ())
    for clip in audio_blocks(messages):
        if clip is None and not waiting:
            raise ValueError("the messages have more places for audio than there are clips")
        yield waiting.pop(0) if clip is None else clip
    if waiting:
        raise ValueError(f"there are {len(waiting)} more clips than places for audio in the messages")


def _is_clip(audio: Any) -> bool:
    if isinstance(audio, str | os.PathLike | np.ndarray | torch.Tensor):
        return not hasattr(audio, "ndim") or audio.ndim == 1
    return bool(audio) and isinstance(audio[0], int | float)


def _read(path: str) -> np.ndarray:
    """Read an audio file, and return the mean over its channels [T] at 16 kHz."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError(f"{path}: reading files needs soundfile; pip install soundfile, or pass a waveform") from error
    frames, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0]
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(wave)
    try:
        import soxr
    except ImportError as error:
        raise ValueError(
            f"{path}: the sampling rate is {rate} Hz; pip install soxr to resample, or convert to {SAMPLE_RATE} Hz"
        ) from error
    return np.ascontiguousarray(soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ"), dtype=np.float32)
