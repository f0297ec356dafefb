import math
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from sma.errors import SpecError
from sma.tune.distributions import Choice, DistributionSpec, Fixed, Int, LogUniform, QUniform, Uniform
from sma.tune.space import starting_code, value_at, with_values
from sma.yaml_text import read_yaml
from tests.test_recipes.tiny import tiny
from tests.test_tune.sweeps import SPACE, small_sweep

WINDOW = "layers.layer.modules.attention.window"


EACH = [
    pytest.param(Uniform(low=-1.0, high=2.0), id="uniform"),
    pytest.param(LogUniform(low=0.1, high=10.0), id="loguniform"),
    pytest.param(QUniform(low=0.1, high=0.7, step=0.1), id="quniform"),
    pytest.param(Int(low=1, high=64, log=True), id="int"),
    pytest.param(Choice(values=(8, None, "gau", {"kind": "sma"})), id="choice"),
    pytest.param(Fixed(value=3), id="fixed"),
]


@pytest.mark.parametrize("distribution", EACH)
def test_draw_undoes_encode(distribution: DistributionSpec) -> None:
    drawn = [distribution.draw(FixedTrial({"x": distribution.encode(value)}), "x") for value in distribution.probes]
    assert drawn == list(distribution.probes)


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        pytest.param(Uniform(low=0.0, high=1.0), 1.5, id="above"),
        pytest.param(Uniform(low=0.0, high=1.0), None, id="null"),
        pytest.param(Uniform(low=0.0, high=1.0), True, id="true-is-not-a-number"),
        pytest.param(QUniform(low=0.0, high=1.0, step=0.25), 0.3, id="between-steps"),
        pytest.param(Int(low=1, high=9), 2.5, id="not-an-integer"),
        pytest.param(Choice(values=(1, 2)), 3, id="not-a-choice"),
        pytest.param(Choice(values=(1, 2)), True, id="true-is-not-one"),
    ],
)
def test_a_value_that_is_never_drawn_has_no_code(distribution: DistributionSpec, value: Any) -> None:
    assert distribution.encode(value) is None


@pytest.mark.parametrize(
    ("path", "values", "code"),
    [
        pytest.param("training.learning_rate", "[1e-2, 3e-3]", 1, id="exponents-without-a-point"),
        pytest.param("training.weight_decay", "[0.1, 0]", 1, id="an-integer-for-a-float"),
        pytest.param("layers.layer.modules.attention.window", "[16.0, 8.0]", 1, id="a-float-for-an-integer"),
        pytest.param("layers.layer.router", "[{kind: always}, {kind: sma}]", 1, id="a-part-without-its-defaults"),
        pytest.param("layers.layer.dropout", "[0.2, 0.3]", None, id="not-a-choice"),
        pytest.param("layers.layer.norm", "[null, {kind: rms_norm}]", None, id="not-a-choice-of-parts"),
    ],
)
def test_the_value_of_the_experiment_has_a_code_in_every_spelling(path: str, values: str, code: int | None) -> None:
    experiment = tiny(training__weight_decay=0.0)
    assert starting_code(experiment, path, Choice(values=read_yaml(values, "values"))) == code


def test_large_choice_is_checked_in_bounded_time() -> None:
    began = time.process_time()
    Choice(values=range(1000))
    assert time.process_time() - began < 1


