"""Runs: files of the folder, one result per seed, and resumed runs that equal uninterrupted ones."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sma
from sma.errors import CheckpointError, DataError
from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import BEST, LAST
from sma.recipes.reports.classification import ClassificationReport
from sma.recipes.training import classification as training
from sma.recipes.training import loop
from sma.recipes.training.callbacks import RandomStates
from sma.recipes.training.classification import Classifier
from sma.recipes.training.provenance import commit, hardware, versions
from sma.recipes.training.run import run_experiment
from tests.test_recipes.tiny import (
    assert_same_run,
    before_update,
    checkpoint,
    fail,
    metrics_of,
    power_failure,
    same,
    tiny,
    train,
)


def _weights(out, name=LAST):
    return checkpoint(out, name)["state_dict"]


def test_folder_has_the_listed_files(finished):
    out, _ = finished
    found = {
        re.sub(r"events\.out.*", "events", str(path.relative_to(out))) for path in out.rglob("*") if path.is_file()
    }
    assert found == {
        "experiment.yaml",
        "data.json",
        "versions.json",
        "summary.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics/version_0/metrics.csv",
        "tensorboard/events",
        "tensorboard/hparams.yaml",
        "model/model.safetensors",
        "model/spec.yaml",
        "evaluation.json",
    }


def test_repr_of_a_finished_run_is_one_line(finished):
    _, run = finished
    line = repr(run)
    assert line.startswith(f"Finished(listops, test_accuracy={run.summary['test_accuracy']:.4g}, test_loss=")
    assert (len(line) < 160, "\n" in line) == (True, False)


def test_folder_holds_the_experiment_that_ran(finished):
    out, _ = finished
    assert load_experiment(out / "experiment.yaml") == tiny()


def test_versions_name_the_software_and_the_commit(finished):
    out, _ = finished
    recorded = json.loads((out / "versions.json").read_text())
    assert recorded == [{"update": 0, **versions()}]
    assert recorded[0]["torch"] == torch.__version__
    assert set(versions()) == {
        "python",
        "sparse-modular-activation",
        "torch",
        "lightning",
        "torchmetrics",
        "numpy",
        "commit",
    }


def test_hashes_of_the_data_are_written_before_the_first_update(data, tmp_path):
    _interrupted(tmp_path, data, 0)
    assert json.loads((tmp_path / "data.json").read_text()) == data.hashes


def test_summary_holds_the_measurements(finished, data):
    out, done = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary == done.summary
    assert summary["seed"] == 0
    assert summary["commit"] == commit()
    assert summary["data"] == data.hashes
    assert (summary["task"], summary["chance"], summary["updates"]) == ("listops", 0.1, 30)
    assert summary["parameters"] == tiny().model.num_parameters()
    assert (summary["hardware"], summary["device"]) == (hardware("cpu"), "cpu")
    assert 0 < summary["seconds"] < 300
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", summary["date"])
    batches = training.Classification(tiny().task, data).training_batches(tiny().training, 0)
    tokens = sum(int(batch.valid.sum()) for batch in batches)
    # Updates take only a part of the time of the run.
    assert summary["tokens_per_second"] > tokens / summary["seconds"]


def test_saved_model_gives_the_recorded_accuracy_and_rates(finished, data):
    out, done = finished
    model = sma.load(out / "model")
    assert model.spec == tiny().model
    right, tokens, ran = 0, 0, [0, 0]
    with torch.no_grad():
        for number in range(len(data.test)):
            ids, target = data.test[number]
            output = model(ids[None])
            right += int(output.logits.argmax()) == target
            tokens += len(ids)
            ran = [count + int(decision.active.sum()) for count, decision in zip(ran, output.decisions, strict=True)]
    assert done.summary["test_accuracy"] == pytest.approx(right / len(data.test), abs=1e-6)
    # Rounding may flip a decision near the threshold.
    assert done.summary["activation_rate"] == pytest.approx([count / tokens for count in ran], abs=3 / tokens)


def test_saved_model_is_the_best_checkpoint(finished):
    out, done = finished
    best = _weights(out, BEST)
    assert same({f"model.{name}": tensor for name, tensor in sma.load(out / "model").state_dict().items()}, best)
    assert checkpoint(out, BEST)["global_step"] == done.summary["best_update"]
    scores = {step: float(line["val_accuracy"]) for (step, kind), line in metrics_of(out).items() if kind == "val"}
    assert sorted(scores) == [10, 20, 30]
    assert scores[done.summary["best_update"]] == max(scores.values())


def test_metrics_are_in_the_csv_file(finished):
    out, done = finished
    lines = metrics_of(out)
    assert set(lines) == {(step, kind) for step in (10, 20, 30) for kind in ("fit", "val")} | {(30, "test")}
    assert {"loss", "fit_accuracy", "fit_rate", "fit_rate/layer0/attention", "fit_rate/layer1/attention"} <= set(
        lines[10, "fit"]
    )
    assert {"val_loss", "val_accuracy", "val_rate", "val_rate/layer0/attention", "val_rate/layer1/attention"} <= set(
        lines[10, "val"]
    )
    assert float(lines[30, "test"]["test_accuracy"]) == done.summary["test_accuracy"]


def test_metrics_are_also_in_tensorboard(finished):
    out, _ = finished
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val_accuracy")] == [9, 19, 29]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [float(line["loss"]) for (_, kind), line in sorted(metrics_of(out).items()) if kind == "fit"]
    )


def test_one_seed_gives_one_result(finished, data, tmp_path):
    out, done = finished
    torch.manual_seed(123)  # earlier draws in the process have no effect
    again = train(tiny(), tmp_path, data)
    assert same(checkpoint(tmp_path)["state_dict"], checkpoint(out)["state_dict"])
    assert same(checkpoint(tmp_path)["optimizer_states"], checkpoint(out)["optimizer_states"])
    varying = {"seconds", "tokens_per_second", "date"}
    assert {name: value for name, value in again.summary.items() if name not in varying} == {
        name: value for name, value in done.summary.items() if name not in varying
    }
    assert metrics_of(tmp_path) == metrics_of(out)


def test_another_seed_gives_another_result(finished, data, tmp_path):
    out, _ = finished
    train(tiny(seed=1, training__updates=10), tmp_path, data)
    mine, theirs = _weights(tmp_path), _weights(out)
    assert [name for name in mine if mine[name].dim() > 1 and torch.equal(mine[name], theirs[name])] == []


def _interrupted(out, data, update, spec=None):
    with power_failure(update):
        train(spec or tiny(), out, data, resume=True)


@pytest.mark.parametrize(
    "updates",
    [
        pytest.param([5], id="before-the-first-checkpoint"),
        pytest.param([10], id="right-after-a-checkpoint"),
        pytest.param([13], id="first-epoch"),
        pytest.param([27], id="second-epoch"),
        pytest.param([12, 14, 25], id="three-times"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, data, tmp_path, updates):
    for update in updates:
        _interrupted(tmp_path, data, update)
        assert not (tmp_path / "summary.json").exists()
        torch.rand(7)  # another process would have other random states
    train(tiny(), tmp_path, data, resume=True)
    assert_same_run(tmp_path, finished[0])


@pytest.mark.parametrize(
    ("settings", "update"),
    [
        pytest.param({"training__updates": 11, "training__evaluate_every": 4}, 9, id="evaluations-do-not-divide"),
        pytest.param({"precision": "64-true"}, 15, id="float64"),
    ],
)
def test_resumed_run_with_other_settings_equals_the_uninterrupted_one(data, tmp_path, settings, update):
    spec = tiny(**settings)
    train(spec, tmp_path / "whole", data)
    _interrupted(tmp_path / "parts", data, update, spec)
    train(spec, tmp_path / "parts", data, resume=True)
    for part in ("global_step", "state_dict", "optimizer_states"):
        assert same(checkpoint(tmp_path / "parts")[part], checkpoint(tmp_path / "whole")[part]), part


def test_dropout_needs_the_random_states(finished, data, tmp_path, monkeypatch):
    # Without them the test above must fail: with a model that draws no random numbers it would prove nothing.
    _interrupted(tmp_path, data, 13)
    monkeypatch.setattr(RandomStates, "on_train_start", lambda *_: None)
    train(tiny(), tmp_path, data, resume=True)
    assert not same(_weights(tmp_path), _weights(finished[0]))


def test_run_that_was_trained_and_not_yet_tested_is_only_tested(finished, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "test_step", lambda self, batch, batch_idx: fail(self))
        with pytest.raises(RuntimeError, match="the power went out"):
            train(tiny(), tmp_path, data)
    before_update(monkeypatch, 30, fail)  # no update is left
    summary = train(tiny(), tmp_path, data, resume=True).summary
    spent = checkpoint(tmp_path)["callbacks"]["Stopwatch"]
    assert summary["tokens_per_second"] == round(spent["tokens"] / spent["updating"])
    assert_same_run(tmp_path, finished[0])


def test_time_and_tokens_cover_all_parts_of_a_run(finished, data, tmp_path):
    _interrupted(tmp_path, data, 13)
    state = checkpoint(tmp_path)
    assert 0 < state["callbacks"]["Stopwatch"]["updating"] < state["callbacks"]["Stopwatch"]["elapsed"]
    state["callbacks"]["Stopwatch"]["elapsed"] += 1000
    torch.save(state, tmp_path / LAST)
    assert 1000 < train(tiny(), tmp_path, data, resume=True).summary["seconds"] < 1300
    mine, theirs = (checkpoint(folder)["callbacks"]["Stopwatch"] for folder in (tmp_path, finished[0]))
    assert mine["tokens"] == theirs["tokens"] > 0


def test_run_whose_folder_was_moved_keeps_its_best_checkpoint(data, tmp_path, monkeypatch, recwarn):
    scores = iter([0.9, 0.5, 0.4])

    def scored(self):
        self.log_dict({**self.val_scores.compute("val"), "val_accuracy": next(scores)})

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", scored)
    _interrupted(tmp_path / "here", data, 13)
    (tmp_path / "here").rename(tmp_path / "there")
    assert train(tiny(), tmp_path / "there", data, resume=True).summary["best_update"] == 10
    assert checkpoint(tmp_path / "there", BEST)["global_step"] == 10
    assert [str(warning.message) for warning in recwarn] == []
    assert not (tmp_path / "here").exists()
    best = next(
        state
        for name, state in checkpoint(tmp_path / "there")["callbacks"].items()
        if name.startswith("BestCheckpoint")
    )
    assert best["best_model_path"] == str(tmp_path / "there" / BEST)


def test_run_resumes_only_with_its_own_data(finished, data, tmp_path):
    _interrupted(tmp_path, data, 13)
    other = data._replace(hashes={**data.hashes, next(iter(data.hashes)): "0" * 64})
    with pytest.raises(
        DataError,
        match=rf"the data differs from that with which the run in '.*' began: {next(iter(data.hashes))} has another",
    ):
        train(tiny(), tmp_path, other, resume=True)
    train(tiny(), tmp_path, data, resume=True)
    assert_same_run(tmp_path, finished[0])


def test_run_without_a_checkpoint_starts_anew_with_the_current_data(data, tmp_path):
    _interrupted(tmp_path, data, 5)
    other = data._replace(hashes={"train": "0" * 64})
    assert train(tiny(training__updates=6), tmp_path, other).summary["data"] == {"train": "0" * 64}
    assert json.loads((tmp_path / "data.json").read_text()) == {"train": "0" * 64}


def test_versions_of_every_part_are_kept(data, tmp_path, monkeypatch):
    first = {**versions(), "commit": "an earlier one"}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "versions", lambda: first)
        _interrupted(tmp_path, data, 13)
    train(tiny(), tmp_path, data, resume=True)
    assert json.loads((tmp_path / "versions.json").read_text()) == [
        {"update": 0, **first},
        {"update": 10, **versions()},
    ]


@pytest.mark.parametrize("name", [LAST, BEST])
@pytest.mark.parametrize("left", [0, 1000], ids=["empty", "cut"])
def test_damaged_checkpoint_is_refused(finished, data, tmp_path, name, left):
    shutil.copytree(finished[0], tmp_path / "run")
    os.truncate(tmp_path / "run" / name, left)
    complaint = rf"the checkpoint '.*{name}' cannot be read: .*; replace it with an intact checkpoint"
    with pytest.raises(CheckpointError, match=complaint):
        train(tiny(), tmp_path / "run", data, resume=True)


def test_remains_of_killed_writes_are_removed(data, tmp_path):
    drafts = [tmp_path / folder / f".file{number}.draft" for number, folder in enumerate(("", "checkpoints", "model"))]
    for draft in drafts:
        draft.parent.mkdir(exist_ok=True)
        draft.write_bytes(b"half")
    train(tiny(training__updates=6), tmp_path, data)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_figures_are_drawn_before_the_run_counts_as_finished(data, tmp_path, monkeypatch):
    def full(report, out, title):
        assert out == tmp_path
        assert not (tmp_path / "summary.json").exists()
        raise OSError(28, "No space left on device")

    spec, titles = tiny(training__updates=6), []
    monkeypatch.setattr(ClassificationReport, "draw", full)
    with pytest.raises(OSError, match="No space left"):
        run_experiment(spec, tmp_path, data, accelerator="cpu", progress=False, title="short lists")
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(ClassificationReport, "draw", lambda report, out, title: titles.append(title))
    run_experiment(spec, tmp_path, data, resume=True, accelerator="cpu", progress=False, title="short lists")
    accuracy = json.loads((tmp_path / "summary.json").read_text())["test_accuracy"]
    assert titles == [f"short lists: test accuracy {accuracy:.1%}, seed {spec.seed}"]


def test_resuming_prints_no_warning(data, tmp_path, recwarn, capfd):
    _interrupted(tmp_path, data, 13)
    train(tiny(), tmp_path, data, resume=True)
    assert [str(warning.message) for warning in recwarn] == []
    assert not [line for line in capfd.readouterr().err.splitlines() if "router of" not in line]


@pytest.mark.parametrize("place", ["training_step", "validation_step", "test_step"])
def test_ctrl_c_raises_a_keyboard_interrupt_and_the_handler_is_restored(data, tmp_path, monkeypatch, place):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, place, interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        train(tiny(training__updates=6), tmp_path, data)
    assert signal.getsignal(signal.SIGINT) == handler


def test_commit_has_the_form_of_a_git_hash():
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit())


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("no git"), subprocess.CalledProcessError(128, "git"), subprocess.TimeoutExpired("git", 10)],
)
def test_commit_is_unknown_outside_a_checkout(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", refuse)
    assert commit() is None
    assert versions()["commit"] is None


def test_hardware_has_a_name():
    assert re.search(r"\w", hardware())


def test_folder_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write '.*run': Not a directory; the folder must be writable"):
        train(tiny(), tmp_path / "file" / "run", data)


def test_interrupted_summary_leaves_no_partial_file(data, tmp_path, monkeypatch):
    def half(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_activation", half)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            train(tiny(training__updates=6), tmp_path, data)
    assert not (tmp_path / "summary.json").exists()
    assert [path.name for path in tmp_path.rglob(".*")] == []
    assert train(tiny(training__updates=6), tmp_path, data, resume=True).summary["updates"] == 6
