"""Table of routers: its experiments, its contents, interrupted tables, and failed runs."""

import csv
import json
import re
import statistics
from collections import Counter

import pytest
import yaml

from sma.budget import BudgetController
from sma.errors import SpecError
from sma.model import build
from sma.recipes import router_table
from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY
from sma.recipes.reports.routers import router_table as table_of
from sma.recipes.reports.table import comma_separated, markdown
from sma.recipes.studies.router_grid import OPTIONS, REPEATED, ROUTERS, columns, grid, router_experiment
from sma.recipes.training import run as training
from sma.routers import SMARouterSpec
from sma.stats import count_macs
from tests.test_recipes import tiny

PRESET = "listops_router_table_tiny"
ALL = grid(load_experiment(PRESET))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A short experiment with two sub-modules, as a file."""
    layers = tiny.MODEL["layers"]
    modules = {"mlp": {"kind": "gated_mlp", "hidden_size": 8}, **layers["layer"]["modules"]}
    model = {**tiny.MODEL, "layers": {**layers, "layer": {**layers["layer"], "modules": modules}}}
    training = {**tiny.TRAINING, "updates": 4, "warmup": 1, "budget": {"target": 0.4}}
    path = tmp_path_factory.mktemp("spec") / "spec.yaml"
    path.write_text(
        yaml.safe_dump({**tiny.EXPERIMENT, "model": model, "training": training, "threads": 1}, sort_keys=False),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the data is kept between runs."""
    return tmp_path_factory.mktemp("cache")


def _main(*arguments):
    return router_table.main([*map(str, arguments), "--no-progress", "--accelerator", "cpu"])


@pytest.fixture(scope="module")
def done(spec, cache, tmp_path_factory):
    """Folder and summary of a finished table of two routers and one column, with several seeds."""
    out = tmp_path_factory.mktemp("table") / "out"
    chosen = ["--only", "sma+budget, never", "--modules", "mlp", "--jobs", 1]
    assert _main("--spec", spec, "--data", cache, "--out", out, *chosen) == 0
    return out, json.loads((out / SUMMARY).read_text())


def _runs(out):
    """Folders of finished runs, and the time at which each run ended."""
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in out.glob(f"*/*/{SUMMARY}")}


def test_grid_has_every_router_with_every_column_and_more_seeds_for_four():
    spec = load_experiment(PRESET)
    assert columns(spec) == ["gau", "gated_mlp", "conv", "mixed"]
    assert [layer.modules["conv"].kernel_size for layer in spec.model.layer_specs] == [5] * 3
    assert len(ALL) == len({run.name for run in ALL}) == 108
    assert Counter(run.seed for run in ALL) == {0: 100, 1: 4, 2: 4}
    assert {(run.column, run.variant) for run in ALL if not run.seed} == {
        (column, row) for column in columns(spec) for row in ROUTERS
    }
    assert {(run.column, run.variant) for run in ALL if run.seed} == {("gau", router) for router in REPEATED}


def test_requested_seeds_apply_to_every_run():
    runs = grid(load_experiment(PRESET, ["seed=5"]), 2)
    assert len({run.name for run in runs}) == 200
    assert {run.seed for run in runs} == {run.experiment.seed for run in runs} == {5, 6}
    assert len(grid(load_experiment(PRESET), 1)) == 100


@pytest.mark.parametrize("run", [pytest.param(run, id=run.name) for run in ALL])
def test_every_run_builds_and_differs_only_in_modules_routers_and_seed(run):
    base, spec = load_experiment(PRESET), run.experiment
    model = build(spec.model, seed=spec.seed)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.model.num_parameters()
    layers = spec.model.layer_specs
    names = {"gau", "gated_mlp", "conv"} if run.column == "mixed" else {run.column}
    assert [set(layer.modules) for layer in layers] == [names] * 3
    kind, _, option = run.variant.removesuffix("+budget").partition("-")
    assert {layer.router.kind for layer in layers} == {kind}
    assert spec.model.shared_router == (option == "shared")
    for field, value in OPTIONS.get(option, {}).items():
        assert {getattr(layer.router, field) for layer in layers} == {value}
    kept = tuple(
        mine.replace(router=own.router, modules=own.modules)
        for mine, own in zip(layers, base.model.layer_specs, strict=True)
    )
    assert spec.model.replace(layers=kept, shared_router=False) == base.model.replace(layers=base.model.layer_specs)
    steered = base.training if run.variant.endswith("+budget") else base.training.replace(budget=None)
    if run.variant.startswith(("bernoulli", "explore-policy")):
        assert spec.training.losses.policy == 1
        slow = spec.training.router_learning_rate
        assert slow is not None
        assert slow < spec.training.learning_rate
        steered = steered.replace(losses=spec.training.losses, router_learning_rate=slow)
    assert spec == base.replace(model=spec.model, seed=run.seed, training=steered)
    if spec.training.budget is not None:  # the budget can steer every router
        assert len(BudgetController.of(model, spec.training.budget).steered) == 3 * len(names)


