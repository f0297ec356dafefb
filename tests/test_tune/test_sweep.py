from pathlib import Path
from typing import Any

import pytest
import yaml

from sma.errors import SpecError
from sma.spec import dump_yaml
from sma.tune.sweep import SweepSpec, make_sweep, read_sweep, shipped_sweeps
from sma.yaml_text import read_yaml
from tests.test_recipes.tiny import tiny
from tests.test_tune.sweeps import SPACE, small_sweep, write_sweep


@pytest.mark.parametrize("name", shipped_sweeps())
def test_every_shipped_sweep_is_valid(name: str) -> None:
    sweep = make_sweep(name)
    assert sweep.samples == 16
    assert any(path.endswith(("window", "kernel_size")) for path in sweep.space)
    # At least one evaluation before the last one may stop a trial.
    every = sweep.experiment.training.evaluate_every
    assert any(sweep.grace <= update for update in range(every, sweep.updates, every))


def test_a_sweep_loaded_from_its_file_is_equal() -> None:
    sweep = small_sweep(stopping={"grace": 7}, samples=3)
    assert SweepSpec.model_validate(read_yaml(dump_yaml(sweep), "here")) == sweep


def test_settings_apply_to_trial_0_and_all_others(tmp_path: Path) -> None:
    sweep = make_sweep(write_sweep(tmp_path, {"training.updates": 20}), settings=["training.warmup=2", "seed=7"])
    for experiment in (sweep.trial({}), sweep.trial({"training.learning_rate": 0.004})):
        assert (experiment.training.updates, experiment.training.warmup, experiment.seed) == (20, 2, 7)


def test_a_setting_replaces_a_fixed_value_of_the_space() -> None:
    settings = ["training.updates=400", "training.budget.hold=30", "training.budget.anneal=150"]
    with pytest.raises(
        SpecError, match=r"after 600 updates.*the fixed values can be changed: --set training.budget.hold=VALUE"
    ):
        make_sweep("listops_tiny", settings=settings[:1])
    sweep = make_sweep("listops_tiny", settings=settings)
    budget = sweep.trial({path: distribution.probes[0] for path, distribution in sweep.space.items()}).training.budget
    assert budget is not None
    assert (budget.hold, budget.anneal) == (30, 150)
    assert sweep.trial({}).training.budget is None


def test_a_setting_of_a_fixed_field_applies_to_trial_0_if_it_has_the_part() -> None:
    settings = ["training.updates=400", "training.budget.hold=30", "training.budget.anneal=150"]
    budget = make_sweep("pathfinder_tiny", settings=settings).trial({}).training.budget
    assert budget is not None
    assert (budget.hold, budget.anneal) == (30, 150)


@pytest.mark.parametrize(
    ("path", "value"),
    [("learning_rate", "0.004"), ("model.layers.layer.modules.attention.window", "8"), ("budget.target", "null")],
)
def test_a_setting_of_a_searched_field_is_refused(path: str, value: str) -> None:
    path = path if path.startswith("model") else f"training.{path}"
    with pytest.raises(
        SpecError,
        match=rf"--set {path}={value}: the sweep searches '.*{path.split('.')[-1]}'.*leave it out, or give your own",
    ):
        make_sweep("listops_tiny", settings=[f"{path}={value}"])


def test_a_setting_inside_a_searched_part_is_refused() -> None:
    space = {"layers.layer.router": {"kind": "choice", "values": [{"kind": "sma"}, {"kind": "always"}]}}
    with pytest.raises(SpecError, match=r"the sweep searches 'layers.layer.router', which would replace"):
        make_sweep({"experiment": tiny(), "space": space}, settings=["layers.layer.router.temperature_scale=0.5"])


def test_the_settings_of_a_shipped_sweep_do_not_apply_to_another_experiment(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    fixed = ["training.budget.hold=5", "training.budget.anneal=10"]
    sweep = make_sweep("listops_tiny", experiment=tmp_path / "experiment.yaml", settings=fixed)
    assert sweep.experiment == tiny(threads=1)
    own = make_sweep(write_sweep(tmp_path, {"training.updates": 800}), experiment="listops_tiny")
    assert own.updates == 800


def test_the_path_of_the_experiment_is_relative_to_the_file_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep(tmp_path)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "experiment": "experiment.yaml"}))
    monkeypatch.chdir("/")
    assert make_sweep(path).experiment == tiny(threads=1)


@pytest.mark.parametrize(
    ("budget", "stopping", "grace"),
    [
        pytest.param({}, {}, 7, id="no-budget"),
        pytest.param({"hold": 5, "anneal": 12}, {}, 17, id="budget"),
        pytest.param({"hold": 5, "anneal": 12}, {"grace": 9}, 9, id="as-given"),
    ],
)
def test_no_trial_is_stopped_before_the_rates_have_reached_their_targets(
    budget: dict[str, int], stopping: dict[str, int], grace: int
) -> None:
    fixed = {f"training.budget.{name}": {"kind": "fixed", "value": value} for name, value in budget.items()}
    assert small_sweep(space={**SPACE, **fixed}, stopping=stopping).grace == grace
    assert make_sweep("listops_tiny").grace == 600


def test_the_measures_are_those_of_the_task() -> None:
    assert small_sweep().quality == ("accuracy", "max")
    assert make_sweep("language_tiny").quality == ("bits_per_character", "min")
    assert [measure.name for measure in small_sweep(objectives=["rate", "quality", "time"]).measures] == [
        "rate",
        "accuracy",
        "microseconds_per_token",
    ]
    assert small_sweep(objectives=["operations"]) == small_sweep(objectives=["macs"])  # the former name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"samples": 0}, r"samples=0 must be at least 1", id="samples"),
        pytest.param({"objectives": ["speed"]}, r"objectives", id="objective"),
        pytest.param({"objectives": ["rate", "rate"]}, r"must all be different", id="objective-twice"),
        pytest.param({"stopping": {"grace": 31}}, r"stopping.grace=31 must be at most training.updates=30", id="grace"),
        pytest.param({"stopping": {"reduction": 1}}, r"reduction=1 must be at least 1\.1", id="reduction"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        small_sweep(**fields)


def test_an_unknown_name_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no shipped sweep 'listop_tiny'; did you mean 'listops_tiny'"):
        read_sweep("listop_tiny")
    path = tmp_path / "space.yaml"
    path.write_text("spce: {}")
    with pytest.raises(SpecError, match=r"unknown field 'spce'; did you mean 'space'"):
        read_sweep(path)
    with pytest.raises(SpecError, match=r"settings=\['a=1'\] must map field paths to values"):
        make_sweep({"experiment": "listops_tiny", "space": SPACE, "settings": ["a=1"]})
    with pytest.raises(SpecError, match=r"a sweep needs an experiment"):
        make_sweep({"space": SPACE})
