from pathlib import Path
from typing import Any

import pytest

from sma.errors import SpecError
from sma.spec import dump_yaml, read_yaml
from sma.tune.sweep import SweepSpec, make_sweep, read_sweep, shipped_sweeps
from tests.test_tune.sweeps import SPACE, small_sweep, write_sweep


@pytest.mark.parametrize("name", shipped_sweeps())
def test_every_shipped_sweep_is_valid(name: str) -> None:
    sweep = make_sweep(name)
    assert sweep.samples == 16
    assert any(path.endswith(("window", "kernel_size")) for path in sweep.space)


def test_a_sweep_survives_its_file() -> None:
    sweep = small_sweep(stopping={"grace": 7}, samples=3)
    assert SweepSpec.model_validate(read_yaml(dump_yaml(sweep), "here")) == sweep


def test_settings_reach_trial_0_and_all_others(tmp_path: Path) -> None:
    sweep = make_sweep(write_sweep(tmp_path, {"training.updates": 20}), settings=["training.warmup=2", "seed=7"])
    for experiment in (sweep.trial({}), sweep.trial({"training.learning_rate": 0.004})):
        assert (experiment.training.updates, experiment.training.warmup, experiment.seed) == (20, 2, 7)


def test_the_measures_are_those_of_the_task() -> None:
    assert small_sweep().quality == ("accuracy", "max")
    assert make_sweep("language_tiny").quality == ("bits_per_character", "min")
    assert [measure.name for measure in small_sweep(objectives=["rate", "quality", "time"]).measures] == [
        "rate",
        "accuracy",
        "microseconds_per_token",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"samples": 0}, r"samples=0 must be at least 1", id="samples"),
        pytest.param({"objectives": ["speed"]}, r"objectives", id="objective"),
        pytest.param({"objectives": ["rate", "rate"]}, r"name one twice", id="objective-twice"),
        pytest.param({"stopping": {"grace": 31}}, r"stopping.grace=31 must be at most training.updates=30", id="grace"),
        pytest.param({"stopping": {"reduction": 1}}, r"reduction=1 must be greater than 1", id="reduction"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        small_sweep(**fields)


def test_an_unknown_name_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no shipped sweep 'listop_tiny'; did you mean 'listops_tiny'"):
        read_sweep("listop_tiny")
    path = tmp_path / "space.yaml"
    path.write_text("spce: {}")
    with pytest.raises(SpecError, match=r"unknown field 'spce'; did you mean 'space'"):
        read_sweep(path)
    with pytest.raises(SpecError, match=r"a sweep needs an experiment"):
        make_sweep({"space": SPACE})
