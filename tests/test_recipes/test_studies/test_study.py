"""Behaviour shared by all studies: options, folders, and folders of earlier versions."""

import json
from functools import partial

import pytest
import yaml

import sma.recipes.tasks.kinds  # registers the tasks
import sma.spec
from sma.__main__ import main as report
from sma.recipes import compare, recall, routed_conv, routed_mlp, router_table
from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import SUMMARY
from sma.recipes.studies import comparison, study
from sma.recipes.studies.folder import STUDY
from sma.recipes.studies.grid import run_grid
from sma.spec import dump_yaml
from tests.test_recipes import fake, tiny
from tests.test_recipes.regression import LENGTH, RowMeanTask

pytestmark = pytest.mark.slow  # real trainings

SETTINGS = {"seeds": 1, "minutes": None, "length": 64}


@pytest.fixture
def spec(tmp_path):
    """An experiment that suits every study, as a file."""
    training = {**tiny.TRAINING, "updates": 6, "budget": {"target": 0.4, "hold": 1, "anneal": 1}}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**tiny.EXPERIMENT, "training": training}), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _without_training(monkeypatch):
    cost = {"milliseconds": 1.0, "megabytes": 1.0}
    monkeypatch.setattr(study, "run_grid", partial(run_grid, trainer=fake.train))
    monkeypatch.setattr(comparison, "efficiency", lambda *_, **__: {"inference": cost, "training": cost})


@pytest.fixture(params=["compare", "router_table", "routed_mlp", "routed_conv"])
def command(request, tmp_path):
    """A command with its data folder, and two of its variants."""
    recipe, variants = {
        "compare": (compare, ("seqboat", "ema")),
        "router_table": (router_table, ("sma", "always")),
        "routed_mlp": (routed_mlp, ("routed", "never")),
        "routed_conv": (routed_conv, ("always", "never")),
    }[request.param]

    def call(*arguments):
        return recipe.main([*map(str, arguments), "--no-progress", "--data", str(tmp_path / "data"), "--jobs", "1"])

    return call, variants


def _variants(out):
    return list(dict.fromkeys(row["variant"] for row in json.loads((out / SUMMARY).read_text())["rows"]))


@pytest.mark.parametrize("option", ["--variants", "--arms", "--models", "--only"])
def test_variants_are_selected_under_every_former_name_of_the_option(command, spec, tmp_path, option):
    call, (first, _) = command
    assert call("--spec", spec, "--out", tmp_path / "out", option, first) == 0
    assert _variants(tmp_path / "out") == [first]


def test_variant_that_is_named_twice_is_trained_once(command, spec, tmp_path):
    call, (first, second) = command
    assert call("--spec", spec, "--out", tmp_path / "out", "--variants", f"{first}, {second},{first}") == 0
    assert set(_variants(tmp_path / "out")) == {first, second}
    for run in json.loads((tmp_path / "out" / SUMMARY).read_text())["rows"]:
        assert fake.trainings(tmp_path / "out" / run["name"]) == 1


def test_models_are_compared_by_the_metric_of_a_third_party_task(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sma.spec._registry["task"], "row_mean", RowMeanTask)
    monkeypatch.setattr(study, "run_grid", run_grid)
    model = {**tiny.MODEL, "encoder": {"kind": "real_number"}, "head": {"kind": "mean_pool_linear", "classes": 1}}
    experiment = {"task": {"kind": "row_mean"}, "model": model, "training": tiny.TRAINING, "threads": 1}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    out = tmp_path / "out"
    command = ["--spec", tmp_path / "spec.yaml", "--variants", "transformer,seqboat", "--minutes", "0.001"]
    here = ["--out", out, "--accelerator", "cpu", "--no-progress"]
    assert compare.main([*map(str, [*command, *here])]) == 0, capsys.readouterr().err
    summary = json.loads((out / SUMMARY).read_text())
    errors = {row["variant"]: json.loads((out / row["name"] / SUMMARY).read_text())["error"] for row in summary["rows"]}
    assert {row["variant"]: row["squared_error"] for row in summary["rows"]} == errors
    assert (summary["metric"], summary["length"]) == ({**RowMeanTask.metric._asdict()}, LENGTH)
    table = (out / "table.md").read_text()
    assert table.startswith("| model | squared error | parameters |")
    assert f"| seqboat | {errors['seqboat']:.3f} |" in table
    assert "64 test samples. A lower squared error is better. Training time" in table
    assert f"seqboat-0: {errors['seqboat']:.3f} squared error after" in capsys.readouterr().out


