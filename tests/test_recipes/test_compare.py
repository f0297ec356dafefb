"""Comparison of SeqBoat with its baselines: runs, tables, and rejected commands."""

import csv
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sma.__main__ import main as sma_main
from sma.errors import SpecError
from sma.recipes.compare import main
from sma.recipes.reports.comparison import _means, comparison_table, tasks_table
from sma.recipes.reports.table import comma_separated, markdown
from sma.recipes.studies import comparison, folder, study
from sma.recipes.studies.comparison import updates_in, with_updates
from sma.recipes.studies.grid import ERROR, run_grid
from sma.recipes.tasks.digits import DigitsTask
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.training.classification import Classifier
from sma.recipes.training.provenance import hardware
from tests.test_recipes import fake
from tests.test_recipes.test_reports.test_table import row as table_row
from tests.test_recipes.test_reports.test_table import summary as table_summary
from tests.test_recipes.tiny import EXPERIMENT, tiny


def test_with_updates_keeps_the_proportions_of_warm_up_evaluation_and_budget():
    spec = tiny(
        training__updates=100,
        training__warmup=10,
        training__evaluate_every=20,
        training__budget="{target: 0.3, hold: 20, anneal: 40, exploration: 0.1, period: 30, until: 90}",
    )
    training = with_updates(spec, 50).training
    assert (training.updates, training.warmup, training.evaluate_every) == (50, 5, 10)
    assert (training.budget.hold, training.budget.anneal) == (10, 20)
    assert (training.budget.until, training.budget.period) == (45, 15)


@pytest.mark.parametrize("preset", ["listops", "digits", "pathfinder", "mqar", "recall"])
def test_tasks_are_named_once_with_or_without_spaces(preset):
    assert list(comparison._parts(comparison.ComparisonOptions(task=f" {preset} "))) == [preset]
    with pytest.raises(SpecError, match="names a task twice"):
        comparison._parts(comparison.ComparisonOptions(task=f"{preset}, {preset}"))


def test_varied_fields_of_the_same_name_have_their_own_folders():
    vary = ["training.budget.target=0.1", "training.losses.target=0.1", "task.data.length=64"]
    parts = comparison._parts(comparison.ComparisonOptions(vary=vary))
    assert list(parts) == ["target=0.1", "training.losses.target=0.1", "length=64"]


def test_figure_of_several_tasks_has_one_point_per_task():
    assert _means([(0, 1.0), (0, 3.0), (1, 5.0)]) == [(0, 2.0), (1, 5.0)]


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "tiny.json"
    path.write_text(
        json.dumps(
            {**EXPERIMENT, "training": {**EXPERIMENT["training"], "updates": 6, "evaluate_every": 3}, "threads": 1}
        )
    )
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory, experiment_file):
    """A finished comparison of three models with two seeds each."""
    out = tmp_path_factory.mktemp("compared") / "out"
    asked = [
        "--spec",
        str(experiment_file),
        "--models",
        "transformer,mega_chunk,seqboat",
        "--seeds",
        "2",
        "--length",
        "64",
    ]
    code = main(
        [*asked, "--no-progress", "--out", str(out), "--data", str(out.parent / "data"), "--accelerator", "cpu"]
    )
    assert code == 0
    return out


@pytest.mark.slow
def test_table_and_summary_match_the_runs(compared):
    summary = json.loads((compared / "summary.json").read_text())
    names = [f"{model}-{seed}" for model in ("transformer", "mega_chunk", "seqboat") for seed in (0, 1)]
    assert [row["name"] for row in summary["rows"]] == names
    for row in summary["rows"]:
        run = json.loads((compared / row["name"] / "summary.json").read_text())
        assert (row["accuracy"], row["parameters"]) == (run["test_accuracy"], run["parameters"])
        assert {"milliseconds", "megabytes"} == set(row["inference"]) == set(row["training"])
        assert row["measured_on"] == hardware("cpu", 1)
        assert row["inference"]["milliseconds"] > 0
    for name in ("transformer", "mega_chunk", "seqboat"):
        assert json.loads((compared / f"{name}-0" / "efficiency.json").read_text())["device"] == "cpu"
        assert not (compared / f"{name}-1" / "efficiency.json").exists()
    assert [row["activation_rate"] for row in summary["rows"]][:4] == [None, None, 1.0, 1.0]
    assert [(spread["variant"], spread["seeds"]) for spread in summary["spread"]] == [
        (name, [0, 1]) for name in ("transformer", "mega_chunk", "seqboat")
    ]
    text = (compared / "table.md").read_text()
    assert text == markdown(comparison_table(summary))
    assert "| transformer | " in text
    assert text.splitlines()[2].count("1.00x") >= 2  # rows this short use too little memory for a ratio
    rows = list(csv.DictReader((compared / "table.csv").read_text().splitlines()))
    assert (compared / "table.csv").read_text() == comma_separated(comparison_table(summary))
    assert [f"{row['variant']}-{row['seed']}" for row in rows] == names


