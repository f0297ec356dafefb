"""Saving and loading a model: its spec and its weights."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sma.errors import CheckpointError, SpecError
from sma.model import SequenceModel, build
from sma.spec import dump_spec, dump_yaml, load_spec

WEIGHTS, SPEC = "model.safetensors", "spec.yaml"


def save(model: SequenceModel, folder: str | Path) -> Path:
    """Write a model into a folder, replacing what an earlier save left there.

    The weights file carries the spec too, and each file is replaced in one step, so an interrupted save leaves the old model or
    the new one. `spec.yaml` is there to be read and to be run by the recipes.

    Returns:
        the folder.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "sparse-modular-activation", "spec": json.dumps(dump_spec(model.spec))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
        write_atomically(folder / SPEC, lambda path: path.write_text(dump_yaml(model.spec), encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save the model in {str(folder)!r}: {error}; the folder must be writable and have space") from error
    return folder


def load(folder: str | Path, *, device: str = "cpu") -> SequenceModel:
    """Build the model that `save` wrote into a folder, in evaluation mode.

    Raises:
        CheckpointError: there is no saved model, it is damaged, or its weights do not fit its spec.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"there is no saved model in {str(folder)!r}: {WEIGHTS} is missing; give a folder that sma.save wrote")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "spec" not in metadata:
        raise CheckpointError(f"{path} holds weights without a spec; load the model with the code that wrote it")
    try:
        # With a seed, so that the weights that are replaced at once leave the caller's random state alone.
        model = build(load_spec(json.loads(metadata["spec"])), seed=0).to(device)
    except (SpecError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the spec saved in {path} cannot be built here: {error}") from error
    missing, unknown = _difference(model.state_dict(), tensors)
    if missing or unknown:
        raise CheckpointError(f"{path} does not fit its spec: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _difference(wanted: dict[str, Any], given: dict[str, Any]) -> tuple[list[str], list[str]]:
    missing = [name for name, tensor in wanted.items() if name not in given or given[name].shape != tensor.shape]
    return missing, [name for name in given if name not in wanted]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` in one step.

    Whatever goes wrong, `path` holds its old content or the whole new one, and the temporary file is gone.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
