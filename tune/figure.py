"""The figure of a sweep: quality against activation rate."""

from collections.abc import Sequence
from typing import Any

from sma.recipes.io.names import plain
from sma.recipes.reports.figures import drawing, png
from sma.tune.pareto import front
from sma.tune.records import TrialRecord
from sma.tune.space import searched
from sma.tune.sweep import RATE, SweepSpec

_MARKS = {"finished": "o", "stopped": "x", "running": "+"}


def draw_front(records: Sequence[TrialRecord], chosen: Sequence[TrialRecord], sweep: SweepSpec) -> bytes:
    """Draw all evaluated trials, coloured by window, the Pareto front, and trial 0; returns a PNG file.

    Args:
        records: all trials.
        chosen: the trials on the front.
        sweep: the sweep.
    """
    quality = sweep.quality
    shown = [
        record
        for record in records
        if quality.name in record.metrics and RATE.name in record.metrics and record.status != "failed"
    ]
    path = next((path for path in searched(sweep.space) if path.endswith("window")), None)
    colours = _colours([_window_of(record, sweep, path) for record in shown])
    with drawing(8, 5) as figure:
        axis = figure.subplots()
        for record in shown:
            axis.scatter(
                record.metrics[RATE.name],
                record.metrics[quality.name],
                marker=_MARKS[record.status],
                s=42,
                color=colours[_window_of(record, sweep, path)],
                zorder=3,
            )
            axis.annotate(
                str(record.number),
                (record.metrics[RATE.name], record.metrics[quality.name]),
                (5, 4),
                textcoords="offset points",
                fontsize=8,
            )
        line = sorted((record.metrics[RATE.name], record.metrics[quality.name]) for record in _outline(chosen, sweep))
        if line:
            axis.step(*zip(*line, strict=True), where="post", color="0.6", linewidth=1, zorder=1)
        baseline = next((record for record in shown if record.number == 0), None)
        if baseline is not None:
            axis.scatter(
                baseline.metrics[RATE.name],
                baseline.metrics[quality.name],
                s=170,
                facecolors="none",
                edgecolors="black",
                zorder=2,
            )
            axis.axhline(baseline.metrics[quality.name], color="black", linewidth=0.6, linestyle=":")
            axis.axvline(baseline.metrics[RATE.name] / 2, color="black", linewidth=0.6, linestyle=":")
        axis.set(
            xlabel="activation rate (validation)",
            ylabel=f"{quality.name.replace('_', ' ')} (validation)",
            xlim=(-0.02, 1.02),
        )
        axis.set_title(
            f"{len(records)} trials on {sweep.experiment.task.kind}, {sweep.updates:,} updates; ring: trial 0; "
            "cross: stopped early;\n"
            "grey: the Pareto front; dotted: trial 0's quality and half its rate",
            fontsize=10,
        )
        axis.grid(alpha=0.3)
        _legend(axis, colours, path)
        return png(figure)


def _outline(chosen: Sequence[TrialRecord], sweep: SweepSpec) -> list[TrialRecord]:
    """The trials of the front that are also on the front of the two drawn objectives."""
    sign = -1 if sweep.quality.mode == "max" else 1
    return [
        chosen[index]
        for index in front(
            [(sign * record.metrics[sweep.quality.name], record.metrics[RATE.name]) for record in chosen]
        )
    ]


def _window_of(record: TrialRecord, sweep: SweepSpec, path: str | None) -> Any:
    window = None if path is None else sweep.value(record.values, path)
    # The field of a third-party sub-module may hold anything.
    return window if isinstance(window, int | float | None) else plain(window, 40)


def _colours(windows: Sequence[Any]) -> dict[Any, Any]:
    """One colour of a scale per window, darker for wider windows. null, which is unlimited, comes last."""
    import matplotlib as mpl

    order = sorted(
        set(windows),
        key=lambda window: (window is None, (window, "") if isinstance(window, int | float) else (0, str(window))),
    )
    scale = mpl.colormaps["viridis_r"]
    return {window: scale(0.15 + 0.85 * rank / max(1, len(order) - 1)) for rank, window in enumerate(order)}


def _legend(axis: Any, colours: dict[Any, Any], path: str | None) -> None:
    if path is None or not colours:
        return
    for window, colour in colours.items():
        axis.scatter([], [], color=colour, label=f"window {'all' if window is None else window}")
    axis.legend(fontsize=8, loc="lower right")
