"""Device settings of a training change no batch, and no global state of torch after the training."""

import os

import pytest
import torch
from torch.utils.data import DataLoader

from sma.recipes.training.execution import for_device, product_precision
from tests.test_recipes.tiny import checkpoint, power_failure, same, tiny, train


@pytest.mark.parametrize(
    ("device", "settings", "workers", "pinned"),
    [
        pytest.param("cpu", {}, 0, False, id="cpu"),
        pytest.param("cuda", {}, 2, True, id="cuda"),
        pytest.param("mps", {}, 2, False, id="mps"),
        pytest.param("cpu", {"training__workers": 3}, 3, False, id="cpu-with-workers"),
        pytest.param("cuda", {"training__workers": 0, "training__pinned": "false"}, 0, False, id="cuda-by-itself"),
    ],
)
def test_batches_are_prepared_as_the_device_needs_them(monkeypatch, device, settings, workers, pinned):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    loader = for_device(DataLoader(range(4), batch_size=2), tiny(**settings).training, device)
    assert (loader.num_workers, loader.pin_memory) == (workers, pinned)


def test_a_single_core_uses_no_worker_processes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert for_device(DataLoader(range(4)), tiny().training, "cuda").num_workers == 0


@pytest.mark.parametrize(
    ("device", "settings", "inside"),
    [("cuda", {}, True), ("cuda", {"training__tf32": "false"}, False), ("cpu", {}, False), ("mps", {}, False)],
)
def test_tf32_is_enabled_on_cuda_only_inside_the_block(device, settings, inside):
    before = torch.backends.cuda.matmul.allow_tf32
    with product_precision(tiny(**settings).training, device):
        assert torch.backends.cuda.matmul.allow_tf32 is (inside or before)
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_any_number_of_workers_gives_the_same_run_even_if_resumed(finished, data, tmp_path):
    out, _ = finished
    spec = tiny(training__workers=2)
    with power_failure(13):
        train(spec, tmp_path / "run", data)
    train(spec, tmp_path / "run", data, resume=True)
    found, wanted = checkpoint(tmp_path / "run"), checkpoint(out)
    for part in ("state_dict", "optimizer_states", "fit_scores"):
        assert same(found[part], wanted[part])
