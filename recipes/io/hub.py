"""Data sets from the Hugging Face Hub, through the package `datasets`, which is not among the requirements."""

from pathlib import Path
from typing import Any

from sma.errors import DataError, reason


def from_hub(name: str, data: Path, *, otherwise: str) -> Any:
    """Return all splits of a data set of the Hub, which is kept in `huggingface` in the data folder.

    Args:
        name: name of the data set.
        data: the data folder.
        otherwise: the value of `task.data.source` that needs no Hub.

    Raises:
        DataError: the package is missing, or the data set cannot be downloaded.
    """
    instead = f"task.data.source={otherwise}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"task.data.source=hub reads {name} through the package datasets, which is not installed; "
            f"pip install datasets, or set {instead}"
        ) from error
    try:
        return datasets.load_dataset(name, cache_dir=str(data / "huggingface"))
    except Exception as error:  # the network and the Hub have many exceptions
        raise DataError(
            f"cannot get {name} from the Hub: {reason(error)}; check the network and try again, or set {instead}"
        ) from error
