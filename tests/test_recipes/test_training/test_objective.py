"""A third-party task is trained, resumed, evaluated and swept by its own objective."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import sma.spec
from sma.errors import SpecError
from sma.model import build
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.run_folder import EVALUATION, SUMMARY
from sma.recipes.seqboat_lra import Options, main
from sma.recipes.tasks.contract import ClassificationTask, Metric, TaskSpec
from sma.recipes.tasks.language.task import LanguageTask
from sma.recipes.training.evaluation import evaluate
from sma.recipes.training.objective import load_objective
from sma.recipes.training.run import Finished, run_experiment
from sma.spec import dump_yaml, kinds
from tests.test_recipes.regression import LENGTH, Regressor, RowMeanTask
from tests.test_recipes.tiny import MODEL, TRAINING, checkpoint, power_failure, same

pytestmark = pytest.mark.slow  # real trainings

EXPERIMENT = {
    "task": {"kind": "row_mean"},
    "model": {**MODEL, "encoder": {"kind": "real_number"}, "head": {"kind": "mean_pool_linear", "classes": 1}},
    "training": {**TRAINING, "learning_rate": 0.03},
    "threads": 1,
}


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds("task")
    for task in (RowMeanTask, Untrainable):
        monkeypatch.setitem(sma.spec._registry["task"], task.model_fields["kind"].default, task)


def experiment(*settings: str) -> ExperimentSpec:
    return load_experiment(EXPERIMENT, settings)


def train(spec: ExperimentSpec, out: Path, **options: Any) -> Finished:
    return run_experiment(spec, out, spec.task.prepare(out), accelerator="cpu", progress=False, **options)


def test_a_run_tests_the_metric_of_the_task(tmp_path: Path) -> None:
    spec = experiment("training.updates=120", "training.evaluate_every=40")
    finished = train(spec, tmp_path, title="row means")
    rows = spec.task.prepare(tmp_path).test
    with torch.no_grad():
        guesses = finished.module.model.eval()(rows).logits[:, 0]
    error = finished.summary["error"]
    assert error == pytest.approx(float((guesses - 2 * rows.mean(1)).square().mean()), rel=1e-5)
    assert error < 0.5 * float((2 * rows.mean(1)).square().mean())  # the error of the constant answer 0
    assert json.loads((tmp_path / SUMMARY).read_text()) == finished.summary
    assert json.loads((tmp_path / EVALUATION).read_text()) == {"task": "row_mean", "error": error}
    assert finished.summary["data"] == {"rows": "64 rows"}
    assert len(finished.summary["activation_rate"]) == 2
    assert (tmp_path / "title.txt").read_text() == f"row means: {error:.3f} squared error, seed 0"


def test_the_best_checkpoint_has_the_best_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([3.0, 1.0, 2.0])
    log = Regressor._log

    def scripted(self: Regressor, split: str) -> None:
        log(self, split)
        if split == "val":
            self.log("val_squared_error", next(errors))

    monkeypatch.setattr(Regressor, "_log", scripted)
    assert train(experiment(), tmp_path).summary["best_update"] == 20


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(experiment(), tmp_path / "whole")
    with power_failure(14, Regressor):
        train(experiment(), tmp_path / "parts")
    assert train(experiment(), tmp_path / "parts", resume=True).summary["error"] == whole.summary["error"]
    assert same(*(checkpoint(tmp_path / name)["state_dict"] for name in ("parts", "whole")))


def test_a_command_trains_and_evaluates_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment.yaml").write_text(dump_yaml(experiment()))
    run, common = tmp_path / "run", ["--no-progress", "--accelerator", "cpu", "--data", str(tmp_path)]
    assert main(["--spec", str(tmp_path / "experiment.yaml"), "--out", str(run), *common]) == 0
    error = json.loads((run / SUMMARY).read_text())["error"]
    printed = capsys.readouterr().out
    assert "SeqBoat on row_mean: 64 rows, " in printed
    assert f"error {error:.3f} on 64 rows\n" in printed
    assert main(["--evaluate", str(run), *common]) == 0
    printed = capsys.readouterr().out
    assert f"error             {error:.6f} of the test split, recorded {error:.6f}\n" in printed
    assert "reproduced        exactly" in printed
    assert json.loads((run / EVALUATION).read_text())["reproduced"] is True


def test_a_sweep_compares_trials_by_the_metric_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sma.tune import trial
    from sma.tune.sweep import Measure, make_sweep

    space = {"training.learning_rate": {"kind": "loguniform", "low": 0.01, "high": 0.1}}
    sweep = make_sweep({"experiment": experiment(), "space": space})
    assert sweep.quality == Measure("squared_error", "min")
    reports: list[tuple[str, dict[str, float]]] = []
    monkeypatch.setattr(
        trial.TrialReporter, "report", lambda self, status, metrics, reason="": reports.append((status, metrics))
    )
    data = sweep.experiment.task.prepare(tmp_path)
    values = {"training.learning_rate": 0.02}
    trial.train_trial({"values": values}, sweep, data, tmp_path / "trial", "cpu", 0.0, trial.Checkpoint(), "")  # type: ignore[arg-type]
    assert [status for status, _ in reports] == ["running"] * 3 + ["finished"]
    last = reports[-1][1]
    assert last["test_squared_error"] == json.loads((tmp_path / "trial" / SUMMARY).read_text())["error"]
    assert last["squared_error"] == min(found["squared_error"] for _, found in reports[:3])
    assert last["macs_per_token"] > 0


def test_several_workers_accept_the_task(tmp_path: Path) -> None:
    from sma.tune.parallel import Workers

    Workers(2).check_experiment(experiment())
    Workers(2).check_data(experiment(), experiment().task.prepare(tmp_path))
    with pytest.raises(SpecError, match="a batch of 8 samples cannot be shared evenly by 3 workers"):
        Workers(3).check_data(experiment(), experiment().task.prepare(tmp_path))


def test_an_objective_states_the_longest_row_for_the_memory_estimate(tmp_path: Path) -> None:
    objective = load_objective(RowMeanTask(), RowMeanTask().prepare(tmp_path))
    assert (objective.longest_row, objective.typical_row, objective.subject) == (LENGTH, LENGTH, "row_mean")


class Untrainable(TaskSpec):
    """A task without a metric and an objective."""

    kind: str = "untrainable"

    def prepare(self, folder: Path, *, progress: bool = True) -> Any:
        return None


COMPLAINT = (
    "the task 'untrainable' cannot be trained, evaluated or swept: Untrainable lacks metric and objective; "
    "set Untrainable.metric to a Metric and Untrainable.objective to the class that trains it"
)


def test_a_task_without_metric_and_objective_is_refused_everywhere(tmp_path: Path) -> None:
    from sma.tune.parallel import Workers
    from sma.tune.sweep import make_sweep

    spec = experiment().replace(task=Untrainable())
    with pytest.raises(SpecError, match=COMPLAINT):
        train(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SpecError, match=COMPLAINT):
        make_sweep(
            {"experiment": spec, "space": {"training.learning_rate": {"kind": "choice", "values": [0.01, 0.02]}}}
        )
    with pytest.raises(SpecError, match=COMPLAINT):
        Workers(2).check_experiment(spec)
    (tmp_path / "experiment.yaml").write_text(dump_yaml(spec))
    (tmp_path / SUMMARY).write_text("{}")
    with pytest.raises(SpecError, match=COMPLAINT):
        evaluate(tmp_path, Options())


def test_error_names_the_missing_objective() -> None:
    class Half(TaskSpec):
        metric: ClassVar[Metric] = Metric("error", "min", "error")
        kind: str = "half"

    with pytest.raises(SpecError, match=r"Half lacks objective; set Half\.metric"):
        Half().check_trainable()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        pytest.param("no_such_package:Class", "cannot be imported: No module named 'no_such_package'", id="module"),
        pytest.param("tests.test_recipes.regression:Nothing", "cannot be imported: .*'Nothing'", id="class"),
        pytest.param("not a name", "cannot be imported: invalid format", id="spelling"),
        pytest.param(
            "tests.test_recipes.regression:Rows", "must be a subclass of .*objective.Objective", id="no-objective"
        ),
    ],
)
def test_error_names_an_invalid_objective(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowMeanTask, "objective", name)
    with pytest.raises(SpecError, match=rf"the objective '{name}' of the task 'row_mean' {complaint}"):
        load_objective(RowMeanTask(), None)


@pytest.mark.parametrize(
    ("metric", "value", "headline", "digits", "difference"),
    [
        pytest.param(
            ClassificationTask.metric, 0.57, "test accuracy 57.0%", "57.0000%", "+57.0000 points", id="percent"
        ),
        pytest.param(LanguageTask.metric, 2.5432, "2.543 bits per character", "2.543200", "+2.543200", id="number"),
    ],
)
def test_a_metric_formats_values_like_reports(
    metric: Metric, value: float, headline: str, digits: str, difference: str
) -> None:
    assert (metric.headline(value), metric.digits(value), metric.difference(value)) == (headline, digits, difference)


def test_callbacks_keep_their_names_in_checkpoints(tmp_path: Path) -> None:
    train(experiment(), tmp_path)
    names = {name.partition("{")[0] for name in checkpoint(tmp_path)["callbacks"]}
    assert names == {"BestCheckpoint", "LastCheckpoint", "Origin", "Preemption", "RandomStates", "Stopwatch"}


def test_a_training_module_without_training_scores_is_saved(tmp_path: Path) -> None:
    spec = experiment()
    objective = load_objective(spec.task, spec.task.prepare(tmp_path))
    saved: dict[str, Any] = {}
    objective.module(build(spec.model, seed=0), spec.training).on_save_checkpoint(saved)
    assert saved.pop("fit_scores") == {}
    assert saved.keys() == {"format_version"}
