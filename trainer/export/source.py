"""The source of an export, which is a checkpoint with the description of its model and the selected encoder experts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.config import is_factor
from model.errors import UserError
from model.lengths import TokenRate
from model.llm.experts import place_experts
from model.llm.families import mixture_of, modules_of
from model.llm.mixture import described
from model.llm.stacked import Stacked, stacked_tensors
from model.lora import Adapters
from model.losses.ctc import CTC
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.layout import PARAM, files_of
from trainer.checkpoint.reader import STATE, Reader, check_files, read_manifest
from trainer.checkpoint.rect import Rect, matrix_of
from trainer.config.load import parse_stored_recipe
from trainer.config.schema import Recipe
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.export.description import Description, read_description
from trainer.export.weights import LowRank, read_merged
from trainer.run_tokenizer import check_digest, of_checkpoint
from trainer.telemetry.expert_load import ALL, add_up
from trainer.telemetry.load_history import HISTORY_NAME, read_history

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AUDIO, LLM = "audio.", "llm."
LAST_SHARE = 0.25
"""The fraction of the run's steps, counted from its end, whose routing determines which encoder experts are kept."""


@dataclass(frozen=True)
class Selection:
    """The encoder experts that an export keeps, and the fraction of routed clips that went to the others."""

    kept: tuple[int, ...]
    """The indices of kept encoder experts in the checkpoint's model, in ascending order."""
    dropped: tuple[str, ...]
    """The names of dropped encoder experts."""
    lost_share: Mapping[str, float]
    """The fraction of routed clips that went to a dropped encoder expert, by task, and under `all` for all tasks."""


