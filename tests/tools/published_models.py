"""Tiny random models of the published architectures, whose logits are computed by independent implementations.

Windows are 2 s long instead of 30 s. Qwen2-Audio, Qwen3-ASR, Voxtral and Audio Flamingo 3 use transformers' classes.
Ultravox is not in transformers, so the class `Ultravox` follows the description of the architecture.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.whisper.modeling_whisper import WhisperEncoder

WINDOW_SEC = 2
WINDOW_SAMPLES = WINDOW_SEC * 16_000
MELS = 16
WIDTH = 16
INSTRUCTION = "what is said"
AUDIO = {
    "num_mel_bins": MELS,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": 50 * WINDOW_SEC,
}
AUDIO_IN_NEW_NAMES = {
    "num_mel_bins": MELS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_source_positions": 50 * WINDOW_SEC,
}
TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 8,
}
SPECIAL = (
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<sound>"),
    "<|audio|>",
    *("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"),
)
WORDS = (
    *("system", "user", "assistant", "You", "are", "a", "helpful", ".", "Audio", "1", ":", "what", "is", "said", "it"),
    *("red", "green", "blue", "white", "Write", "you", "hear"),
)
Logits = Callable[..., tuple[list[int], Tensor]]
"""A function of a waveform and of a model, by default the published one. It returns the L token ids of the prompt and
the logits [L, vocabulary]."""


@dataclass(frozen=True)
class Reference:
    """A published model, the folder that contains it, and the function that computes its logits."""

    folder: Path
    logits: Logits
    model: Any


def write_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, and with a chat template unless it is None."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    found = PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL[3:])})
    found.chat_template = chat_template
    return found


def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=MELS, chunk_length=WINDOW_SEC)


def perturbed(model: nn.Module) -> nn.Module:
    """Return the model with noise added to all parameters, since biases of 0 and norms of 1 would hide mistakes."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model.eval()


def qwen2_audio(folder: Path) -> Reference:
    config = Qwen2AudioConfig(
        audio_config=dict(AUDIO),
        text_config={**TEXT, "model_type": "qwen2", "use_mrope": False},  # `use_mrope` is not a key of Qwen2's config
        audio_token_index=SPECIAL.index("<|AUDIO|>"),
    )
    model: Any = perturbed(Qwen2AudioForConditionalGeneration(config))
    model.save_pretrained(folder)
    processor = Qwen2AudioProcessor(extractor(), write_tokenizer(None))
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # the published folder has none
    write_tokenizer(None).save_pretrained(folder)

    @torch.no_grad()
    def logits(wave: np.ndarray, model: Any = model) -> tuple[list[int], Tensor]:
        content = [{"type": "audio", "audio": "x"}, {"type": "text", "text": INSTRUCTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, audio=[wave], sampling_rate=16_000, return_tensors="pt")
        return inputs["input_ids"][0].tolist(), model(**inputs).logits[0]

    return Reference(folder, logits, model)


def audioflamingo3(folder: Path) -> Reference:
    config = AudioFlamingo3Config(
        audio_config=dict(AUDIO_IN_NEW_NAMES),
        text_config={**TEXT, "model_type": "qwen2"},
        audio_token_id=SPECIAL.index("<sound>"),
    )
    model: Any = perturbed(AudioFlamingo3ForConditionalGeneration(config))
    model.save_pretrained(folder)
    template = "{% for m in messages %}<|im_start|>user {{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>assistant "
    tokenizer = write_tokenizer(template)
    tokenizer.save_pretrained(folder)
    processor = AudioFlamingo3Processor(extractor(), tokenizer, chat_template=template)
    processor.save_pretrained(folder)

    @torch.no_grad()
    def logits(wave: np.ndarray, model: Any = model) -> tuple[list[int], Tensor]:
        text = f"<|im_start|>user <sound>{INSTRUCTION}<|im_end|><|im_start|>assistant "
        inputs = processor(text=[text], audio=[wave])
        return inputs["input_ids"][0].tolist(), model(**inputs).logits[0]

    return Reference(folder, logits, model)


def qwen3_asr(folder: Path) -> Reference:
    audio = {key: AUDIO[key] for key in AUDIO if key != "max_source_positions"}
    audio |= {"downsample_hidden_size": 8, "output_dim": TEXT["hidden_size"], "n_window_infer": 200}
    config = Qwen3ASRConfig(
        audio_config=audio,
        text_config={**TEXT, "model_type": "qwen3", "tie_word_embeddings": True},
        audio_token_id=SPECIAL.index("<|audio_pad|>"),
    )
    model: Any = perturbed(Qwen3ASRForConditionalGeneration(config))
    model.save_pretrained(folder)
    template = "{% for m in messages %}<|im_start|>user {{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>assistant "
    tokenizer = write_tokenizer(template)
    tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def logits(wave: np.ndarray, model: Any = model) -> tuple[list[int], Tensor]:
        extract = Qwen3ASRFeatureExtractor(feature_size=MELS)
        features = extract([wave], sampling_rate=16_000, padding=True, return_attention_mask=True)
        mel, mask = features["input_features"], features["attention_mask"]
        frames = model.model.audio_tower(mel, mask).last_hidden_state
        audio = f"<|audio_start|>{'<|audio_pad|>' * len(frames)}<|audio_end|>{INSTRUCTION}"
        ids = tokenizer.encode(f"<|im_start|>user {audio}<|im_end|><|im_start|>assistant ", add_special_tokens=False)
        given = {"input_ids": torch.tensor([ids]), "input_features": mel, "input_features_mask": mask}
        return ids, model(**given).logits[0]

    return Reference(folder, logits, model)


def write_tekken(folder: Path) -> None:
    """Write a tokenizer of bytes in Mistral's own format, which is the only format in Voxtral's folders."""
    control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]", "<pad>"]
    size = 256 + len(control)
    counts = {"num_vocab_tokens": 256, "default_vocab_size": size, "default_num_special_tokens": len(control)}
    content = {
        "config": {"pattern": r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+", "version": "v7", **counts},
        "vocab": [{"rank": i, "token_bytes": b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)],
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(control)],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def voxtral(folder: Path) -> Reference:
    audio, token = dict(AUDIO_IN_NEW_NAMES), 5
    text = {**TEXT, "model_type": "llama", "vocab_size": 270}
    model: Any = perturbed(
        VoxtralForConditionalGeneration(VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=token))
    )
    model.save_pretrained(folder)
    write_tekken(folder)

    @torch.no_grad()
    def logits(wave: np.ndarray, model: Any = model) -> tuple[list[int], Tensor]:
        features = extractor()(wave, sampling_rate=16_000, pad_to_multiple_of=WINDOW_SAMPLES, truncation=False)
        mel = torch.from_numpy(np.stack(features["input_features"]))
        # The ids of bytes follow the ids of the control tokens.
        ids = [1, 3, 6, *[token] * 25, *(8 + byte for byte in INSTRUCTION.encode()), 4]
        return ids, model(input_ids=torch.tensor([ids]), input_features=mel).logits[0]

    return Reference(folder, logits, model)


