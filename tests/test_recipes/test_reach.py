"""Study of reach: streams give the answers of whole rows, and the command trains, measures and resumes."""

import json
import math

import pytest
import torch

from sma.__main__ import main as sma_main
from sma.model import build
from sma.recipes.experiment import load_experiment
from sma.recipes.reach import main
from sma.recipes.reports.reach import reach_table
from sma.recipes.reports.table import markdown
from sma.recipes.studies.baselines import with_parameters
from sma.recipes.studies.reach import VARIANTS, measure_reach
from sma.recipes.tasks.mqar import draw
from tests.test_recipes.test_tasks.test_mqar import TINY


@pytest.mark.parametrize("router", ["always", "sma", "never"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_streams_give_the_answers_of_whole_rows(router, chunk):
    spec = load_experiment(TINY, [f"layers.0.router={{kind: {router}}}"])
    model = build(spec.model, seed=0).eval()
    found = measure_reach(model, spec.task.data, [24, 40], 7, chunk)
    by_distance = {}
    for length in (24, 40):
        drawn = draw(spec.task.data.replace(length=length, power=1.0), 2, torch.arange(7))
        with torch.no_grad():
            output = model(drawn.ids)
        right = 0
        for row in range(7):
            for pair in range(2):
                place = int(drawn.queries[row, pair])
                hit = int(output.logits[row, place].argmax()) == int(drawn.answers[row, pair])
                right += hit
                reach = max(power for power in (2**n for n in range(9)) if power <= place - (2 * pair + 1))
                by_distance.setdefault(str(reach), []).append(hit)
        assert found["recall"][str(length)] == pytest.approx(right / 14)
        assert found["rate"][str(length)] == pytest.approx(float(output.decisions[0].active.double().mean()))
    assert found["distance"] == pytest.approx({reach: sum(hits) / len(hits) for reach, hits in by_distance.items()})
    assert sum(map(len, by_distance.values())) == 28
    assert all(math.log2(int(reach)).is_integer() for reach in found["distance"])


@pytest.fixture
def experiment_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return path


def test_command_trains_streams_and_resumes(experiment_file, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--spec", str(experiment_file), "--out", str(out), "--no-progress", "--accelerator", "cpu"]
    assert main([*asked, "--variants", "seqboat,s4d", "--lengths", "20, 33", "--samples", "3"]) == 0
    printed = capsys.readouterr().out
    assert "streaming 20, 33 tokens through seqboat-0" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert [row["variant"] for row in summary["rows"]] == ["seqboat", "s4d"]
    for row in summary["rows"]:
        assert {*row["recall"]} == {"20", "33"}
        assert bool(row["rate"]) == (row["variant"] == "seqboat")
        assert json.loads((out / row["name"] / "reach.json").read_text())["distance"] == row["distance"]
    table = markdown(reach_table(summary))
    assert table == (out / "table.md").read_text()
    assert "| model | accuracy | parameters | rate per layer, % | 20 tokens | 33 tokens |" in table
    assert "3 streams of every length, read in chunks; distances are uniform." in table
    assert "distance_4" in (out / "table.csv").read_text().splitlines()[0]
    assert (out / "reach.png").stat().st_size > 10_000
    assert main(["--resume", str(out), "--no-progress"]) == 0
    assert "streaming" not in capsys.readouterr().out
    assert sma_main(["report", str(out)]) == 0
    assert (out / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(["--lengths", "4k"], "--lengths '4k' must be numbers of tokens separated by commas", id="word"),
        pytest.param(["--lengths", "4"], "pairs=2 need a length of at least 8", id="short"),
        pytest.param(
            ["--variants", "s5"], "unknown variant 's5'; variants: seqboat, always, local_attention, s4d", id="variant"
        ),
    ],
)
def test_wrong_option_gives_an_error_message(arguments, complaint, experiment_file, tmp_path, capsys):
    assert main(["--spec", str(experiment_file), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_of_another_task_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(load_experiment("recall_tiny").model_dump_json(), encoding="utf-8")
    assert main(["--spec", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "tests models of the task 'mqar', not of 'recall'; use that task" in capsys.readouterr().err


def test_preset_makes_an_experiment_of_every_variant():
    spec = load_experiment("mqar_reach_tiny")
    made = {name: with_parameters(name, spec) for name in VARIANTS}
    counts = {name: each.model.num_parameters() for name, each in made.items()}
    assert all(each.task == spec.task for each in made.values())
    assert made["seqboat"] == spec
    assert counts == pytest.approx(dict.fromkeys(VARIANTS, counts["seqboat"]), rel=0.1)