def _row(variant, seed=0, **more):
    return table_row(variant, seed, rates=[{"gau": 0.3}], **more)


def _cost(milliseconds, megabytes):
    return {work: {"milliseconds": milliseconds, "megabytes": megabytes} for work in ("inference", "training")}


def _table(*rows):
    return comparison_table(table_summary(*rows, minutes=None, measured_length=4096))


def test_costs_are_relative_if_the_transformer_was_measured_and_the_caption_states_it():
    mine, there = _cost(5.0, 3.0), {"measured_on": "a GPU"}
    seqboat = [_row("seqboat", seed, parameters=1, **mine, **there) for seed in (0, 1)]
    relative = markdown(_table(_row("transformer", 1, **_cost(10.0, 6.0), **there), *seqboat))
    assert "| seqboat | 50.0% (50.0 to 50.0) | 1 | 30% (30 to 30) | 2.00x | 0.50x | 2.00x | 0.50x |" in relative
    assert "Speed and peak memory of one row of 4,096 random tokens on a GPU: the transformer's is 1." in relative
    failed = markdown(_table(_row("transformer"), *seqboat))
    assert "| 5 ms | 3 MB | 5 ms | 3 MB |" in failed
    assert "on a GPU: the transformer was not measured, so they are in milliseconds and megabytes." in failed
    assert "the transformer is not among the models, so they are" in markdown(_table(*seqboat))
    assert "Speed and memory are not measured yet." in markdown(_table(_row("transformer"), _row("seqboat")))


def test_csv_holds_costs_relative_to_the_transformer():
    there = {"measured_on": "a GPU"}
    seqboat = [_row("seqboat", seed, **_cost(4.0, 0.0), **there) for seed in (0, 1)]
    text = comma_separated(_table(_row("transformer", **_cost(10.0, 6.0), **there), *seqboat, _row("ema")))
    transformer, first, second, ema = csv.DictReader(text.splitlines())
    names = [f"{work}_relative_{what}" for work in ("inference", "training") for what in ("speed", "memory")]
    assert [transformer[name] for name in names] == ["1.0"] * 4
    assert [first[name] for name in names] == ["2.5", "0.0"] * 2 == [second[name] for name in names]
    assert [ema[name] for name in names] == [""] * 4
    assert (first["inference_milliseconds"], ema["inference_milliseconds"]) == ("4.0", "")
    assert (first["measured_on"], ema["measured_on"]) == ("a GPU", "")


@pytest.fixture
def without_training(monkeypatch):
    """Runs that end at once: `fails` names those that fail, `devices` records which run was measured where."""
    seen = SimpleNamespace(fails=[], devices=[], began=[])

    def trainer(spec, folder, data, **options):
        seen.began.append((folder.parent.name, folder.name, spec))
        if folder.name in seen.fails:
            raise RuntimeError("broken")
        fake.train(spec, folder, data, **options)

    def measured(folder, length, *, device, threads):
        seen.devices.append((folder.name, device))
        return {"device": device, "hardware": f"the {device}", **_cost(5.0, 3.0)}

    monkeypatch.setattr(study, "run_grid", partial(run_grid, trainer=trainer))
    monkeypatch.setattr(comparison, "efficiency", measured)
    return seen


def _main(*arguments):
    return main([*map(str, arguments), "--no-progress"])


def test_speed_is_measured_on_the_training_device_with_the_first_finished_run(
    tmp_path, experiment_file, without_training, capsys
):
    out, data = tmp_path / "out", tmp_path
    without_training.fails = ["transformer-0"]
    asked = ["--spec", experiment_file, "--models", "transformer,seqboat", "--seeds", 2, "--out", out, "--data", data]
    assert _main(*asked) == 2
    assert f"error: 1 run failed: transformer-0; {ERROR} in the folder of each" in (said := capsys.readouterr().err)
    assert f"and python -m sma.recipes.compare --resume {out} --data {data} --no-progress tries again" in said
    assert without_training.devices == [("transformer-1", "cuda"), ("seqboat-0", "cuda")]
    assert "on the cuda: the transformer's is 1." in (out / "table.md").read_text()
    without_training.fails = []
    assert _main("--resume", out, "--data", data) == 0
    assert len(without_training.devices) == 2
    assert json.loads((out / "summary.json").read_text())["failed"] == []


