"""Accuracy against activation rate: measured points, variants, and rejected settings."""

import json
import re
from typing import get_args

import pytest
import torch
from PIL import Image

from sma.__main__ import main as sma_main
from sma.errors import SpecError
from sma.model import build
from sma.recipes.experiment import load_experiment
from sma.recipes.rates import main
from sma.recipes.reports.rates import draw_rates
from sma.recipes.studies.rates import CALIBRATED, Rates, RatesChosen, RatesOptions, rate_sweep
from sma.recipes.tasks.batch import UNSCORED
from sma.recipes.tasks.recall import collate
from tests.test_recipes.test_recall import TINY as RECALL
from tests.test_recipes.test_tasks.test_mqar import TINY

TIME = re.compile(r"[\d.]+ minutes")


@pytest.mark.parametrize("over", ["each", "total"])
def test_rate_sweep_measures_the_model_at_each_rate(over):
    # Enough tokens that equal scores leave no gap in the rates.
    model = {**RECALL["model"], "layers": 2 * RECALL["model"]["layers"]}
    spec = load_experiment({**RECALL, "model": model}, ["task.data.validation=40"])
    data = spec.task.prepare(None, progress=False)
    model = build(spec.model, seed=0).eval()
    points = rate_sweep(model, data, over=over)
    batch = collate([data.test[number] for number in range(len(data.test))])
    with torch.no_grad():  # the sweep leaves the model at the last rate
        output = model(batch.inputs, batch.valid)
    scored = batch.targets != UNSCORED
    assert points[-1]["accuracy"] == pytest.approx(
        float((output.logits.argmax(-1) == batch.targets)[scored].double().mean())
    )
    reached = [float(decision.rate()) for decision in output.decisions]
    assert points[-1]["activation_rate"] == pytest.approx(sum(reached) / 2)
    assert (abs(reached[0] - reached[1]) > 0.2) == (over == "total")
    rates = [point["activation_rate"] for point in points]
    assert rates == sorted(rates)
    assert rates == pytest.approx(list(CALIBRATED), abs=0.1)


@pytest.mark.parametrize("task", get_args(RatesOptions.model_fields["task"].annotation))
def test_the_preset_of_every_task_is_accepted(task):
    options, study = RatesOptions(task=task), Rates()
    spec = study.experiment(options)
    study.check(spec, RatesChosen(study="rates", seeds=1, variants=["trained"], rates=[0.05, 0.5]))
    assert spec.training.budget.settled < spec.training.updates
    with pytest.raises(SpecError, match="floor"):
        study.check(spec, RatesChosen(study="rates", seeds=1, variants=["trained"], rates=[0.005]))


def test_rates_are_means_over_layers_with_different_sub_modules():
    layer = RECALL["model"]["layers"][0]
    other = {**layer, "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 8}}}
    spec = load_experiment({**RECALL, "model": {**RECALL["model"], "layers": [layer, other]}})
    data = spec.task.prepare(None, progress=False)
    (point,) = rate_sweep(build(spec.model, seed=0).eval(), data, [0.5])
    assert 0 < point["activation_rate"] <= point["highest_rate"] < 1


@pytest.fixture
def asked(tmp_path):
    """Arguments of the command for a small experiment, without --out."""
    training = {**TINY["training"], "updates": 6, "budget": {"target": 0.3, "hold": 1, "anneal": 1}}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**TINY, "training": training}), encoding="utf-8")
    return ["--spec", str(path), "--no-progress", "--accelerator", "cpu"]


def test_command_trains_at_every_rate_and_calibrates_the_highest(asked, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*asked, "--out", str(out), "--rates", "0.25, 0.5"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [row["variant"] for row in summary["rows"]] == ["rate=0.25", "rate=0.5", "always", "never"]
    targets = [load_experiment(out / row["name"] / "experiment.yaml").training.budget for row in summary["rows"]]
    assert [budget and budget.target for budget in targets] == [0.25, 0.5, None, None]
    assert [row["activation_rate"] for row in summary["rows"][2:]] == [1.0, 0.0]
    assert summary["calibrated_model"] == "rate=0.5-0"
    assert [point["asked"] for point in summary["calibrated"]] == list(CALIBRATED)
    table = (out / "table.md").read_text()
    assert "| trained with | accuracy | rate per layer, % | MACs per token |" in table
    assert "rate=0.5-0 at other rates, without further training: " in table
    assert (out / "rates.png").stat().st_size > 10_000
    capsys.readouterr()
    assert main(["--resume", str(out), "--no-progress"]) == 0
    assert sma_main(["report", str(out)]) == 0
    # On a busy machine the second command adds a tenth of a minute to the time that the table names.
    assert TIME.sub("", (out / "table.md").read_text()) == TIME.sub("", table)


def test_constant_rates_alone_are_not_calibrated(asked, tmp_path):
    out = tmp_path / "out"
    assert main([*asked, "--out", str(out), "--variants", "never"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [row["variant"] for row in summary["rows"]] == ["never"]
    assert "calibrated" not in summary
    assert (out / "rates.png").is_file()


@pytest.mark.parametrize("rates", ["1", "0.1,0.1", "0.1;0.2", "", "nan", "10%", "0"])
def test_wrong_rates_give_an_error_message(rates, asked, tmp_path, capsys):
    assert main([*asked, "--out", str(tmp_path / "out"), "--rates", rates]) == 2
    assert f"--rates {rates!r} must be different activation rates between 0 and 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("training.budget=null", "the models are trained under a budget; set training.budget.target to a rate"),
        ("model.layers.0.modules={}", "the experiment has no routed layer"),
    ],
)
def test_experiment_without_a_rate_is_refused(setting, complaint, asked, tmp_path, capsys):
    assert main([*asked, "--out", str(tmp_path / "out"), "--set", setting]) == 2
    assert complaint in capsys.readouterr().err


def test_finished_studies_are_drawn_beside_another(asked, tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr("sma.recipes.reports.rates._draw_panel", lambda axis, summary: panels.append(summary["task"]))
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*asked, "--out", str(first), "--variants", "always"]) == 0
    assert main([*asked, "--out", str(second), "--variants", "never", "--beside", f"{first},"]) == 0
    assert panels == ["mqar"] * 3  # the first study alone, then both
    assert json.loads((second / "study.json").read_text())["beside"] == [str(first)]
    panels.clear()
    assert sma_main(["report", str(second)]) == 0
    assert panels == ["mqar"] * 2


def test_three_studies_have_three_panels(asked, tmp_path):
    out = tmp_path / "out"
    assert main([*asked, "--out", str(out), "--variants", "always,never"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    widths = []
    for number in (1, 2, 3):
        with Image.open(draw_rates([summary] * number, tmp_path)) as image:
            widths.append(image.size)
    assert widths[1][0] > 1.8 * widths[0][0]
    assert widths[2][1] > 1.8 * widths[1][1]


def test_folder_without_a_finished_study_cannot_be_drawn(asked, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    assert main([*asked, "--out", str(out), "--beside", str(other)]) == 2
    assert f"{str(other)!r} is not the folder of a finished study of rates" in capsys.readouterr().err
    (other / "summary.json").write_text("{}", encoding="utf-8")
    (other / "study.json").write_text(json.dumps({"study": "reach"}), encoding="utf-8")
    assert main([*asked, "--out", str(out), "--beside", str(other)]) == 2
    assert "belongs to the study 'reach', not to 'rates'" in capsys.readouterr().err
    assert not out.exists()
