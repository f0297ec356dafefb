"""SeqBoat beside its baselines: the runs, the table, and what it refuses."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from sma.recipes import compare
from sma.recipes.compare import main, updates_in, with_updates
from sma.recipes.io.run_folder import write_text
from sma.recipes.reports.comparison import comma_separated, markdown, markdown_of_several
from sma.recipes.tasks.digits import DigitsTask
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.training.classification import Classifier
from sma.recipes.training.provenance import hardware
from tests.test_recipes.tiny import EXPERIMENT, tiny


def test_other_updates_keep_the_shares_of_warm_up_evaluation_and_budget():
    spec = tiny(
        training__updates=100,
        training__warmup=10,
        training__evaluate_every=20,
        training__budget="{target: 0.3, hold: 20, anneal: 40}",
    )
    training = with_updates(spec, 50).training
    assert (training.updates, training.warmup, training.evaluate_every) == (50, 5, 10)
    assert (training.budget.hold, training.budget.anneal) == (10, 20)


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
    """A finished comparison of three models, one of them with two seeds' worth of runs."""
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
def test_table_says_what_the_runs_say(compared):
    summary = json.loads((compared / "summary.json").read_text())
    assert list(summary["models"]) == ["transformer", "mega_chunk", "seqboat"]
    for name, row in summary["models"].items():
        assert row["seeds"] == [0, 1]
        for seed in (0, 1):
            run = json.loads((compared / f"{name}-{seed}" / "summary.json").read_text())
            assert (row["accuracy"][seed], row["parameters"]) == (run["test_accuracy"], run["parameters"])
        assert {"milliseconds", "megabytes"} == set(row["inference"]) == set(row["training"])
        assert row["measured_on"] == hardware("cpu", 1)
        assert json.loads((compared / f"{name}-0" / "efficiency.json").read_text())["device"] == "cpu"
        assert row["inference"]["milliseconds"] > 0
    assert [row["activation_rate"][0] for row in summary["models"].values()][:2] == [None, 1.0]
    table = (compared / "table.md").read_text()
    assert table == markdown(summary)
    assert "| transformer | " in table
    assert table.splitlines()[2].count("1.00x") >= 2  # of so short rows the memory is nothing that could be compared
    rows = list(csv.DictReader((compared / "table.csv").read_text().splitlines()))
    assert (compared / "table.csv").read_text() == comma_separated(summary)
    assert [(row["model"], row["seed"]) for row in rows] == [
        (name, seed) for name in summary["models"] for seed in "01"
    ]


def _row(seeds=(0,), **more):
    each = {"accuracy": 0.5, "activation_rate": 0.3, "tokens_per_second": 10, "seconds": 1.0}
    return {
        "parameters": 1,
        "updates": 10,
        "seeds": list(seeds),
        **{name: [value] * len(seeds) for name, value in each.items()},
        **more,
    }


def _cost(milliseconds, megabytes):
    return {work: {"milliseconds": milliseconds, "megabytes": megabytes} for work in ("inference", "training")}


def _summary(**models):
    task = {"task": "x", "minutes": None, "test_samples": 9, "length": 4096, "chance": 0.1, "majority": 0.1}
    return {**task, "commit": "c", "hardware": "the card", "date": "d", "models": models, "failed": []}


def test_figures_are_relative_where_the_transformer_was_measured_and_the_caption_says_which():
    mine, there = _cost(5.0, 3.0), {"measured_on": "a GPU"}
    relative = markdown(
        _summary(transformer=_row([1], **_cost(10.0, 6.0), **there), seqboat=_row([0, 1], **mine, **there))
    )
    assert "| seqboat | 50.0% (50.0 to 50.0) | 1 | 30% (30 to 30) | 2.00x | 0.50x | 2.00x | 0.50x |" in relative
    assert "Speed and peak memory of one row of 4,096 random tokens on a GPU: the transformer's is 1." in relative
    failed = markdown(_summary(transformer=_row(), seqboat=_row(**mine, **there)))
    assert "| 5 ms | 3 MB | 5 ms | 3 MB |" in failed
    assert "on a GPU: the transformer was not measured, so they are in milliseconds and megabytes." in failed
    assert "there is no transformer here, so they are" in markdown(_summary(seqboat=_row(**mine, **there)))
    assert "Speed and memory are not measured yet." in markdown(_summary(transformer=_row(), seqboat=_row()))


def test_values_hold_what_is_relative_to_the_transformer():
    there = {"measured_on": "a GPU"}
    models = {
        "transformer": _row(**_cost(10.0, 6.0), **there),
        "seqboat": _row([0, 1], **_cost(4.0, 0.0), **there),
        "ema": _row(),
    }
    text = comma_separated(_summary(**models))
    transformer, first, second, ema = csv.DictReader(text.splitlines())
    names = [f"{work}_relative_{what}" for work in ("inference", "training") for what in ("speed", "memory")]
    assert [transformer[name] for name in names] == ["1.0"] * 4
    assert [first[name] for name in names] == ["2.5", "0.0"] * 2 == [second[name] for name in names]
    assert [ema[name] for name in names] == [""] * 4
    assert (first["measured_on"], ema["measured_on"]) == ("a GPU", "")


