"""The tokenizer and processor files of an exported model, which transformers reads without additional packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError
from model.lengths import TokenRate
from trainer.data.config import DataConfig
from trainer.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from trainer.data.tokenizer_digest import PROBES, save_without_code
from trainer.export.code import PROCESSING, remote_name
from trainer.run_tokenizer import PROCESSOR

if TYPE_CHECKING:
    from model.hub.processing import EarshotProcessor

_SETTINGS = (
    "placeholder",
    "prompt_with_audio",
    "prompt_without_audio",
    "as_chat",
    "strides",
    "tokens_per_group",
    "drops_rest",
    "block_frames",
    "min_audio_sec",
    "max_audio_sec",
)
"""The arguments of `EarshotProcessor` that an export stores."""
_ALL_SPACES = 1 << 16


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    """Write a tokenizer in the format of transformers, and return it.

    Args:
        tokenizer: The tokenizer.
        folder: The folder to write to.

    Returns:
        The transformers tokenizer, which produces the same tokens for the same text.

    Raises:
        UserError: If transformers cannot represent the SentencePiece model, or if the written tokenizer differs when it
            is read back.
    """
    found = as_transformers(tokenizer)
    save_without_code(found, folder)
    written = HuggingFaceTokenizer(str(folder), tokenizer.config)
    if written.digest != tokenizer.digest:
        raise UserError(
            f"{folder}: the tokenizer has different tokens when it is read back; use the LLM's tokenizer.json"
        )
    return found


def as_transformers(tokenizer: Tokenizer) -> Any:
    """Return a transformers tokenizer that produces the same tokens for the same text.

    Raises:
        UserError: If transformers cannot represent the SentencePiece model.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.inner
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _from_sentencepiece(tokenizer)


def processor_settings(tokenizer: Tokenizer, data: DataConfig, rate: TokenRate) -> dict[str, Any]:
    """Return the arguments, except the tokenizer, with which `EarshotProcessor` processes samples as in training."""
    return {
        "placeholder": data.tokenizer.placeholder,
        "prompt_with_audio": data.tokenizer.template,
        "prompt_without_audio": data.tokenizer.text_template,
        "as_chat": isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.chats,
        "strides": list(rate.strides),
        "tokens_per_group": rate.tokens_per_group,
        "drops_rest": rate.drops_rest,
        "block_frames": rate.block_frames,
        "min_audio_sec": data.min_audio_sec,
        "max_audio_sec": data.max_audio_sec,
    }


def write_processor(tokenizer: Tokenizer, data: DataConfig, rate: TokenRate, folder: Path) -> None:
    """Write `processor_config.json` to a folder."""
    content = {
        "auto_map": {"AutoProcessor": f"{remote_name(PROCESSING)}.EarshotProcessor"},
        "processor_class": "EarshotProcessor",
        **processor_settings(tokenizer, data, rate),
    }
    (folder / PROCESSOR).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_processor(folder: Path) -> EarshotProcessor:
    """Return the processor of an exported model, built with the classes of this program, not the code in the folder.

    Raises:
        OSError, ValueError, KeyError, TypeError: If a file is missing or was not written by an export.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    from model.hub.processing import EarshotProcessor

    stored = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
    settings = {key: stored[key] for key in _SETTINGS if key in stored}
    # With a config, transformers does not warn that the model type in config.json is unknown.
    tokenizer = AutoTokenizer.from_pretrained(folder, config=PretrainedConfig(), trust_remote_code=False)
    return EarshotProcessor(tokenizer, **settings)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    protobuf: Any = sentencepiece_model_pb2  # The classes of this module are created at run time.
    proto = protobuf.ModelProto.FromString(tokenizer.serialized())
    where = f"data.tokenizer.path = {tokenizer.path}"
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError(f"{where}: only unigram SentencePiece models can be exported; use the LLM's tokenizer.json")
    scores = [p.score for p in proto.pieces if p.type == p.NORMAL]
    pieces = []
    for p in proto.pieces:
        if p.type == p.NORMAL:
            score = p.score
        elif p.type == p.USER_DEFINED:  # SentencePiece prefers these pieces to any split into smaller ones.
            score = len(p.piece) * max(scores) - 0.1
        else:  # Control pieces are not text, so they must never be the best choice.
            score = min(scores)
        pieces.append((p.piece, score))
    rules: list[Any] = []
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        rules.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        rules += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.escape_whitespaces:
        rules.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix:
        rules.append(normalizers.Prepend("▁"))
    settings = proto.trainer_spec
    inner = FastTokenizer(Unigram(pieces, unk_id=settings.unk_id, byte_fallback=settings.byte_fallback))
    inner.normalizer = normalizers.Sequence(rules)
    # If SentencePiece removes extra spaces, it drops all leading spaces. Otherwise, it drops only the one space that it
    # prepends itself (add_dummy_prefix).
    leading = _ALL_SPACES if spec.remove_extra_whitespaces else 1
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", leading, 0)]
    )
    names = {"unk_token": proto.trainer_spec.unk_id, "eos_token": tokenizer.eos_id}
    names |= {k: i for k, i in (("bos_token", tokenizer.bos_id), ("pad_token", tokenizer.pad_id)) if i is not None}
    special = {key: proto.pieces[i].piece for key, i in names.items()}
    found = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    own = [p.piece.replace("▁", " ") for p in proto.pieces if p.type == p.NORMAL]
    placeholder = tokenizer.config.placeholder
    for text in (*PROBES, *own, " ".join(own), f"{placeholder}a", f"a {placeholder} b{placeholder}{placeholder}"):
        wanted, made = tokenizer.encode_prompt(text), found.encode(text, add_special_tokens=False)
        if wanted != made:
            raise UserError(
                f"{where}: {text[:40]!r} has different tokens in transformers; use the LLM's tokenizer.json"
            )
    return found