def test_rows_with_a_fixed_rate_use_the_rate_of_the_budget():
    base = load_experiment(PRESET, ["training.budget.target=0.25"])
    layers = {router: router_experiment(base, "gau", router, 2).model.layer_specs for router in ROUTERS}
    assert (
        [layer.router.share for layer in layers["expert_choice"]]
        == [layer.router.rate for layer in layers["random"]]
        == [0.25] * 3
    )
    assert (layers["top_k+budget"][0].router.k, layers["top_k+budget"][0].router.skips) == (1, 1)


@pytest.mark.parametrize("task", ["pathfinder", "recall", "mqar"])
def test_other_tasks_have_every_router_that_their_models_support(task):
    base = load_experiment(router_table.Options.model_validate({"task": task}).name)
    runs = {run.variant: run.experiment for run in grid(base, 1)}
    assert set(ROUTERS) - set(runs) == ({"expert_choice"} if task != "pathfinder" else set())
    for row, spec in runs.items():
        policy = row.startswith(("bernoulli", "explore-policy"))
        assert (spec.training.losses.policy, spec.training.router_learning_rate is not None) == (policy, policy)
        build(spec.model, seed=0)
    plain = {layer.router for layer in runs["sma"].model.layer_specs}
    assert plain == {SMARouterSpec(temperature_scale=1.0)}


def test_every_layer_and_run_has_its_own_random_seed():
    base = load_experiment(PRESET)
    specs = [router_experiment(base, "gau", "random", seed) for seed in (0, 1, 2, 2**31 - 1)]
    assert len({layer.router.seed for spec in specs for layer in spec.model.layer_specs}) == 12


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        pytest.param(
            ["training.budget=null"],
            "the table needs one target rate .* set training.budget.target to a number",
            id="no-budget",
        ),
        pytest.param(["training.budget.target={gau: 0.3}"], "the table needs one target rate", id="budget-by-name"),
    ],
)
def test_experiment_without_one_rate_is_refused(settings, complaint):
    with pytest.raises(SpecError, match=complaint):
        router_experiment(load_experiment(PRESET, settings), "gau", "sma", 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(
            ["--only", "sma,alway"],
            "error: unknown router 'alway'; did you mean 'always'? routers: sma, sma+budget",
            id="router",
        ),
        pytest.param(
            ["--modules", "gau,con"],
            "error: unknown column 'con'; did you mean 'conv'? columns: gau, gated_mlp",
            id="column",
        ),
        pytest.param(["--jobs", "0"], "error: --jobs='0': input should be greater than or equal to 1", id="jobs"),
        pytest.param(
            ["--resume", "nowhere"], "error: there is no study in 'nowhere': study.json is missing", id="resume"
        ),
        pytest.param(["--set", "training.budget=null"], "error: the table needs one target rate", id="budget"),
        pytest.param(
            ["--set", "layers.layer.modules={}"],
            "error: the table needs an experiment whose layers have sub-modules",
            id="none",
        ),
    ],
)
def test_wrong_option_gives_an_error_message_and_exit_code_2(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _main(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(complaint)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_summary_holds_the_numbers_of_the_runs(done):
    out, summary = done
    assert {row["name"] for row in summary["rows"]} == set(_runs(out))
    assert set(_runs(out)) == {"mlp/sma+budget-0", "mlp/sma+budget-1", "mlp/sma+budget-2", "mlp/never-0"}
    assert (summary["seeds"], summary["updates"], summary["jobs"], summary["failed"]) == ([0, 1, 2], 4, 1, [])
    assert 0 < sum(run["seconds"] for run in summary["rows"]) <= summary["seconds"] + 0.1 * len(summary["rows"])
    for run in summary["rows"]:
        folder = out / run["column"] / f"{run['variant']}-{run['seed']}"
        own = json.loads((folder / SUMMARY).read_text())
        assert (run["accuracy"], run["rates"]) == (own["test_accuracy"], own["activation_rates"])
        assert (run["tokens_per_second"], run["seed"]) == (own["tokens_per_second"], own["seed"])
        assert {key: summary[key] for key in ("commit", "hardware", "date")} == {
            k: str(own[k]) for k in ("commit", "hardware", "date")
        }
        model = load_experiment(folder / EXPERIMENT).model
        assert run["macs_per_token"] == count_macs(model, summary["length"], run["rates"]).per_token


def test_table_holds_the_numbers_of_the_summary(done):
    out, summary = done
    text = (out / "table.md").read_text()
    assert text == markdown(table_of(summary))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    for run in summary["rows"]:
        rates = " / ".join(f"{100 * rates['mlp']:.0f}" for rates in run["rates"])
        row = [
            run["variant"],
            f"{run['accuracy']:.1%}",
            rates,
            f"{run['macs_per_token']:,.0f}",
            f"{run['tokens_per_second']:,}",
        ]
        assert (row in rows) == (run["seed"] == 0)
    accuracies = [100 * run["accuracy"] for run in summary["rows"] if run["variant"] == "sma+budget"]
    spread = f"{statistics.mean(accuracies):.1f}% ({min(accuracies):.1f} to {max(accuracies):.1f})"
    assert [row[:3] for row in rows if "to" in row[2]] == [["sma+budget", "3", spread]]
    assert "tokens/s: in training, without evaluation; one run at a time." in text


def test_csv_values_equal_the_summary(done):
    out, summary = done
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], int(row["seed"]), float(row["accuracy"])) for row in rows] == [
        (run["variant"], run["seed"], run["accuracy"]) for run in summary["rows"]
    ]
    assert [float(row["rate/layer1/mlp"]) for row in rows] == [run["rates"][1]["mlp"] for run in summary["rows"]]


