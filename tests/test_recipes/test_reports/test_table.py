"""Table of a study: the Markdown and the CSV file hold the numbers of the rows."""

import csv
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sma.recipes.reports.results import groups, layer_rates, over_seeds
from sma.recipes.reports.table import (
    ACCURACY,
    MACS,
    MACS_NOTE,
    MEAN_RATE,
    PARAMETERS,
    RATES_BY_LAYER,
    SECONDS,
    SEEDS,
    TOKENS_PER_SECOND,
    Block,
    Table,
    caption,
    comma_separated,
    markdown,
    speed_note,
    spread,
    variants,
)

COLUMNS = (
    variants("variant"),
    SEEDS,
    ACCURACY,
    PARAMETERS,
    MEAN_RATE,
    RATES_BY_LAYER,
    MACS,
    TOKENS_PER_SECOND,
    SECONDS,
)


def row(variant="a", seed=0, **changes):
    """A row with two layers of one sub-module."""
    rates = changes.pop("rates", [{"gau": 0.25}, {"gau": 0.75}])
    layers = layer_rates(rates)
    return {
        "name": f"{variant}-{seed}",
        "variant": variant,
        "seed": seed,
        "accuracy": 0.5,
        "activation_rate": sum(layers) / len(layers) if layers else None,
        "rates": rates,
        "macs_per_token": 1234.5,
        "tokens_per_second": 1000,
        "seconds": 2.5,
        "parameters": 4321,
        "updates": 30,
        **changes,
    }


def summary(*rows, **changes):
    """A summary of rows."""
    return {
        "task": "listops",
        "chance": 0.1,
        "majority": 0.25,
        "commit": "c",
        "hardware": "h",
        "date": "d",
        "test_samples": 400,
        "length": 13,
        "jobs": 1,
        "seconds": 90.0,
        "rows": list(rows),
        "failed": [],
        **changes,
    }


