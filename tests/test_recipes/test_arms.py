"""Arms: what is compared differs in nothing but the router, and a comparison can be interrupted."""

import json

import matplotlib.image
import pytest

from sma.errors import CheckpointError, SpecError
from sma.recipes.experiment import RoutingLosses, load_experiment
from sma.recipes.io.run_folder import EXPERIMENT
from sma.recipes.reports.classification import ClassificationReport
from sma.recipes.studies.variants import layer_rates, run_arms, table, with_routers
from sma.recipes.training import run as training
from sma.routers import (
    AlwaysRouterSpec,
    BernoulliRouterSpec,
    GumbelRouterSpec,
    NeverRouterSpec,
    RandomRouterSpec,
    SMARouterSpec,
)
from tests.test_recipes.tiny import before_update, fail, tiny

FIELDS = {"accuracy", "activation_rate", "rates", "operations_per_token", "tokens_per_second", "seconds", "parameters"}


def _arms(**settings):
    """An experiment with its own router, and beside it always and random ones."""
    spec = tiny(**settings)

    def random(results):
        return with_routers(spec, [RandomRouterSpec(rate=rate) for rate in layer_rates(results, "routed")])

    return {"routed": spec, "always": with_routers(spec, AlwaysRouterSpec()), "random": random}


def _run(arms, out, data, **options):
    return run_arms(arms, out, data, accelerator="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished comparison: its folder, its summary, and the folders and titles of the figures of its runs."""
    out = tmp_path_factory.mktemp("arms")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationReport, "draw", lambda report, out, title: drawn.append((out, title)))
        summary = _run(_arms(), out, data, title="the title", subject="the subject")
    return out, summary, drawn


def test_summary_has_every_arm_and_is_what_stands_in_the_folder(done, data):
    out, summary, _ = done
    assert list(summary["models"]) == ["routed", "always", "random"]
    assert all(set(result) == FIELDS for result in summary["models"].values())
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["task"], summary["seed"], summary["updates"], summary["test_samples"]) == (
        "listops",
        0,
        30,
        len(data.test),
    )
    assert summary["data"] == dict(data.hashes)


def test_result_of_an_arm_is_that_of_its_run(done):
    out, summary, drawn = done
    for name, result in summary["models"].items():
        run = json.loads((out / name / "summary.json").read_text())
        assert (result["accuracy"], result["seconds"]) == (run["test_accuracy"], run["seconds"])
        assert result["activation_rate"] == max(run["activation_rate"])
        assert [list(rates) for rates in result["rates"]] == [["attention"]] * 2
    assert drawn == [
        (out / name, f"the subject, {name}: test accuracy {result['accuracy']:.1%}, seed 0")
        for name, result in summary["models"].items()
    ]


def test_fixed_routers_run_as_often_as_they_say(done):
    models = done[1]["models"]
    assert layer_rates(models, "always") == [1.0, 1.0]
    # Some hundred tokens: a rate of 0.5 is measured to within 0.03, one standard error.
    assert layer_rates(models, "random") == pytest.approx(layer_rates(models, "routed"), abs=0.12)


def test_operations_are_those_of_the_layers_at_the_measured_rates(done):
    out, summary, _ = done
    length = summary["length"]
    for name, result in summary["models"].items():
        spec = load_experiment(out / name / EXPERIMENT).model
        layers = zip(spec.layer_specs, result["rates"], strict=True)
        expected = sum(layer.operations(spec.width, length, rates).total for layer, rates in layers) / length
        assert result["operations_per_token"] == pytest.approx(expected)
    assert summary["models"]["routed"]["operations_per_token"] < summary["models"]["always"]["operations_per_token"]


def test_arms_differ_in_their_routers_alone(done):
    out, _, _ = done
    specs = [load_experiment(out / name / EXPERIMENT) for name in ("routed", "always", "random")]
    kinds = [[layer.router.kind for layer in spec.model.layer_specs] for spec in specs]
    assert kinds == [["sma"] * 2, ["always"] * 2, ["random"] * 2]
    assert len({with_routers(spec, NeverRouterSpec()).model_dump_json() for spec in specs}) == 1


def test_table_has_a_row_per_arm(done):
    lines = table(done[1]).splitlines()
    assert lines[0].split("  ")[0] == "arm"
    for line, (name, result) in zip(lines[1:], done[1]["models"].items(), strict=False):
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        rates = " / ".join(f"{100 * rate:.0f}" for rate in layer_rates(done[1]["models"], name))
        expected = [name, f"{result['accuracy']:.1%}", rates, f"{result['operations_per_token']:,.0f}"]
        assert cells == [*expected, f"{result['tokens_per_second']:,}", f"{result['seconds']:.0f}"]
    assert "chance 10.0%" in lines[-2]
    assert lines[-1] == "60 test samples, so one standard error is at most 6.5 points"


