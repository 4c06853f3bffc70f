"""Conversion of Whisper weights from CTranslate2's format (faster-whisper) to a Hugging Face folder.

CTranslate2 stores a list of named arrays in one file, `model.bin`. The query, key and value projections of each
self-attention are stored in one array, as are the key and value projections of each cross-attention.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from model.errors import UserError

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_HEAD_DIM = 64
_ENGLISH_VOCABULARY = 51864
"""The vocabulary size of Whisper's English-only models. Multilingual models have more tokens."""


def convert_whisper(model_bin: Path, folder: Path) -> None:
    """Write Whisper weights as a Hugging Face folder, in fp16.

    Args:
        model_bin: A `model.bin` of CTranslate2, in a folder that also contains `config.json` and `tokenizer.json`.
        folder: An existing, empty folder.

    Raises:
        UserError: If the file is not a Whisper model in this format.
    """
    try:
        arrays = read_ctranslate2(model_bin)
        tensors = _hugging_face_tensors(arrays)
        stored = json.loads((model_bin.parent / "config.json").read_text(encoding="utf-8"))
        added = json.loads((model_bin.parent / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        config = _config(tensors)
        generation = _generation_config(config, stored, {token["content"]: token["id"] for token in added})
    except (OSError, KeyError, ValueError, IndexError, struct.error) as error:
        raise UserError(
            f"{model_bin}: cannot be read as a Whisper model of CTranslate2 ({error!r}); download it again"
        ) from error
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(model_bin.parent / "tokenizer.json", folder / "tokenizer.json")
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", _feature_extractor(config)),
        ("tokenizer_config.json", _TOKENIZER),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_ctranslate2(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a CTranslate2 model by name.

    Args:
        path: A `model.bin` of the format's versions 4 to 6.

    Raises:
        ValueError: If the version or the type of the model is unknown, or the size of an array is invalid.
        struct.error: If the file ends within a number.
    """
    data = memoryview(path.read_bytes())
    position = 0

    def number(kind: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{kind}", data, position)
        position += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal position
        size = number("H")  # with the terminating zero
        position += size
        return bytes(data[position - size : position - 1]).decode()

    version = number("I")
    if not 4 <= version <= 6:
        raise ValueError(f"format version {version}, expected 4 to 6")
    name, _revision = text(), number("I")
    if name != "WhisperSpec":
        raise ValueError(f"the model is a {name}, expected WhisperSpec")
    arrays: dict[str, NDArray[Any]] = {}
    for _ in range(number("I")):
        key = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, num_bytes = np.dtype(_DTYPES[number("B")]), number("I")
        arrays[key] = np.frombuffer(data[position : position + num_bytes], dtype).reshape(shape)
        position += num_bytes
    for _ in range(number("I")):
        alias, original = text(), text()
        arrays[alias] = arrays[original]
    return arrays


def _hugging_face_tensors(arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Return the tensors of `WhisperForConditionalGeneration` in fp16. The output layer shares the embedding."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: NDArray[Any]) -> None:
        tensors[name] = torch.from_numpy(value.astype(np.float16))

    def linear(source: str, *targets: str) -> None:
        weights = np.split(_dequantized(arrays, f"{source}/weight"), len(targets))
        biases = np.split(_dequantized(arrays, f"{source}/bias"), len(targets))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            keep(f"{target}.weight", weight)
            if target.endswith("k_proj"):  # Whisper's keys have no bias
                if bias.any():
                    raise ValueError(f"{source}/bias: keys have a bias, which Whisper does not have")
            else:
                keep(f"{target}.bias", bias)

    def norm(source: str, target: str) -> None:
        keep(f"{target}.weight", arrays[f"{source}/gamma"])
        keep(f"{target}.bias", arrays[f"{source}/beta"])

    for i in (1, 2):
        keep(f"model.encoder.conv{i}.weight", _dequantized(arrays, f"encoder/conv{i}/weight"))
        keep(f"model.encoder.conv{i}.bias", arrays[f"encoder/conv{i}/bias"])
    keep("model.decoder.embed_tokens.weight", _dequantized(arrays, "decoder/embeddings/weight"))
    for part in ("encoder", "decoder"):
        keep(f"model.{part}.embed_positions.weight", arrays[f"{part}/position_encodings/encodings"])
        norm(f"{part}/layer_norm", f"model.{part}.layer_norm")
        for i in range(_num_layers(arrays, part)):
            source, target = f"{part}/layer_{i}", f"model.{part}.layers.{i}"
            attention = f"{target}.self_attn"
            linear(f"{source}/self_attention/linear_0", *(f"{attention}.{x}_proj" for x in "qkv"))
            linear(f"{source}/self_attention/linear_1", f"{attention}.out_proj")
            norm(f"{source}/self_attention/layer_norm", f"{attention}_layer_norm")
            if part == "decoder":
                cross = f"{target}.encoder_attn"
                linear(f"{source}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{source}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{source}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{source}/attention/layer_norm", f"{cross}_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    return tensors


def _dequantized(arrays: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """Return an array as floats. An int8 weight was multiplied by one scale per row, so it is divided by this scale."""
    value, scale = arrays[name], arrays.get(f"{name}_scale")
    if scale is None:
        return value
    return value.astype(np.float32) / scale.reshape(-1, *(1,) * (value.ndim - 1)).astype(np.float32)


def _num_layers(arrays: dict[str, NDArray[Any]], part: str) -> int:
    """Return the number of layers of the encoder or decoder, which are named `layer_0`, `layer_1` and so on."""
    names = {key.split("/")[1] for key in arrays if key.startswith(f"{part}/layer_")}
    return len(names - {"layer_norm"})


def _config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the content of `config.json`, which is derived from the shapes of the tensors."""
    vocab_size, dim = tensors["model.decoder.embed_tokens.weight"].shape
    end = 50256 if vocab_size == _ENGLISH_VOCABULARY else 50257  # <|endoftext|>; <|startoftranscript|> follows it
    sizes = {
        "vocab_size": vocab_size,
        "d_model": dim,
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(tensors["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(tensors["model.decoder.embed_positions.weight"]),
    }
    for part in ("encoder", "decoder"):
        layers = {name.split(".")[3] for name in tensors if name.startswith(f"model.{part}.layers.")}
        sizes |= {
            f"{part}_layers": len(layers),
            f"{part}_attention_heads": dim // _HEAD_DIM,
            f"{part}_ffn_dim": len(tensors[f"model.{part}.layers.0.fc1.bias"]),
        }
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float16",
        **sizes,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": end + 1,
        "begin_suppress_tokens": [220, end],
    }


def _generation_config(config: dict[str, Any], stored: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Return the content of `generation_config.json`.

    Args:
        config: The content of `config.json`.
        stored: The content of CTranslate2's `config.json`.
        ids: The ids of the tokenizer's added tokens, by their text.
    """
    multilingual = config["vocab_size"] != _ENGLISH_VOCABULARY
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    found = {
        **{key: config[key] for key in kept},
        "alignment_heads": stored["alignment_heads"],
        "suppress_tokens": stored["suppress_ids"],
        "begin_suppress_tokens": stored["suppress_ids_begin"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "is_multilingual": multilingual,
        "max_length": config["max_target_positions"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
    }
    if multilingual:
        languages = set(stored["lang_ids"])
        found["lang_to_id"] = {text: token for text, token in ids.items() if token in languages}
        found["task_to_id"] = {"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]}
    return found


def _feature_extractor(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`: 30 s windows at 16 kHz."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 1024,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
