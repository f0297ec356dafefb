"""Set-up of all tests: shape checks, seeds, profiles of hypothesis, time limits, and skipped GPU tests."""

import gc
import logging
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

import tests.interpreter
import tests.shapes

ROOT = Path(__file__).resolve().parents[1]

# A garbage collection visits all objects, also those of thousands of collected tests, which
# `pytest_collection_finish` freezes.
gc.set_threshold(50_000, 20, 100)

if "sma" in sys.modules:
    raise RuntimeError("sma was imported before its shape annotations could be checked; import it in test files only")
# The recipes are not checked: their generators call small functions millions of times, and their tensor operations are
# calls of the core. The device programs are not checked: Triton compiles their source.
_CHECKED = [
    f"{package}.{part.name}"
    for package in ("sma", "sma.kernels")
    for part in pkgutil.iter_modules([str(ROOT / package.replace(".", "/"))])
    if part.name not in ("kernels", "gpu", "recipes", "tune")
]
tests.shapes.install(_CHECKED)

tests.interpreter.install()

# Every run has the same examples; `--hypothesis-profile=explore` draws new ones.
_ALL = hypothesis.settings(
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile("same", _ALL, max_examples=25, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", _ALL, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

torch.set_num_threads(1)

# For an unavailable device, `torch.manual_seed` stores each call with its traceback until the device is initialised.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None  # type: ignore[assignment]

# A shell starts background jobs with SIGINT ignored, and all child processes inherit this. The main process runs this
# line before it starts workers.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # beartype checks a random item of a list, also in strategies that build specs. No result depends on the choice.
    config.addinivalue_line(
        "filterwarnings", "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
    )


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_users_run() -> Iterator[None]:
    """Disable the shape checker, which users do not have, so that the package itself must raise for wrong input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def shipped_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict the registry to the kinds of the plugins; recipes and test files in this process register more."""
    import sma.spec  # here, because the import hook must be installed first

    plugins = {entry.module for entry in entry_points(group=sma.spec.PLUGINS)}
    own = {
        family: {kind: spec for kind, spec in sma.spec.kinds(family).items() if spec.__module__ in plugins}
        for family in sma.spec.families()
    }
    monkeypatch.setattr(sma.spec, "_registry", {family: members for family, members in own.items() if members})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Raise the time limit of slow tests, because a busy machine needs minutes instead of seconds."""
    for item in items:
        if item.get_closest_marker("slow") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1200))


def pytest_collection_finish() -> None:
    # pytest attaches handlers to each logger that does not propagate, three times in every test; torch has fifty.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch") and isinstance(logger, logging.Logger):
            logger.propagate = True
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