def test_figure_is_an_image_with_something_on_it(done):
    image = matplotlib.image.imread(done[0] / "comparison.png")
    assert min(image.shape[:2]) > 200
    assert 0.5 < image[..., :3].mean() < 1.0


def test_finished_arms_are_not_run_again(done, data, monkeypatch):
    out, summary, _ = done
    monkeypatch.setattr(training, "run_experiment", None)
    assert _run(_arms(), out, data, only=["always"]) == summary


def test_interrupted_comparison_goes_on_where_it_stopped(data, tmp_path, monkeypatch, done):
    with monkeypatch.context() as patch:
        before_update(
            patch, 13, lambda classifier: fail(classifier) if (tmp_path / "routed" / "summary.json").exists() else None
        )
        with pytest.raises(RuntimeError, match="the power went out"):
            _run(_arms(), tmp_path, data)
    assert list(json.loads((tmp_path / "summary.json").read_text())["models"]) == ["routed"]
    first = (tmp_path / "routed" / "summary.json").stat().st_mtime_ns
    summary = _run(_arms(), tmp_path, data)
    assert (tmp_path / "routed" / "summary.json").stat().st_mtime_ns == first
    accuracies = {name: result["accuracy"] for name, result in done[1]["models"].items()}
    assert {name: result["accuracy"] for name, result in summary["models"].items()} == accuracies


def test_unknown_arm_is_answered_with_a_near_one(data, tmp_path):
    with pytest.raises(SpecError, match=r"unknown arm 'alway'; did you mean 'always'[?] arms: routed, always, random"):
        _run(_arms(), tmp_path, data, only=["routed", "alway"])
    with pytest.raises(SpecError, match="there is no arm to train; choose some of routed, always, random"):
        _run(_arms(), tmp_path, data, only=[])
    assert list(tmp_path.iterdir()) == []


def test_arm_that_needs_another_says_so(data, tmp_path):
    with pytest.raises(
        SpecError, match="an arm is to run at the rates of 'routed', which was not trained; train 'routed' too"
    ):
        _run(_arms(), tmp_path, data, only=["random"])


def test_folder_of_another_experiment_is_refused(done, data):
    complaint = (
        r"routed/experiment\.yaml' belongs to another experiment: seed is 0 there, and 1 is asked for; "
        r"give another folder, or"
    )
    with pytest.raises(CheckpointError, match=complaint):
        _run(_arms(seed=1), done[0], data)


def test_arms_of_different_tasks_are_refused(done, data):
    other = tiny(task__data__train=121)
    with pytest.raises(SpecError, match=r"the arm 'other' has the task .*train=121.* arms must have one task"):
        _run({"routed": tiny(), "other": other}, done[0], data)


def test_routers_are_given_once_or_for_every_layer_that_routes():
    spec = tiny()
    each = with_routers(spec, [AlwaysRouterSpec(), NeverRouterSpec()])
    assert [layer.router.kind for layer in each.model.layer_specs] == ["always", "never"]
    assert with_routers(spec, [NeverRouterSpec()] * 2) == with_routers(spec, NeverRouterSpec())
    with pytest.raises(
        SpecError, match="there are 3 routers for 2 layers that route; give one for each of them, or one for all"
    ):
        with_routers(spec, [NeverRouterSpec()] * 3)


def test_policy_gradient_comes_and_goes_with_the_routers_that_learn_from_it():
    drawing = with_routers(tiny(training__losses__z=0.1), BernoulliRouterSpec())
    assert (drawing.training.losses.policy, drawing.training.losses.z) == (1.0, 0.1)
    assert with_routers(drawing, SMARouterSpec()).training == tiny(training__losses__z=0.1).training
    mine = drawing.replace(training=drawing.training.replace(losses=RoutingLosses(policy=0.5)))
    assert with_routers(mine, GumbelRouterSpec()).training.losses.policy == 0.5
    assert with_routers(mine, BernoulliRouterSpec()) == mine
    assert with_routers(mine, [SMARouterSpec(), BernoulliRouterSpec()]).training.losses.policy == 0.5


def test_budget_stays_with_routers_that_can_keep_it():
    spec = tiny(training__budget="{target: 0.5}")
    assert with_routers(spec, AlwaysRouterSpec()).training.budget is None
    assert with_routers(spec, AlwaysRouterSpec()).training == tiny().training
    assert with_routers(spec, spec.model.layer_specs[0].router) == spec.replace(
        model=with_routers(spec, spec.model.layer_specs[0].router).model
    )


def test_router_of_a_layer_that_routes_nothing_is_left_alone():
    spec = load_experiment("digits_routed_mlp_tiny")
    changed = with_routers(spec, NeverRouterSpec())
    pairs = zip(spec.model.layer_specs, changed.model.layer_specs, strict=True)
    assert [(old == new, bool(old.modules)) for old, new in pairs] == [(True, False), (False, True)] * 2
