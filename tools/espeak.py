"""Speech synthesis with espeak-ng in this process, through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8, _POS_CHARACTER = 1, 1
_RATE, _PITCH, _RANGE, _WORDGAP = 1, 3, 4, 7
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Prosody:
    """The prosody of an utterance."""

    pitch: int = 50
    """The pitch, 0 to 99."""
    pitch_range: int = 50
    """The variation of the pitch, from 0 (monotone) to 99."""
    rate_wpm: int = 175
    """The speaking rate in words per minute, 80 to 450."""
    word_gap: int = 0
    """The pause between words, in units of 10 ms."""


class Espeak:
    """A speech synthesizer. The same calls in the same order return the same waveforms.

    Raises:
        UserError: If espeakng-loader is not installed.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "espeakng-loader is not installed: run `make setup`, or `pip install espeakng-loader`"
            ) from None
        # Utterances change state in the library that initialization does not reset, so a new copy of the library is
        # loaded. The link is needed because the library's data path may have at most 160 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-")
        library = Path(self._folder.name) / "libespeak-ng.so"
        shutil.copyfile(espeakng_loader.get_library_path(), library)
        data = Path(self._folder.name) / "espeak-ng-data"
        data.symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
        self._library = ctypes.CDLL(str(library))
        self.rate_hz: int = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), _INITIALIZE_DONT_EXIT
        )
        """The sampling rate of the waveforms that `speak` returns, in Hz."""
        assert self.rate_hz > 0, f"espeak_Initialize failed: {self.rate_hz}"
        self._chunks: list[bytes] = []
        self._callback = _Callback(self._collect)  # Keep a reference, since the library only stores a pointer.
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, prosody: Prosody | None = None) -> NDArray[np.float32]:
        """Synthesize speech from text.

        Args:
            text: The text.
            voice: The name of espeak-ng's voice, optionally with a variant, such as `en-us+f3`.
            prosody: The prosody; None for `Prosody()`.

        Returns:
            A waveform `[T]` in [-1, 1] at `rate_hz`.
        """
        how = Prosody() if prosody is None else prosody
        self._chunks.clear()
        status = self._library.espeak_SetVoiceByName(voice.encode())
        assert status == 0, f"espeak-ng has no voice {voice!r}"
        values = ((_RATE, how.rate_wpm), (_PITCH, how.pitch), (_RANGE, how.pitch_range), (_WORDGAP, how.word_gap))
        for parameter, value in values:
            self._library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode() + b"\0"
        status = self._library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        assert status == 0, f"espeak_Synth: {status}"
        self._library.espeak_Synchronize()
        return np.frombuffer(b"".join(self._chunks), np.int16).astype(np.float32) / np.float32(32768)

    def _collect(self, wave: ctypes._Pointer[ctypes.c_short], num_samples: int, events: int | None) -> int:
        if wave and num_samples > 0:
            self._chunks.append(ctypes.string_at(wave, num_samples * 2))
        return 0
