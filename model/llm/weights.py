"""Sources from which slices of the LLM's weights can be read: a Hugging Face directory, a state dict or a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.errors import UserError
from model.llm.families import family_of
from model.llm.mixture import SCORE_BIAS
from model.llm.names import Index, hf_shapes, hf_to_local, is_expert, local_pieces

RANDOM_BLOCK_ROWS = 256
"""The number of rows of a random tensor that one generator draws. A different value would change the random weights of
every seed."""


class WeightSource(Protocol):
    """A source of Hugging Face tensors, of which any slice can be read."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if the source does not contain the tensor."""
        ...

    def read(self, name: str, index: Index) -> Tensor:
        """Return the part of a tensor that `index` selects."""
        ...

    def where(self, name: str) -> str:
        """Return the location of a tensor, for error messages."""
        ...


class SafetensorsSource:
    """A directory with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Raises:
        UserError: If the directory contains neither, or a file cannot be read. Methods can also raise this error.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = self._directory / "model.safetensors.index.json"
        single = self._directory / "model.safetensors"
        if index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index}: not a safetensors index ({error!r}); download it again") from error
        elif single.is_file():
            self._file_of = dict.fromkeys(self._handle(single.name).keys(), single.name)
        else:
            raise UserError(
                f"{self._directory}: holds neither {single.name} nor {index.name}; use a Hugging Face directory with "
                "safetensors weights"
            )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            if Path(file).name != file:
                raise UserError(f"{self._directory}: the index names {file!r}; shards must be in the directory itself")
            path = self._directory / file
            try:
                self._open[file] = safe_open(str(path), framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read as safetensors ({error}); download it again") from error
        return self._open[file]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Implement `WeightSource`."""
        if name not in self._file_of:
            return None
        try:
            return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(
                f"{self.where(name)}: lacks the tensor {name}, which the index names ({error}); download it again"
            ) from error

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`."""
        part: Tensor = self._handle(self._file_of[name]).get_slice(name)[index]
        return part

    def where(self, name: str) -> str:
        """Implement `WeightSource`."""
        return str(self._directory / self._file_of.get(name, ""))


def embedding_rms(source: WeightSource, hf_config: PretrainedConfig) -> float:
    """Estimate the root mean square of the LLM's token embeddings from evenly spaced blocks of 256 rows.

    At most 17 blocks are read. The result includes the factor that the LLM applies only to token embeddings
    (`Scales.tokens`).
    """
    name = "model.embed_tokens.weight"
    shape = source.shape(name)
    assert shape is not None, source.where(name)
    starts = range(0, shape[0], max(RANDOM_BLOCK_ROWS, shape[0] // 16))
    blocks = [source.read(name, (slice(i, i + RANDOM_BLOCK_ROWS), slice(None))).double() for i in starts]
    return float(torch.cat(blocks).square().mean().sqrt()) * family_of(hf_config).scales(hf_config).tokens


def symbol_embeddings(source: WeightSource, token_ids: Sequence[int]) -> Tensor:
    """Return the token embeddings [ids, H] of some ids in fp32, divided by their root mean square.

    Args:
        source: The weights of the LLM.
        token_ids: The ids, in ascending order. They are read in blocks of up to 256 rows.
    """
    name = "model.embed_tokens.weight"
    rows, start = [], 0
    for end in range(1, len(token_ids) + 1):
        if end == len(token_ids) or token_ids[end] - token_ids[start] >= RANDOM_BLOCK_ROWS:
            first = token_ids[start]
            block = source.read(name, (slice(first, token_ids[end - 1] + 1), slice(None))).float()
            rows.append(block[[token - first for token in token_ids[start:end]]])
            start = end
    found = torch.cat(rows)
    return found / found.square().mean().sqrt()


class StateDictSource:
    """Tensors in memory, with the names of Hugging Face's `state_dict()`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Implement `WeightSource`."""
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`."""
        return self._tensors[name][index]

    def where(self, name: str) -> str:
        """Implement `WeightSource`."""
        return "state dict"


class RandomSource:
    """Random initial weights.

    Matrices are normally distributed with the standard deviation `initializer_range`. Biases and attention sinks are 0.
    The weights of norms are 1, or 0 in families whose norms multiply by 1 + weight. In gated delta networks, the
    weights of norms are 1, exp(A_log) is uniformly distributed in [0.01, 16], and softplus(dt_bias) is log-uniformly
    distributed in [0.001, 0.1], as in flash-linear-attention.

    Every block of rows is drawn from a generator that is seeded by (seed, name, block). Any rank of any topology
    therefore gets the same values for the slices that it reads, and draws at most one additional block.
    """

    def __init__(self, hf_config: PretrainedConfig, seed: int) -> None:
        self._shapes = hf_shapes(hf_config)
        self._std = float(hf_config.initializer_range)
        self._seed = seed
        self._norm = torch.zeros if family_of(hf_config).norms_from_zero else torch.ones

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Implement `WeightSource`."""
        return self._shapes.get(name)

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`. The result is in fp32."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return self._vector(name, shape[0])[index]
        start, stop, _ = index[0].indices(shape[0])
        blocks = range(start // RANDOM_BLOCK_ROWS, -(-stop // RANDOM_BLOCK_ROWS))
        parts = []
        for block in blocks:
            first = block * RANDOM_BLOCK_ROWS
            rows = slice(max(start - first, 0), min(stop - first, RANDOM_BLOCK_ROWS))
            part: Index = (rows, *index[1:])
            values = torch.randn(RANDOM_BLOCK_ROWS, *shape[1:], generator=self._generator(name, block))
            parts.append(values.mul_(self._std)[part])
        return torch.cat(parts)

    def _vector(self, name: str, size: int) -> Tensor:
        if name.endswith((".A_log", ".dt_bias")):
            drawn = torch.rand(size, generator=self._generator(name, 0))
            if name.endswith(".A_log"):
                return (0.01 + 15.99 * drawn).log()
            steps = 0.001 * 100**drawn
            return steps + torch.log(-torch.expm1(-steps))  # This is the inverse of softplus.
        if name.endswith((".bias", ".sinks", f".{SCORE_BIAS}")):
            return torch.zeros(size)
        return torch.ones(size) if ".linear_attn." in name else self._norm(size)

    def _generator(self, name: str, block: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}/{block}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def where(self, name: str) -> str:
        """Implement `WeightSource`."""
        return f"random weights, seed {self._seed}"


def local_directory(weights: str) -> Path:
    """Return `weights` if it is a directory, or else download the JSON and safetensors files of this hub id.

    Raises:
        UserError: If `weights` is not a directory and cannot be downloaded.
    """
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(weights, allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.llm.weights = {weights!r}: neither a local directory nor a hub id that can be fetched ({reason}); "
            "use a local directory, or check the id, the network and HF_TOKEN"
        ) from error


def check_source(source: WeightSource, hf_config: PretrainedConfig) -> None:
    """Check that `source` contains every tensor of the model in the correct shape.

    Raises:
        UserError: If a tensor is missing or has a different shape.
    """
    for name, expected in hf_shapes(hf_config).items():
        check_tensor(source, name, expected)


def check_tensor(source: WeightSource, name: str, expected: tuple[int, ...]) -> None:
    """Check that `source` contains the tensor `name` in the shape `expected`.

    Raises:
        UserError: If the tensor is missing or has a different shape.
    """
    found = source.shape(name)
    if found is None:
        raise UserError(
            f"{source.where(name)}: tensor {name} {expected} is missing; make model.llm.config match the weights"
        )
    if found != expected:
        raise UserError(
            f"{source.where(name)}: tensor {name} has shape {found}, but the config needs {expected}; "
            "make model.llm.config match the weights"
        )


def global_parameters(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and parameters of a pipeline stage's chunks.

    In the names, layers are numbered over the whole model, and experts over all ranks.
    """
    for chunk in chunks:
        yield from _global_parameters(chunk)


def _global_parameters(gpt: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    layers: Any = gpt.decoder.layers  # type: ignore[union-attr]
    offsets = [layer.layer_number - 1 for layer in layers]
    experts = [getattr(layer.mlp, "local_expert_indices", ()) for layer in layers]
    for name, parameter in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            if parts[4:6] == ["experts", "local_experts"]:
                parts[6] = str(experts[int(parts[2])][int(parts[6])])
            parts[2] = str(offsets[int(parts[2])])
        yield ".".join(parts), parameter


@torch.no_grad()
def load_megatron(
    chunks: Sequence[nn.Module],
    source: WeightSource,
    hf_config: PretrainedConfig,
    *,
    tp_rank: int,
    tp_size: int,
    expert_tp: tuple[int, int] | None = None,
) -> None:
    """Load every parameter of this rank's chunks, reading only this rank's slices.

    Args:
        chunks: The chunks of this rank's pipeline stage.
        source: The weights.
        hf_config: The LLM.
        tp_rank: The tensor-parallel rank.
        tp_size: The tensor-parallel size.
        expert_tp: The rank and the size of expert tensor parallelism; None if they equal `tp_rank` and `tp_size`.

    Raises:
        UserError: If a tensor is missing or its shape does not match the config. No parameter is written in this case.
    """
    shapes = hf_shapes(hf_config)

    def split(name: str) -> tuple[int, int]:
        return expert_tp if expert_tp is not None and is_expert(name) else (tp_rank, tp_size)

    needed = [(n, p, _hf_names(n, hf_config, *split(n))) for n, p in global_parameters(chunks)]
    for hf_name in dict.fromkeys(h for *_, names in needed for h in names):
        check_tensor(source, hf_name, shapes[hf_name])
    for name, parameter, _ in needed:
        local = hf_to_local(name, source.read, hf_config, *split(name))
        assert local.shape == parameter.shape, (name, local.shape, parameter.shape)
        parameter.copy_(local)


def _hf_names(name: str, hf_config: PretrainedConfig, tp_rank: int, tp_size: int) -> list[str]:
    return [p.hf_name for p in local_pieces(name, hf_config, tp_rank, tp_size) if p.hf_name is not None]
