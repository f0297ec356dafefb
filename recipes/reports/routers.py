"""The table of routers."""

from sma.recipes.reports.results import Row, Summary, groups, metric_of
from sma.recipes.reports.table import (
    MACS,
    MACS_NOTE,
    MEAN_RATE_PERCENT,
    RATES_BY_LAYER,
    SEEDS,
    TOKENS_PER_SECOND,
    Block,
    Table,
    caption,
    measured,
    speed_note,
    variants,
)

ROUTER = variants("router")
ONE_SEED = (RATES_BY_LAYER, MACS, TOKENS_PER_SECOND)
SEVERAL_SEEDS = (MEAN_RATE_PERCENT, MACS)


def router_table(summary: Summary) -> Table:
    """The table of a router study: for every column a block of the first seed, and one of the repeated seeds."""
    rows: list[Row] = summary["rows"]
    result = measured(metric_of(summary))
    one_seed, several_seeds = (ROUTER, result, *ONE_SEED), (ROUTER, SEEDS, result, *SEVERAL_SEEDS)
    seed = summary["seeds"][0]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    first, repeated = [], []
    for column in columns:
        own = [row for row in rows if row["column"] == column]
        first.append(Block(one_seed, groups([row for row in own if row["seed"] == seed]), f"{column}, seed {seed}"))
        several = [group for group in groups(own) if len(group) > 1]
        repeated.append(Block(several_seeds, several, f"{column}, several seeds: mean (min to max)"))
    sentences = MACS_NOTE.format(length=summary["length"]), speed_note(summary)
    return Table(summary, [*first, *repeated], caption(summary, *sentences))