def test_mixed_layers_have_a_rate_for_every_module_and_the_caption_states_parallel_runs(done):
    run = {**done[1]["rows"][0], "column": "mixed", "rates": [{"a": 0.25, "b": 1.0}, {"a": 0.5}]}
    failed = {
        "name": "mixed/random-0",
        "column": "mixed",
        "variant": "random",
        "seed": 0,
        "error": "MemoryError: all of it",
    }
    summary = {**done[1], "rows": [run], "failed": [failed], "jobs": 2}
    assert "| a 25 / 50, b 100 |" in markdown(table_of(summary))
    assert "**failed**\n\n- mixed/random-0: MemoryError: all of it" in markdown(table_of(summary))
    assert "each run beside 1 other, so not comparable" in markdown(table_of(summary))
    first, second = csv.DictReader(comma_separated(table_of(summary)).splitlines())
    assert (first["rate/layer0/b"], first.get("rate/layer1/b"), first["error"]) == ("1.0", None, "")
    assert (second["variant"], second["accuracy"], second["error"]) == ("random", "", "MemoryError: all of it")


def test_seeds_are_compared_with_those_of_the_dense_variant_and_extreme_rates_are_counted(done):
    found = {
        "always": ([0.9, 0.8, 0.85], [1.0, 1.0]),
        "sma": ([0.95, 0.84, 0.86], [0.009, 0.991]),
        "never": ([0.5, 0.5, 0.5], [0.0, 0.01]),
    }
    rows = [
        {**done[1]["rows"][0], "variant": variant, "seed": seed, "accuracy": value, "rates": [{"a": r} for r in rates]}
        for variant, (accuracies, rates) in found.items()
        for seed, value in enumerate(accuracies)
    ]
    table = markdown(table_of({**done[1], "rows": rows}))
    several = table.split("several seeds", 1)[1]
    cells = {
        line.split("|")[1].strip(): [each.strip() for each in line.split("|")[4::3]]
        for line in several.splitlines()[4:7]
    }
    # The differences 5, 4 and 1 have the mean 10/3 and the variance 13/3; the quantile is 4.3027.
    half = 4.302652729749464 * (13 / 3 / 3) ** 0.5
    assert cells["sma"] == [f"{10 / 3:+.1f} ± {half:.1f}", "3, 3 of 6"]
    assert cells["always"] == ["-", "0, 6 of 6"]
    assert cells["never"][1] == "3, 0 of 6"
    without = markdown(table_of({**done[1], "rows": [row for row in rows if row["variant"] != "always"]}))
    assert "minus" not in without
    assert "dead, saturated" in without


