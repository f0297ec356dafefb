"""The training commands of `sma`: their arguments, their errors, and that they call the functions of the recipes."""

from pathlib import Path

import pytest

from sma.__main__ import EXPERIMENTS, main
from sma.recipes.experiment import load_experiment
from sma.recipes.io.presets import shipped
from sma.recipes.training.single_run import TASKS
from tests.forks import run_fork, run_without
from tests.test_sma.test_main import _run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_of_every_command_has_the_same_form(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    positional = EXPERIMENTS[name].positional.upper()
    assert shown.startswith(f"usage: sma {name} {f'[{positional}]' if EXPERIMENTS[name].unless else positional} ")
    for word in ("None", "null", "list[", "factory", "str}", "int}"):
        assert word not in shown


HEAVY = {
    "lightning", "torchmetrics", "matplotlib", "tensorboard", "rich", "ray", "optuna", "pyarrow", "pandas",
    "sma.recipes.tasks.kinds",
}  # fmt: skip


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys; from sma.__main__ import main\n"
        "try: main()\n"
        f"finally: print(*sorted(sys.modules.keys() & {HEAVY!r}), file=sys.stderr)"
    )
    for name in ("", *EXPERIMENTS, "describe"):
        words = [*([name] if name else []), "--help"]
        done = run_fork("program", *words, folder=tmp_path, cwd=tmp_path, imported=("sma",))
        assert (name, done.returncode, done.stderr) == (name, 0, "\n")


