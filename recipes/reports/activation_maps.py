"""Activation maps: which positions of a sample ran sub-modules, drawn over what the sample is: a text, an image or a
sound.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SHORT = 130
"""Positions of a text that fit into one line with a name under each."""

_COLUMNS = 150
"""Characters of a line of a long text."""

_LINES = 7
"""Lines that are shown of a long text."""

_BINS = 1000
"""Columns of a strip: neighbours are averaged where there are more positions."""

_RAN = (0.93, 0.45, 0.05)


class Example(NamedTuple):
    """A sample that the figure shows.

    Attributes:
        texts: every position.
        target: the right class; where answers are asked at positions, how many.
        guess: the model's; how many of them it got right.
        active: `(layers, positions)`, whether any sub-module ran.
        values: the inputs of an image or a sound; None for a text.
    """

    texts: list[str]
    target: int
    guess: int
    active: Bool[Tensor, "N L"]
    values: Float[Tensor, " L"] | None = None


class Medium(NamedTuple):
    """What the positions of a sample are; see `TaskData`."""

    image_shape: tuple[int, int] | None = None
    sample_rate: int | None = None


class Line(NamedTuple):
    """One line of a long text: number of the first token, and the column of the first character of each token."""

    first: int
    columns: list[int]


def height_of(example: Example, medium: Medium) -> float:
    """Inches that the map of a sample needs."""
    layers = len(example.active)
    if medium.image_shape is not None:
        return 2.3 if layers < 7 else 1.9
    if medium.sample_rate is not None:
        return 1.6 + 0.17 * layers
    if len(example.texts) <= _SHORT:
        return 1.35 if layers < 6 else 0.6 + 0.14 * layers
    return 0.95 + 0.14 * layers + 0.17 * len(wrapped(example.texts))


def draw_map(figure: Any, example: Example, medium: Medium, title: str) -> None:
    """Draw one sample into a figure or a sub-figure of its own."""
    if medium.image_shape is not None and example.values is not None:
        _draw_image(figure, example, medium.image_shape, title)
    elif medium.sample_rate is not None and example.values is not None:
        _draw_sound(figure, example, medium.sample_rate, title)
    elif len(example.texts) <= _SHORT:
        _draw_short_text(figure, example, title)
    else:
        _draw_long_text(figure, example, title)


def wrapped(texts: Sequence[str]) -> list[Line]:
    """Break a text into the lines that are shown; words get a blank between them, single characters do not."""
    blank = int(sum(len(text) > 1 for text in texts) > len(texts) / 10)
    lines, column = [Line(0, [])], 0
    for number, text in enumerate(texts):
        if column and column + len(text) > _COLUMNS:
            if len(lines) == _LINES:
                return lines
            lines.append(Line(number, []))
            column = 0
        lines[-1].columns.append(column)
        column += max(1, len(text)) + blank
    return lines


def binned(active: Bool[Tensor, "N L"], bins: int = _BINS) -> Float[Tensor, "N K"]:
    """Share of the positions of every column that ran, for at most `bins` columns of (nearly) equal width."""
    length = active.shape[1]
    return torch.nn.functional.adaptive_avg_pool1d(active.double(), bins) if length > bins else active.double()


def printable(text: str) -> str:
    """A text that can be drawn: what has no shape gets one."""
    return "".join({"\n": "⏎", "\t": "→"}.get(sign, sign if sign.isprintable() else "·") for sign in text)


def _draw_image(figure: Any, example: Example, shape: tuple[int, int], title: str) -> None:
    layers = len(example.active)
    values = example.values.reshape(shape).numpy()  # type: ignore[union-attr]
    axes = figure.subplots(1, layers + 1, squeeze=False)[0]
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    for place, axis in enumerate(axes):
        axis.imshow(values, cmap="gray", interpolation="nearest")
        axis.set_axis_off()
        if place == 0:
            axis.set_title("input", fontsize=8)
            continue
        ran = example.active[place - 1].reshape(shape)
        overlay = torch.zeros(*shape, 4)
        overlay[ran] = torch.tensor([*_RAN, 0.6])
        axis.imshow(overlay.numpy(), interpolation="nearest")
        axis.set_title(f"layer {place - 1}: {float(ran.double().mean()):.0%}", fontsize=8)


def _draw_sound(figure: Any, example: Example, rate: int, title: str) -> None:
    values = example.values.numpy()  # type: ignore[union-attr]
    seconds = len(values) / rate
    wave, strip = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 0.3 + 0.13 * len(example.active)])
    wave.plot(torch.arange(len(values)).numpy() / rate, values, linewidth=0.6, color="black")
    wave.set_ylabel("sample", fontsize=8)
    wave.tick_params(labelsize=8)
    wave.set_title(title, fontsize=9, loc="left")
    _draw_strip(strip, example.active, (0.0, seconds))
    strip.set_xlabel("seconds", fontsize=8)
    strip.tick_params(labelsize=8)
    strip.set_xlim(0.0, seconds)


def _draw_short_text(figure: Any, example: Example, title: str) -> None:
    layers, positions = example.active.shape
    axis = figure.subplots()
    axis.imshow(example.active.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    names = [printable(text) for text in example.texts]
    axis.set_xticks(range(positions), names, fontsize=8, family="monospace", rotation=90, parse_math=False)
    axis.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)], fontsize=8)
    axis.set_xticks([place - 0.5 for place in range(1, positions)], minor=True)
    axis.set_yticks([place - 0.5 for place in range(1, layers)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.set_title(title, fontsize=9, loc="left")


def _draw_long_text(figure: Any, example: Example, title: str) -> None:
    """The whole sample as a strip per layer, and its beginning as a text whose tokens are as dark as many layers ran on
    them.
    """
    layers, positions = example.active.shape
    lines = wrapped(example.texts)
    strip, page = figure.subplots(2, 1, height_ratios=[0.3 + 0.14 * layers, 0.17 * len(lines)])
    _draw_strip(strip, example.active, (-0.5, positions - 0.5))
    strip.tick_params(labelsize=7)
    strip.set_title(title, fontsize=9, loc="left")
    share = example.active.double().mean(0)
    ground = torch.full((len(lines), _COLUMNS), float("nan"), dtype=torch.float64)
    for row, line in enumerate(lines):
        for number, column in enumerate(line.columns, start=line.first):
            text = printable(example.texts[number])
            ground[row, column : column + max(1, len(text))] = share[number]
            # Each by itself: a line of text would be wider or narrower than the columns of the ground.
            middle = column + (len(text) - 1) / 2
            sign = page.text(
                middle, row, text, fontsize=7, family="monospace", ha="center", va="center", parse_math=False
            )
            sign.set_in_layout(False)  # a thousand of them would be measured again and again
    page.imshow(ground.numpy(), aspect="auto", cmap="Oranges", vmin=0, vmax=1.5, interpolation="nearest")
    page.set_yticks(range(len(lines)), [str(line.first) for line in lines], fontsize=7)
    page.set_xticks([])
    page.tick_params(length=0)
    shown = lines[-1].first + len(lines[-1].columns)
    page.set_xlabel(
        f"positions 0 to {shown - 1:,} of {positions:,}; the darker, the more of the {layers} layers ran", fontsize=8
    )


def _draw_strip(axis: Any, active: Bool[Tensor, "N L"], extent: tuple[float, float]) -> None:
    layers = len(active)
    axis.imshow(
        binned(active).numpy(),
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1.2,
        interpolation="nearest",
        extent=(*extent, layers - 0.5, -0.5),
    )
    axis.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)], fontsize=7 if layers > 4 else 8)
