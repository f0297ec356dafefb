"""TensorBoard logs of a finished run: hyper-parameters, results and figures."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sma.recipes.reports.figures import drawing, save_figure
from sma.recipes.training.tensorboard import log_finished
from tests.test_recipes.tiny import tiny


def test_hyper_parameters_and_results_are_in_tensorboard(finished):
    out, done = finished
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("final/")} == {
        "final/test_accuracy",
        "final/test_loss",
        "final/activation_rate",
    }
    (event,) = events.Scalars("final/test_accuracy")
    assert event.value == pytest.approx(done.summary["test_accuracy"])
    plugin = events.PluginTagToContent("hparams")
    assert set(plugin) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    for name, value in (("training/learning_rate", 0.003), ("training/updates", 30.0), ("model/width", 8.0)):
        assert hyper_parameters(plugin["_hparams_/session_start_info"])[name] == value


def hyper_parameters(content):
    start = HParamsPluginData.FromString(content).session_start_info
    return {name: value.number_value or value.string_value for name, value in start.hparams.items()}


def test_figures_are_in_tensorboard(finished, tmp_path):
    out, done = finished
    logger = TensorBoardLogger(tmp_path, name="", version="")
    with drawing(4, 3) as figure:
        figure.subplots().plot([1, 2])
        path = save_figure(figure, tmp_path / "activation.png")
    log_finished(SimpleNamespace(loggers=[logger], global_step=30), tiny(), {"test_accuracy": 0.5}, [path])
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("activation")
    assert (image.step, image.width, image.height) == (30, 440, 330)


def test_a_broken_figure_gives_a_warning(tmp_path, caplog):
    (tmp_path / "own.png").write_bytes(b"no image")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_finished(SimpleNamespace(loggers=[logger], global_step=30), tiny(), {"loss": 0.5}, [tmp_path / "own.png"])
    assert "warning: own.png in TensorBoard was not drawn: UnidentifiedImageError" in caplog.text
    (event,) = EventAccumulator(str(tmp_path)).Reload().Scalars("final/loss")
    assert (event.step, event.value) == (30, 0.5)
