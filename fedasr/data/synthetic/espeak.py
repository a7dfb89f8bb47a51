"""eSpeak NG, the engine that speaks."""

import contextlib
import ctypes
import ctypes.util
import functools
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from fedasr.data.synthetic.voices import Voice, voice_file
from fedasr.errors import UserError

SAMPLE_RATE = 16_000  # Hz
_REMEDY = "`pip install 'fedasr[quickstart]'` or `apt-get install libespeak-ng1 espeak-ng-data`"
_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback alone, before the call returns
_DONT_EXIT = 0x8000  # espeakINITIALIZE: report a bad data folder instead of ending the process
_UTF8 = 1  # espeakCHARS
_VOLUME = 2  # espeak_PARAMETER
# eSpeak NG 1.51 reads past the end of its list of phonemes what longer speech left there earlier.
# Begun before every utterance and broken off at its first samples, this text fills the list further
# than any sentence of the corpus.
_PRIMER = b"four " * 30
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def synthesize(text: str, voice: Voice) -> np.ndarray:
    """Speaks `text` silently: float32 [samples] at 16 kHz, peak `voice.level`, on a 16-bit grid.

    Raises:
      UserError: if eSpeak NG or soxr is not installed.
    """
    soxr = require_soxr()
    speaker = engine()
    samples = soxr.resample(speaker.speak(text, voice), speaker.rate, SAMPLE_RATE)
    # On the 16-bit grid the last float bits of the resampler cannot matter, and a WAV or int16
    # copy loses nothing.
    peak = max(float(np.abs(samples).max(initial=0.0)), 1e-9)
    steps = np.rint(samples * (voice.level * 32767.0 / peak))
    return (steps / 32768.0).astype(np.float32)


def audio_of(text: str, voice: Voice) -> tuple[np.ndarray, int]:
    """(samples, rate), as utterances give them."""
    return synthesize(text, voice), SAMPLE_RATE


def require_soxr() -> Any:
    """The package soxr; raises UserError where it is not installed."""
    try:
        import soxr
    except ImportError as error:
        raise UserError(
            "the synthetic corpus needs soxr: `pip install 'fedasr[quickstart]'`"
        ) from error
    return soxr


def _find_engine() -> tuple[ctypes.CDLL, Path]:
    """eSpeak NG's library and data folder: of espeakng-loader, or else of the system."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import espeakng_loader

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        return library, Path(espeakng_loader.get_data_path())
    name = ctypes.util.find_library("espeak-ng")
    if name is None:
        raise UserError(f"the synthetic corpus needs eSpeak NG: {_REMEDY}")
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise UserError(f"eSpeak NG ({name}) cannot be loaded ({error}): {_REMEDY}") from error
    if library.espeak_Initialize(_SYNCHRONOUS, 0, None, _DONT_EXIT) <= 0:
        raise UserError(f"eSpeak NG ({name}) finds no data: {_REMEDY}")
    data = ctypes.c_char_p()
    library.espeak_Info(ctypes.byref(data))
    return library, Path(os.fsdecode(data.value or b""))


class _Engine:
    """eSpeak NG on a private data folder with a single voice, "speaker", rewritten every time.

    One voice file needs no room in the engine's table of at most 349 voices. The engine's state is
    global to the process: hence one engine a process (see `_engine`) and a lock.
    """

    def __init__(self) -> None:
        self._library, source = _find_engine()
        self._library.espeak_Info.restype = ctypes.c_char_p
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
            *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        ]
        self.version = self._library.espeak_Info(None).decode()
        self._folder = tempfile.TemporaryDirectory(prefix="fedasr-voices-")
        data = Path(self._folder.name, "espeak-ng-data")
        self._accents = source / "lang" / "gmw"
        self._voice = data / "lang" / "gmw" / "speaker"
        self._voice.parent.mkdir(parents=True)
        try:
            for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
                shutil.copyfile(source / name, data / name)
        except OSError as error:
            raise UserError(f"eSpeak NG's data in {source} is incomplete: {_REMEDY}") from error
        self._heard: list[bytes] = []
        self._listening = True
        self._callback = _CALLBACK(self._hear)  # kept: the engine holds only a pointer
        self._lock = threading.Lock()
        # Never terminated, here or later: that hangs on the idle threads of eSpeak NG 1.51.
        folder = os.fsencode(self._folder.name)
        self.rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, folder, _DONT_EXIT)  # Hz
        if self.rate <= 0:
            raise UserError(f"eSpeak NG {self.version} rejects its data: {_REMEDY}")
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if not self._listening:
            return 1  # stop here
        if samples and count > 0:
            self._heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """float32 [samples] at `rate`, in [-1, 1]."""
        with self._lock:
            self._voice.write_text(voice_file(voice, self._accents))
            if self._library.espeak_SetVoiceByName(b"speaker") != 0:
                raise UserError(f"eSpeak NG {self.version} rejects its voice: {_REMEDY}")
            # Far from overload: the gain control that prevents it carries over to later speech.
            self._library.espeak_SetParameter(_VOLUME, 40, 0)
            self._heard.clear()
            for self._listening, spoken in ((False, _PRIMER), (True, text.encode())):
                self._library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, _UTF8, None, None)
            samples = np.frombuffer(b"".join(self._heard), np.int16)
        return samples.astype(np.float32) / 32768.0


def engine() -> _Engine:
    """The engine of this process; raises UserError where none is installed."""
    # By process id: a forked child must not write into its parent's folder.
    return engine_of(os.getpid())


@functools.lru_cache(maxsize=1)
def engine_of(process: int) -> _Engine:
    """The engine of a process, remembered."""
    del process
    return _Engine()
