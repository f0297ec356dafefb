"""The table of routers."""

from sma.recipes.reports.results import Row, Summary, groups
from sma.recipes.reports.table import (
    ACCURACY,
    MACS,
    MACS_ARE,
    MEAN_RATE_PERCENT,
    RATES_BY_LAYER,
    SEEDS,
    TOKENS_PER_SECOND,
    Block,
    Table,
    caption,
    speed_is,
    variants,
)

ROUTER = variants("router")
ONE_SEED = (ROUTER, ACCURACY, RATES_BY_LAYER, MACS, TOKENS_PER_SECOND)
SEVERAL_SEEDS = (ROUTER, SEEDS, ACCURACY, MEAN_RATE_PERCENT, MACS)


def router_table(summary: Summary) -> Table:
    """A block of the first seed for every column, and one of the routers with several seeds."""
    rows: list[Row] = summary["rows"]
    seed = summary["seeds"][0]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    first = [
        Block(ONE_SEED, groups([row for row in rows if row["column"] == column and row["seed"] == seed]), title)
        for column in columns
        for title in [f"{column}, seed {seed}"]
    ]
    repeated = [
        Block(
            SEVERAL_SEEDS, [group for group in groups(rows) if len(group) > 1 and group[0]["column"] == column], title
        )
        for column in columns
        for title in [f"{column}, several seeds: mean (min to max)"]
    ]
    sentences = MACS_ARE.format(length=summary["length"]), speed_is(summary)
    return Table(summary, [*first, *repeated], caption(summary, *sentences))
