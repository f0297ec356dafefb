"""Static types: the results of layers and models, and the fields of specs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RESULTS = """
from typing import assert_type

import torch

import sma

model = sma.build("model.yaml")
output = model(torch.ones(2, 5))
assert_type(output, sma.ModelOutput)
assert_type(output.decisions[0], sma.Decision)
assert_type(output.decisions[0].active, torch.Tensor)
assert_type(model.layers[0], sma.RoutedLayer)

spec = sma.LayerSpec(modules={"attention": sma.modules.GAUSpec(query_size=4, hidden_size=8)})
assert_type(spec, sma.LayerSpec)
layer = spec.build(8)
assert_type(layer, sma.RoutedLayer)
assert_type(layer(torch.ones(2, 5, 8)).decision, sma.Decision | None)

routed = sma.SparseModularActivation("sma", {"mlp": sma.TokenWise(torch.nn.Linear(8, 8))})
result = routed(torch.ones(2, 5, 8))
assert_type(result, sma.RoutedOutput)
assert_type(result.decision, sma.Decision)
assert_type(result.values, torch.Tensor)
assert_type(routed.submodules["mlp"], sma.SubModule)
assert_type(routed.router, sma.Router)
assert_type(sma.load("saved"), sma.SequenceModel)
assert_type(sma.modules.GAUSpec(query_size=4, hidden_size=8), sma.modules.GAUSpec)
"""
TYPO = """
import sma

sma.modules.GAUSpec(query_size=4, hidden_sise=8)
"""


@pytest.mark.slow
def test_type_checkers_infer_results_and_fields(tmp_path: Path) -> None:
    for name, program in (("results.py", RESULTS), ("typo.py", TYPO)):
        (tmp_path / name).write_text(program)
    paths = [str(tmp_path / name) for name in ("results.py", "typo.py")]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *paths]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, checked.stdout + checked.stderr
    assert 'typo.py:4: error: Unexpected keyword argument "hidden_sise" for "GAUSpec"' in errors[0]


def test_the_zoo_is_imported_at_its_first_use() -> None:
    program = "import sys, sma; print('sma.modules' in sys.modules, sma.modules.GAUSpec.__name__, hasattr(sma, 'gau'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False GAUSpec False\n", done.stderr
