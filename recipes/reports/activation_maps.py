"""Activation maps: the positions of a sample that activated sub-modules, drawn over the text, image or sound."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SHORT = 130
"""Maximum number of positions of a text that is drawn on one line, with a label per position."""

_COLUMNS = 150
"""Number of characters per line of a long text."""

_LINES = 7
"""Maximum number of lines of a long text."""

_BINS = 1000
"""Maximum number of columns of a strip; adjacent positions are averaged if there are more."""

_ACTIVE_COLOUR = (0.93, 0.45, 0.05)


class Example(NamedTuple):
    """A sample of the figure.

    Attributes:
        texts: text of every position.
        target: true class; with a target per position, the number of scored positions.
        guess: predicted class; with a target per position, the number of right predictions.
        active: whether any sub-module was active, `(layers, positions)`.
        values: inputs of an image or a sound; None for a text.
    """

    texts: list[str]
    target: int
    guess: int
    active: Bool[Tensor, "N L"]
    values: Float[Tensor, " L"] | None = None


class Modality(NamedTuple):
    """The kind of input: an image, a sound, or, if both fields are None, a text; see `TaskData`."""

    image_shape: tuple[int, int] | None = None
    sample_rate: int | None = None


class Line(NamedTuple):
    """A line of a long text: the number of its first token, and the column of the first character of every token."""

    first: int
    columns: list[int]


def height_of(example: Example, modality: Modality) -> float:
    """Height of the map of a sample, in inches."""
    layers = len(example.active)
    if modality.image_shape is not None:
        return 2.3 if layers < 7 else 1.9
    if modality.sample_rate is not None:
        return 1.6 + 0.17 * layers
    if len(example.texts) <= _SHORT:
        return 1.35 if layers < 6 else 0.6 + 0.14 * layers
    return 0.95 + 0.14 * layers + 0.17 * len(wrapped(example.texts))


def beside(example: Example, modality: Modality) -> int:
    """Number of maps that fit beside each other: two images of up to three layers, one map of anything else."""
    return 2 if modality.image_shape is not None and len(example.active) <= 3 else 1


def draw_map(figure: Any, example: Example, modality: Modality, title: str) -> None:
    """Draw one sample into an empty figure or sub-figure."""
    if modality.image_shape is not None and example.values is not None:
        _draw_image(figure, example, modality.image_shape, title)
    elif modality.sample_rate is not None and example.values is not None:
        _draw_sound(figure, example, modality.sample_rate, title)
    elif len(example.texts) <= _SHORT:
        _draw_short_text(figure, example, title)
    else:
        _draw_long_text(figure, example, title)


def wrapped(texts: Sequence[str]) -> list[Line]:
    """Break a text into the lines of the figure. Words are separated by a blank, single characters are not."""
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
    """Share of active positions per column, for at most `bins` columns of (nearly) equal width."""
    length = active.shape[1]
    return torch.nn.functional.adaptive_avg_pool1d(active.double(), bins) if length > bins else active.double()


def printable(text: str) -> str:
    """A text in which visible symbols replace unprintable characters."""
    return "".join({"\n": "⏎", "\t": "→"}.get(sign, sign if sign.isprintable() else "·") for sign in text)


def _draw_image(figure: Any, example: Example, shape: tuple[int, int], title: str) -> None:
    layers = len(example.active)
    values = example.values.reshape(shape).numpy()  # type: ignore[union-attr]
    axes = figure.subplots(1, layers + 1, squeeze=False)[0]
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    for layer, axis in enumerate(axes, start=-1):
        axis.imshow(values, cmap="gray", interpolation="nearest")
        axis.set_axis_off()
        if layer < 0:
            axis.set_title("input", fontsize=8)
            continue
        active = example.active[layer].reshape(shape)
        overlay = torch.zeros(*shape, 4)
        overlay[active] = torch.tensor([*_ACTIVE_COLOUR, 0.6])
        axis.imshow(overlay.numpy(), interpolation="nearest")
        axis.set_title(f"layer {layer}: {float(active.double().mean()):.0%}", fontsize=8)


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
    axis.set_xticks([position - 0.5 for position in range(1, positions)], minor=True)
    axis.set_yticks([layer - 0.5 for layer in range(1, layers)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.set_title(title, fontsize=9, loc="left")


def _draw_long_text(figure: Any, example: Example, title: str) -> None:
    """Draw the whole sample as a strip per layer, and its beginning as text.

    The background of a token is darker if more layers were active on it.
    """
    layers, positions = example.active.shape
    lines = wrapped(example.texts)
    strip, page = figure.subplots(2, 1, height_ratios=[0.3 + 0.14 * layers, 0.17 * len(lines)])
    _draw_strip(strip, example.active, (-0.5, positions - 0.5))
    strip.tick_params(labelsize=7)
    strip.set_title(title, fontsize=9, loc="left")
    share = example.active.double().mean(0)
    background = torch.full((len(lines), _COLUMNS), float("nan"), dtype=torch.float64)
    for row, line in enumerate(lines):
        for number, column in enumerate(line.columns, start=line.first):
            text = printable(example.texts[number])
            background[row, column : column + max(1, len(text))] = share[number]
            # Tokens are drawn one by one: a whole line would be wider or narrower than the columns of the background.
            middle = column + (len(text) - 1) / 2
            sign = page.text(
                middle, row, text, fontsize=7, family="monospace", ha="center", va="center", parse_math=False
            )
            sign.set_in_layout(False)  # the layout would measure a thousand of them repeatedly
    page.imshow(background.numpy(), aspect="auto", cmap="Oranges", vmin=0, vmax=1.5, interpolation="nearest")
    page.set_yticks(range(len(lines)), [str(line.first) for line in lines], fontsize=7)
    page.set_xticks([])
    page.tick_params(length=0)
    shown = lines[-1].first + len(lines[-1].columns)
    page.set_xlabel(
        f"positions 0 to {shown - 1:,} of {positions:,}; darker: more of the {layers} layers active", fontsize=8
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
