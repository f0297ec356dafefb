"""The table of routers."""

from collections.abc import Sequence

from sma.recipes.reports.intervals import mean_interval
from sma.recipes.reports.results import Row, Summary, groups, metric_of, value_of
from sma.recipes.reports.table import (
    MACS,
    MACS_NOTE,
    MEAN_RATE_PERCENT,
    RATES_BY_LAYER,
    SEEDS,
    TOKENS_PER_SECOND,
    Block,
    Column,
    Table,
    caption,
    measured,
    speed_note,
    variants,
)
from sma.recipes.tasks.contract import Metric

ROUTER = variants("router")
ONE_SEED = (RATES_BY_LAYER, MACS, TOKENS_PER_SECOND)
SEVERAL_SEEDS = (MEAN_RATE_PERCENT, MACS)

DENSE = "always"
"""The variant with which all others are compared, seed by seed."""

DEAD, SATURATED = 0.01, 0.99
"""Rates below and above which a sub-module of a layer counts as dead and as saturated."""


def router_table(summary: Summary) -> Table:
    """The table of a router study: for every column a block of the first seed, and one of the repeated seeds."""
    rows: list[Row] = summary["rows"]
    result = measured(metric_of(summary))
    one_seed = (ROUTER, result, *ONE_SEED)
    seed = summary["seeds"][0]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    first, repeated = [], []
    for column in columns:
        own = [row for row in rows if row["column"] == column]
        first.append(Block(one_seed, groups([row for row in own if row["seed"] == seed]), f"{column}, seed {seed}"))
        several = [group for group in groups(own) if len(group) > 1]
        dense = {row["seed"]: row for row in own if row["variant"] == DENSE}
        compared = (_minus(dense, metric_of(summary)),) if len(dense) > 1 else ()
        several_seeds = (ROUTER, SEEDS, result, *compared, *SEVERAL_SEEDS, EXTREMES)
        repeated.append(Block(several_seeds, several, f"{column}, several seeds: mean (min to max)"))
    sentences = [MACS_NOTE.format(length=summary["length"]), speed_note(summary)]
    if any(block.lines for block in repeated):
        sentences.append(
            f"dead, saturated: sub-modules of all layers and seeds with a rate below {DEAD:.0%}, above {SATURATED:.0%}."
        )
    if any(column.head == f"minus {DENSE}" for block in repeated if block.lines for column in block.columns):
        sentences.append(f"minus {DENSE}: mean of the differences seed by seed, and its 95 % confidence interval.")
    return Table(summary, [*first, *repeated], caption(summary, *sentences))


def _minus(dense: dict[int, Row], metric: Metric) -> Column:
    """The difference to the dense variant over the seeds of both."""

    def cell(line: Sequence[Row]) -> str:
        scale = 100 if metric.percent else 1
        differences = [
            scale * (value_of(row, metric) - value_of(dense[row["seed"]], metric))
            for row in line
            if row["seed"] in dense
        ]
        if line[0]["variant"] == DENSE or len(differences) < 2:
            return "-"
        mean, half = mean_interval(differences)
        digits = 1 if metric.percent else 3
        return f"{mean:+.{digits}f} ± {half:.{digits}f}"

    return Column(f"minus {DENSE}", cell)


def _extremes(line: Sequence[Row]) -> str:
    rates = [rate for row in line for layer in row["rates"] for rate in layer.values()]
    return f"{sum(rate < DEAD for rate in rates)}, {sum(rate > SATURATED for rate in rates)} of {len(rates)}"


EXTREMES = Column("dead, saturated", _extremes)
