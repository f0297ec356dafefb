"""Lower bounds of the memory and the disk space of a training, computed from its spec before anything is written."""

import shutil
from pathlib import Path

from sma.errors import SpecError
from sma.memory import check_memory, format_bytes
from sma.recipes.experiment import ExperimentSpec

COPIES = 4
"""Number of values per parameter: its weight, its gradient, and the two averages of Adam."""

_BYTES = {"32-true": (4, 4), "64-true": (8, 8), "bf16-mixed": (4, 2), "16-mixed": (4, 2)}
"""Bytes of a weight and of an activation, by precision."""


def check_data_fits(spec: ExperimentSpec, folder: Path) -> None:
    """Check that the data of the task fits into memory and onto the disk of its folder.

    Args:
        spec: the experiment.
        folder: the folder of the data; it need not exist yet.

    Raises:
        SpecError: the data does not fit; the message has the required and the available bytes.
    """
    task = spec.task
    hint = "lower the numbers in task.data, such as task.data.train"
    check_memory(task.least_memory, f"the data of the task {task.kind!r}", device="cpu", hint=hint)
    if not task.least_disk:
        return
    existing = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), None)
    total = shutil.disk_usage(existing).total if existing is not None else None
    if total is not None and task.least_disk > total:
        needed = format_bytes(task.least_disk)
        where = f"the disk of {str(folder)!r} has {format_bytes(total)}"
        raise SpecError(f"the data of the task {task.kind!r} needs {needed}, and {where}; {hint}")


def check_update_fits(spec: ExperimentSpec, device: str = "cpu", *, length: int = 0, processes: int = 1) -> None:
    """Check that one update of the model fits into the memory of its device.

    The estimate is a lower bound: weights, gradients and states of the optimiser, and the output of every layer for one
    batch, which the backward pass needs even with activation checkpointing.

    Args:
        spec: the experiment.
        device: device of the training, `cpu` or `cuda`.
        length: positions of the longest row; 0 if the data is not known yet.
        processes: number of processes that share every batch.

    Raises:
        SpecError: the update does not fit; the message has the required and the free bytes.
    """
    task, training, model = spec.task, spec.training, spec.model
    weight, activation = _BYTES[spec.precision]
    states = COPIES * weight * model.num_parameters()
    check_memory(
        states, "the model with its optimiser", device=device, hint="lower model.width or the number of layers"
    )
    samples = training.batch_size if task.training_samples is None else min(training.batch_size, task.training_samples)
    rows = max(1, samples // processes) * model.rows_per_sample
    outputs = rows * max(length, task.least_length) * model.width * activation * (1 + len(model.layer_specs))
    hint = f"lower training.batch_size={training.batch_size}, or the length of the samples"
    check_memory(states + outputs, "one update", device=device, hint=hint)
