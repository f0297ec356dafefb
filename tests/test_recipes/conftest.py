"""One small data set and one finished run for all tests of the recipes."""

from pathlib import Path

import pytest

from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.run import Finished
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