class Source:
    """A checkpoint to be exported. Its weights are verified in the background (see `wait_verified`).

    Args:
        url: The path or `s3://…` URL of a checkpoint or of a run. The newest checkpoint of a run is used.
        tokenizer_path: The path to the tokenizer; None selects the tokenizer of the run.
        run_dir: The run's folder, with its scores and routing history. None selects the folder that contains the
            checkpoints or, if the checkpoints are stored elsewhere, the run's folder according to the recipe.

    Raises:
        UserError: If there is no such checkpoint, or it contains no description of the model.
        DamagedError: If the manifest or the state of the checkpoint is damaged.
    """

    def __init__(self, url: str | Path, tokenizer_path: str | None = None, run_dir: Path | None = None) -> None:
        self.folder = find_checkpoint(str(url))
        manifest = read_manifest(self.folder)
        self.reader = Reader(self.folder, manifest)
        # Optimizer state is not read, so it is not verified.
        needed = sorted(files_of(manifest.tensors.values()))
        check_files(self.folder, manifest, [STATE])
        # Another thread verifies the files while they are read. Nothing is published before it has finished.
        self._pool = ThreadPoolExecutor(1)
        self._verified = self._pool.submit(check_files, self.folder, manifest, needed)
        self.extra = read_extra(self.folder)
        state = f"{self.folder.url}/{STATE}"
        if "model" not in self.extra or self.extra.get("recipe") is None:
            raise UserError(
                f"{state}: contains no description of the model or no recipe; resume the run for one step to save a "
                "checkpoint with both"
            )
        self.recipe: Recipe = parse_stored_recipe(self.extra["recipe"], state)
        self.model: Description = read_description(self.extra["model"], state)
        self._check_shapes(state)
        self._tokenizer_path, self._run_dir = tokenizer_path, run_dir

    def _check_shapes(self, state: str) -> None:
        """Check that the LLM's tensors have the shapes that the description implies."""
        for name, shape in self.model.llm_shapes.items():
            entry = self.reader.manifest.tensors.get(f"{LLM}{name}")
            if entry is None or entry.shape != shape:
                found = "is missing" if entry is None else f"has shape {entry.shape}"
                raise UserError(
                    f"{state}: describes {LLM}{name} with shape {shape}, but the tensor {found}; use another checkpoint"
                )

    def wait_verified(self) -> None:
        """Wait until all files that an export reads have been verified.

        Raises:
            DamagedError: If a file differs from what was written.
        """
        self._verified.result()

    @property
    def run_dir(self) -> Path:
        """The folder that contains everything that the run wrote except checkpoints. It may not exist."""
        if self._run_dir is not None:
            return self._run_dir
        if isinstance(self.folder, LocalFolder) and self.recipe.checkpoint.root is None:
            return self.folder.path.absolute().parent.parent
        return Path(self.recipe.train.run_dir) / self.recipe.name

    @property
    def rate(self) -> TokenRate:
        """The adapter's rule for the number of audio tokens."""
        return self.model.audio.adapter.rate

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer at `tokenizer_path`, or the run's tokenizer if no path was given.

        Raises:
            UserError: If the tokenizer cannot be read, or the weights were trained with a different one.
        """
        owned = of_checkpoint(self.folder, str(self.run_dir))
        with tempfile.TemporaryDirectory() as scratch:
            if self._tokenizer_path is None:
                return owned.load(owned.put_into(scratch))
            given, digest = load_tokenizer(self._tokenizer_path, self.recipe.data.tokenizer), owned.digest
            if digest is None and owned.files:
                digest = owned.load(owned.put_into(scratch)).digest
        check_digest(given, digest, self.folder.url, self._tokenizer_path)
        return given

    def expert_names(self) -> list[str]:
        """Return the names of the encoder experts of the checkpoint's model."""
        return [e.name for e in self.model.audio.experts]

    def select(self, least_share: float) -> Selection:
        """Select the encoder experts that received at least `least_share` of all routed clips.

        The expert that received the most clips is always selected.

        Raises:
            UserError: If the run has no routing history.
        """
        names = self.expert_names()
        if not names or least_share <= 0:
            return Selection(tuple(range(len(names))), (), {})
        counts = routing_counts(self.run_dir)
        total = {name: sum(by_expert.get(name, 0) for by_expert in counts.values()) for name in names}
        best = max(total, key=lambda name: total[name])
        everything = sum(total.values())
        kept = [i for i, n in enumerate(names) if n == best or total[n] >= least_share * everything]
        dropped = [n for i, n in enumerate(names) if i not in kept]

        def lost(by_expert: Mapping[str, float]) -> float:
            return sum(by_expert.get(n, 0) for n in dropped) / max(1, sum(by_expert.values()))

        shares = {task: lost(by_expert) for task, by_expert in sorted(counts.items())}
        return Selection(tuple(kept), tuple(dropped), {"all": lost(total), **shares})

    def description(self, selection: Selection) -> dict[str, Any]:
        """Return the arguments of `EarshotConfig` for the exported model."""
        return self.model.tree(selection.kept)

    def names(self, selection: Selection, llm_only: bool) -> dict[str, str]:
        """Return the tensors to export.

        Args:
            selection: The encoder experts that are kept.
            llm_only: Whether to export the LLM without the audio modules.

        Returns:
            Exported name → saved name.
        """
        saved = [name for name in self.reader.manifest.tensors if not is_factor(name)]
        if llm_only:
            return {name.removeprefix(LLM): name for name in saved if name.startswith(LLM)}
        dropped = tuple(f"{AUDIO}experts.{name}." for name in selection.dropped)
        kept = rf"(?!{CTC.name}_)" if self.model.audio.ctc_feedback else ""  # The LLM reads the output of this head.
        heads = re.compile(rf"{re.escape(AUDIO)}{kept}\w+_head\.")  # Only losses use these tensors.
        return {name: name for name in saved if not name.startswith(dropped) and not heads.match(name)}

    def stacked(self) -> dict[str, Stacked]:
        """Return the LLM's tensors in which transformers stores several experts, by their names in transformers."""
        return stacked_tensors(self.hf_config())

    def hf_config(self) -> PretrainedConfig:
        """Return the transformers config of the LLM."""
        from transformers import AutoConfig

        config: PretrainedConfig = AutoConfig.for_model(**self.model.text_config)
        return config

    def adapters(self) -> dict[str, LowRank]:
        """Return the low-rank adapters of the checkpoint, by the saved name of the adapted weight."""
        saved, parts = self.reader.manifest.tensors, Adapters(self.recipe.lora)
        found = {}
        for name in saved:
            layer = name.removesuffix(".lora_A")
            if layer != name:
                part = parts.of_layer(layer)
                assert part is not None, f"{name}: the recipe in the checkpoint has no adapter there"
                found[f"{layer}.weight"] = LowRank(name, f"{layer}.lora_B", part.scale)
        return found

    def rows(self, selection: Selection) -> dict[str, tuple[int, ...]]:
        """Return the rows to keep in each of the router's tensors that have one row per encoder expert.

        Returns:
            Saved name → indices of rows; empty if all rows are kept.
        """
        if not selection.dropped:
            return {}
        router = ("independent.logits", "dependent.weight", "dependent.bias", "steps_to_enter")
        names = (f"{AUDIO}router.{name}" for name in router)
        return {name: selection.kept for name in names if name in self.reader.manifest.tensors}

    @torch.no_grad()
    def fill(self, module: nn.Module, names: Sequence[str], selection: Selection, rounded_to: torch.dtype) -> None:
        """Fill the parameters and buffers of a module with the checkpoint's tensors of the same names.

        Low-rank adapters are merged into the weights.

        Args:
            module: The module to fill.
            names: The names of the tensors.
            selection: The encoder experts that are kept.
            rounded_to: The dtype to which floating-point values are rounded before they are copied.
        """
        rows, adapters, state = self.rows(selection), self.adapters(), module.state_dict()
        for name in names:
            whole = matrix_of(self.reader.manifest.tensors[name].shape)
            target = state[name]
            if name in adapters:
                target.copy_(read_merged(self.reader, name, adapters[name]).to(rounded_to).view(target.shape))
                continue
            saved = torch.empty(
                whole.rows, whole.cols, dtype=rounded_to if target.is_floating_point() else target.dtype
            )
            self.reader.read_rect(name, PARAM, Rect(0, 0, whole.rows, whole.cols), saved)
            target.copy_(saved[list(rows.get(name, range(whole.rows)))].view(target.shape))


def routing_counts(run_dir: Path) -> dict[str, dict[str, float]]:
    """Count the clips that were routed to each encoder expert in the last quarter of the run's steps.

    Returns:
        Task → encoder expert → number of clips.

    Raises:
        UserError: If the run has no routing history.
    """
    history = read_history(run_dir / HISTORY_NAME)
    since = history[-1].step * (1 - LAST_SHARE)
    load = add_up(i.load for i in history if i.step > since)
    return {
        task: dict(zip(load.experts, found.routed_clips.tolist(), strict=True))
        for task, found in load.by_task().items()
        if task != ALL
    }


def separate_experts(model: Any) -> None:
    """Convert the LLM of an `EarshotForCausalLM` so that its tensors have the same names as in checkpoints.

    For LLM families with FFN experts, transformers stores all experts of a layer in one tensor, while checkpoints have
    separate tensors for each expert.
    """
    hf_config = model.config.text_config
    mixture = mixture_of(hf_config)
    if mixture is not None and described(hf_config) is None:
        place_experts(model.llm, mixture, modules_of(hf_config))
