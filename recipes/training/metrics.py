"""The metrics of a run as comma-separated values in UTF-8."""

from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger


class MetricsLogger(CSVLogger):
    """Lightning's logger, with files in UTF-8.

    Lightning writes in the locale's encoding; the name of a sub-module that it cannot encode would end the training.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file."""
        writer = super().experiment
        # Rank 0 gets a writer, other ranks a placeholder without files.
        if not isinstance(files := getattr(writer, "_fs", None), _InUTF8 | None):
            writer._fs = _InUTF8(files)
        return writer


class _InUTF8:
    """A file system of fsspec that opens text files in UTF-8."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return self._files.open(path, mode, encoding="utf-8", **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)