def test_every_task_with_a_preset_can_be_trained():
    assert set(TASKS) == {load_experiment(name).task.kind for name in shipped("presets")}
    for task, presets in TASKS.items():
        assert {load_experiment(f"{task}_{preset}").task.kind for preset in presets} == {task}
    assert (TASKS["digits"], TASKS["speech"]) == (["tiny"], ["tiny", "paper"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["trian", "listops"], "unknown command 'trian'; did you mean 'train'? commands: ", id="command"),
        pytest.param(["--verson"], "--verson: unknown option; did you mean --version?\n", id="top option"),
        pytest.param(["train"], "give TASK, or one of --spec, --resume; see sma train --help\n", id="no task"),
        pytest.param(["compare"], "give TASK, or one of --spec, --resume; see sma compare --help\n", id="nothing"),
        pytest.param(["sweep"], "give TASK, or one of --space, --resume; see sma sweep --help\n", id="no sweep"),
        pytest.param(["evaluate"], "the following arguments are required: RUN; see sma evaluate --help\n", id="no run"),
        pytest.param(
            ["train", "lisops"], "unknown task 'lisops'; did you mean 'listops'? tasks: digits, image, ", id="task"
        ),
        pytest.param(["compare", "lisops"], "unknown task 'lisops'; did you mean 'listops'? tasks: ", id="compared"),
        pytest.param(
            ["train", "digits", "--preset", "paper"],
            "the task 'digits' has no preset 'paper'; its only preset is 'tiny'\n",
            id="no paper",
        ),
        pytest.param(
            ["train", "listops", "--preset", "pape"],
            "the task 'listops' has no preset 'pape'; its presets are tiny, binary, paper\n",
            id="preset",
        ),
        pytest.param(
            ["compare", "digits", "--preset", "paper"],
            "the task 'digits' has no preset 'paper'; its only preset is 'tiny'\n",
            id="compared paper",
        ),
        pytest.param(
            ["train", "--task", "listops"],
            "--task: unknown option; write TASK without an option: sma train TASK\n",
            id="task as option",
        ),
        pytest.param(
            ["train", "digits", "listops"],
            "sma train takes no further argument 'listops'; see sma train --help\n",
            id="two tasks",
        ),
        pytest.param(
            ["train", "digits", "--spec", "x.yaml"],
            "--spec has its own task and training; leave TASK out\n",
            id="task and spec",
        ),
        pytest.param(
            ["train", "digits", "--resume", "x"],
            "--resume continues the experiment as it was; leave TASK out, or start a new run\n",
            id="task and resume",
        ),
        pytest.param(
            ["compare", "digits", "--resume", "x"],
            "--resume continues the study as it was; leave TASK out, or start a new study\n",
            id="compare and resume",
        ),
        pytest.param(
            ["compare", "digits", "--spec", "x.yaml"],
            "--spec has its own task and training; leave TASK out\n",
            id="compare and spec",
        ),
        pytest.param(
            ["evaluate", "nowhere"], "there is no finished run in 'nowhere': experiment.yaml is missing; ", id="run"
        ),
        pytest.param(
            ["generate", "nowhere", "--temperature", "0", "--top-k", "5", "--seed", "1"],
            "--temperature 0 takes the most probable byte without sampling; leave --top-k, --seed out\n",
            id="generate without draws",
        ),
        pytest.param(
            ["report", "nowhere"],
            "there is no folder 'nowhere'; give the folder of a run, a study or a sweep\n",
            id="report",
        ),
        pytest.param(
            ["report", "."],
            "the folder '.' holds no run, no study and no sweep: experiment.yaml is missing; "
            "give a folder of sma train, sma compare or sma sweep\n",
            id="report of nothing",
        ),
        pytest.param(["generate", "nowhere"], "there is no saved model in 'nowhere'", id="generate"),
        *(
            pytest.param([name, "x", "--progres"], "--progres: unknown option; did you mean --progress?\n", id=name)
            for name in EXPERIMENTS
            if name != "generate"
        ),
    ],
)
def test_a_mistake_gives_one_message_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = _run(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_environment_variable_is_reported(capsys, monkeypatch):
    monkeypatch.setenv("SMA_PRESET", "paper")
    assert _run(capsys, "train", "--spec", "x.yaml")[2] == (
        "error: --spec has its own task and training; leave --preset (from the variable SMA_PRESET) out\n"
    )


@pytest.mark.slow
def test_a_missing_extra_gives_one_message(tmp_path):
    cases = [
        (["train", "digits"], ["pydantic_settings"], "recipes"),
        (["train", "digits"], ["lightning"], "recipes"),
        (["evaluate", "run"], ["torchmetrics"], "recipes"),
        (["compare", "digits"], ["matplotlib"], "recipes"),
        (["generate", "run"], ["pydantic_settings", "lightning"], "recipes"),
        (["sweep", "digits"], ["ray"], "tune"),
        (["sweep", "digits"], ["pydantic_settings", "lightning", "ray"], "tune"),  # in the core dependencies
    ]
    core = ["pydantic_settings", "lightning", "torchmetrics", "rich", "ray", "optuna"]
    sweep = str(Path("tune", "presets", "listops_tiny.yaml").resolve())
    done = [run_without(blocked, "sma", *words, folder=tmp_path) for words, blocked, _ in cases]
    helped, experiment, swept = (
        run_without(core, "sma", *words, folder=tmp_path)
        for words in (["--help"], ["validate", "listops_tiny"], ["validate", sweep])
    )
    assert done == [
        (
            2,
            "",
            f"error: sma {words[0]} needs the extra {extra!r}, but its package {blocked[0]} is not installed; "
            f"run: pip install 'sparse-modular-activation[{extra}]'\n",
        )
        for words, blocked, extra in cases
    ]
    assert (experiment.returncode, experiment.stderr) == (0, "")
    assert experiment.stdout.startswith("ok: listops_tiny is an experiment of ")
    assert swept == (
        2,
        "",
        f"error: {sweep!r} is a sweep, which needs the extra 'tune', but its package optuna is not installed; "
        "run: pip install 'sparse-modular-activation[tune]'\n",
    )
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "    train " in helped.stdout


def test_the_command_line_trains_and_evaluates(capsys, tmp_path):
    here = ["--data", str(tmp_path / "data"), "--accelerator", "cpu", "--no-progress"]
    run = tmp_path / "run"
    status, out, err = _run(capsys, "train", "digits", "--out", str(run), *FEW, *here)
    assert (status, "test accuracy" in out) == (0, True), err
    assert "run is an experiment of 4 updates on digits; " in _run(capsys, "validate", str(run))[1]
    status, out, err = _run(capsys, "evaluate", str(run), *here)
    assert (status, "reproduced        exactly" in out) == (0, True), err
    assert _run(capsys, "generate", str(run))[2].startswith("error: the model in ")


@pytest.mark.slow
def test_report_draws_the_figures_of_a_run_again(capsys, tmp_path):
    here = ["--data", str(tmp_path / "data"), "--accelerator", "cpu", "--no-progress"]
    run = tmp_path / "run"
    trained = _run(capsys, "train", "digits", "--out", str(run), *FEW, *here)[1]
    before = {path: path.read_bytes() for path in (*run.glob("*.png"), *run.glob("*.json"))}
    assert {run / "activation.png", run / "confusion.png"} <= before.keys()
    for path in run.glob("*.png"):
        path.unlink()
    status, out, err = _run(capsys, "report", str(run), *here)
    assert (status, err) == (0, "")
    assert trained.endswith(out)
    assert {path: path.read_bytes() for path in before} == before


FEW = ["--set", "training.updates=4", "--set", "training.warmup=1", "--set", "training.evaluate_every=2"]


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_control_c_names_the_command_that_resumes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sma.recipes.training.run.run_test", _interrupt)
    monkeypatch.chdir(tmp_path)
    status, _, err = _run(capsys, "train", "digits", "--no-progress", *FEW)
    (run,) = Path("runs").iterdir()
    assert (status, err) == (130, f"interrupted; resume with: sma train --resume {run} --no-progress\n")
    status, _, err = _run(capsys, "train", "--resume", str(run))
    assert (status, err) == (130, f"interrupted; resume with: sma train --resume {run}\n")


def test_control_c_names_the_command_that_resumes_a_comparison(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sma.recipes.tasks.digits.DigitsTask.prepare", _interrupt)
    status, _, err = _run(capsys, "compare", "digits,listops", "--out", str(tmp_path / "a b"), "--jobs", "2")
    assert (status, err) == (130, f"interrupted; resume with: sma compare --resume '{tmp_path}/a b' --jobs 2\n")


def test_control_c_before_the_start_names_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sma.recipes.tasks.digits.DigitsTask.prepare", _interrupt)
    monkeypatch.chdir(tmp_path)
    assert _run(capsys, "train", "digits")[::2] == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []
