"""Raw speech: one-second clips at 16 kHz as sequences of real numbers, Speech Commands or synthetic.

Samples are numbers from -1 to 1 (16-bit integers / 32,768). Each is standardised by the mean and the standard deviation
of the training clips at its position: (x - mean) / (deviation + 1e-5).

| split | training, validation, test | note |
|---|---|---|
| `stratified` | 70 / 15 / 15 % of every word: 24,482 / 5,246 / 5,247 | drawn from the clips sorted by word and name |
| `hash` | the other clips, `validation_list.txt`, `testing_list.txt` | a speaker is in one split only |

`stratified` is the split of the paper and of earlier work: two draws of scikit-learn, with the seeds 0 and 1. The
authors drew from the clips in the order of their file system, which cannot be reproduced. With sorted names, the splits
are the same everywhere and have the authors' sizes, but not their clips.
"""

import hashlib
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Float64, Int16, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError
from sma.recipes.tasks.contract import TaskData
from sma.recipes.tasks.speech import commands as speech_commands
from sma.recipes.tasks.speech import synthetic as synthetic_speech
from sma.recipes.tasks.speech.commands import LISTS, SAMPLE_RATE, SAMPLES, load_clips
from sma.recipes.tasks.speech.synthetic import synthetic_clips
from sma.spec import Spec

NUM_CLASSES = 10
_SCALE = 32_768
_FLOOR = 1e-5
_BLOCK = 256
SYNTHETIC_CLIPS = 2000


