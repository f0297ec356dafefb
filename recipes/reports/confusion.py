"""The confusion matrix of a classifier and its accuracy per class, as a table, as JSON and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int64
from torch import Tensor

from sma.errors import DataError, quote
from sma.recipes.io.names import plain
from sma.recipes.reports.figures import drawing, label, save_figure

_MAX_CLASSES = 20
"""Maximum number of classes of a matrix that is printed, or drawn with numbers."""

_MAX_NAME = 24
"""Maximum number of characters of a name in tables and figures."""


class Confusion(NamedTuple):
    """A confusion matrix.

    Attributes:
        counts: numbers of samples by true class (rows) and predicted class (columns).
        names: names of the classes.
    """

    counts: Int64[Tensor, "C C"]
    names: tuple[str, ...]

    @classmethod
    def of(cls, counts: Int64[Tensor, "C C"], names: tuple[str, ...]) -> "Confusion":
        """Make a confusion matrix from counts. Without names the classes have their numbers."""
        return cls(counts.cpu(), names or tuple(map(str, range(len(counts)))))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def file(self) -> str:
        """File name of its figure in a run folder."""
        return "confusion.png"

    @property
    def per_class(self) -> dict[str, float | None]:
        """Accuracy on the samples of every class; None for a class without samples."""
        pairs = zip(self.names, self.counts.diagonal().tolist(), self.counts.sum(1).tolist(), strict=True)
        return {name: right / total if total else None for name, right, total in pairs}

    def record(self) -> dict[str, Any]:
        """The matrix and the accuracies as values for JSON."""
        return {"per_class": self.per_class, "classes": list(self.names), "confusion": self.counts.tolist()}

    def table(self) -> str:
        """The matrix with the accuracy of every class.

        Of more than 20 classes it has the least accurate, with their most frequent wrong prediction.
        """
        return self._matrix() if len(self.names) <= _MAX_CLASSES else self._worst()

    def _matrix(self) -> str:
        names = [plain(name, _MAX_NAME) for name in self.names]
        width = 1 + max(*map(len, names), len(str(int(self.counts.max()))))
        first = max(len("class"), *map(len, names))
        head = f"{'class':<{first}} {'accuracy':>8}   answered" + "".join(f"{name:>{width}}" for name in names)
        lines = [head]
        for name, accuracy, row in zip(names, self.per_class.values(), self.counts.tolist(), strict=True):
            cells = "".join(f"{count or '·':>{width}}" for count in row)
            lines.append(f"{name:<{first}} {_percent(accuracy):>8}           {cells}")
        return "\n".join(lines)

    def _worst(self) -> str:
        accuracies = {index: accuracy for index, accuracy in enumerate(self.per_class.values()) if accuracy is not None}
        worst = sorted(accuracies, key=lambda index: (accuracies[index], index))[:_MAX_CLASSES]
        names = [plain(name, _MAX_NAME) for name in self.names]
        first = max([len("class"), *(len(names[index]) for index in worst)])
        lines = [f"{'class':<{first}} {'accuracy':>8} {'samples':>8}   most often taken for"]
        for index in worst:
            row = self.counts[index].clone()
            samples, row[index] = int(row.sum()), 0
            other = f"{names[int(row.argmax())]} ({int(row.max())})" if int(row.max()) else "nothing else"
            lines.append(f"{names[index]:<{first}} {_percent(accuracies[index]):>8} {samples:>8}   {other}")
        left = len(self.names) - len(worst)
        return "\n".join([*lines, f"and {left} more classes"] if left else lines)

    def draw(self, path: Path, title: str) -> Path:
        """Draw the matrix into a PNG file, every row as shares of its class."""
        # Not torchmetrics' plot: it colours counts, which hides small classes, and places names beside their ticks.
        classes = len(self.names)
        totals = self.counts.sum(1, keepdim=True)
        shares = self.counts.double() / totals.clamp(min=1)
        side = min(14.0, 2.5 + 0.55 * classes)
        names = [label(name, _MAX_NAME) for name in self.names]
        with drawing(side + 1.2, side) as figure:
            axis = figure.subplots()
            image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            if classes <= _MAX_CLASSES:
                axis.set_xticks(range(classes), names, rotation=45, ha="right")
                axis.set_yticks(range(classes), names)
                for row, column in self.counts.nonzero().tolist():
                    colour = "white" if float(shares[row, column]) > 0.6 else "black"
                    count = str(int(self.counts[row, column]))
                    axis.text(column, row, count, ha="center", va="center", fontsize=8, color=colour)
            axis.set(xlabel="answer", ylabel="class", title=title)
            figure.colorbar(image, ax=axis, label="share of the class", shrink=0.8)
            return save_figure(figure, path)


def check_names(names: Sequence[str], classes: int) -> None:
    """Check the names of classes, by which accuracies are listed.

    Raises:
        DataError: their number differs from that of the classes, or two are the same.
    """
    if names and len(names) != classes:
        raise DataError(
            f"the data names {len(names)} classes and the task has {classes}; give every class a name, or none"
        )
    if (twice := next((name for index, name in enumerate(names) if name in names[:index]), None)) is not None:
        raise DataError(f"the data gives the name {quote(twice)} to two classes; give every class its own name")


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.1%}"
