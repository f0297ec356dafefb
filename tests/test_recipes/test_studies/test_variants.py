"""Variants differ only in their routers, and an interrupted study resumes."""

import json

import matplotlib.image
import pytest

from sma.errors import SpecError
from sma.recipes.experiment import RoutingLosses, load_experiment
from sma.recipes.io.run_folder import EXPERIMENT
from sma.recipes.reports.classification import ClassificationReport
from sma.recipes.reports.results import layer_rates
from sma.recipes.reports.table import markdown
from sma.recipes.reports.variants import draw_variants, variants_table
from sma.recipes.studies.contract import Chosen
from sma.recipes.studies.grid import run_grid
from sma.recipes.studies.variants import VariantsStudy, at_random, with_routers
from sma.routers import AlwaysRouterSpec, BernoulliRouterSpec, GumbelRouterSpec, NeverRouterSpec, SMARouterSpec
from tests.test_recipes import fake
from tests.test_recipes.test_reports.test_table import lines_of, summary
from tests.test_recipes.tiny import before_update, fail, tiny

pytestmark = pytest.mark.slow  # real trainings

NAMES = ("routed", "always", "random")


class Three(VariantsStudy):
    """The experiment with its own routers, with always-on ones, and with random ones."""

    name = "three"
    known = NAMES

    def subject(self, spec):
        return "the subject"

    def variants(self, spec):
        return {"routed": spec, "always": with_routers(spec, AlwaysRouterSpec()), "random": at_random(spec, "routed")}


def _runs(seeds=1, **settings):
    return Three().runs(tiny(**settings), Chosen(study="three", variants=[*NAMES], seeds=seeds), None, None)


