"""One small data set, one finished run, and recorded updates for all tests of the recipes."""

import importlib
from pathlib import Path

import pytest

from sma.recipes.tasks import batch as batches
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training import graph
from sma.recipes.training.run import Finished
from tests.tape import TapeRecorder
from tests.test_recipes.tiny import tiny, tiny_data, train


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    """60 to 120 short expressions per split."""
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """An uninterrupted run of the experiment with seed 0, and its folder."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, train(tiny(), out, data)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[TapeRecorder]:
    """Record updates on the CPU; the returned list receives every recorder."""
    made: list[TapeRecorder] = []

    def make() -> TapeRecorder:
        made.append(TapeRecorder())
        return made[-1]

    monkeypatch.setitem(graph.RECORDERS, "cpu", make)
    monkeypatch.setattr(batches, "LENGTHS", 1)  # one padded length
    for name in ("torch.optim.adam", "torch.optim.radam"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu", "meta"])
    return made
