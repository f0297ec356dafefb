"""Raw speech: one-second clips at 16 kHz as sequences of real numbers, Speech Commands or synthetic.

Samples are numbers from -1 to 1 (16-bit numbers / 32,768). Each is standardised by the mean and the deviation, over the
training clips, of the samples at its own place of the clip: (x - mean) / (deviation + 1e-5).

| split | training, validation, test | of |
|---|---|---|
| `stratified` | 70 / 15 / 15 % of every word: 24,482 / 5,246 / 5,247 | the clips sorted by word and name |
| `hash` | what the lists leave, `validation_list.txt`, `testing_list.txt` | a speaker is in one split only |

`stratified` is how the paper's authors and those before them split: scikit-learn's draw, twice, with the seeds 0 and 1.
They drew from the clips in the order in which their file system listed the files, which nobody else has. Sorted names
give everybody the same clips in the same splits, and the same number as theirs, but not the same clips as theirs.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Float64, Int16, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError
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
    """Which clips, and how they are split. The same files and settings give the same clips in the same splits."""

    source: Literal["speech_commands", "synthetic"] = Field(
        default="speech_commands",
        description="recordings of ten words, or ten sounds made by a formula, which need no data",
    )
    split: Literal["stratified", "hash"] = Field(
        default="stratified",
        description="70/15/15 %, each with its share of every word, or by the lists of the publisher, by speaker",
    )
    downsample: int = Field(
        default=1, ge=1, le=SAMPLES, description="samples that are averaged into one; must divide 16,000"
    )
    clips: int | None = Field(default=None, ge=100, description=f"synthetic clips in all; null: {SYNTHETIC_CLIPS:,}")
    download: bool = Field(
        default=False, description="get the archive of Speech Commands (2.3 GiB) where it is missing"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the stratified split and the synthetic clips")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if SAMPLES % self.downsample:
            raise ValueError(
                f"downsample={self.downsample} must divide the {SAMPLES:,} samples of a clip, "
                "as 1, 2, 4, 5, 8, 10, 16 do"
            )
        if self.source == "synthetic" and (self.split == "hash" or self.download):
            raise ValueError(
                "source='synthetic' has no lists and needs no download; leave split='hash' and download=true out"
            )
        if self.source == "speech_commands" and self.clips is not None:
            raise ValueError(
                f"clips={self.clips} is for source='synthetic'; Speech Commands has the clips it has, so leave it out"
            )
        return self


class SpeechDataset(Dataset[tuple[Tensor, int]]):
    """Clips as `(samples, target)`: standardised numbers of shape `(16000 / downsample,)`, float32, and the class.

    Args:
        clips: all clips of the data set, in memory or on the disk.
        numbers: which of them are in this split, in ascending order.
        targets: their classes.
        downsample: samples that are averaged into one; a divisor of 16,000.
        mean: of the training clips at every place; None: of these clips.
        std: their standard deviation.
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
        place = range(len(self))[index]
        sums = self._sums(self.numbers[place : place + 1])[0].double()
        return ((self._scaled(sums) - self.mean) / (self.std + _FLOOR)).float(), int(self.targets[place])

    @property
    def lengths(self) -> Int64[Tensor, " M"]:
        """Samples of every clip, all the same."""
        return torch.full((len(self),), SAMPLES // self.downsample)

    @property
    def sha256(self) -> str:
        """Of the clips as they are recorded, 16-bit little-endian numbers, clip after clip, and then the classes, a
        byte each.
        """
        total = hashlib.sha256()
        for part in self.numbers.split(_BLOCK):
            total.update(self.clips[part.numpy()].tobytes())
        total.update(self.targets.to(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def _sums(self, numbers: Int64[Tensor, " K"]) -> Int64[Tensor, "K L"]:
        """The sums of every `downsample` samples of some clips, which are exact."""
        return torch.from_numpy(self.clips[numbers.numpy()]).long().unflatten(1, (-1, self.downsample)).sum(-1)

    def _scaled(self, sums: Float64[Tensor, "*K L"]) -> Float64[Tensor, "*K L"]:
        return sums / (_SCALE * self.downsample)

    def _moments(self) -> tuple[Float64[Tensor, " L"], Float64[Tensor, " L"]]:
        """Mean and standard deviation (of a sample: N - 1) at every place; from whole numbers, so in whatever order
        they are added.
        """
        count = len(self)
        first = torch.zeros(SAMPLES // self.downsample, dtype=torch.int64)
        second = torch.zeros(SAMPLES // self.downsample, dtype=torch.float64)
        for part in self.numbers.split(_BLOCK):
            sums = self._sums(part)
            first += sums.sum(0)
            second += sums.double().square().sum(0)
        mean = first.double() / count
        variance = ((second - count * mean.square()) / max(1, count - 1)).clamp(min=0)
        return self._scaled(mean), self._scaled(variance.sqrt())


class SpeechData(NamedTuple):
    """The three splits, the SHA-256 of each, and the names of the classes."""

    train: SpeechDataset
    validation: SpeechDataset
    test: SpeechDataset
    hashes: dict[str, str]
    class_names: tuple[str, ...]
    sample_rate: int

    def show(self, samples: Float[Tensor, " L"]) -> list[str]:
        """Every standardised sample as it is recorded, in thousandths of the loudest that can be."""
        recorded = samples.double() * (self.train.std + _FLOOR) + self.train.mean
        return [f"{1000 * value:.0f}" for value in recorded.tolist()]


def load_speech(settings: SpeechSettings, folder: Path, *, progress: bool = True) -> SpeechData:
    """Return the clips in three splits.

    Args:
        settings: which clips.
        folder: where Speech Commands is; see `sma.recipes.tasks.speech.commands`.
        progress: show bars.

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
        if settings.split == "hash":
            parts = _listed(loaded, folder)
        else:
            parts = _stratified(targets, settings.seed)
    train = SpeechDataset(clips, parts[0], targets[parts[0]], settings.downsample)
    others = [
        SpeechDataset(clips, part, targets[part], settings.downsample, train.mean, train.std) for part in parts[1:]
    ]
    splits = dict(zip(("train", "validation", "test"), (train, *others), strict=True))
    hashes = {name: split.sha256 for name, split in splits.items()}
    return SpeechData(**splits, hashes=hashes, class_names=names, sample_rate=round(SAMPLE_RATE / settings.downsample))


def _stratified(targets: Int64[Tensor, " N"], seed: int) -> list[Int64[Tensor, " M"]]:
    """Numbers of the clips of each split, drawn as the authors do, from clips in their order."""
    from sklearn.model_selection import train_test_split  # a second, and only this needs it

    numbers = np.arange(len(targets))
    try:
        train, rest = train_test_split(numbers, train_size=0.7, random_state=seed, stratify=targets.numpy())
        validation, test = train_test_split(rest, train_size=0.5, random_state=seed + 1, stratify=targets[rest].numpy())
    except ValueError as error:
        counts = targets.bincount(minlength=NUM_CLASSES).tolist()
        raise DataError(
            f"the clips cannot be split 70/15/15 with every class in each: there are {counts} of the classes: {error}"
        ) from error
    return [torch.from_numpy(np.sort(part)) for part in (train, validation, test)]


def _listed(clips: speech_commands.Clips, folder: Path) -> list[Int64[Tensor, " M"]]:
    """Numbers of the clips of each split, by the publisher's lists."""
    validation, test = (clips.lists[name] for name in LISTS)
    places = torch.tensor([1 if name in validation else 2 if name in test else 0 for name in clips.names])
    parts = [(places == place).nonzero().flatten() for place in range(3)]
    if not all(map(len, parts)):
        raise DataError(
            f"split='hash' needs {LISTS[0]} and {LISTS[1]} in {folder / speech_commands.NAME}, with the names of some "
            f"of the clips there; they give {', '.join(str(len(part)) for part in parts)} clips to train on, validate "
            "on and test on: get the lists from the archive, or use split='stratified'"
        )
    return parts
