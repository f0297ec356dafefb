"""Digits: the 8x8 images of handwritten digits in scikit-learn, as sequences of 64 grey values, row after row.

1,797 images of 10 classes; a grey value is an integer, 0 (white) to 16 (black). It is a small real data set of pixels
without a download.

Reference:
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, doi
    10.24432/C50P49; its test part.
"""

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from sma.errors import DataError
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.grey import GreyDataset
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


def load_digits(settings: DigitsSettings | None = None) -> TaskData:
    """Return the images in three splits, stratified by class, each in scikit-learn's order.

    Pixels are standardised by one mean and one standard deviation, those of the training split.

    Args:
        settings: fractions and seed; None: 70 %, 10 % and 20 %, seed 0.

    Raises:
        DataError: scikit-learn is not installed, or a split has no image of some class.
    """
    pixels, targets = read_digits()
    splits = split_digits(targets, settings or DigitsSettings())
    grey = torch.from_numpy(pixels[splits[0]]).double()
    mean, std = float(grey.mean()), float(grey.std(correction=0))
    datasets = [GreyDataset(pixels[numbers], targets[numbers], mean, std, scale=1) for numbers in splits]
    return TaskData.of(datasets, datasets[0].show, image_shape=(SIDE, SIDE))


def split_digits(targets: UInt8[np.ndarray, " N"], settings: DigitsSettings) -> list[Int64[np.ndarray, " M"]]:
    """Return the indices of the images of every split, in ascending order.

    Raises:
        DataError: a split has no image of some class.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    splits: tuple[list[Tensor], ...] = ([], [], [])
    for digit in range(NUM_CLASSES):
        mine = torch.from_numpy(targets == digit).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        sizes = [round(settings.validation * len(mine)), round(settings.test * len(mine))]
        for split, numbers in zip(splits, mine.split([len(mine) - sum(sizes), *sizes]), strict=True):
            split.append(numbers)
            if not len(numbers):
                raise DataError(
                    f"a split has no image of digit {digit}: validation={settings.validation} or test={settings.test} "
                    f"is too small or too large for its {len(mine)} images; each split needs at least one"
                )
    return [torch.cat(split).sort().values.numpy() for split in splits]


def read_digits() -> tuple[UInt8[np.ndarray, "N 64"], UInt8[np.ndarray, " N"]]:
    """Return the grey values, 0 to 16, and the digits, in scikit-learn's order.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load  # here, because the import takes a second
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; install it: pip install scikit-learn, or all "
            "requirements of the recipes: pip install 'sparse-modular-activation[recipes]'"
        ) from error
    bunch = load()
    return bunch.data.astype(np.uint8), bunch.target.astype(np.uint8)


@register
class DigitsTask(ClassificationTask):
    """Handwritten digits of 8x8 pixels, read pixel by pixel; the class is the digit."""

    kind: Literal["digits"] = "digits"
    data: DigitsSettings = Field(default=DigitsSettings(), description="splits of the images")
    numbers: ClassVar[str] = "grey values"

    @property
    def classes(self) -> int:
        return NUM_CLASSES

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return load_digits(self.data)
