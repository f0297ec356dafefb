"""What a training takes at least, known from its experiment, so that one that cannot fit is refused before anything is
made.
"""

import shutil
from pathlib import Path

from sma.errors import SpecError
from sma.memory import check_memory, format_bytes
from sma.recipes.experiment import ExperimentSpec

COPIES = 4
"""Of every parameter: its weight, its gradient, and the two averages of Adam."""

_BYTES = {"32-true": (4, 4), "64-true": (8, 8), "bf16-mixed": (4, 2), "16-mixed": (4, 2)}
"""Of a number among the weights, and in what the layers hand on, by precision."""


def check_data_fits(spec: ExperimentSpec, folder: Path) -> None:
    """Check that the data of the task can be in memory, and in its folder.

    Args:
        spec: the experiment.
        folder: where data is kept; it need not be there yet.

    Raises:
        SpecError: how many bytes are needed and how many there are.
    """
    task = spec.task
    hint = "lower the numbers in task.data, such as task.data.train"
    check_memory(task.least_memory, f"the data of the task {task.kind!r}", device="cpu", hint=hint)
    if not task.least_disk:
        return
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    total = shutil.disk_usage(there).total if there is not None else None
    if total is not None and task.least_disk > total:
        needed = format_bytes(task.least_disk)
        where = f"the disk of {str(folder)!r} has {format_bytes(total)}"
        raise SpecError(f"the data of the task {task.kind!r} needs {needed}, and {where}; {hint}")


def check_update_fits(spec: ExperimentSpec, device: str = "cpu", *, length: int = 0, processes: int = 1) -> None:
    """Check that one update of the model can be made on its device.

    Only what is sure to be needed counts: the weights with gradients and the optimiser's states; and the output of
    every layer for one batch, which the backward pass needs, also where activations are computed again.

    Args:
        spec: the experiment.
        device: on which the model is trained, `cpu` or `cuda`.
        length: of the longest inputs, where the data is known.
        processes: that share every batch.

    Raises:
        SpecError: how many bytes are needed and how many are free.
    """
    task, training, model = spec.task, spec.training, spec.model
    weight, handed_on = _BYTES[spec.precision]
    states = COPIES * weight * model.num_parameters()
    check_memory(
        states, "the model with its optimiser", device=device, hint="lower model.width or the number of layers"
    )
    samples = training.batch_size if task.training_samples is None else min(training.batch_size, task.training_samples)
    rows = max(1, samples // processes) * model.rows_per_sample
    outputs = rows * max(length, task.least_length) * model.width * handed_on * (1 + len(model.layer_specs))
    hint = f"lower training.batch_size={training.batch_size}, or the length of the samples"
    check_memory(states + outputs, "one update", device=device, hint=hint)