def test_finished_runs_are_not_repeated(done, cache, monkeypatch, capsys):
    out, summary = done
    before = _runs(out)
    with monkeypatch.context() as patch:
        patch.setattr(training, "run_experiment", None)
        assert _main("--resume", out, "--data", cache, "--jobs", 2) == 0
    assert "4 runs, 0 to do, 2 at a time" in capsys.readouterr().out
    assert json.loads((out / SUMMARY).read_text())["rows"] == summary["rows"]
    assert json.loads((out / SUMMARY).read_text())["jobs"] == 1  # no two runs were parallel
    assert _main("--resume", out, "--set", "training.updates=5") == 2
    assert "--resume continues the study as it was; leave --set out, or start a new study" in capsys.readouterr().err
    assert _runs(out) == before


def test_failed_run_is_named_and_retried(spec, cache, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    chosen = ["--only", "expert_choice,always", "--modules", "attention", "--jobs", 1]
    with monkeypatch.context() as patch:
        tiny.before_update(
            patch, 2, lambda classifier: tiny.fail(classifier) if "Choice" in repr(classifier.model) else None
        )
        assert _main("--spec", spec, "--data", cache, "--out", out, *chosen) == 2
    said = capsys.readouterr()
    assert "[1/2] attention/expert_choice-0: failed: RuntimeError: the power went out\n" in said.out
    assert re.search(r"\[2/2\] attention/always-0: accuracy \d+\.\d% after \d+ s\n", said.out)
    assert (
        "error: 1 run failed: attention/expert_choice-0; error.txt in the folder of each holds the reason" in said.err
    )
    how = f"--accelerator cpu --data {cache} --jobs 1 --no-progress"
    assert f"and python -m sma.recipes.router_table --resume {out} {how} tries again" in said.err
    folder = out / "attention" / "expert_choice-0"
    assert "Traceback (most recent call last)" in (folder / "log.txt").read_text()
    assert json.loads((out / SUMMARY).read_text())["failed"] == [
        {
            "name": "attention/expert_choice-0",
            "column": "attention",
            "variant": "expert_choice",
            "seed": 0,
            "error": "RuntimeError: the power went out",
        }
    ]
    first = _runs(out)
    assert _main("--resume", out, "--data", cache, "--jobs", 1) == 0
    summary = json.loads((out / SUMMARY).read_text())
    assert [run["variant"] for run in summary["rows"]] == ["expert_choice", "always"]
    assert summary["failed"] == []
    assert _runs(out)["attention/always-0"] == first["attention/always-0"]


def test_run_of_another_experiment_is_refused(done, spec, cache, capsys):
    out, _ = done
    path = out / "mlp" / "never-0" / EXPERIMENT
    text = path.read_text()
    path.write_text(text.replace("updates: 4", "updates: 5"))
    assert _main("--resume", out, "--data", cache) == 2
    path.write_text(text)
    complaint = capsys.readouterr().err
    assert (
        "never-0/experiment.yaml' belongs to another experiment: training.updates is 5 there, and 4 is requested; give"
        in complaint
    )


@pytest.mark.slow
def test_parallel_runs_give_the_results_of_sequential_runs(done, spec, cache, tmp_path, capfd):
    out = tmp_path / "out"
    broken = out / "mlp" / "never-0" / "checkpoints" / "last.ckpt"
    assert (
        _main("--spec", spec, "--data", cache, "--out", out, "--only", "never", "--modules", "attention", "--jobs", 1)
        == 0
    )
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    chosen = ["--only", "sma+budget,never", "--modules", "mlp"]
    assert _main("--resume", out, "--data", cache, *chosen, "--jobs", 2) == 2
    assert "mlp/never-0: failed: " in capfd.readouterr().out
    summary = json.loads((out / SUMMARY).read_text())
    timed = {"tokens_per_second", "seconds"}
    mine, own = (
        [
            {key: value for key, value in run.items() if key not in timed}
            for run in runs
            if run["variant"] == "sma+budget"
        ]
        for runs in (summary["rows"], done[1]["rows"])
    )
    assert mine == own
    assert summary["jobs"] == 2
    assert "Traceback" in (broken.parents[1] / "log.txt").read_text()
