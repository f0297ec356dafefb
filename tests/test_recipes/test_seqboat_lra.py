"""Command line of the arena tasks: rejected options, output, and interrupted runs that resume."""

import json
import os
import re
import sys
from typing import get_args

import pytest

from sma.recipes.experiment import load_experiment
from sma.recipes.seqboat_lra import Options, main
from tests.test_recipes.lra_command import MODULE, RESUME, SCRIPT, run, write_spec
from tests.test_recipes.tiny import before_update, checkpoint, fail, same, tiny, train


@pytest.fixture(autouse=True)
def _without_settings_in_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SMA_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def spec(tmp_path):
    """The experiment as a file."""
    return write_spec(tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the data is kept between runs."""
    return tmp_path_factory.mktemp("cache")


def _said(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_is_equal_for_script_and_module_and_imports_little():
    script, module = run([*SCRIPT, "--help"]), run([sys.executable, "-X", "importtime", *MODULE[1:], "--help"])
    assert (script.returncode, module.returncode) == (0, 0)
    assert script.stdout == module.stdout
    assert script.stderr == ""
    for option in ("task", "preset", "spec", "set", "seed", "out", "resume", "data", "accelerator", "progress"):
        assert f"--{option}" in script.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in module.stderr.splitlines()}
    assert "torch" in imported
    # These imports take seconds.
    assert imported & {"lightning", "torchmetrics", "matplotlib", "tensorboard"} == set()


@pytest.mark.slow
def test_run_prints_only_its_progress_and_results(spec, cache, tmp_path):
    out = tmp_path / "run"
    done = run([*SCRIPT, "--spec", spec, "--data", cache, "--out", out, "--seed", 4])
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "the router of" not in line] == []
    assert (
        f"SeqBoat on listops: 120 samples, {tiny().model.num_parameters():,} parameters, 30 updates -> {out}"
        in done.stdout
    )
    updates = [line for line in done.stdout.splitlines() if line.startswith("update ")]
    number = r"\d\.\d{3}"
    measures = f"loss {number}(, validation (loss|accuracy|rate) {number}){{3}}"
    assert re.fullmatch(f"update 30 of 30: {measures}", updates[-1])
    assert all(re.fullmatch(rf"update \d+ of 30, \d+:\d\d left: {measures}", line) for line in updates[:-1])
    assert len(updates) == 3
    assert "Epoch" not in done.stdout
    assert "\r" not in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert f"test accuracy     {summary['test_accuracy']:.1%}" in done.stdout
    assert summary["seed"] == load_experiment(out / "experiment.yaml").seed == 4
    assert (out / "activation.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(
            ["--task", "lisops"],
            r"error: --task: unknown choice 'lisops'; did you mean 'listops'\? choices: listops, text, retrieval, ",
            id="task",
        ),
        pytest.param(
            ["--task", "digits", "--preset", "paper"],
            "error: the task 'digits' has no preset 'paper'; its only preset is 'tiny'$",
            id="no-paper",
        ),
        pytest.param(
            ["--preset", "huge"],
            "error: --preset: unknown choice 'huge'; choices: tiny, paper, standard, binary",
            id="preset",
        ),
        pytest.param(
            ["--accelerator", "gpu"],
            "error: --accelerator: unknown choice 'gpu'.* choices: auto, cpu, cuda",
            id="device",
        ),
        pytest.param(["--seed", "x"], "--seed='x': input should be a valid integer", id="seed"),
        pytest.param(["--presets", "tiny"], r"error: --presets: unknown option; did you mean --preset\?$", id="flag"),
        pytest.param(
            ["tiny"], "error: python -m sma.recipes.seqboat_lra takes no further argument 'tiny'; see ", id="word"
        ),
        pytest.param(
            ["--out"],
            "error: --out: expected one argument; see python -m sma.recipes.seqboat_lra --help",
            id="no-value",
        ),
        pytest.param(
            ["--set"],
            "error: --set: expected one argument; see python -m sma.recipes.seqboat_lra --help",
            id="no-setting",
        ),
        pytest.param(["--seed", "-1"], "error: ExperimentSpec: seed=-1", id="negative-seed"),
        pytest.param(
            ["--spec", "none.yaml"],
            "error: there is no file and no shipped preset 'none.yaml'; shipped presets: .*listops_paper",
            id="spec",
        ),
        pytest.param(["--set", "width"], "error: the setting 'width' has no '='; write path=value", id="no-equals"),
        pytest.param(
            ["--set", "training.updats=3"],
            "error: unknown field path 'training.updats'.*did you mean 'updates'",
            id="path",
        ),
        pytest.param(
            ["--set", "head.classes=3"], "error: ExperimentSpec: model.head.classes=3 must be 10", id="classes"
        ),
        pytest.param(
            ["--spec", "x.yaml", "--task", "digits"],
            "error: --spec has its own task and training; leave --task out$",
            id="spec-and-task",
        ),
        pytest.param(
            ["--spec", "x.yaml", "--task", "digits", "--preset=paper"],
            "error: --spec has its own task and training; leave --task, --preset out$",
            id="spec-and-preset",
        ),
        pytest.param(
            ["--resume", "x", "--task", "digits", "--out", "y"],
            "error: --resume continues the experiment as it was; leave --out, --task out, or start a new run$",
            id="resume-and-task",
        ),
        pytest.param(
            ["--evaluate", "x", "--task", "digits"],
            "error: --evaluate tests the run as it was; leave --task out$",
            id="evaluate-and-task",
        ),
        pytest.param(
            ["--resume", "x", "--evaluate", "y"],
            "error: --evaluate tests the run as it was; leave --resume out$",
            id="evaluate-and-resume",
        ),
        pytest.param(
            ["--resume", "nowhere"],
            "error: there is no run in 'nowhere': experiment.yaml is missing; give the folder",
            id="resume",
        ),
    ],
)
def test_wrong_option_gives_an_error_message_and_exit_code_2(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = _said(capsys)
    assert out == ""
    assert re.search(complaint, err)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["digits", "recall", "mqar"])
def test_tasks_outside_the_paper_default_to_the_tiny_preset(task):
    assert load_experiment(Options(task=task).name).task.kind == task


@pytest.mark.parametrize("preset", ["tiny", "paper"])
@pytest.mark.parametrize(
    "task",
    [task for task in get_args(Options.model_fields["task"].annotation) if task not in ("digits", "recall", "mqar")],
)
def test_every_task_of_the_arena_has_both_presets(task, preset):
    assert load_experiment(Options(task=task, preset=preset).name).task.kind == task


def _experiment(monkeypatch, arguments):
    """The experiment that the command line would run."""
    seen = []

    def stop(spec, *_, **__):
        seen.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr("sma.recipes.tasks.listops.task.ListOpsTask.prepare", lambda task, folder, progress: stop(task))
    monkeypatch.setattr(
        "sma.recipes.training.start.load_experiment", lambda *given: seen.append(load_experiment(*given)) or seen[-1]
    )
    assert main(list(map(str, arguments))) == 130
    return seen[0]


def test_options_choose_the_experiment(spec, monkeypatch):
    assert _experiment(monkeypatch, []) == load_experiment("listops_tiny")
    assert _experiment(monkeypatch, ["--task", "listops", "--preset", "paper"]) == load_experiment("listops_paper")
    assert _experiment(monkeypatch, ["--spec", spec, "--seed", 3]) == tiny(seed=3)
    assert _experiment(monkeypatch, ["--seed", 3, "--set", "seed=4"]).seed == 3


def test_settings_are_repeated_and_may_hold_commas_quotes_and_brackets(spec, monkeypatch):
    settings = {
        "layers.layer.router": "{kind: sma, temperature_scale: 0.5}",
        "training.betas": "[0.8, 0.9]",
        "precision": '"64-true"',
        "training.clip_norm": "null",
    }
    arguments = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    chosen = _experiment(monkeypatch, ["--spec", spec, *arguments, "--set=width=16"])
    assert chosen.model.layer_specs[0].router.temperature_scale == 0.5
    assert (chosen.training.betas, chosen.precision, chosen.training.clip_norm, chosen.model.width) == (
        (0.8, 0.9),
        "64-true",
        None,
        16,
    )


def test_environment_variable_named_set_is_ignored(spec, monkeypatch):
    monkeypatch.setenv("SET", "anything")
    assert _experiment(monkeypatch, ["--spec", spec]) == tiny()


def test_folder_that_is_not_empty_is_refused(spec, tmp_path, capsys):
    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert main(["--spec", str(spec), "--out", str(out)]) == 2
    complaint = (
        f"error: the folder '{out}' is not empty; give another --out, or --resume {out} to resume the run in it\n"
    )
    assert _said(capsys) == ("", complaint)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_file_at_the_path_of_the_folder_is_refused(spec, cache, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--spec", str(spec), "--data", str(cache), "--out", str(tmp_path / "file"), "--no-progress"]) == 2
    assert re.search(
        r"error: cannot make the folder '.*file': '.*file' is not a folder; give another folder", _said(capsys)[1]
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments", [["--set", "width=4"], ["--seed", "1"], ["--spec", "other.yaml"]], ids=["set", "seed", "spec"]
)
def test_resumed_experiment_cannot_be_changed(finished, arguments, capsys):
    assert main(["--resume", str(finished[0]), *arguments]) == 2
    complaint = f"error: --resume continues the experiment as it was; leave {arguments[0]} out, or start a new run\n"
    assert _said(capsys) == ("", complaint)


def test_finished_run_is_not_resumed(finished, capsys):
    out, _ = finished
    before = (out / "summary.json").stat().st_mtime_ns
    assert main(["--resume", str(out)]) == 2
    assert _said(capsys) == (
        "",
        f"error: the run in '{out}' is finished; its results are in {out / 'summary.json'}\n",
    )
    assert (out / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("update", "note"), [(4, True), (23, False)], ids=["no-checkpoint-yet", "with-checkpoint"])
def test_interrupted_run_is_resumed_by_its_folder(finished, data, cache, tmp_path, monkeypatch, capsys, update, note):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_update(patch, update, fail)
        with pytest.raises(RuntimeError, match="the power went out"):
            train(tiny(), out, data)
    assert main(["--resume", str(out), "--data", str(cache), "--no-progress"]) == 0
    assert (f"no checkpoint yet in {out}: starting from the beginning" in _said(capsys)[0]) == note
    assert same(checkpoint(out)["state_dict"], checkpoint(finished[0])["state_dict"])
    assert (out / "activation.png").is_file()


def test_figure_that_failed_on_a_full_disk_is_drawn_by_resuming(spec, cache, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "activation.png")

    out, common = tmp_path / "run", ["--data", str(cache), "--no-progress", "--accelerator", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("sma.recipes.reports.classification.ClassificationReport.draw", full)
        assert main(["--spec", str(spec), "--out", str(out), *common]) == 2
    assert (
        f"make room, and resume with: {RESUME} {out} --accelerator cpu --data {cache} --no-progress" in _said(capsys)[1]
    )
    assert main(["--resume", str(out), *common]) == 0
    assert (out / "activation.png").is_file()


def test_ctrl_c_gives_a_message_and_exit_code_130(spec, cache, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    before_update(monkeypatch, 13, interrupt)
    assert main(["--spec", str(spec), "--data", str(cache), "--out", str(tmp_path / "run"), "--no-progress"]) == 130
    hint = f"interrupted; resume with: {RESUME} {tmp_path / 'run'} --data {cache} --no-progress"
    assert _said(capsys)[1].splitlines()[-1] == hint


def test_non_finite_loss_gives_an_error_message(spec, cache, tmp_path, monkeypatch, capsys):
    before_update(
        monkeypatch,
        13,
        lambda classifier: [parameter.data.fill_(float("nan")) for parameter in classifier.parameters()],
    )
    assert main(["--spec", str(spec), "--data", str(cache), "--out", str(tmp_path / "run"), "--no-progress"]) == 2
    assert "error: the loss of update 13 is nan; the last checkpoint is still good: start a new run" in _said(capsys)[1]
