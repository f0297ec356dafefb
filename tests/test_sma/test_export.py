"""An exported model equals the eager one on other inputs and batch sizes, after saving and loading."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export, load, save

from sma import ModelOutput
from sma.pytree import named_tensors
from tests.cases import generator
from tests.test_sma.compiled import KINDS, LENGTH, MIXED, batches, model_of

CAPACITY = 0.5
LAYERS = {"mixed": MIXED, **{name: {"module": KINDS[name]} for name in ("causal relu2", "ema", "causal attention")}}


def main(name: str, file: str) -> None:
    """Export a model for any number of rows, and compare the loaded program with the model."""
    model = model_of(LAYERS[name]).eval()
    inputs, valid = batches()[0]
    rows = {0: Dim("rows", min=2, max=4096)}
    program = export(
        model, (inputs, valid), {"capacity": CAPACITY}, dynamic_shapes={"inputs": rows, "valid": rows, "capacity": None}
    )
    save(program, file)
    exported = load(file).module()
    for count in (3, 2, 7):
        ids = torch.randint(0, 9, (count, LENGTH), generator=generator(count))
        mask = torch.rand(count, LENGTH, generator=generator(1)) < 0.7
        with torch.no_grad():
            found, wanted = (each(ids, mask, capacity=CAPACITY) for each in (exported, model))
        assert type(found) is ModelOutput
        torch.testing.assert_close(named_tensors(found), named_tensors(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in LAYERS])
def test_an_exported_model_equals_the_eager_one_on_other_batches(tmp_path, name):
    # In a separate process, because torch.export cannot trace the suite's shape checker.
    folder = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.test_sma.test_export", name, str(tmp_path / "model.pt2")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=580)
    assert done.stdout.strip() == "equal", done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
    print("equal")
