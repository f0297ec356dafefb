"""Saving and loading a model, its spec and its weights; and where its streams stand."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sma.errors import CheckpointError, SpecError
from sma.files import write_atomically
from sma.model import SequenceModel, build
from sma.pytree import named_tensors, with_tensors
from sma.spec import dump_spec, dump_yaml, load_spec
from sma.submodule import State, StateKind

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


def save_state(state: State, path: str | Path) -> None:
    """Write where the streams of a model, a layer or a sub-module stand into one safetensors file, in one step.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    # One copy each, because safetensors refuses tensors that share memory.
    parts = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in named_tensors(state).items()}
    try:
        write_atomically(path, lambda temporary: save_file(parts, temporary, metadata={"format": "sparse-modular-activation-state"}))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save the state in {str(path)!r}: {error}; the folder must be writable and have space") from error


def load_state(path: str | Path, like: StateKind) -> StateKind:
    """Read what `save_state` wrote.

    Args:
        path: the file.
        like: a state of the same model for any number of streams, such as `model.init_state(1)`; gives the structure and the device.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is the state of something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"there is no saved state in {str(path)!r}: {error}") from error
    wanted = named_tensors(like)
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))[0]
        raise CheckpointError(f"{str(path)!r} is the state of another model: it {'lacks' if odd in wanted else 'has'} {odd!r}")
    for name, tensor in wanted.items():
        here, there = (tensor.dtype, tensor.shape[2:]), (found[name].dtype, found[name].shape[2:])
        if here != there:
            raise CheckpointError(f"{str(path)!r} is the state of another model: {name!r} has {there}; required is {here}")
    return with_tensors(like, {name: found[name].to(tensor.device) for name, tensor in wanted.items()})
