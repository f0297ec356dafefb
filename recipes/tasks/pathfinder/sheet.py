"""A contact sheet of Pathfinder images: label 1 on the left, label 0 on the right.

`python -m sma.recipes.tasks.pathfinder.sheet --size 32 --out sheet.png`
"""

import io
import itertools
import sys
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import DataError, quote, reason
from sma.files import write_atomically
from sma.paths import parse_settings
from sma.recipes.io.command import CommandOptions, exit_code, parse
from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import File, Setting
from sma.recipes.tasks.pathfinder.images import PathfinderSettings, PathXSettings
from sma.recipes.tasks.pathfinder.stimulus import StimulusSettings, draw_stimulus

_GAP = 2  # pixels between images
_GAP_GREY = 96


class SheetOptions(CommandOptions):
    """Draw Pathfinder images of both classes side by side: left, both discs on one contour; right, on two."""

    model_config = SettingsConfigDict(cli_prog_name="python -m sma.recipes.tasks.pathfinder.sheet")

    size: int = Field(
        default=32,
        description="height and width in pixels; the stimulus is that of Path-X from 128 on, else of Pathfinder",
    )
    set: list[Setting] = Field(
        default=[],
        description="change another field of the stimulus, such as contour_length=6; may be repeated",
    )
    rows: int = Field(default=4, ge=1, le=50, description="number of rows of images")
    columns: int = Field(default=4, ge=1, le=50, description="number of images of each class in a row")
    scale: int | None = Field(
        default=None,
        ge=1,
        le=32,
        description="pixels of the sheet per pixel of an image; default: the smallest with a side of 128 or more",
    )
    seed: int = Field(default=0, ge=0, description="seed of the images")
    out: File = Field(default=Path("pathfinder.png"), description="the PNG file to write")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(parse(SheetOptions, sys.argv[1:] if arguments is None else arguments)))


def run(options: SheetOptions) -> Path:
    """Draw the sheet of the options, and write it; returns its path.

    Raises:
        SmaError: an option does not fit, or the file cannot be written.
    """
    from matplotlib.image import imsave  # here, because the import takes seconds

    kind = PathXSettings if options.size >= 128 else PathfinderSettings
    changes = parse_settings(options.set)
    sheet = contact_sheet(
        kind.model_validate({**changes, "size": options.size}), options.rows, options.columns, options.seed
    )
    scale = options.scale or max(1, -(-128 // options.size))
    try:
        content = io.BytesIO()
        imsave(
            content,
            np.kron(sheet, np.ones((scale, scale), dtype=np.uint8)),
            cmap="gray",
            vmin=0,
            vmax=255,
            format="png",
        )
        write_atomically(options.out, lambda temporary: temporary.write_bytes(content.getvalue()))
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise DataError(f"cannot write {quote(str(options.out))}: {reason(error)}; choose another --out") from error
    count = options.rows * options.columns
    print(
        f"{count} images with both discs on one contour (left) "
        f"and as many with discs on two (right): {plain(options.out)}"
    )
    return options.out


def contact_sheet(settings: StimulusSettings, rows: int, columns: int, seed: int) -> UInt8[np.ndarray, "H W"]:
    """Return the first images of a seed in rows, each with `columns` images of label 1 and then as many of label 0."""
    images: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    numbers = itertools.count()
    while min(map(len, images)) < rows * columns:
        stimulus = draw_stimulus(settings, seed, next(numbers))
        images[stimulus.label].append(np.pad(stimulus.image, _GAP, constant_values=_GAP_GREY))
    bar = np.full((settings.size + 2 * _GAP, 2 * _GAP), _GAP_GREY, dtype=np.uint8)
    lines = [slice(row * columns, (row + 1) * columns) for row in range(rows)]
    return np.vstack([np.hstack([*images[1][line], bar, *images[0][line]]) for line in lines])


if __name__ == "__main__":
    sys.exit(main())