def test_updates_in_a_time_are_estimated_over_the_rates_of_the_whole_schedule(data, monkeypatch):
    spec = tiny(training__updates=200, training__budget="{target: 0.1, hold: 60, anneal: 60, floor: 0.0}")
    rates = []
    step = Classifier.training_step
    monkeypatch.setattr(
        Classifier,
        "training_step",
        lambda self, batch, number: rates.append(rate(self.model, batch)) or step(self, batch, number),
    )

    def rate(model, batch):
        with torch.no_grad():
            return float(
                torch.stack(
                    [decision.rate(batch.valid) for decision in model(batch.inputs, batch.valid).decisions]
                ).mean()
            )

    assert updates_in(1.0, spec, data) > 2
    assert rates[1] > 0.9
    assert rates[-1] < 0.4
    assert rates[4] > rates[7] > rates[-1]


@pytest.fixture
def without_data(monkeypatch, data):
    """Tasks whose `prepare` returns existing data."""
    for kind in (DigitsTask, ListOpsTask):
        monkeypatch.setattr(kind, "prepare", lambda *_, **__: data)


def test_resumed_comparison_of_several_tasks_keeps_its_options(
    tmp_path, without_training, without_data, monkeypatch, capsys
):
    asked = ["--task", "digits,listops", "--models", "transformer,seqboat", "--seeds", 3]
    asked += ["--minutes", 1, "--length", 99, "--set", "training.batch_size=8"]
    out, data = tmp_path / "out", tmp_path
    monkeypatch.setattr(comparison, "updates_in", lambda *_: 600)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "run_grid", interrupt)
        assert _main(*asked, "--out", out, "--data", data) == 130
    assert _main("--resume", out, "--data", data) == 0
    for task in ("digits", "listops"):
        began = {name: spec for folder, name, spec in without_training.began if folder == task}
        assert list(began) == [f"{model}-{seed}" for model in ("transformer", "seqboat") for seed in range(3)]
        assert {(spec.training.batch_size, spec.training.updates, spec.task.kind) for spec in began.values()} == {
            (8, 600, task)
        }
        summary = json.loads((out / task / "summary.json").read_text())
        assert (summary["measured_length"], summary["minutes"]) == (99, 1.0)
        assert "Training time of each model: 1 min." in (out / task / "table.md").read_text()
    assert list(json.loads((out / "summary.json").read_text())) == ["digits", "listops"]
    capsys.readouterr()
    assert _main("--resume", out, "--seeds", 2, "--minutes", 2, "--models", "seqboat") == 2
    assert capsys.readouterr().err == (
        "error: --resume continues the study as it was; leave --seeds, --minutes out, or start a new study\n"
    )


def test_one_task_is_compared_under_several_settings(tmp_path, without_training, without_data, capsys):
    out = tmp_path / "out"
    asked = ["--task", "listops", "--models", "seqboat,s4d", "--data", tmp_path, "--out", out, "--set", "width=24"]
    varied = ["--vary", "training.updates=4001,training.betas=[0.9, 0.95]", "--vary", "training.updates=4002"]
    assert _main(*asked, *varied, "--equal-parameters", "--no-speed") == 0
    assert without_training.devices == []
    names = ["updates=4001,betas=0.9,0.95", "updates=4002"]
    began = {(part, name): spec for part, name, spec in without_training.began}
    assert list(began) == [(part, name) for part in names for name in ("seqboat-0", "s4d-0")]
    for (part, name), spec in began.items():
        assert spec.training.updates == (4001 if part == names[0] else 4002)
        assert spec.training.betas == ((0.9, 0.95) if part == names[0] else (0.9, 0.98))
        assert (spec.model.width == 24) == (name == "seqboat-0")
    assert f"| accuracy | {names[0]} | {names[1]} |" in (printed := capsys.readouterr().out)
    assert "| rate per layer, % | " in printed
    assert not {"speed", "memory"} & {*re.findall(r"\w+", (out / names[0] / "table.md").read_text())}
    assert (out / "comparison.png").stat().st_size > 10_000
    assert _main("--resume", out, "--data", tmp_path) == 0
    assert _main(*asked, "--vary", "training.updates=5", "--equal-parameters", "--no-speed", "--auto-resume") == 2
    assert f"holds a study of other tasks: {', '.join(names)}; give another --out" in capsys.readouterr().err
    assert len(without_training.began) == 4


