"""Digits: the 8x8 images of handwritten digits in scikit-learn, as sequences of 64 grey values, row after row.

1,797 images of 10 classes; a grey value is an integer, 0 (white) to 16 (black). It is a small real data set of pixels
without a download.

Reference:
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, doi
    10.24432/C50P49; its test part.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError
from sma.model import ModelSpec
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.contract import ClassificationTask, TaskData, check_reads_numbers
from sma.spec import Spec, register

NUM_CLASSES = 10
SIDE = 8
"""Number of pixels of a row, and of rows of an image."""


class DigitsSettings(Spec):
    """Settings of the splits. The same settings give the same images in the same splits."""

    validation: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="fraction of the images of every class in the validation split"
    )
    test: float = Field(
        default=0.2, gt=0.0, lt=1.0, description="fraction of the images of every class in the test split"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the splits")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.validation + self.test > 0.99:
            raise ValueError(
                f"validation={self.validation} and test={self.test} leave nothing to train on; "
                "their sum must be at most 0.99"
            )
        return self


class DigitsDataset(Dataset[tuple[Tensor, int]]):
    """Images as `(pixels, target)`: standardised numbers of shape `(64,)`, float32, and the digit.

    Args:
        pixels: grey values, 0 to 16.
        targets: the digits.
        numbers: indices of the images in scikit-learn's data set.
        mean: mean of the grey values of the training split.
        std: standard deviation of the grey values of the training split.
    """

    def __init__(
        self,
        pixels: UInt8[Tensor, "N 64"],
        targets: Int64[Tensor, " N"],
        numbers: Int64[Tensor, " N"],
        mean: float,
        std: float,
    ) -> None:
        self.pixels, self.targets, self.numbers, self.mean, self.std = pixels, targets, numbers, mean, std

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "64"], int]:
        number = range(len(self))[index]
        return (self.pixels[number].float() - self.mean) / self.std, int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Number of pixels of every image: 64."""
        return torch.full((len(self),), self.pixels.shape[1])

    @property
    def sha256(self) -> str:
        """SHA-256 of the grey values, a byte each, image after image, followed by the digits, a byte each."""
        return hashlib.sha256(
            self.pixels.numpy().tobytes() + self.targets.to(torch.uint8).numpy().tobytes()
        ).hexdigest()


class DigitsData(NamedTuple):
    """The three splits, and the SHA-256 of each."""

    train: DigitsDataset
    validation: DigitsDataset
    test: DigitsDataset
    hashes: dict[str, str]

    def show(self, pixels: Float[Tensor, " L"]) -> list[str]:
        """The grey value of every standardised pixel, `0` to `16`."""
        return [str(round(value)) for value in (pixels.double() * self.train.std + self.train.mean).tolist()]


def load_digits(settings: DigitsSettings | None = None) -> DigitsData:
    """Return the images in three splits, stratified by class, each in scikit-learn's order.

    Pixels are standardised by one mean and one standard deviation, those of the training split.

    Args:
        settings: fractions and seed; None: 70 %, 10 % and 20 %, seed 0.

    Raises:
        DataError: scikit-learn is not installed, or a split has no image of some class.
    """
    settings = settings or DigitsSettings()
    pixels, targets = _images()
    generator = torch.Generator().manual_seed(settings.seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for digit in range(NUM_CLASSES):
        mine = (targets == digit).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        sizes = [round(settings.validation * len(mine)), round(settings.test * len(mine))]
        for part, numbers in zip(parts, mine.split([len(mine) - sum(sizes), *sizes]), strict=True):
            part.append(numbers)
            if not len(numbers):
                raise DataError(
                    f"a split has no image of digit {digit}: validation={settings.validation} or test={settings.test} "
                    f"is too small or too large for its {len(mine)} images; each split needs at least one"
                )
    train, validation, test = (torch.cat(part).sort().values for part in parts)
    grey = pixels[train].double()
    mean, std = float(grey.mean()), float(grey.std(correction=0))
    splits = {
        name: DigitsDataset(pixels[numbers], targets[numbers], numbers, mean, std)
        for name, numbers in (("train", train), ("validation", validation), ("test", test))
    }
    return DigitsData(**splits, hashes={name: split.sha256 for name, split in splits.items()})


def _images() -> tuple[UInt8[Tensor, "N 64"], Int64[Tensor, " N"]]:
    try:
        from sklearn.datasets import load_digits as load  # here, because the import takes a second
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; install it: pip install scikit-learn, or all "
            "requirements of the recipes: pip install 'sparse-modular-activation[recipes]'"
        ) from error
    bunch = load()
    return torch.from_numpy(bunch.data).to(torch.uint8), torch.from_numpy(bunch.target).long()


@register
class DigitsTask(ClassificationTask):
    """Handwritten digits of 8x8 pixels, read pixel by pixel; the answer is the digit."""

    kind: Literal["digits"] = "digits"
    data: DigitsSettings = Field(default=DigitsSettings(), description="how the images are split")

    @property
    def classes(self) -> int:
        return NUM_CLASSES

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_reads_numbers(model, "grey values")

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_digits(self.data)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, made.show, image_shape=(8, 8))
