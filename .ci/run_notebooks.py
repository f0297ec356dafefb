"""Run the notebooks of docs/notebooks, each in a fresh kernel, and write their outputs into them."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run(path: Path, folder: Path, *more: str) -> Any:
    """Run a notebook, and return it with its outputs.

    Args:
        path: the notebook.
        folder: an empty folder, the kernel's working directory.
        more: code of further cells, which run after those of the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in more]
    # The kernel imports this checkout and ignores the settings of the user.
    settings = {"IPYTHONDIR": str(folder / ".ipython"), "PYTHONPATH": str(ROOT)}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute(env={**os.environ, **settings})


def main(names: list[str]) -> None:
    """Run the notebooks with these names; all if there are none."""
    for path in [path for path in NOTEBOOKS if path.stem in names or not names]:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, Path(folder))
        notebook.metadata["language_info"] = {"name": "python"}  # without the version of this machine
        nbformat.write(notebook, path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