class SpeechSettings(Spec):
    """The clips and their splits, determined by the settings and the files."""

    source: Literal["speech_commands", "synthetic"] = Field(
        default="speech_commands",
        description="speech_commands: recordings of ten words; synthetic: ten generated sounds, which need no files",
    )
    split: Literal["stratified", "hash"] = Field(
        default="stratified",
        description="stratified: 70/15/15 % of every word; hash: the lists of the publisher, which separate speakers",
    )
    downsample: int = Field(
        default=1, ge=1, le=SAMPLES, description="number of samples averaged into one; must divide 16,000"
    )
    clips: int | None = Field(default=None, ge=100, description=f"number of synthetic clips; null: {SYNTHETIC_CLIPS:,}")
    download: bool = Field(
        default=False, description="download the archive of Speech Commands, 2.3 GiB, if it is not found"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the stratified split and of the synthetic clips")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if SAMPLES % self.downsample:
            raise ValueError(
                f"downsample={self.downsample} must divide the {SAMPLES:,} samples of a clip, "
                "as 1, 2, 4, 5, 8, 10, 16 do"
            )
        if self.source == "synthetic" and (self.split == "hash" or self.download):
            raise ValueError(
                "source='synthetic' has no lists and no download; leave split='hash' and download=true out"
            )
        if self.source == "speech_commands" and self.clips is not None:
            raise ValueError(
                f"clips={self.clips} requires source='synthetic'; Speech Commands has a fixed number; leave it out"
            )
        return self


class SpeechDataset(Dataset[tuple[Tensor, int]]):
    """Clips as `(samples, target)`: standardised numbers of shape `(16000 / downsample,)`, float32, and the class.

    Args:
        clips: all clips of the data set, in memory or on the disk.
        numbers: indices of the clips of this split, in ascending order.
        targets: their classes.
        downsample: number of samples averaged into one; a divisor of 16,000.
        mean: mean of the training clips at every position; None: that of these clips.
        std: standard deviation of the training clips at every position; None: that of these clips.
    """

    def __init__(
        self,
        clips: Int16[np.ndarray, "N 16000"],
        numbers: Int64[Tensor, " M"],
        targets: Int64[Tensor, " M"],
        downsample: int = 1,
        mean: Float64[Tensor, " L"] | None = None,
        std: Float64[Tensor, " L"] | None = None,
    ) -> None:
        self.clips, self.numbers, self.targets, self.downsample = clips, numbers, targets, downsample
        if mean is None or std is None:
            mean, std = self._moments()
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, " L"], int]:
        number = range(len(self))[index]
        sums = self._sums(self.numbers[number : number + 1])[0].double()
        return ((self._scaled(sums) - self.mean) / (self.std + _FLOOR)).float(), int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " M"]:
        """Number of samples of every clip."""
        return torch.full((len(self),), SAMPLES // self.downsample)

    @property
    def sha256(self) -> str:
        """SHA-256 of the recorded clips as 16-bit little-endian integers, followed by the classes, a byte each."""
        total = hashlib.sha256()
        for block in self.numbers.split(_BLOCK):
            total.update(self.clips[block.numpy()].tobytes())
        total.update(self.targets.to(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def show(self, samples: Float[Tensor, " L"]) -> list[str]:
        """Every standardised sample as recorded, in thousandths of the maximum amplitude."""
        return [f"{1000 * value:.0f}" for value in (samples.double() * (self.std + _FLOOR) + self.mean).tolist()]

    def _sums(self, numbers: Int64[Tensor, " K"]) -> Int64[Tensor, "K L"]:
        """The exact sums of every `downsample` samples of some clips."""
        return torch.from_numpy(self.clips[numbers.numpy()]).long().unflatten(1, (-1, self.downsample)).sum(-1)

    def _scaled(self, sums: Float64[Tensor, "*K L"]) -> Float64[Tensor, "*K L"]:
        return sums / (_SCALE * self.downsample)

    def _moments(self) -> tuple[Float64[Tensor, " L"], Float64[Tensor, " L"]]:
        """Mean and sample standard deviation (N - 1) at every position, from exact sums."""
        count, first = len(self), torch.zeros(SAMPLES // self.downsample, dtype=torch.int64)
        second = first.double()
        for block in self.numbers.split(_BLOCK):
            sums = self._sums(block)
            first += sums.sum(0)
            second += sums.double().square().sum(0)
        mean = first.double() / count
        variance = ((second - count * mean.square()) / max(1, count - 1)).clamp(min=0)
        return self._scaled(mean), self._scaled(variance.sqrt())


def load_speech(settings: SpeechSettings, folder: Path, *, progress: bool = True) -> TaskData:
    """Return the clips in three splits.

    Args:
        settings: source and split.
        folder: the data folder; see `sma.recipes.tasks.speech.commands`.
        progress: whether to show progress bars.

    Raises:
        DataError: the data is missing or broken, the lists are missing, or a split would be empty.
    """
    if settings.source == "synthetic":
        clips = synthetic_clips(settings.clips or SYNTHETIC_CLIPS, settings.seed)
        targets = torch.arange(len(clips)) % NUM_CLASSES
        parts, names = _stratified(targets, settings.seed), synthetic_speech.CLASSES
    else:
        loaded = load_clips(folder, download=settings.download, progress=progress)
        clips, names = loaded.samples, speech_commands.CLASSES
        targets = torch.tensor([names.index(name.split("/")[0]) for name in loaded.names])
        parts = _listed(loaded, folder) if settings.split == "hash" else _stratified(targets, settings.seed)
    train = SpeechDataset(clips, parts[0], targets[parts[0]], settings.downsample)
    others = [
        SpeechDataset(clips, part, targets[part], settings.downsample, train.mean, train.std) for part in parts[1:]
    ]
    rate = round(SAMPLE_RATE / settings.downsample)
    return TaskData.of((train, *others), train.show, class_names=names, sample_rate=rate)


def _stratified(targets: Int64[Tensor, " N"], seed: int) -> list[Int64[Tensor, " M"]]:
    """Indices of the clips of each split, drawn by the method of the paper."""
    from sklearn.model_selection import train_test_split  # here, because the import takes a second

    numbers = np.arange(len(targets))
    try:
        train, rest = train_test_split(numbers, train_size=0.7, random_state=seed, stratify=targets.numpy())
        validation, test = train_test_split(rest, train_size=0.5, random_state=seed + 1, stratify=targets[rest].numpy())
    except ValueError as error:
        counts = targets.bincount(minlength=NUM_CLASSES).tolist()
        raise DataError(
            f"the clips cannot be split 70/15/15 with every class in each; the classes have {counts} clips: {error}"
        ) from error
    return [torch.from_numpy(np.sort(part)) for part in (train, validation, test)]


def _listed(clips: speech_commands.Clips, folder: Path) -> list[Int64[Tensor, " M"]]:
    """Indices of the clips of each split, by the lists of the publisher."""
    validation, test = (np.array([name in clips.lists[of] for name in clips.names]) for of in LISTS)
    masks = (~(validation | test), validation, test & ~validation)
    parts = [torch.from_numpy(mask).nonzero().flatten() for mask in masks]
    if not all(map(len, parts)):
        raise DataError(
            f"split='hash' requires {LISTS[0]} and {LISTS[1]} in {folder / speech_commands.NAME}, with names of clips "
            f"there; they give {', '.join(str(len(part)) for part in parts)} training, validation and test clips: "
            "get the lists from the archive, or use split='stratified'"
        )
    return parts