def test_study_of_recall_refuses_a_task_without_an_accuracy(tmp_path, capsys):
    (tmp_path / "language.yaml").write_text(dump_yaml(load_experiment("language_tiny")), encoding="utf-8")
    assert recall.main(["--spec", str(tmp_path / "language.yaml"), "--out", str(tmp_path / "out")]) == 2
    complaint = (
        "the metric of the task 'language' is 'bits_per_character', and the study of recall compares accuracies; "
    )
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_environment_variables_without_the_prefix_are_ignored(command, spec, tmp_path, monkeypatch):
    call, (first, second) = command
    monkeypatch.setenv("MODELS", "nothing")
    monkeypatch.setenv("SMA_VARIANTS", second)
    assert call("--spec", spec, "--out", tmp_path / "out") == 0
    assert _variants(tmp_path / "out") == [second]


def test_error_for_a_misspelt_variant_suggests_a_near_one(command, spec, tmp_path, capsys):
    call, (first, _) = command
    assert call("--spec", spec, "--out", tmp_path / "out", "--variants", f"{first}s") == 2
    assert f"'{first}s'; did you mean '{first}'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resumed_study_trains_further_variants_and_remembers_them(command, spec, tmp_path, capsys):
    call, (first, second) = command
    out = tmp_path / "out"
    assert call("--spec", spec, "--out", out, "--variants", first) == 0
    assert call("--resume", out, "--variants", second) == 0
    assert set(_variants(out)) == {first, second}
    for run in json.loads((out / SUMMARY).read_text())["rows"]:
        assert fake.trainings(out / run["name"]) == 1
    capsys.readouterr()
    assert call("--resume", out) == 0
    assert ", 0 to do" in capsys.readouterr().out
    assert set(json.loads((out / STUDY).read_text())["variants"]) == {first, second}


def test_resumed_study_refuses_all_options_that_would_change_it_in_one_message(command, spec, tmp_path, capsys):
    call, (first, _) = command
    out = tmp_path / "out"
    assert call("--spec", spec, "--out", out, "--variants", first) == 0
    capsys.readouterr()
    assert call("--resume", out, "--seeds", 2, "--seed", 3, "--set", "training.updates=9") == 2
    assert capsys.readouterr().err == (
        "error: --resume continues the study as it was; leave --set, --seed, --seeds out, or start a new study\n"
    )


