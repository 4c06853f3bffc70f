"""The peer of `bench.trainer`: Hugging Face Trainer with DeepSpeed ZeRO-3 on `model.speech_llm.SpeechLLM`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices

from bench.trainer_work import DS_CONFIG, OPTIM, VOCAB_SIZE, Setting, Sizes, Stopwatch, model_config
from model.batch import IGNORE, Batch, Ragged, Sample
from model.lengths import num_frames
from model.speech_llm import SpeechLLM
from trainer import parity_cases


class Everything(nn.Module):
    """The model as such models are commonly trained: every encoder expert encodes every clip of a padded batch.

    The features of experts that the router did not choose get the weight 0.

    Args:
        model: The model.
    """

    def __init__(self, model: SpeechLLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, labels: Tensor, num_items_in_batch: Tensor, **_: Any) -> dict[str, Tensor]:
        """Return the sum of the token losses of a micro-batch, divided by the number of targets of the update.

        Args:
            batch: The micro-batch.
            labels: [B, max L], padded with IGNORE.
            num_items_in_batch: The number of targets of all micro-batches on all ranks.
        """
        audio = self.model.audio(batch.clips, batch.prompts, None, self._encode)
        logits = self.model.logits(batch, audio)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return {"loss": losses / num_items_in_batch}

    def _encode(self, names: Sequence[str], clips: Ragged, wanted: Tensor) -> list[Ragged]:
        """Implement `model.audio_tower.EncodeClips`."""
        encoded = [self.model.audio.encoder(name)(clips) for name in names]
        return [
            features.select(flags.nonzero().flatten().tolist())
            for features, flags in zip(encoded, wanted.T, strict=True)
        ]


class Grouped(Sampler[int]):
    """A sampler that yields the warm-up's clips in order, and then the others in the order of `LengthGroupedSampler`.

    With thousands of samples, `LengthGroupedSampler` sorts 50 batches at a time. The few clips of this benchmark are
    sorted all at once.

    Args:
        frames: The length of each clip in frames.
        first: The number of clips of the warm-up.
        batch: The number of clips of an update on one rank.
    """

    def __init__(self, frames: Sequence[int], first: int, batch: int) -> None:
        self.frames, self.first, self.batch = frames, first, batch

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[int]:
        yield from range(self.first)
        timed = list(self.frames[self.first :])
        yield from (self.first + i for i in get_length_grouped_indices(timed, self.batch, len(timed) // self.batch))


class Peer(Trainer):
    """A Hugging Face Trainer with a given sampler, which also records the losses of micro-batches."""

    sampler: Any
    """The sampler; None for Trainer's sampler, which keeps the order of the dataset."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


class Watched(TrainerCallback):
    """A callback that measures the time of all updates of the epoch except the first."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.found: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks after the first update."""
        if state.global_step == 1:
            self.watch.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clocks."""
        self.found = self.watch.stop()


def collate(rows: Sequence[Sample]) -> dict[str, Any]:
    """Return the arguments of `Everything` for a micro-batch."""
    batch = Batch(tuple(rows))
    return {"batch": batch, "labels": batch.labels.padded(IGNORE)}


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """Return DeepSpeed's config. Trainer replaces the values `auto` with its own settings."""
    config: dict[str, Any] = json.loads(DS_CONFIG.read_text(encoding="utf-8"))
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": setting.persistent}
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    return config | dict.fromkeys(names, "auto")


def run_peer(setting: Setting, sizes: Sizes, rank: int, world: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """Train for one epoch, and return the measurements of `Stopwatch` and the losses of all updates.

    Collective: every rank of the world must call it.
    """
    own_clips = sizes.global_batch // world
    micro = min(setting.micro, own_clips)
    num_micro = own_clips // micro
    frames = [num_frames(len(s.clips[0])) for s in samples]
    # The weights are initialized before Trainer switches transformers to ZeRO-3, so that all arms have equal weights.
    model = Everything(SpeechLLM(model_config(sizes), VOCAB_SIZE, parity_cases.SEED))
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=True,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=num_micro,
            num_train_epochs=1,
            learning_rate=OPTIM.lr,
            lr_scheduler_type="constant",
            weight_decay=OPTIM.weight_decay,
            adam_beta1=OPTIM.betas[0],
            adam_beta2=OPTIM.betas[1],
            adam_epsilon=OPTIM.eps,
            max_grad_norm=OPTIM.clip_norm,
            train_sampling_strategy="sequential",
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            deepspeed=deepspeed_config(setting),
        )
        watched = Watched()
        peer = Peer(model, arguments, data_collator=collate, train_dataset=list(samples), callbacks=[watched])
        peer.sampler = {
            "padded": lambda: None,
            "grouped": lambda: Grouped(frames, sizes.global_batch, own_clips),
            # The order is not shuffled, so that each update has the same clips as in the other arms.
            "balanced": lambda: BatchRebalanceSampler(
                frames, sizes.global_batch, world, num_micro, shuffle=False, rank=rank
            ),
        }[setting.kind]()
        peer.remove_callback(PrinterCallback)
        peer.train()
    means = torch.tensor(peer.losses, dtype=torch.float64).view(-1, num_micro).sum(dim=1) / world
    dist.all_reduce(means)
    return watched.found | {"losses": means.tolist()}
