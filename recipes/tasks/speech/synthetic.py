"""Synthetic words: ten generated sounds in the format of Speech Commands, for trials of the pipeline without its data.

A word is one of five melodies, played once or twice. Speaker, loudness, tempo, start and noise are drawn for every
clip, so that no single sample determines the word: the melody takes a tenth to half a second. Accuracies on these
sounds are not comparable to those on recordings.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int16

from sma.errors import DataError
from sma.memory import check_memory
from sma.recipes.tasks.speech.commands import SAMPLE_RATE, SAMPLES

# Pitch in octaves above the speaker's lowest tone, at times from 0 to 1.
_MELODIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "low": lambda time: 0 * time,
    "high": lambda time: 0 * time + 1,
    "rising": lambda time: time,
    "falling": lambda time: 1 - time,
    "arched": lambda time: 1 - np.abs(2 * time - 1),
}
CLASSES = (*_MELODIES, *(f"{name} twice" for name in _MELODIES))


def synthetic_clips(count: int, seed: int) -> Int16[np.ndarray, "N 16000"]:
    """Return `count` clips; clip i is word i modulo 10, and depends on the seed and i only.

    Args:
        count: number of clips, N.
        seed: seed of the clips.

    Raises:
        DataError: there is too little memory.
    """
    check_memory(2 * SAMPLES * count, f"a data set of {count:,} clips", error=DataError, hint="lower task.data.clips")
    clips = np.empty((count, SAMPLES), dtype="<i2")
    for number in range(count):
        clips[number] = _clip(number % len(CLASSES), np.random.default_rng((seed, number)))
    return clips


def _clip(word: int, random: np.random.Generator) -> Int16[np.ndarray, "16000"]:
    melody = list(_MELODIES.values())[word % len(_MELODIES)]
    times = 1 + word // len(_MELODIES)
    lowest = random.uniform(70.0, 95.0)  # Hz; the highest tone is below 200 Hz, so that clips can be downsampled
    length = int(random.uniform(0.45, 0.75) * SAMPLE_RATE)
    start = int(random.uniform(0, SAMPLES - length))
    tone = np.concatenate([_syllable(melody, lowest, length // times, random) for _ in range(times)])
    sound = random.normal(0.0, random.uniform(0.01, 0.04), SAMPLES)
    sound[start : start + len(tone)] += random.uniform(0.15, 0.6) * tone
    return np.round(32767 * sound.clip(-1, 1)).astype("<i2")


def _syllable(
    melody: Callable[[np.ndarray], np.ndarray], lowest: float, length: int, random: np.random.Generator
) -> Float[np.ndarray, " S"]:
    time = np.arange(length) / length
    angle = 2 * np.pi * (np.cumsum(lowest * 2.0 ** melody(time)) / SAMPLE_RATE + random.uniform())
    overtone = random.uniform(0.0, 0.3)
    return np.sin(np.pi * time) ** 2 * (np.sin(angle) + overtone * np.sin(2 * angle)) / (1 + overtone)
