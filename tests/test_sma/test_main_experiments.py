"""The command line on experiments and sweeps, and on sizes that fit on no machine."""

import time
from pathlib import Path

import pytest

import sma
from tests.test_sma.test_main import _run

EXPERIMENT = """\
task: {kind: digits}
model: seqboat_digits_tiny
training: {updates: 1200, batch_size: 4, learning_rate: 1e-3}
"""
SWEEP = (
    "experiment: experiment.yaml\nspace: {training.learning_rate: {kind: choice, values: [1e-3, 4e-3]}}\nsamples: 5\n"
)
DIGITS = "a sequence_classifier of width 48 with 3 layers and 79,639 parameters"


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    files = {
        "experiment.yaml": EXPERIMENT,
        "sweep.yaml": SWEEP,
        "run/experiment.yaml": EXPERIMENT,
        "mistyped.yaml": EXPERIMENT.replace("training:", "trainig:"),
        "only_mistyped.yaml": "tsk: {kind: digits}\nmodle: seqboat_digits_tiny\ntrainig: {updates: 1}\n",
        "mistyped_sweep.yaml": SWEEP.replace("experiment:", "experment:").replace("space:", "spaces:"),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("experiments")
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        pytest.param(
            ["experiment.yaml"],
            f"ok: experiment is an experiment of 1,200 updates on digits; its model is {DIGITS}\n",
            id="file",
        ),
        pytest.param(
            ["run"],
            f"ok: run is an experiment of 1,200 updates on digits; its model is {DIGITS}\n",
            id="folder of a run",
        ),
        pytest.param(
            ["digits_tiny"],
            f"ok: digits_tiny is an experiment of 1,000 updates on digits; its model is {DIGITS}\n",
            id="preset",
        ),
        pytest.param(
            ["sweep.yaml"],
            f"ok: sweep is a sweep of 5 trials of 1,200 updates on digits; the model of trial 0 is {DIGITS}\n",
            id="sweep",
        ),
        pytest.param(
            ["experiment.yaml", "--set", "training.updates=7", "--set", "layers.repeat=1"],
            "ok: experiment is an experiment of 7 updates on digits; "
            "its model is a sequence_classifier of width 48 with 1 layer",
            id="settings of both",
        ),
    ],
)
def test_experiments_and_sweeps_are_validated_as_such(words, answer, capsys):
    status, out, err = _run(capsys, "validate", *words)
    assert (status, err) == (0, "")
    assert out.startswith(answer)


@pytest.mark.usefixtures("experiments")
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        pytest.param(
            ["experiment.yaml", "--set", "seed=yes"],
            "error: ExperimentSpec: seed='yes': input should be a valid integer",
            id="seed",
        ),
        pytest.param(
            ["sweep.yaml", "--set", "training.learning_rate=1"],
            "error: --set training.learning_rate=1: the sweep searches",
            id="sweep",
        ),
        pytest.param(
            ["mistyped.yaml"],
            "error: ExperimentSpec: unknown field 'trainig'; did you mean 'training'? fields: ",
            id="mistyped field",
        ),
        pytest.param(
            ["only_mistyped.yaml"],
            "error: ExperimentSpec: unknown fields 'tsk', 'modle', 'trainig'; did you mean 'task'? fields: ",
            id="mistyped fields",
        ),
        pytest.param(
            ["mistyped_sweep.yaml"],
            "error: mistyped_sweep.yaml: unknown field 'experment'; did you mean 'experiment'? fields: ",
            id="mistyped sweep",
        ),
        pytest.param(
            ["experiment.yaml", "--set", "trainin.updates=1"], "error: unknown field path 'trainin.updates'", id="path"
        ),
    ],
)
def test_a_wrong_experiment_gives_an_error_message(words, complaint, capsys):
    status, out, err = _run(capsys, "validate", *words)
    assert (status, out) == (2, "")
    assert err.startswith(complaint)


@pytest.mark.usefixtures("experiments")
def test_the_model_of_an_experiment_is_described(capsys):
    assert (
        DIGITS.split(" with")[0].removeprefix("a ").replace(" of", ",")
        in _run(capsys, "describe", "experiment.yaml")[1]
    )


def test_validating_10000_repeated_layers_is_fast(capsys):
    began = time.process_time()
    status, out, _ = _run(capsys, "validate", "seqboat_listops", "--set", "layers.repeat=10000")
    assert (status, out) == (
        0,
        "ok: seqboat_listops is a model: a sequence_classifier of width 80 with 10,000 layers "
        "and 653,675,840 parameters\n",
    )
    assert time.process_time() - began < 10


def test_many_listed_layers_are_counted_like_the_built_model(tmp_path, capsys):
    layers = ", ".join(["{modules: {a: {kind: conv}}}", "{norm: {kind: rms_norm}}", "{}"] * 30)
    (tmp_path / "long.yaml").write_text(
        f"{{kind: sequence_encoder, width: 4, encoder: {{kind: real_number}}, layers: [{layers}]}}"
    )
    counted = sum(parameter.numel() for parameter in sma.build(tmp_path / "long.yaml").parameters())
    assert f"with 90 layers and {counted:,} parameters" in _run(capsys, "validate", str(tmp_path / "long.yaml"))[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--set", "layers.repeat=10001"], "error: RepeatSpec in layers: repeat=10001 must be at most 10000"),
        (["--set", "layers.repeat=9999999999999999999999"], "error: RepeatSpec in layers: repeat=99999999999999"),
        (
            ["--set", "layers={repeat: 5001, layer: [{}, {}]}"],
            "error: RepeatSpec in layers: repeat=5001 of 2 layers makes 10,002; a model has 10,000",
        ),
        (
            ["--set", "width=1e20"],
            "error: SequenceClassifierSpec: width=1e+20: input should be between -2^63 and 2^63; width: channels of",
        ),
        (["--set", "width=-1"], "error: SequenceClassifierSpec: width=-1 must be at least 1"),
        (
            ["--set", "width=9e18"],
            "error: SequenceClassifierSpec needs about 10^39 bytes, more than any machine can address",
        ),
        (["--set", f"width={'9' * 5000}"], "error: the value of the setting width is not valid YAML: '999999"),
        (
            ["--set", "width=&a [*a]"],
            "error: the value of the setting width is not valid YAML: the alias '*a' is inside its own value (line 1)",
        ),
        (["--set", "x" * 100_000], "error: the setting 'xxx"),
        (["--length", "9" * 5000], "error: --length: invalid int value: '999"),
        (["y" * 100_000], "error: sma describe takes no further argument 'yyy"),
        ([f"--{'z' * 100_000}"], "error: --zzz"),
    ],
    ids=str,
)
def test_impossible_sizes_give_short_error_messages(words, complaint, capsys):
    command = "describe" if words[0] != "--set" else "validate"
    status, out, err = _run(capsys, command, "seqboat_listops", *words)
    assert (status, out) == (2, "")
    assert err.startswith(complaint)
    assert len(err) < 1000
