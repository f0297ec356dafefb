"""Recipes of routed modules: rejected options, variants, and extended studies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sma.recipes import routed_conv, routed_mlp
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.studies.routed import VARIANTS, Routed
from tests.test_recipes.tiny import EXPERIMENT, TRAINING, tiny

pytestmark = pytest.mark.slow  # real trainings

ROOT = Path(__file__).resolve().parents[2]
PRESETS = [f"{task}_routed_{what}_tiny" for task in ("listops", "digits") for what in ("mlp", "conv")]


@pytest.fixture
def spec(tmp_path):
    """A short experiment as a file."""
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, "training": {**TRAINING, "updates": 6}}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the data is kept between runs."""
    return tmp_path_factory.mktemp("cache")


def _main(*arguments):
    return routed_mlp.main([*map(str, arguments), "--no-progress"])


@pytest.mark.parametrize("name", ["routed_mlp", "routed_conv"])
def test_help_imports_no_slow_package(name):
    command = [sys.executable, "-X", "importtime", f"recipes/{name}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0
    assert all(
        f"--{option}" in done.stdout
        for option in ("task", "preset", "router", "variants", "seeds", "jobs", "set", "seed", "out", "resume", "data")
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert imported & {"lightning", "torchmetrics", "matplotlib", "tensorboard", "sklearn"} == set()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(
            ["--task", "digit"],
            "error: --task: unknown choice 'digit'; did you mean 'digits'? choices: listops, digits",
            id="task",
        ),
        pytest.param(
            ["--arms", "routed,alway"],
            "error: unknown variant 'alway'; did you mean 'always'? variants: routed, expert_choice",
            id="variant",
        ),
        pytest.param(
            ["--router", "sna"],
            "error: unknown router kind 'sna'; did you mean 'sma'? known kinds: always, ",
            id="router",
        ),
        pytest.param(
            ["--router", "{kind: sma, tau: 1}"], "error: SMARouterSpec: unknown field 'tau'", id="router-field"
        ),
        pytest.param(["--router", "{kind: "], "error: the value of --router is not valid YAML", id="router-yaml"),
        pytest.param(
            ["--resume", "nowhere"], "error: there is no study in 'nowhere': study.json is missing", id="resume"
        ),
        pytest.param(["--set", "training.updats=3"], "error: unknown field path 'training.updats'", id="set"),
    ],
)
def test_wrong_option_gives_an_error_message_and_exit_code_2(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _main(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(complaint)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def _variants(spec, rates):
    """The variants of an experiment, as if `routed` had run at these rates."""
    made = Routed().variants(spec)
    return {name: each if isinstance(each, ExperimentSpec) else each.make(rates) for name, each in made.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_variants_have_equal_width_depth_training_and_task(preset):
    spec = load_experiment(preset)
    variants = _variants(spec, [0.3 for layer in spec.model.layer_specs if layer.modules])
    assert tuple(variants) == VARIANTS
    for name, variant in variants.items():
        assert (variant.task, variant.seed, variant.threads, variant.model.width) == (
            spec.task,
            spec.seed,
            spec.threads,
            spec.model.width,
        )
        assert variant.training.replace(budget=None) == spec.training.replace(budget=None)
        for mine, own in zip(variant.model.layer_specs, spec.model.layer_specs, strict=True):
            assert mine.replace(router=own.router) == own
            assert not own.modules or mine.router.kind == ("sma" if name == "routed" else name)


def test_controls_run_at_the_rate_of_the_routed_variant_layer_by_layer():
    variants = _variants(tiny(seed=5), [0.25, 0.0])
    random, choice = (variants[name].model.layer_specs for name in ("random", "expert_choice"))
    assert [layer.router.rate for layer in random] == [0.25, 0.0]
    assert [layer.router.seed for layer in random] == [5, 5]  # layers draw independently
    # A dead layer stays without its sub-module.
    assert (choice[0].router.share, choice[1].router.kind) == (0.25, "never")


def _trained(out):
    return [row["variant"] for row in json.loads((out / "summary.json").read_text())["rows"]]


def test_study_is_run_and_then_extended(spec, cache, tmp_path, capsys):
    out = tmp_path / "out"
    router = "{kind: threshold, threshold: 0.4}"
    assert _main("--spec", spec, "--data", cache, "--out", out, "--arms", "routed, never", "--router", router) == 0
    said = capsys.readouterr().out
    assert f"summary  {out / 'summary.json'}\nfigure   {out / 'comparison.png'}" in said
    assert load_experiment(out / "routed" / "experiment.yaml").model.layer_specs[0].router.threshold == 0.4
    assert _trained(out) == ["routed", "never"]
    assert (out / "routed" / "activation.png").stat().st_size > 10_000
    first = (out / "routed" / "summary.json").stat().st_mtime_ns
    # The same command trains nothing; with another variant, it trains only that one.
    assert _main("--resume", out, "--data", cache) == 0
    assert "parameters" not in capsys.readouterr().out
    assert _main("--resume", out, "--data", cache, "--variants", "random") == 0
    assert "random: " in capsys.readouterr().out
    assert (out / "routed" / "summary.json").stat().st_mtime_ns == first
    assert _trained(out) == ["routed", "never", "random"]
    assert _main("--resume", out, "--router", "always") == 2
    assert "--resume continues the study as it was; leave --router out" in capsys.readouterr().err


def test_variant_without_the_one_it_needs_fails_with_an_error_message(spec, cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert _main("--spec", spec, "--data", cache, "--out", out, "--variants", "random") == 2
    said = capsys.readouterr()
    reason = "the run needs the results of 'routed', which was not trained; train 'routed' too"
    assert f"[1/1] random: failed: SpecError: {reason}" in said.out
    assert "error: 1 run failed: random; error.txt in the folder of each holds the reason" in said.err
    assert _main("--resume", out, "--data", cache, "--variants", "routed") == 0
    assert _main("--resume", out, "--data", cache) == 0
    assert _trained(out) == ["routed", "random"]


@pytest.mark.parametrize("recipe", [routed_mlp, routed_conv], ids=["mlp", "conv"])
def test_digits_are_compared_by_both_recipes(recipe, tmp_path):
    settings = ["--set", "training.updates=4", "--set", "training.warmup=1", "--set", "training.budget=null"]
    assert recipe.main(["--task", "digits", "--out", str(tmp_path / "out"), "--no-progress", *settings]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert tuple(row["variant"] for row in summary["rows"]) == VARIANTS
    assert (tmp_path / "out" / "always" / "activation.png").stat().st_size > 10_000
