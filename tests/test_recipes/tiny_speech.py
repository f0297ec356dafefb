"""A made-up copy of Speech Commands in its real format, ten clips per word, and a one-second experiment on it."""

import wave
from pathlib import Path
from typing import Any

import numpy as np

from sma.recipes.tasks.speech.commands import CLASSES, LISTS, NAME

MODEL = {
    "kind": "sequence_classifier",
    "width": 8,
    "encoder": {"kind": "real_number"},
    "sinusoid": True,
    "layers": {
        "repeat": 2,
        "layer": {
            "backbone": {"kind": "ema", "state_size": 4, "truncation": 16},
            "modules": {
                "attention": {
                    "kind": "gau",
                    "query_size": 4,
                    "hidden_size": 8,
                    "window": 8,
                    "attention": "relu2",
                    "position": {"kind": "relative_bias", "distance": "slot_distance"},
                }
            },
            "norm": {"kind": "batch_norm", "place": "pre"},
        },
    },
    "head": {"kind": "mean_pool_mlp", "hidden": 8, "classes": 10},
}
TRAINING = {"updates": 6, "batch_size": 8, "learning_rate": 0.003, "warmup": 2, "evaluate_every": 3}


def speech_experiment(**data: Any) -> dict[str, Any]:
    """The experiment with these data settings, and 100 samples per clip."""
    return {
        "task": {"kind": "speech", "data": {"downsample": 160, **data}},
        "model": MODEL,
        "training": TRAINING,
        "threads": 1,
    }


def write_wav(path: Path, samples: np.ndarray, *, rate: int = 16_000, width: int = 2, channels: int = 1) -> Path:
    """Write a WAV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def clip_of(word: str, number: int) -> np.ndarray:
    """Random samples that are fixed by word and number."""
    return np.random.default_rng((CLASSES.index(word), number)).integers(-30_000, 30_000, 16_000)


def write_corpus(folder: Path, *, backwards: bool = False, lists: bool = True) -> Path:
    """Write ten full clips and a short one per word, a word outside the classes, and the lists; return the folder."""
    root = folder / NAME
    jobs = [(word, number) for word in CLASSES for number in range(10)]
    for word, number in reversed(jobs) if backwards else jobs:
        write_wav(root / word / f"{(7 * number) % 10:02d}_nohash_0.wav", clip_of(word, number))
    for word in CLASSES:
        write_wav(root / word / "99_nohash_0.wav", clip_of(word, 99)[:12_000])
    write_wav(root / "cat" / "00_nohash_0.wav", clip_of("yes", 50))
    if lists:
        (root / LISTS[0]).write_text("".join(f"{word}/03_nohash_0.wav\n" for word in CLASSES) + "cat/00_nohash_0.wav\n")
        (root / LISTS[1]).write_text(
            "".join(f"{word}/0{number}_nohash_0.wav\n" for word in CLASSES for number in (5, 8))
        )
    return root
