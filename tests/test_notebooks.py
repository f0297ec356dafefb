"""The notebooks run from top to bottom in a Jupyter kernel, with the committed outputs."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tests.test_site import load

ROOT = Path(__file__).resolve().parents[1]
RUN = load(ROOT / ".ci" / "run_notebooks.py")

# Claims of the text of each notebook, as assertions about its variables.
HOLDS = {
    "compose_train_look": """
assert evaluate(model)[0] > 0.85, evaluate(model)
assert evaluate(plain)[0] > 0.7, evaluate(plain)
rates = [rate for shown in (decisions, [decision]) for each in shown for rate in each.rate().tolist()]
assert len(rates) == 6
assert all(abs(rate - 0.3) < 0.05 for rate in rates), rates
""",
    "route_your_model": """
work, scores = zip(*points, strict=True)
assert list(work) == sorted(work), points
assert work[-1] < 1.02 * macs(dense), points
assert work[4] < 0.7 * macs(dense), points
assert scores[4] > accuracy(dense) - 0.05, points
assert scores[4] > 0.85, points
""",
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> list[str]:
    """Outputs of a cell, with 0 for all numbers, which differ between processors, and types for figures."""
    texts = [re.sub(r"\s*-?\d[\d.,]*(e-?\d+)?", " 0", output.get("text", "")) for output in cell.outputs]
    return texts + [kind for output in cell.outputs for kind in sorted(output.get("data", {}))]  # sorted, as in files


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in RUN.NOTEBOOKS])
def test_a_committed_notebook_was_run_once_from_top_to_bottom(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    kinds = {output.output_type for cell in code_cells(notebook) for output in cell.outputs}
    assert kinds == {"stream", "display_data"}, "an error, or a cell that shows its last value; run `make notebooks`"
    streams = [
        output.name for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream"
    ]
    assert set(streams) == {"stdout"}, "a warning is no output for readers"
    assert path.stat().st_size < 200_000, "lower the resolution of its pictures"
    assert notebook.metadata.language_info == {"name": "python"}


def test_every_notebook_has_assertions() -> None:
    assert [path.stem for path in RUN.NOTEBOOKS] == sorted(HOLDS)


def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    with pytest.raises(CellExecutionError, match="division by zero"):
        RUN.run(tmp_path / "wrong.ipynb", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in RUN.NOTEBOOKS])
def test_a_notebook_runs_with_the_committed_outputs(path: Path, tmp_path: Path) -> None:
    committed = code_cells(read(path))
    ran = code_cells(RUN.run(path, tmp_path, HOLDS[path.stem]))
    for before, after in zip(committed, ran[:-1], strict=True):
        assert shown(after) == shown(before), before.source
