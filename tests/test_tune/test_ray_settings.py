import os

import pytest

from sma.tune.ray_settings import TUNE, ray_settings


def test_other_variables_of_ray_are_hidden_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "TUNE_RESULT_DELIM": ".",
        "RAY_TRAIN_V2_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "1",
        "RAY_ADDRESS": "127.0.0.1:1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    before = dict(os.environ)
    with ray_settings(TUNE):
        assert "TUNE_RESULT_DELIM" not in os.environ
        assert {name: os.environ[name] for name in ("RAY_TRAIN_V2_ENABLED", "RAY_AIR_NEW_OUTPUT")} == {
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_AIR_NEW_OUTPUT": "0",
        }
        assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert dict(os.environ) == before


def test_the_users_choice_about_usage_statistics_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with ray_settings({}):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