class Projector(nn.Module):
    """Ultravox's projector: stacked frames, RMSNorm, linear layer, SwiGLU, then RMSNorm and linear layer.

    In old models (`is_old`), the last RMSNorm follows the last linear layer.
    """

    def __init__(self, width: int, stack: int, hidden: int, out: int, is_old: bool) -> None:
        super().__init__()
        self.stack = stack
        self.ln_pre = LlamaRMSNorm(width * stack)
        self.linear_1 = nn.Linear(width * stack, hidden, bias=False)
        self.ln_mid = nn.Identity() if is_old else LlamaRMSNorm(hidden // 2)
        self.linear_2 = nn.Linear(hidden // 2, out, bias=False)
        self.ln_post = LlamaRMSNorm(out) if is_old else nn.Identity()

    def forward(self, frames: Tensor) -> Tensor:
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.stack))
        stacked = frames.reshape(1, -1, self.stack * frames.shape[2])
        value, gate = self.linear_1(self.ln_pre(stacked)).chunk(2, dim=-1)
        return self.ln_post(self.linear_2(self.ln_mid(F.silu(gate) * value)))


class Ultravox(nn.Module):
    """Ultravox's modules under their published names."""

    def __init__(self, is_old: bool) -> None:
        super().__init__()
        self.audio_tower = WhisperEncoder(WhisperConfig(**AUDIO))
        self.multi_modal_projector = Projector(WIDTH, 8, 24, TEXT["hidden_size"], is_old)
        self.language_model = LlamaForCausalLM(LlamaConfig(**TEXT))

    def encode(self, mel: Tensor) -> Tensor:
        """Return the frames [1, F, D] of a log-mel spectrogram [1, N, M] of any length."""
        tower = self.audio_tower
        hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(mel)))).transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
        for layer in tower.layers:
            hidden = layer(hidden, None)
        return tower.layer_norm(hidden)


def ultravox(folder: Path, llm_folder: Path | None = None, is_old: bool = False) -> Reference:
    """Write an Ultravox model.

    Args:
        folder: The folder to write to.
        llm_folder: A separate folder for the LLM, which config.json then only names; None to store it in `folder`.
        is_old: True for the layout up to version 0.4.1.
    """
    model: Any = perturbed(Ultravox(is_old))
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "ultravox",
        "architectures": ["UltravoxModel"],
        "audio_config": {**AUDIO, "model_type": "whisper"},
        "text_config": {**TEXT, "model_type": "llama"},
        "hidden_size": 24,
        "stack_factor": 8,
        "projector_act": "swiglu",
        "projector_ln_mid": True,
        "dtype": "float32",
    }
    if is_old:
        del config["projector_ln_mid"]
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if llm_folder is not None:
        model.language_model.save_pretrained(llm_folder)
        config |= {"text_config": None, "text_model_id": "meta-llama/somewhere"}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("language_model.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    template = "<s>{% for m in messages %}user : {{ m['content'] }} assistant :{% endfor %}"
    tokenizer = write_tokenizer(template)
    tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def logits(wave: np.ndarray, model: Any = model) -> tuple[list[int], Tensor]:
        features = extractor()(wave, sampling_rate=16_000, padding="longest", pad_to_multiple_of=160)
        audio = model.multi_modal_projector(model.encode(torch.from_numpy(np.stack(features["input_features"]))))
        text = f"{INSTRUCTION}\n" + audio.shape[1] * "<|audio|>"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = tokenizer.encode(chat, add_special_tokens=False)
        embedded = model.language_model.get_input_embeddings()(torch.tensor([ids]))
        embedded[0, torch.tensor(ids) == SPECIAL.index("<|audio|>")] = audio[0]
        return ids, model.language_model(inputs_embeds=embedded).logits[0]

    return Reference(folder, logits, model)


MODELS: dict[str, Callable[[Path], Reference]] = {
    "qwen2_audio": qwen2_audio,
    "audioflamingo3": audioflamingo3,
    "qwen3_asr": qwen3_asr,
    "voxtral": voxtral,
    "ultravox": ultravox,
}
