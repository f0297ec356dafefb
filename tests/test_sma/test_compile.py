"""A compiled model equals the eager one; and the models of one device equal those of another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_sma.compiled import CASES, MIXED, batches, logits_and_gradients, model_of


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [pytest.param(name, id=name) for name in CASES])
def test_a_compiled_model_equals_the_eager_one(case):
    folder = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.test_sma.compiled", case]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=880)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 9])
def test_a_model_on_a_gpu_equals_the_one_on_the_cpu(capacity):
    model, (inputs, valid) = model_of(MIXED), batches()[0]
    expected = logits_and_gradients(model, inputs, valid, capacity=capacity)
    found = logits_and_gradients(model.cuda(), inputs.cuda(), valid.cuda(), capacity=capacity)
    torch.testing.assert_close([tensor.cpu() for tensor in found], expected, rtol=1e-3, atol=1e-4)
