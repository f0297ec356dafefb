"""Raw speech on the command line: training, evaluation and figures on a made-up copy of the data; synthetic words."""

import json
import os
import re

import matplotlib.image
import pytest
import yaml

from sma.recipes.experiment import load_experiment
from sma.recipes.seqboat_speech import Options, main
from tests.test_recipes.tiny_speech import speech_experiment, write_corpus


@pytest.fixture(autouse=True)
def _without_settings_in_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SMA_")]:
        monkeypatch.delenv(name)


def _train(folder, experiment):
    (folder / "spec.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    common = ["--data", folder, "--accelerator", "cpu", "--no-progress"]
    assert main([str(word) for word in ("--spec", folder / "spec.yaml", "--out", folder / "run", *common)]) == 0
    return folder / "run", [str(word) for word in common]


def test_real_format_is_loaded_trained_on_and_evaluated(tmp_path, capsys):
    write_corpus(tmp_path)
    run, common = _train(tmp_path, speech_experiment(split="hash"))
    said = capsys.readouterr().out
    assert "SeqBoat on speech: 70 samples" in said
    assert re.search("class +accuracy +answered +yes +no +up +down", said)
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["data"]) == {"train", "validation", "test"}
    assert list(summary["per_class"]) == ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
    for name in ("activation.png", "confusion.png"):
        assert matplotlib.image.imread(run / name)[..., :3].std() > 0.05
    assert main(["--evaluate", str(run), *common]) == 0
    assert "reproduced        exactly" in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["test_accuracy"] == summary["test_accuracy"]


def test_preset_names_the_experiment():
    assert Options().name == "speech_tiny"
    assert load_experiment(Options(preset="paper").name).task.data.source == "speech_commands"
    assert load_experiment("speech_tiny").task.data.source == "synthetic"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(["--preset", "huge"], "error: --preset: unknown choice 'huge'; choices: tiny, paper", id="preset"),
        pytest.param(
            ["--evaluate", "nowhere"],
            "error: there is no finished run in 'nowhere': experiment.yaml is missing",
            id="evaluate",
        ),
        pytest.param(
            ["--preset", "paper", "--data", "nowhere"], "error: there is no Speech Commands data: neither", id="data"
        ),
    ],
)
def test_wrong_option_gives_an_error_message_and_exit_code_2(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tiny_preset_learns_synthetic_words(tmp_path):
    arguments = [
        "--preset",
        "tiny",
        "--data",
        tmp_path,
        "--out",
        tmp_path / "run",
        "--accelerator",
        "cpu",
        "--no-progress",
    ]
    assert main(list(map(str, arguments))) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.6  # 300 clips, chance 10 %: a standard deviation of 3 points
