"""The table and the figure of recall on streams that are longer than the training samples."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sma.recipes.reports.figures import drawing, label, save_figure
from sma.recipes.reports.results import Row, Summary, groups, metric_of
from sma.recipes.reports.table import (
    PARAMETERS,
    RATES_BY_LAYER,
    Block,
    Column,
    Table,
    caption,
    measured,
    spread,
    variants,
)

FIGURE = "reach.png"


def reach_table(summary: Summary) -> Table:
    """Accuracy at the length of the training, and on longer streams by length and by distance."""
    lines = groups(summary["rows"])
    reached = sorted({int(reach) for row in summary["rows"] for reach in _found(row, "distance")})
    first = variants("model")
    columns = [first, measured(metric_of(summary)), PARAMETERS, RATES_BY_LAYER]
    columns += [_share(f"{length:,} tokens", "recall", length) for length in summary["lengths"]]
    blocks = [Block(columns, lines)]
    if reached:
        by_distance = [_share(f"{reach:,}", "distance", reach) for reach in reached]
        blocks.append(Block([first, *by_distance], lines, "accuracy by distance of at least this number of tokens"))
        blocks.append(
            Block(
                [first, *(_share(f"{length:,} tokens", "rate", length, ".2f") for length in summary["lengths"])],
                [line for line in lines if all(_found(row, "rate") for row in line)],
                "mean activation rate of the layers on the streams",
            )
        )
    streams = f"{summary['samples']} streams of every length, read in chunks; distances are uniform."
    return Table(summary, blocks, caption(summary, streams))


def _share(head: str, key: str, part: int, form: str = ".1f") -> Column:
    def cell(line: Sequence[Row]) -> str:
        values = [100 * found[str(part)] for row in line if str(part) in (found := _found(row, key))]
        return spread(values, form, "%") if values else "-"

    return Column(head, cell)


def _found(row: Row, key: str) -> Mapping[str, float]:
    """The measurements on the streams; empty if there are none yet."""
    found: Mapping[str, float] = cast(Mapping[str, Any], row).get(key, {})
    return found


def draw_reach(summary: Summary, out: Path, trained: int) -> Path:
    """Draw the accuracy of every model by distance into `reach.png`, as means over the seeds.

    Args:
        summary: summary of the study.
        out: its folder.
        trained: number of tokens of a training sample.
    """
    with drawing(8, 4.5) as figure:
        axis = figure.subplots()
        for line in groups(summary["rows"]):
            found = [_found(row, "distance") for row in line]
            means = {int(reach): statistics.fmean(100 * each[reach] for each in found) for reach in found[0]}
            axis.plot(*zip(*means.items(), strict=True), "-o", markersize=4, label=label(line[0]["variant"], 40))
        axis.axvline(trained, color="0.6", linestyle="--", linewidth=1)
        axis.annotate(" length of the training", (trained, 50), fontsize=8, color="0.4")
        axis.set_xscale("log", base=2)
        reaches = sorted({int(reach) for row in summary["rows"] for reach in _found(row, "distance")})
        axis.set_xticks(reaches, [f"{reach:,}" for reach in reaches], fontsize=8, rotation=30)
        axis.set(xlabel="tokens from the value to its query", ylabel="accuracy, %", ylim=(-3, 103))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        return save_figure(figure, out / FIGURE)
