"""Conversion of Llama weights from a GGUF file (llama.cpp) to a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from model.errors import UserError

_CONTROL_TOKEN = 3
"""GGUF's token type of special tokens, such as the end of text."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_llama(path: Path, folder: Path) -> None:
    """Write the Llama weights of a GGUF file as a Hugging Face folder, dequantized to bf16, with the tokenizer.

    Args:
        path: A GGUF file of the architecture `llama` with the tokenizer of SmolLM2.
        folder: An existing, empty folder.

    Raises:
        UserError: If the package gguf is missing, or the file does not contain such a model.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError("reading GGUF needs the package gguf: pip install 'earshot[models]'") from error
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
        if kind != ("llama", "gpt2", "smollm"):
            raise UserError(
                f"{path}: architecture and tokenizer are {kind}; only Llama with SmolLM2's tokenizer can be converted"
            )
        tensors = {
            _hugging_face_name(t.name): _rotary_halves(
                t.name, torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32)), fields
            )
            .to(torch.bfloat16)
            .contiguous()
            for t in reader.tensors
        }
        config = _config(fields, tied="lm_head.weight" not in tensors)
        tokenizer, tokenizer_config = _tokenizer(fields)
    except (OSError, KeyError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as GGUF ({error!r}); download it again") from error
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _hugging_face_name(name: str) -> str:
    first, *rest = name.split(".")
    if first != "blk":
        return f"{_OTHER_NAMES[first]}.weight"
    return f"model.layers.{rest[0]}.{_LAYER_NAMES[rest[1]]}.weight"


def _rotary_halves(name: str, weight: Tensor, fields: dict[str, Any]) -> Tensor:
    """Return a weight with the rows of each head in the order of transformers.

    llama.cpp interleaves the two halves of the rotary embedding, while transformers stores the second half after the
    first.
    """
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    key = heads.get(name.split(".")[2]) if name.startswith("blk.") else None
    if key is None:
        return weight
    rows, columns = weight.shape
    num_heads = fields[key]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # GGUF has it in fp32.
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **{f"{key}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for key, name in _SPECIAL_TOKENS.items()},
    }


_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _tokenizer(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return SmolLM2's tokenizer and the content of `tokenizer_config.json`.

    The tokenizer is byte-level BPE, with one token per digit.
    """
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {**_SPECIAL_TOKENS, "unk": "unknown"}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **{f"{key}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()},
    }
