"""A compiled model equals the eager one, and a model on a GPU equals the one on the CPU."""

import pytest
import torch

from tests.test_sma.compiled import CASES, MIXED, assert_equal_if_compiled, batches, logits_and_gradients, model_of


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [pytest.param(name, id=name) for name in CASES])
def test_a_compiled_model_equals_the_eager_one(case, tmp_path):
    assert_equal_if_compiled(case, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 9])
def test_a_model_on_a_gpu_equals_the_one_on_the_cpu(capacity):
    model, (inputs, valid) = model_of(MIXED), batches()[0]
    expected = logits_and_gradients(model, inputs, valid, capacity=capacity)
    found = logits_and_gradients(model.cuda(), inputs.cuda(), valid.cuda(), capacity=capacity)
    torch.testing.assert_close([tensor.cpu() for tensor in found], expected, rtol=1e-3, atol=1e-4)
