"""The table of formats that can be imported. A format is a module with a function that yields rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.importers.formats import (
    audiofolder,
    corpora,
    kaldi,
    lhotse_cuts,
    llamafactory,
    messages,
    nemo,
    nemo_chat,
    parquet,
    slam,
    tables,
    webdataset_tars,
    wenet,
)
from trainer.importers.row import Row
from trainer.importers.source import Source


@dataclass(frozen=True)
class Importer:
    """A format that can be imported."""

    rows: Callable[[Source], Iterator[Row]]
    """The function that yields the rows of a source."""
    summary: str


IMPORTERS: dict[str, Importer] = {
    "csv": Importer(tables.rows, "CSV or TSV with a header, for example audio,text"),
    "audiofolder": Importer(
        audiofolder.rows, "audio files with metadata.csv, .jsonl or .parquet, or a folder per label"
    ),
    "hf": Importer(parquet.rows, "Parquet files of the datasets library or the Hugging Face hub"),
    "nemo": Importer(nemo.rows, "NeMo manifests: audio_filepath, duration, text, offset"),
    "kaldi": Importer(kaldi.rows, "Kaldi or ESPnet data folders: wav.scp, text, segments"),
    "openai": Importer(messages.rows, "JSON with messages and parts of text and audio; also Qwen2-Audio, transformers"),
    "swift": Importer(messages.rows, "ms-swift: messages with <audio> and audios, or query and response"),
    "webdataset": Importer(webdataset_tars.rows, "WebDataset tars of other programs"),
    "lhotse": Importer(lhotse_cuts.rows, "cuts of lhotse: *cuts*.jsonl or .jsonl.gz"),
    "shar": Importer(lhotse_cuts.shar_rows, "Shar folders of lhotse: cuts.*.jsonl.gz and recording.*.tar"),
    "llamafactory": Importer(llamafactory.rows, "LLaMA-Factory: conversations or messages with audios, or alpaca"),
    "commonvoice": Importer(
        corpora.commonvoice_rows, "a language of Common Voice: train.tsv, dev.tsv, test.tsv, clips/"
    ),
    "gigaspeech": Importer(corpora.gigaspeech_rows, "GigaSpeech.json"),
    "fleurs": Importer(corpora.fleurs_rows, "a language of FLEURS: train.tsv, dev.tsv, test.tsv, audio/"),
    "wenet": Importer(wenet.rows, "data.list of WeNet, or its tars"),
    "nemo-chat": Importer(nemo_chat.rows, "conversations of NeMo, and its ShareGPT form with sound"),
    "slam": Importer(slam.rows, "SLAM-LLM: key, source, target; or task, path and multiprompt.jsonl"),
}
"""The formats by name."""
