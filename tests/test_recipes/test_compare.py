"""SeqBoat beside its baselines: what they are made of, the runs, the table, and what it refuses."""

import csv
import json

import pytest
import torch

from sma.errors import CheckpointError, SpecError
from sma.ragged import rectangular
from sma.recipes.baselines import BASELINES, baseline
from sma.recipes.compare import main, with_updates
from sma.recipes.compare_report import comma_separated, markdown, markdown_of_several
from sma.recipes.efficiency import efficiency, random_rows
from sma.recipes.experiment import load_experiment
from tests.test_recipes.tiny import EXPERIMENT, tiny


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("preset", ["listops_tiny", "text_paper", "retrieval_paper", "image_paper"])
def test_baseline_builds_with_the_predicted_parameters_and_differs_in_its_layers_alone(preset, name):
    spec = load_experiment(preset)
    made = baseline(name, spec)
    assert sum(parameter.numel() for parameter in made.model.build().parameters()) == made.model.num_parameters()
    assert made.model.replace(layers=spec.model.layers) == spec.model
    training = made.training.replace(learning_rate=spec.training.learning_rate)
    assert (made.task, training, made.seed) == (spec.task, spec.training, spec.seed)
    assert load_experiment(json.loads(made.model_dump_json())) == made


def test_what_the_baselines_are():
    spec = tiny(training__budget="{target: 0.3}", training__updates=200, training__losses="{z: 0.1}")
    layers = {name: baseline(name, spec).model.layer_specs for name in BASELINES}
    assert baseline("seqboat", spec) == spec
    assert [layer.modules["attention"].window for layer in layers["seqboat_full"]] == [None, None]
    assert [(layer.router.kind, layer.modules["attention"].window) for layer in layers["mega_chunk"]] == [("always", 8)] * 2
    assert {layer.modules["attention"].kind for layer in layers["mega_chunk"]} == {"chunked_gau"}
    assert [(layer.backbone.kind, dict(layer.modules)) for layer in layers["ema"]] == [("ema", {})] * 2
    assert [(layer.backbone.kind, dict(layer.modules)) for layer in layers["s4d"]] == [("s4d", {})] * 2
    assert [layer.backbone.kind for layer in layers["transformer"]] == ["attention", "gated_mlp"] * 2
    assert [layer.backbone.kind for layer in layers["local_attention"]] == ["local_attention", "gated_mlp"] * 2
    for name in set(BASELINES) - {"seqboat", "seqboat_full"}:  # nothing is left that only a router learns from
        training = baseline(name, spec).training
        assert (training.budget, training.losses.z) == (None, 0.0)


def test_mega_chunk_is_the_always_active_unit_inside_fixed_chunks():
    spec = tiny()
    model = baseline("mega_chunk", spec).model.build().eval()
    unit = model.routed_layers[0].routed.submodules["attention"]
    x = torch.randn(1, 20, 8)
    whole = unit(rectangular(x))[0]
    parts = torch.cat([unit.unit(rectangular(x[:, start : start + 8]))[0] for start in (0, 8, 16)])
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("transfomer", [], "unknown model 'transfomer'; did you mean 'transformer'"),
        ("ema", ["layers.layer.modules={mlp: {kind: gated_mlp, hidden_size: 4}}"], "layer 0 of the experiment must be a SeqBoat layer"),
        ("ema", ["layers.layer.backbone=null"], "layer 0 of the experiment must be a SeqBoat layer"),
    ],
)
def test_what_cannot_be_made_is_refused(name, settings, complaint):
    with pytest.raises(SpecError, match=complaint):
        baseline(name, load_experiment(EXPERIMENT, settings))


