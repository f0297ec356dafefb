"""Records of a finished run for TensorBoard besides its curves: hyper-parameters, results and figures."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from sma.recipes.experiment import ExperimentSpec
from sma.recipes.reports.figures import attempt
from sma.spec import dump_spec


def log_finished(
    trainer: Trainer, spec: ExperimentSpec, results: Mapping[str, float], figures: Sequence[Path] = ()
) -> None:
    """Write the experiment and the results of a run for the tab HPARAMS, and its figures for the tab IMAGES.

    Args:
        trainer: the trainer of the run.
        spec: the experiment; its fields are the hyper-parameters, with slashes in their paths.
        results: results by name, shown as `final/NAME`.
        figures: PNG files.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            writer: Any = logger.experiment
            for path in figures:
                attempt(f"{path.name} in TensorBoard", partial(_add, writer, path, trainer.global_step))
            final = {f"final/{name}": value for name, value in results.items()}
            logger.log_hyperparams(dump_spec(spec), final, trainer.global_step)
            writer.flush()


def _add(writer: Any, path: Path, step: int) -> None:
    with Image.open(path) as image:
        writer.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")