def test_report_rewrites_tables_and_figures_without_training(command, spec, tmp_path, capsys):
    call, (first, second) = command
    out, data = tmp_path / "out", ["--data", str(tmp_path / "data"), "--no-progress"]
    assert call("--spec", spec, "--out", out, "--variants", f"{first},{second}", "--seeds", "2") == 0
    written = [path for path in out.iterdir() if path.suffix in (".md", ".csv", ".png")]
    before = {path: path.read_bytes() for path in [*written, out / SUMMARY]}
    shown = capsys.readouterr().out.partition("\n\n")[2]
    for path in written:
        path.unlink()
    assert report(["report", str(out), *data]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert shown.endswith(capsys.readouterr().out.lstrip())
    assert {fake.trainings(out / row["name"]) for row in json.loads((out / SUMMARY).read_text())["rows"]} == {1}
    assert report(["report", str(out), *data, "--accelerator", "cpu"]) == 2
    assert "the report of a study needs no training and no test; leave --accelerator out\n" in capsys.readouterr().err


def test_error_for_an_unknown_study_lists_the_known_ones(tmp_path, capsys):
    (tmp_path / STUDY).write_text('{"study": "comparision"}')
    assert report(["report", str(tmp_path)]) == 2
    assert (
        "belongs to an unknown study 'comparision'; did you mean 'compare'? studies: compare, "
        in capsys.readouterr().err
    )


def test_auto_resume_repeats_a_command_and_refuses_another(command, spec, tmp_path, capsys):
    call, (first, _) = command
    out = tmp_path / "out"
    for _time in range(2):
        assert call("--spec", spec, "--out", out, "--variants", first, "--seeds", 2, "--auto-resume") == 0
    assert ", 0 to do" in capsys.readouterr().out
    assert call("--spec", spec, "--out", out, "--variants", first, "--seeds", 3, "--auto-resume") == 2
    assert "holds another study: seeds is 2 there, and 3 is requested; give another --out" in capsys.readouterr().err
    changed = ["--spec", spec, "--set", "training.updates=9", "--seeds", 2]
    assert call(*changed, "--out", out, "--auto-resume") == 2
    assert "belongs to another experiment: training.updates is 6 there" in capsys.readouterr().err


OLDER = {
    "compare": ("compared.json", lambda names: {"models": [*names], **SETTINGS}),
    "router_table": ("chosen.json", lambda names: {"routers": [*names], "modules": ["attention"]}),
    "routed_mlp": ("arms.json", list),
    "routed_conv": ("arms.json", list),
}


@pytest.mark.parametrize("way", ["--resume", "--auto-resume"])
def test_folder_of_an_earlier_version_is_resumed(request, command, spec, tmp_path, capsys, way):
    call, (first, second) = command
    name = request.node.callspec.params["command"]
    out = tmp_path / "out"
    asked = ["--spec", spec, "--variants", first, *(["--length", 64] if name == "compare" else [])]
    assert call(*asked, "--out", out) == 0
    (out / STUDY).unlink()
    file, older = OLDER[name]
    (out / file).write_text(json.dumps(older([first])))
    (out / SUMMARY).write_text(json.dumps({"models": {}, "runs": []}))
    assert report(["report", str(out), "--data", str(tmp_path / "data"), "--no-progress"]) == 0
    assert _variants(out) == [first]
    capsys.readouterr()
    assert call(*([way, out] if way == "--resume" else [*asked, "--out", out, way])) == 0
    assert ", 0 to do" in capsys.readouterr().out
    assert _variants(out) == [first]
    assert call("--resume", out, "--variants", second) == 0
    assert set(json.loads((out / STUDY).read_text())["variants"]) == {first, second}
    (out / STUDY).unlink()
    (out / file).write_text(json.dumps({"what": 1}))
    assert call("--resume", out) == 2
    assert f"out/{file}'" in (said := capsys.readouterr().err)
    assert "start a new study" in said


def test_folder_of_another_study_is_refused(command, spec, tmp_path, capsys):
    call, (first, _) = command
    out = tmp_path / "out"
    assert call("--spec", spec, "--out", out, "--variants", first) == 0
    found = json.loads((out / STUDY).read_text())
    (out / STUDY).write_text(json.dumps({**found, "study": "another"}))
    assert call("--resume", out) == 2
    assert "belongs to the study 'another', not to " in (said := capsys.readouterr().err)
    assert "resume it with the command that began it" in said
    (out / STUDY).write_text(json.dumps({**found, "variants": ["nothing"]}))
    assert call("--resume", out) == 2
    assert ", 'nothing'; start a new study" in capsys.readouterr().err


def test_time_is_the_sum_over_all_commands(command, spec, tmp_path):
    call, (first, second) = command
    out = tmp_path / "out"
    assert call("--spec", spec, "--out", out, "--variants", first) == 0
    summary = json.loads((out / SUMMARY).read_text())
    (out / SUMMARY).write_text(json.dumps({**summary, "seconds": 1000.0, "jobs": 3}))
    assert call("--resume", out, "--variants", second) == 0
    again = json.loads((out / SUMMARY).read_text())
    assert (again["seconds"] >= 1000, again["jobs"]) == (True, 3)


def test_error_names_a_damaged_summary(command, spec, tmp_path, capsys):
    call, (first, _) = command
    out = tmp_path / "out"
    assert call("--spec", spec, "--out", out, "--variants", first) == 0
    (out / SUMMARY).write_text(json.dumps({"seconds": "many"}))
    assert call("--resume", out) == 2
    complaint = "does not hold the summary of a study; delete it to restart the count of time"
    assert complaint in capsys.readouterr().err