@given(st.integers(-20, 20), st.integers(1, 30), st.sampled_from([0.05, 0.1, 0.25, 1.0, 3.0]))
def test_quniform_encodes_all_of_its_steps(first: int, steps: int, step: float) -> None:
    distribution = QUniform(low=first * step, high=first * step + steps * step, step=step)
    assert None not in [distribution.encode(first * step + number * step) for number in range(steps + 1)]
    assert distribution.encode(first * step + step / 2) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Uniform(low=2.0, high=1.0), r"low=2.0 must be below high=1.0", id="reversed"),
        pytest.param(lambda: LogUniform(low=0.0, high=1.0), r"low=0.0 must be greater than 0", id="logarithm-of-zero"),
        pytest.param(
            lambda: Int(low=0, high=4, log=True), r"low=0 must be at least 1 with log=true", id="logarithm-of-int"
        ),
        pytest.param(lambda: QUniform(low=0.0, high=1.0, step=0.3), r"whole number of steps of 0.3", id="steps"),
        pytest.param(
            lambda: Choice(values=(4,)),
            r"must be at least two; for one value use \{kind: fixed, value: 4\}",
            id="one-choice",
        ),
        pytest.param(lambda: Choice(values=(4, 8, 4)), r"4 occurs twice", id="twice"),
        pytest.param(
            lambda: Choice(values=(0, 0.5, 0.0)),
            r"0\.0 occurs twice in values=\[0, 0\.5, 0\.0\]",
            id="twice-as-numbers",
        ),
        pytest.param(
            lambda: Choice(values=([1], {"a": 1}, {"a": 1.0})), r"\{'a': 1\.0\} occurs twice", id="twice-in-mappings"
        ),
        pytest.param(lambda: Choice(values=range(1001)), r"should have at most 1000 items", id="too-many"),
        pytest.param(
            lambda: Uniform(low=-1e308, high=1e308),
            r"too far apart: their difference must be finite",
            id="too-far-apart",
        ),
        pytest.param(
            lambda: QUniform(low=0, high=1e308, step=1e-300), r"must be a whole number of steps", id="too-many-steps"
        ),
        pytest.param(
            lambda: Int(low=True, high=3), r"low=True: input should be a valid integer", id="true-for-an-integer"
        ),
    ],
)
def test_an_invalid_distribution_is_refused(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        pytest.param({}, r"the search space is empty.*loguniform", id="empty"),
        pytest.param({"training.warmup": {"kind": "fixed", "value": 3}}, r"the search space is empty", id="all-fixed"),
        pytest.param(
            {"layers.layer.modules.attention.windw": {"kind": "int", "low": 1, "high": 9}},
            r"unknown field path 'model.layers.layer.modules.attention.windw'.*did you mean 'window'",
            id="field",
        ),
        pytest.param(
            {"training.learning_rte": {"kind": "uniform", "low": 0.1, "high": 0.2}},
            r"unknown field path 'training.learning_rte'.*did you mean 'learning_rate'",
            id="top",
        ),
        pytest.param(
            {"training.learning_rate": {"kind": "unifrm", "low": 0.1, "high": 0.2}},
            r"unknown distribution kind 'unifrm'.*did you mean 'uniform'",
            id="kind",
        ),
        pytest.param(
            {"training.learning_rate": {"kind": "uniform", "low": -0.1, "high": 0.2}},
            r"refuses a value of the search space, training.learning_rate=-0.1: .*must be greater than 0",
            id="end",
        ),
        pytest.param(
            {"layers.layer.modules.attention.window": {"kind": "choice", "values": [8, 0]}},
            r"attention.window=0: .*must be at least 1",
            id="choice",
        ),
        pytest.param(
            {"training.updates": {"kind": "int", "low": 10, "high": 20}}, r"all trials train equally long", id="updates"
        ),
        pytest.param(
            {"task.data.train": {"kind": "int", "low": 10, "high": 20}},
            r"all trials learn from the same data",
            id="data",
        ),
        pytest.param({"training..x": {"kind": "int", "low": 10, "high": 20}}, r"is not a field path", id="path"),
        *(
            pytest.param(
                {WINDOW: {"kind": kind, "low": 4, "high": 30, **step}},
                rf"{WINDOW}=\d+\.\d+: .*valid integer.*for whole numbers write {WINDOW}: {{kind: int, …}}",
                id=f"fraction-{kind}",
            )
            for kind, step in (("uniform", {}), ("loguniform", {}), ("quniform", {"step": 0.5}))
        ),
        *(
            pytest.param(
                {WINDOW: {"kind": "choice", "values": [8, value]}},
                r"the experiment refuses a value of the search space, .*: input should be a finite number",
                id=f"value-{value}",
            )
            for value in (math.inf, -math.inf, math.nan)
        ),
        *(
            pytest.param(
                {path: {"kind": "choice", "values": [4, 8]} for path in (WINDOW, other)},
                rf"'{WINDOW}' and '{other}' {message}",
                id=name,
            )
            for name, other, message in (
                ("two-spellings", f"model.{WINDOW}", "are the same field"),
                ("part-and-child", "layers.layer.modules", "set the same part"),
            )
        ),
    ],
)
def test_a_space_that_does_not_fit_the_experiment_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        small_sweep(space=space)


def test_values_of_which_only_the_combination_is_wrong_are_refused() -> None:
    space = {
        "training.budget.hold": {"kind": "int", "low": 0, "high": 20},
        "training.budget.anneal": {"kind": "int", "low": 0, "high": 20},
    }
    settings = {"training.budget.target": 0.3}
    with pytest.raises(SpecError, match=r"all largest values together \(.*hold=20, .*anneal=20\): .*after 40 updates"):
        small_sweep(settings, space=space)


def test_wrong_combinations_of_valid_values_are_found_by_random_draws() -> None:
    space = {f"training.budget.{name}": {"kind": "choice", "values": [0, 25, 1]} for name in ("hold", "anneal")}
    with pytest.raises(
        SpecError, match=r"the values of random draw \d+ \(.*hold=25, .*anneal=25\): .*after 50 updates"
    ):
        small_sweep({"training.budget.target": 0.3}, space=space)


def test_the_error_names_fixed_values_that_do_not_fit_together() -> None:
    space = {
        **SPACE,
        "training.budget.hold": {"kind": "fixed", "value": 20},
        "training.budget.anneal": {"kind": "fixed", "value": 20},
    }
    expected = (
        r"the fixed and first values together \(.*hold=20.*\): "
        r".*after 40 updates.*--set training.budget.hold=VALUE --set "
    )
    with pytest.raises(SpecError, match=expected + "training.budget.anneal=VALUE"):
        small_sweep(space=space)


def test_a_path_may_omit_the_model() -> None:
    short, full = (
        with_values(tiny(), {f"{prefix}layers.layer.modules.attention.window": 3}) for prefix in ("", "model.")
    )
    assert short == full
    assert value_at(short, "layers.layer.modules.attention.window") == 3


def test_the_value_of_a_field_in_a_null_part_is_null() -> None:
    assert value_at(tiny(), "training.budget.target") is None
    assert value_at(with_values(tiny(), {"training.budget.target": 0.5}), "training.budget.target") == 0.5


def test_fixed_values_are_set_in_all_trials_but_trial_0() -> None:
    sweep = small_sweep(space={**SPACE, "training.budget.hold": {"kind": "fixed", "value": 5}})
    first = {path: distribution.probes[0] for path, distribution in sweep.space.items()}
    budget = sweep.trial(first).training.budget
    assert budget is not None
    assert budget.hold == 5
    assert sweep.trial({}) == sweep.experiment


def test_an_experiment_that_is_neither_mapping_nor_string_is_refused() -> None:
    program = (
        "from sma.tune.sweep import make_sweep\n"
        "try: make_sweep({'experiment': 3, 'space': {}})\n"
        "except ValueError as error: print(error)"
    )
    # In a separate process, which has no shape checker.
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        result.stdout
        == "3 must be a mapping or a string: the name of one of the shipped presets or the path of a file\n"
    )