@pytest.fixture
def without_training(monkeypatch):
    """Runs that end at once: `fails` are the names of those that fail, `devices` what was measured where."""
    seen = SimpleNamespace(fails=[], devices=[], began=[])

    def train_all(left, out, *_, **__):
        for name, spec in left.items():
            seen.began.append((out.name, name, spec))
            if name in seen.fails:
                write_text(out / name / "error.txt", "broken")
            else:
                (out / name / "error.txt").unlink(missing_ok=True)
                run = {
                    "parameters": 1,
                    "updates": spec.training.updates,
                    "test_accuracy": 0.5,
                    "activation_rate": [0.3],
                    "device": "cuda",
                }
                common = {
                    "task": "x",
                    "chance": 0.1,
                    "majority": 0.2,
                    "data": {},
                    "commit": "c",
                    "hardware": "a GPU",
                    "date": "d",
                }
                write_text(
                    out / name / "summary.json", json.dumps({**run, **common, "tokens_per_second": 10, "seconds": 1.0})
                )
            yield name

    def measured(folder, length, *, device, threads):
        seen.devices.append((folder.name, device))
        return {"device": device, "hardware": f"the {device}", **_cost(5.0, 3.0)}

    monkeypatch.setattr(compare, "train_all", train_all)
    monkeypatch.setattr(compare, "efficiency", measured)
    return seen


def test_speed_is_measured_where_it_was_trained_by_the_first_run_that_is_finished(
    tmp_path, experiment_file, without_training
):
    out, common = tmp_path / "out", ["--no-progress", "--data", str(tmp_path)]
    without_training.fails = ["transformer-0"]
    assert (
        main(
            [
                "--spec",
                str(experiment_file),
                "--models",
                "transformer,seqboat",
                "--seeds",
                "2",
                "--out",
                str(out),
                *common,
            ]
        )
        == 2
    )
    assert without_training.devices == [("transformer-1", "cuda"), ("seqboat-0", "cuda")]
    assert "on the cuda: the transformer's is 1." in (out / "table.md").read_text()
    without_training.fails = []
    assert main(["--resume", str(out), *common]) == 0
    assert len(without_training.devices) == 2


def test_updates_of_a_time_are_measured_at_the_rates_of_the_whole_schedule(data, monkeypatch):
    spec = tiny(training__updates=200, training__budget="{target: 0.1, hold: 60, anneal: 60, floor: 0.0}")
    rates = []
    monkeypatch.setattr(
        Classifier,
        "loss_of",
        lambda self, batch: rates.append(rate(self.model, batch)) or self.model.head.outer.weight.sum(),
    )

    def rate(model, batch):
        with torch.no_grad():
            return float(
                torch.stack(
                    [decision.rate(batch.valid) for decision in model(batch.inputs, batch.valid).decisions]
                ).mean()
            )

    assert updates_in(1.0, spec, data) > 2
    assert rates[0] > 0.9
    assert rates[-1] < 0.4
    assert rates[3] > rates[6] > rates[-1]


def test_resumed_comparison_of_several_tasks_is_the_one_that_was_asked_for(
    tmp_path, without_training, monkeypatch, capsys
):
    asked = [
        "--task",
        "digits,listops",
        "--models",
        "transformer,seqboat",
        "--seeds",
        "3",
        "--minutes",
        "1",
        "--length",
        "99",
    ]
    out, common = tmp_path / "out", ["--no-progress", "--data", str(tmp_path)]
    monkeypatch.setattr(compare, "updates_in", lambda *_: 600)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for kind in (DigitsTask, ListOpsTask):
        monkeypatch.setattr(kind, "prepare", lambda *_, **__: SimpleNamespace(test=range(9)))
    with monkeypatch.context() as patch:
        patch.setattr(compare, "train_all", interrupt)
        assert main([*asked, "--set", "training.batch_size=8", "--out", str(out), *common]) == 130
    assert main(["--resume", str(out), *common]) == 0
    for task in ("digits", "listops"):
        began = {name: spec for folder, name, spec in without_training.began if folder == task}
        assert list(began) == [f"{model}-{seed}" for model in ("transformer", "seqboat") for seed in range(3)]
        assert {(spec.training.batch_size, spec.training.updates, spec.task.kind) for spec in began.values()} == {
            (8, 600, task)
        }
        summary = json.loads((out / task / "summary.json").read_text())
        assert (summary["length"], summary["minutes"]) == (99, 1.0)
    capsys.readouterr()
    assert main(["--resume", str(out), "--seeds", "2", "--models", "seqboat"]) == 2
    assert capsys.readouterr().err == (
        "error: --resume goes on with the comparison as it was; leave --models, --seeds out, or start a new one\n"
    )


@pytest.mark.parametrize("killed", range(5))
def test_start_that_was_killed_between_two_files_is_repeated_by_auto_resume(
    tmp_path, without_training, monkeypatch, killed
):
    command = [
        "--task",
        "digits,listops",
        "--models",
        "seqboat",
        "--no-progress",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    original, written = compare.write_text, []

    def write(path, text):
        if len(written) == killed:
            raise KeyboardInterrupt
        written.append(path)
        original(path, text)

    for kind in (DigitsTask, ListOpsTask):
        monkeypatch.setattr(kind, "prepare", lambda *_, **__: SimpleNamespace(test=range(9)))
    with monkeypatch.context() as patch:
        patch.setattr(compare, "write_text", write)
        assert main([*command, "--auto-resume"]) == 130
    assert main([*command, "--auto-resume"]) == 0
    assert {folder for folder, *_ in without_training.began} == {"digits", "listops"}


def test_comparison_of_several_tasks_says_what_is_wrong_with_any_before_the_first_begins(tmp_path, capsys):
    assert main(["--task", "digits,text", "--set", "task.data.length=64", "--out", str(tmp_path / "out")]) == 2
    assert "task.data.length" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert (
        main(
            [
                "--resume",
                str(compared),
                "--no-progress",
                "--data",
                str(compared.parent / "data"),
                "--accelerator",
                "cpu",
            ]
        )
        == 0
    )
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