@pytest.mark.parametrize(
    ("varied", "complaint"),
    [
        pytest.param(["training.updates=5"] * 2, "--vary 'training.updates=5' is given twice; give every", id="twice"),
        pytest.param(["training.update=5"], "there is no 'update' here; did you mean 'updates'", id="field"),
    ],
)
def test_settings_that_cannot_vary_are_refused(varied, complaint, tmp_path, capsys):
    words = [word for each in varied for word in ("--vary", each)]
    assert _main("--task", "digits", "--out", tmp_path / "out", *words) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failure_in_one_task_does_not_stop_the_others(tmp_path, without_training, without_data, capsys):
    without_training.fails = ["seqboat-0"]
    asked = ["--task", "digits,listops", "--models", "seqboat,ema", "--out", tmp_path / "out", "--data", tmp_path]
    assert _main(*asked) == 2
    assert "error: 2 runs failed: digits/seqboat-0, listops/seqboat-0; " in capsys.readouterr().err
    assert "| ema | " in (tmp_path / "out" / "table.md").read_text()


def test_report_of_several_tasks_rewrites_their_tables(tmp_path, without_training, without_data, capsys):
    out = tmp_path / "out"
    assert _main("--task", "digits,listops", "--models", "seqboat,ema", "--out", out, "--data", tmp_path) == 0
    before = {path: path.read_bytes() for path in out.rglob("table.*")}
    assert len(before) == 5
    for path in before:
        path.unlink()
    assert sma_main(["report", str(out), "--data", str(tmp_path)]) == 0
    assert {path: path.read_bytes() for path in out.rglob("table.*")} == before
    assert len(without_training.began) == 4
    assert "| accuracy | digits | listops |" in capsys.readouterr().out


@pytest.mark.parametrize("killed", range(5))
def test_auto_resume_repeats_a_start_that_was_interrupted_between_two_files(
    tmp_path, without_training, without_data, monkeypatch, killed
):
    command = ["--task", "digits,listops", "--models", "seqboat", "--data", tmp_path, "--out", tmp_path / "out"]
    original, written = folder.write_text, []

    def write(path, text):
        if len(written) == killed:
            raise KeyboardInterrupt
        written.append(path)
        original(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_text", write)
        patch.setattr(comparison, "write_text", write)
        assert _main(*command, "--auto-resume") == 130
    assert _main(*command, "--auto-resume") == 0
    assert {folder for folder, *_ in without_training.began} == {"digits", "listops"}


def test_comparison_of_several_tasks_checks_all_before_the_first_starts(tmp_path, capsys):
    assert main(["--task", "digits,text", "--set", "task.data.length=64", "--out", str(tmp_path / "out")]) == 2
    assert "task.data.length" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table_of_several_tasks_has_a_column_for_each():
    names = ("transformer", "mega_chunk", "seqboat")
    whole, fewer = ([_row(name) for name in some] for some in (names, ["seqboat"]))
    summaries = [table_summary(*rows, minutes=None, measured_length=9) for rows in (whole, fewer)]
    lines = tasks_table({"listops": summaries[0], "digits": summaries[1]}).splitlines()
    assert lines[0] == "| accuracy | listops | digits |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == [f"| {name}" for name in names]
    assert lines[2].endswith("| - |")
    assert markdown(comparison_table(summaries[0])).rstrip() in "\n".join(lines)


@pytest.mark.slow
def test_resumed_comparison_trains_only_the_missing_runs(compared, capsys):
    before = (compared / "seqboat-0" / "summary.json").stat().st_mtime_ns
    (compared / "seqboat-1" / "summary.json").unlink()
    (compared / "table.md").unlink()
    accuracies = [row["accuracy"] for row in json.loads((compared / "summary.json").read_text())["rows"]]
    assert _main("--resume", compared, "--data", compared.parent / "data", "--accelerator", "cpu") == 0
    assert "6 runs, 1 to do" in capsys.readouterr().out
    assert (compared / "seqboat-0" / "summary.json").stat().st_mtime_ns == before
    assert [row["accuracy"] for row in json.loads((compared / "summary.json").read_text())["rows"]] == accuracies


def test_bad_command_lines_give_error_messages(tmp_path, capsys, experiment_file):
    assert _main("--spec", experiment_file, "--models", "seqbot", "--out", tmp_path / "a") == 2
    assert "unknown model 'seqbot'; did you mean 'seqboat'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert _main("--resume", tmp_path) == 2
    assert "there is no study in" in capsys.readouterr().err
    assert _main("--task", "digits,listop") == 2
    assert "unknown task 'listop'; did you mean 'listops'" in capsys.readouterr().err