def _grid(runs, out, data, **options):
    return run_grid(runs, out, data, cache=out.parent / "cache", accelerator="cpu", **options)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished study: its folder, its rows by variant, and the folders and titles of the figures of its runs."""
    out = tmp_path_factory.mktemp("variants")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationReport, "draw", lambda report, out, title: drawn.append((out, title)))
        results = _grid(_runs(), out, data)
    return out, {row["variant"]: row for row in results.rows}, drawn


def test_row_of_a_variant_equals_the_summary_of_its_run(done):
    out, rows, drawn = done
    assert tuple(rows) == NAMES
    for name, row in rows.items():
        run = json.loads((out / name / "summary.json").read_text())
        assert (row["accuracy"], row["seconds"]) == (run["test_accuracy"], run["seconds"])
        assert row["activation_rate"] == pytest.approx(sum(run["activation_rate"]) / 2)
        assert [list(rates) for rates in row["rates"]] == [["attention"]] * 2
    assert drawn == [
        (out / name, f"the subject, {name}: test accuracy {row['accuracy']:.1%}, seed 0") for name, row in rows.items()
    ]


def test_fixed_routers_run_at_their_configured_rates(done):
    rates = {name: layer_rates(row["rates"]) for name, row in done[1].items()}
    assert rates["always"] == [1.0, 1.0]
    # With some hundred tokens, the standard error of a rate of 0.5 is 0.03.
    assert rates["random"] == pytest.approx(rates["routed"], abs=0.12)


def test_macs_are_counted_in_the_layers_at_the_measured_rates(done, data):
    out, rows, _ = done
    length = max(1, round(sum(data.test.lengths.tolist()) / len(data.test)))
    for name, row in rows.items():
        spec = load_experiment(out / name / EXPERIMENT).model
        layers = zip(spec.layer_specs, row["rates"], strict=True)
        expected = sum(layer.macs(spec.width, length, rates).total for layer, rates in layers) / length
        assert row["macs_per_token"] == pytest.approx(expected)
    assert rows["routed"]["macs_per_token"] < rows["always"]["macs_per_token"]


def test_variants_differ_only_in_their_routers(done):
    specs = [load_experiment(done[0] / name / EXPERIMENT) for name in NAMES]
    kinds = [[layer.router.kind for layer in spec.model.layer_specs] for spec in specs]
    assert kinds == [["sma"] * 2, ["always"] * 2, ["random"] * 2]
    assert len({with_routers(spec, NeverRouterSpec()).model_dump_json() for spec in specs}) == 1


def test_table_has_a_line_per_variant(done):
    rows = done[1]
    text = markdown(variants_table(summary(*rows.values())))
    head, *lines = lines_of(text)
    assert head == ["variant", "accuracy", "rate per layer, %", "MACs per token", "tokens/s", "seconds"]
    for line, (name, row) in zip(lines, rows.items(), strict=True):
        rates = " / ".join(f"{100 * rate:.0f}" for rate in layer_rates(row["rates"]))
        expected = [name, f"{row['accuracy']:.1%}", rates, f"{row['macs_per_token']:,.0f}"]
        assert line == [*expected, f"{row['tokens_per_second']:,}", f"{row['seconds']:.0f}"]
    assert "MACs: multiply-accumulates of the layers at these rates, in a row of 13 tokens." in text


def test_figure_is_not_blank(done, tmp_path):
    image = matplotlib.image.imread(draw_variants({"rows": [*done[1].values()]}, tmp_path, "the title"))
    assert min(image.shape[:2]) > 200
    assert 0.5 < image[..., :3].mean() < 1.0


def test_interrupted_study_resumes_where_it_stopped(data, tmp_path, monkeypatch, done):
    def interrupt(module):
        if (tmp_path / "routed" / "summary.json").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_update(patch, 13, interrupt)
        with pytest.raises(KeyboardInterrupt):
            _grid(_runs(), tmp_path, data)
    first = (tmp_path / "routed" / "summary.json").stat().st_mtime_ns
    results = _grid(_runs(), tmp_path, data)
    assert (tmp_path / "routed" / "summary.json").stat().st_mtime_ns == first
    assert {row["variant"]: row["accuracy"] for row in results.rows} == {
        name: row["accuracy"] for name, row in done[1].items()
    }


def test_failure_does_not_stop_the_other_variants(data, tmp_path, monkeypatch, done):
    with monkeypatch.context() as patch:
        before_update(
            patch, 13, lambda module: fail(module) if (tmp_path / "routed" / "summary.json").exists() else None
        )
        results = _grid(_runs(), tmp_path, data)
    assert [row["accuracy"] for row in results.rows] == [done[1]["routed"]["accuracy"]]
    assert {run["error"] for run in results.failed} == {"RuntimeError: the power went out"}


def test_further_seeds_have_separate_folders_and_need_the_variant_of_their_seed(data, tmp_path):
    runs = _runs(2, seed=3)
    assert [(run.name, run.variant, run.seed) for run in runs] == [
        *((name, name, 3) for name in NAMES),
        *((f"{name}-4", name, 4) for name in NAMES),
    ]
    assert [run.needs for run in runs] == [(), (), ("routed",), (), (), ("routed-4",)]
    results = _grid(runs, tmp_path, data, trainer=fake.train)
    assert results.failed == []
    for run in runs:
        spec = load_experiment(tmp_path / run.name / EXPERIMENT)
        assert spec.seed == run.seed
        assert run.variant != "random" or [layer.router.seed for layer in spec.model.layer_specs] == [run.seed] * 2


def test_routers_are_given_once_or_for_every_layer_that_routes():
    spec = tiny()
    each = with_routers(spec, [AlwaysRouterSpec(), NeverRouterSpec()])
    assert [layer.router.kind for layer in each.model.layer_specs] == ["always", "never"]
    assert with_routers(spec, [NeverRouterSpec()] * 2) == with_routers(spec, NeverRouterSpec())
    with pytest.raises(
        SpecError, match="there are 3 routers for 2 routed layers; give one for each of them, or one for all"
    ):
        with_routers(spec, [NeverRouterSpec()] * 3)


def test_policy_gradient_is_set_only_for_routers_that_learn_from_it():
    drawing = with_routers(tiny(training__losses__z=0.1), BernoulliRouterSpec())
    assert (drawing.training.losses.policy, drawing.training.losses.z) == (1.0, 0.1)
    assert with_routers(drawing, SMARouterSpec()).training == tiny(training__losses__z=0.1).training
    mine = drawing.replace(training=drawing.training.replace(losses=RoutingLosses(policy=0.5)))
    assert with_routers(mine, GumbelRouterSpec()).training.losses.policy == 0.5
    assert with_routers(mine, BernoulliRouterSpec()) == mine
    assert with_routers(mine, [SMARouterSpec(), BernoulliRouterSpec()]).training.losses.policy == 0.5


def test_budget_is_kept_only_for_routers_that_it_can_steer():
    spec = tiny(training__budget="{target: 0.5}")
    assert with_routers(spec, AlwaysRouterSpec()).training.budget is None
    assert with_routers(spec, AlwaysRouterSpec()).training == tiny().training
    assert with_routers(spec, spec.model.layer_specs[0].router) == spec.replace(
        model=with_routers(spec, spec.model.layer_specs[0].router).model
    )


def test_router_of_a_layer_without_sub_modules_is_unchanged():
    spec = load_experiment("digits_routed_mlp_tiny")
    changed = with_routers(spec, NeverRouterSpec())
    pairs = zip(spec.model.layer_specs, changed.model.layer_specs, strict=True)
    assert [(old == new, bool(old.modules)) for old, new in pairs] == [(True, False), (False, True)] * 2
