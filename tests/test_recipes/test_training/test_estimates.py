"""Experiments that do not fit are refused before anything is allocated, downloaded or generated."""

import shutil
from types import SimpleNamespace

import pytest

from sma.errors import SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io.presets import shipped
from sma.recipes.seqboat_lm import main as language
from sma.recipes.seqboat_lra import main
from sma.recipes.seqboat_speech import main as speech
from sma.recipes.training.estimates import check_data_fits, check_update_fits
from tests.test_recipes.tiny import tiny, train

HUGE = 10**12
TASKS = (
    "digits",
    "image",
    "language",
    "listops",
    "mqar",
    "pathfinder",
    "pathx",
    "recall",
    "retrieval",
    "speech",
    "text",
)


@pytest.mark.parametrize(
    ("task", "field"),
    [
        *(
            pytest.param(task, f"task.data.{split}", id=f"{task}-{split}")
            for task in ("listops", "recall", "mqar", "pathfinder")
            for split in ("train", "validation", "test")
        ),
        pytest.param("pathx", "task.data.train", id="pathx"),
        pytest.param("speech", "task.data.clips", id="speech"),
        pytest.param("recall", "task.data.length", id="recall-length"),
    ],
)
def test_data_that_cannot_fit_is_refused(task, field, tmp_path):
    spec = load_experiment(f"{task}_tiny", [f"{field}={HUGE}"])
    with pytest.raises(
        SpecError, match=rf"the data of the task '{task}' needs .* bytes.*; lower the numbers in task\.data"
    ):
        check_data_fits(spec, tmp_path / "not" / "there")


@pytest.mark.parametrize("task", TASKS)
def test_batch_that_cannot_fit_is_refused(task):
    samples = [f"task.data.train={HUGE}"] if task in ("listops", "recall", "mqar", "pathfinder", "pathx") else []
    spec = load_experiment(f"{task}_tiny", [f"training.batch_size={HUGE}", *samples])
    with pytest.raises(
        SpecError, match=rf"one update needs .*; lower training\.batch_size={HUGE}, or the length of the samples"
    ):
        check_update_fits(spec)


def test_long_segments_are_refused():
    spec = load_experiment("language_tiny", [f"task.segment={HUGE}"])
    with pytest.raises(SpecError, match=r"one update needs .*, or the length of the samples"):
        check_update_fits(spec)


def test_long_samples_are_refused_when_the_data_is_known():
    check_update_fits(tiny())
    with pytest.raises(SpecError, match="one update needs"):
        check_update_fits(tiny(), length=HUGE)
    with pytest.raises(SpecError, match="one update needs"):
        check_update_fits(tiny(training__batch_size=2 * HUGE, task__data__train=2 * HUGE), processes=2)


def test_optimiser_of_a_large_model_is_refused():
    spec = load_experiment("listops_tiny", ["model.width=10000000", "model.head.hidden=10000000"])
    with pytest.raises(
        SpecError, match=r"the model with its optimiser needs .*; lower model\.width or the number of layers"
    ):
        check_update_fits(spec)


def test_batch_is_limited_by_the_number_of_samples():
    check_update_fits(tiny(training__batch_size=HUGE))  # the data has 120 expressions


def test_every_preset_fits(tmp_path):
    for name in shipped("presets"):
        spec = load_experiment(name)
        check_data_fits(spec, tmp_path)
        if name.endswith("_tiny"):
            check_update_fits(spec)


def test_data_on_disk_is_compared_with_the_disk_size(tmp_path, monkeypatch):
    spec = load_experiment("pathfinder_tiny", ["task.data.train=10000"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1_000_000))
    with pytest.raises(
        SpecError, match=r"needs .* bytes.*, and the disk of '.*' has 1,000,000 bytes; lower the numbers in task\.data"
    ):
        check_data_fits(spec, tmp_path)


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        pytest.param(main, f"task.data.train={HUGE}", id="samples"),
        pytest.param(main, f"task.data.train={10**30}", id="more-than-there-are-addresses"),
        pytest.param(language, f"training.batch_size={HUGE}", id="text"),
        pytest.param(speech, f"training.batch_size={HUGE}", id="speech"),
    ],
)
def test_command_refuses_in_one_line_and_creates_nothing(tmp_path, capsys, monkeypatch, command, setting):
    monkeypatch.chdir(tmp_path)
    assert command(["--set", setting, "--data", str(tmp_path / "data")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_an_update_that_does_not_fit(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sma.memory.free_memory", lambda _=None: 1)
    with pytest.raises(SpecError, match="one update needs"):
        train(tiny(training__batch_size=10**8, task__data__train=10**8), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()