def test_other_updates_keep_the_shares_of_warm_up_evaluation_and_budget():
    spec = tiny(
        training__updates=100, training__warmup=10, training__evaluate_every=20, training__budget="{target: 0.3, hold: 20, anneal: 40}"
    )
    training = with_updates(spec, 50).training
    assert (training.updates, training.warmup, training.evaluate_every) == (50, 5, 10)
    assert (training.budget.hold, training.budget.anneal) == (10, 20)


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "tiny.json"
    path.write_text(json.dumps({**EXPERIMENT, "training": {**EXPERIMENT["training"], "updates": 6, "evaluate_every": 3}, "threads": 1}))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory, experiment_file):
    """A finished comparison of three models, one of them with two seeds' worth of runs."""
    out = tmp_path_factory.mktemp("compared") / "out"
    asked = ["--spec", str(experiment_file), "--models", "transformer,mega_chunk,seqboat", "--seeds", "2", "--length", "64"]
    code = main([*asked, "--no-progress", "--out", str(out), "--data", str(out.parent / "data"), "--accelerator", "cpu"])
    assert code == 0
    return out


@pytest.mark.slow
def test_table_says_what_the_runs_say(compared):
    summary = json.loads((compared / "summary.json").read_text())
    assert list(summary["models"]) == ["transformer", "mega_chunk", "seqboat"]
    for name, row in summary["models"].items():
        assert row["seeds"] == [0, 1]
        for seed in (0, 1):
            run = json.loads((compared / f"{name}-{seed}" / "summary.json").read_text())
            assert (row["accuracy"][seed], row["parameters"]) == (run["test_accuracy"], run["parameters"])
        assert {"milliseconds", "megabytes"} == set(row["inference"]) == set(row["training"])
        assert row["inference"]["milliseconds"] > 0
    assert [row["activation_rate"][0] for row in summary["models"].values()][:2] == [None, 1.0]
    table = (compared / "table.md").read_text()
    assert table == markdown(summary)
    assert "| transformer | " in table
    assert table.splitlines()[2].count("1.00x") >= 2  # of so short rows the memory is nothing that could be compared
    rows = list(csv.DictReader((compared / "table.csv").read_text().splitlines()))
    assert (compared / "table.csv").read_text() == comma_separated(summary)
    assert [(row["model"], row["seed"]) for row in rows] == [(name, seed) for name in summary["models"] for seed in "01"]


@pytest.mark.slow
def test_table_of_several_tasks_has_a_column_for_each(compared):
    summary = json.loads((compared / "summary.json").read_text())
    fewer = {**summary, "models": {"seqboat": summary["models"]["seqboat"]}}
    lines = markdown_of_several({"listops": summary, "digits": fewer}).splitlines()
    assert lines[0] == "| accuracy | listops | digits |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| transformer", "| mega_chunk", "| seqboat"]
    assert lines[2].endswith("| - |")
    assert markdown(summary).rstrip() in "\n".join(lines)


@pytest.mark.slow
def test_resumed_comparison_trains_what_is_missing_and_nothing_else(compared, capsys):
    before = (compared / "seqboat-0" / "summary.json").stat().st_mtime_ns
    (compared / "seqboat-1" / "summary.json").unlink()
    accuracy = json.loads((compared / "summary.json").read_text())["models"]["seqboat"]["accuracy"]
    assert main(["--resume", str(compared), "--no-progress", "--data", str(compared.parent / "data"), "--accelerator", "cpu"]) == 0
    assert "6 runs, 1 to do" in capsys.readouterr().out
    assert (compared / "seqboat-0" / "summary.json").stat().st_mtime_ns == before
    assert json.loads((compared / "summary.json").read_text())["models"]["seqboat"]["accuracy"] == accuracy


def test_bad_command_lines_are_sentences(tmp_path, capsys, experiment_file):
    assert main(["--spec", str(experiment_file), "--models", "seqbot", "--out", str(tmp_path / "a")]) == 2
    assert "unknown model 'seqbot'; did you mean 'seqboat'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["--resume", str(tmp_path)]) == 2
    assert "there is no comparison in" in capsys.readouterr().err
    assert main(["--task", "digits,listop"]) == 2
    assert "unknown task 'listop'; did you mean 'listops'" in capsys.readouterr().err


def test_efficiency_of_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no finished run in"):
        efficiency(tmp_path, 16)


@pytest.mark.parametrize("preset", ["listops_tiny", "image_paper", "retrieval_paper"])
def test_random_rows_fit_the_model(preset):
    model = load_experiment(preset, ["layers.repeat=1"]).model.build()
    rows = random_rows(model, 1, 32)
    assert model(rows).logits.shape[0] == 1
