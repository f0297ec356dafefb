"""Synthetic words are fixed by the seed and differ in pitch."""

import numpy as np
import torch

from sma.recipes.tasks.speech.clips import SpeechSettings, load_speech
from sma.recipes.tasks.speech.synthetic import CLASSES as SYNTHETIC_CLASSES
from sma.recipes.tasks.speech.synthetic import synthetic_clips


def test_synthetic_clip_depends_only_on_the_seed_and_its_index():
    few, many, other = synthetic_clips(7, 3), synthetic_clips(12, 3), synthetic_clips(7, 4)
    assert np.array_equal(few, many[:7])
    assert not any(np.array_equal(one, two) for one, two in zip(few, other, strict=True))
    assert (few.dtype, few.shape) == (np.dtype("<i2"), (7, 16_000))
    assert synthetic_clips(0, 0).shape == (0, 16_000)


def test_synthetic_words_differ_in_pitch():
    # Oracle: the pitch at the peak of the spectrum, because a high tone has no energy at the pitch of a low one.
    clips = synthetic_clips(20, 0).astype(np.float64)
    spectrum = np.abs(np.fft.rfft(clips))  # one bin per Hz
    for number in range(20):
        name = SYNTHETIC_CLASSES[number % 10]
        peak = int(spectrum[number, 40:400].argmax()) + 40
        if name.startswith("low"):
            assert 60 < peak < 105, name
        if name.startswith("high"):
            assert 130 < peak < 200, name


def test_synthetic_data_has_its_own_class_names_and_keeps_the_global_random_state(tmp_path):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    made = load_speech(SpeechSettings(source="synthetic", clips=100, downsample=160), tmp_path, progress=False)
    assert made.class_names == SYNTHETIC_CLASSES
    assert [len(part) for part in made[:3]] == [70, 15, 15]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert list(tmp_path.iterdir()) == []
