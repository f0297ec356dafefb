"""Evaluation of a finished run reproduces the recorded results exactly, or reports why it cannot."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sma.checkpoint import load
from sma.errors import CheckpointError
from sma.recipes.seqboat_lra import Options, main
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.training.classification import Classification
from sma.recipes.training.evaluation import evaluate
from sma.recipes.training.resuming import changed


@pytest.fixture
def run(finished, data, tmp_path, monkeypatch):
    """A copy of a finished run whose data is already prepared."""
    monkeypatch.setattr(ListOpsTask, "prepare", lambda self, folder, progress=True: data)
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def _options(**settings):
    return Options(accelerator="cpu", progress=False, **settings)


def test_recorded_results_are_reproduced_bit_for_bit(run, finished, capsys):
    result = evaluate(run, _options())
    assert result["reproduced"]
    assert (result["test_accuracy"], result["test_loss"]) == tuple(
        finished[1].summary[name] for name in ("test_accuracy", "test_loss")
    )
    printed = capsys.readouterr().out
    accuracy = f"{result['test_accuracy']:.4%}"
    assert f"test accuracy     {accuracy} of 60 answers, recorded {accuracy}\n" in printed
    assert "reproduced        exactly" in printed
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert (run / "confusion.png").stat().st_size > 5_000


def test_confusion_and_accuracy_per_class_equal_a_loop_over_the_answers(run, data):
    result = evaluate(run, _options())
    model, counts = load(run / "model"), [[0] * 10 for _ in range(10)]
    with torch.no_grad():
        for batch in Classification(ListOpsTask(), data).evaluation_batches("test"):
            for target, guess in zip(
                batch.targets.tolist(), model(batch.inputs, batch.valid).logits.argmax(-1).tolist(), strict=True
            ):
                counts[target][guess] += 1
    assert result["confusion"] == counts
    assert result["per_class"] == {str(k): counts[k][k] / sum(counts[k]) if any(counts[k]) else None for k in range(10)}


def test_training_writes_the_results_of_an_evaluation(run, finished):
    before = json.loads((run / "evaluation.json").read_text())
    again = evaluate(run, _options())
    assert before == {name: again[name] for name in before}
    assert finished[1].summary["per_class"] == before["per_class"]
    assert finished[1].report.confusion.counts.tolist() == before["confusion"]


def test_changed_data_is_reported(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    name = next(iter(summary["data"]))
    summary["data"][name] = "0" * 64
    (run / "summary.json").write_text(json.dumps(summary))
    assert evaluate(run, _options())["changed_data"] == [name]
    assert f"data              not that of the run: {name} has another hash" in capsys.readouterr().out


def test_changed_model_is_reported(run, capsys):
    weights = run / "model" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata=metadata)
    result = evaluate(run, _options())
    assert not result["reproduced"]
    printed = capsys.readouterr().out
    assert "reproduced        no, " in printed
    assert "points: " in printed


def test_hashes_are_compared_by_name():
    assert changed({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == ["b", "c", "d"]


@pytest.mark.parametrize("name", ["experiment.yaml", "summary.json"])
def test_unfinished_run_is_refused(run, name):
    (run / name).unlink()
    with pytest.raises(
        CheckpointError,
        match=rf"there is no finished run in '.*run': {name} is missing; give the folder of a finished run",
    ):
        evaluate(run, _options())


def test_damaged_summary_is_refused(run):
    (run / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary\.json' cannot be read: .*; the run must be repeated"):
        evaluate(run, _options())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "1"],
        ["--set", "width=4"],
        ["--out", "x"],
        ["--resume", "x"],
        ["--spec", "x"],
        ["--auto-resume"],
        ["--preset", "tiny"],
    ],
)
def test_evaluation_refuses_options_that_would_change_the_run(run, arguments, capsys):
    assert main(["--evaluate", str(run), *arguments]) == 2
    expected = f"error: --evaluate tests the run as it was; leave {arguments[0]} out\n"
    assert capsys.readouterr().err == expected


def test_command_line_evaluates(run, capsys):
    assert main(["--evaluate", str(run), "--no-progress", "--accelerator", "cpu"]) == 0
    assert "reproduced        exactly" in capsys.readouterr().out