def lines_of(text):
    """Cells of a Markdown table, line by line, without the separator line."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if set("".join(line)) - set("-: ")]


def rows_of(draw):
    """Rows of some variants, each with its own number of seeds."""
    rows = []
    share = st.floats(0, 1)
    for variant in draw(st.sets(st.sampled_from("abc"), min_size=1)):
        for seed in range(draw(st.integers(1, 3))):
            rates = [{"gau": draw(share)}, {"gau": draw(share)}]
            speed = draw(st.one_of(st.none(), st.integers(1, 10**6)))
            cost = draw(st.floats(1, 1e6))
            rows.append(
                row(variant, seed, accuracy=draw(share), rates=rates, tokens_per_second=speed, macs_per_token=cost)
            )
    return rows


def _oracle(values, digits, unit=""):
    values = list(values)
    total, least, most = 0.0, values[0], values[0]
    for value in values:
        total += value
        least = value if value < least else least
        most = value if value > most else most
    mean = f"{total / len(values):,.{digits}f}{unit}"
    return mean if len(values) == 1 else f"{mean} ({least:,.{digits}f} to {most:,.{digits}f})"


def _close(cell, expected):
    """Whether two cells differ at most by the rounding of a sum."""
    numbers = [[float(number.replace(",", "")) for number in re.findall(r"[\d,.]+", text)] for text in (cell, expected)]
    words = [re.sub(r"[\d,.]+", "", text) for text in (cell, expected)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], abs=0.1001 if "." in cell else 1.001)


@given(st.data())
def test_cells_equal_a_loop_over_the_rows(data):
    rows = rows_of(data.draw)
    table = Table(summary(*rows), [Block(COLUMNS, groups(rows))], "the caption")
    head, *lines = lines_of(markdown(table))
    assert head == [column.head for column in COLUMNS]
    by_variant = {}
    for each in rows:
        by_variant.setdefault(each["variant"], []).append(each)
    assert [line[0] for line in lines] == list(by_variant)
    for line, own in zip(lines, by_variant.values(), strict=True):
        speeds = [each["tokens_per_second"] for each in own if each["tokens_per_second"] is not None]
        layers = [_oracle([sum(100 * each["rates"][n]["gau"] for each in own) / len(own)], 0) for n in (0, 1)]
        means = [50 * (each["rates"][0]["gau"] + each["rates"][1]["gau"]) for each in own]
        expected = [
            own[0]["variant"],
            str(len(own)),
            _oracle([100 * each["accuracy"] for each in own], 1, "%"),
            "4,321",
            _oracle(means, 0, "%"),
            " / ".join(layers),
            _oracle([each["macs_per_token"] for each in own], 0),
            _oracle(speeds, 0) if speeds else "-",
            _oracle([2.5] * len(own), 0),
        ]
        assert all(map(_close, line, expected)), (line, expected)


@given(st.data())
def test_csv_values_equal_the_rows(data):
    rows = rows_of(data.draw)
    table = Table(summary(*rows), [], "", lambda row: {"twice": 2 * row["accuracy"]})
    lines = list(csv.DictReader(comma_separated(table).splitlines()))
    assert len(lines) == len(rows)
    for line, own in zip(lines, rows, strict=True):
        assert list(line)[:3] == ["variant", "seed", "accuracy"]
        assert (line["variant"], int(line["seed"])) == (own["variant"], own["seed"])
        assert float(line["accuracy"]) == own["accuracy"] == float(line["twice"]) / 2
        assert [float(line[f"rate/layer{n}/gau"]) for n in (0, 1)] == [layer["gau"] for layer in own["rates"]]
        assert line["tokens_per_second"] == ("" if own["tokens_per_second"] is None else str(own["tokens_per_second"]))


@given(st.data())
def test_spread_over_seeds_equals_a_loop(data):
    rows = rows_of(data.draw)
    expected = {}
    for each in rows:
        expected.setdefault(each["variant"], []).append(each)
    found = {entry["variant"]: entry for entry in over_seeds(rows)}
    assert list(found) == [variant for variant, own in expected.items() if len(own) > 1]
    for variant, entry in found.items():
        assert entry["seeds"] == [each["seed"] for each in expected[variant]]
        for measure in ("accuracy", "activation_rate", "macs_per_token"):
            values = sorted(each[measure] for each in expected[variant])
            numbers = {"mean": pytest.approx(statistics.mean(values)), "min": values[0], "max": values[-1]}
            assert entry[measure] == numbers


def test_columns_are_grouped_separately():
    rows = [row(column=column, seed=seed) for seed in (0, 1) for column in ("x", "y")]
    assert [[each["column"] for each in group] for group in groups(rows)] == [["x", "x"], ["y", "y"]]
    assert [(entry["column"], entry["seeds"]) for entry in over_seeds(rows)] == [("x", [0, 1]), ("y", [0, 1])]
    assert next(iter(csv.reader(comma_separated(Table(summary(*rows), [], "")).splitlines())))[:3] == [
        "column",
        "variant",
        "seed",
    ]


def test_rates_of_several_sub_modules_are_named():
    mixed = row(rates=[{"a": 0.25, "b": 1.0}, {"a": 0.5}])
    assert RATES_BY_LAYER.cell([mixed]) == "a 25 / 50, b 100"
    other = row(seed=1, rates=[{"a": 0.35, "b": 0.0}, {"a": 0.5}])
    assert RATES_BY_LAYER.cell([mixed, other]) == "a 30 / 50, b 50"


def test_a_model_without_routing_has_no_rate():
    nothing = row(rates=[])
    assert (RATES_BY_LAYER.cell([nothing]), MEAN_RATE.cell([nothing])) == ("-", "-")
    assert "activation_rate" not in over_seeds([nothing, row(seed=1, rates=[])])[0]


def test_blocks_failed_runs_and_caption_follow_each_other():
    failed = {"name": "b-0", "variant": "b", "column": "x", "seed": 0, "error": "MemoryError: all | of it"}
    table = Table(
        summary(row(), failed=[failed]),
        [Block((variants("router"), ACCURACY), [[row()]], "x, seed 0"), Block((ACCURACY,), [], "nothing in it")],
        "the caption",
    )
    assert markdown(table) == (
        "**x, seed 0**\n\n| router | accuracy |\n| --- | ---: |\n| a | 50.0% |\n\n"
        "**failed**\n\n- b-0: MemoryError: all | of it\n\nthe caption\n"
    )
    first, second = csv.DictReader(comma_separated(table).splitlines())
    assert (first["column"], first["variant"], first["error"]) == ("", "a", "")
    assert (second["column"], second["accuracy"], second["error"]) == ("x", "", "MemoryError: all | of it")


def test_caption_states_updates_seeds_samples_commit_and_hardware():
    two = [row(), row(seed=1, updates=40)]
    assert caption(summary(*two), "A sentence.") == (
        "listops, 30 to 40 updates; seeds 0, 1: mean (min to max). 400 test samples: one standard error is at most 2.5 "
        "points. Chance 10.0%, majority class 25.0%. A sentence. 2 runs in 1.5 minutes, 1 at a time, commit c, h, d."
    )
    assert caption(summary(row(seed=7))).startswith("listops, 30 updates; seed 7. 400 test samples")
    assert caption(summary()) == "No run is finished."
    assert speed_note(summary(jobs=1)) == "tokens/s: in training, without evaluation; one run at a time."
    assert "each run beside 1 other, so not comparable." in speed_note(summary(jobs=2))
    assert "each run beside 2 others, so" in speed_note(summary(jobs=3))
    assert MACS_NOTE.format(length=13).endswith("in a row of 13 tokens.")


def test_spread_of_one_value_is_the_value():
    assert (spread([2.0], ".1f", "%"), spread([1.0, 3.0], ".1f", "%")) == ("2.0%", "2.0% (1.0 to 3.0)")
