"""Saving and loading of models (spec and weights) and of the states of their streams."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sma.checks import what_came
from sma.devices import usable_device
from sma.errors import CheckpointError, SmaError, parsing, quote, reason
from sma.files import check_path, write_atomically
from sma.formats import FORMAT, check_format, rename, renamed
from sma.model import ModelSpec, SequenceModel, build
from sma.pytree import named_tensors, tensors, with_tensors
from sma.spec import dump_spec, dump_yaml, load_spec
from sma.submodule import State, StateKind
from sma.tensor_file import TensorFile, open_tensors, write_tensors
from sma.weights import (
    build_without_memory,
    check_parts,
    check_weights,
    plain_weights,
    shared_names,
    unwrapped,
    warn_of_copies,
    whole_tensor,
)

WEIGHTS, SPEC = "model.safetensors", "spec.yaml"

_LONGEST = 1 << 48
"""Maximum number of tokens that a stream can have seen, far below the limits of int64."""

SPEC_BYTES = 4 << 20
"""Maximum size of a spec in a weights file, in bytes."""


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a model into a folder, over a model that an earlier save wrote.

    The weights file contains the spec too, and each file is replaced atomically, so an interrupted save leaves the old
    model or the new one. `spec.yaml` is for readers and for the recipes. The same model gives the same bytes.

    Wrappers of the model or its parts are left out: torch.compile, data parallelism, activation checkpointing, weight
    averaging (the averaged weights are saved). Parametrised weights are saved as their computed values. All
    requirements of `load` are checked before a file is replaced. With sharded weights (FSDP) every rank calls this, and
    rank 0 writes.

    Args:
        model: a model that was built from a spec, wrapped or not.
        folder: folder of the model, created if missing.

    Returns:
        the folder.

    Raises:
        CheckpointError: the folder cannot be written, or `load` could not rebuild this model: it has no spec, its parts
            or weights differ from those of its spec, or a weight is not a dense tensor.
    """
    folder = check_path(folder, "sma.save")
    model, core = unwrapped(model)
    if not isinstance(getattr(core, "spec", None), ModelSpec):
        raise CheckpointError(
            f"cannot save a {type(model).__name__}, which has no spec of a model; give one that sma.build made, "
            "wrapped or not, or save its state_dict() with torch.save"
        )
    spec, text = _spec_to_save(core)
    reference = build_without_memory(spec)
    check_parts(core, reference)
    given = plain_weights(model)
    check_weights(
        f"cannot save this {type(core).__name__}, because it",
        reference,
        given,
        "; merge, convert or undo the changes of its parts",
    )
    sharded = any(hasattr(tensor, "full_tensor") for tensor in given.values())
    tensors = {}
    for name in sorted(given):  # in the same order on all ranks, which gather together
        tensor = whole_tensor(name, given[name])
        if not sharded or torch.distributed.get_rank() == 0:
            tensors[name] = tensor
    if not sharded:
        warn_of_copies(tensors, shared_names(reference))
    metadata = {"format": "sparse-modular-activation", "format_version": str(FORMAT), "spec": text}

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / WEIGHTS, lambda path: write_tensors(path, tensors, metadata))
            write_atomically(folder / SPEC, lambda path: path.write_text(dump_yaml(spec), encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot save the model in {quote(str(folder))}: {reason(error)}; "
                "the folder must be writable and have space"
            ) from error

    _on_first_rank(write) if sharded else write()
    return folder


def _spec_to_save(core: nn.Module) -> tuple[ModelSpec, str]:
    """The spec of a model as it will be read back, and its text."""
    what = f"cannot save this {type(core).__name__}: its spec"
    try:
        text = json.dumps(dump_spec(core.spec))  # type: ignore[arg-type]
        spec = load_spec(json.loads(text))
    except Exception as error:  # third-party specs have their own methods
        raise CheckpointError(
            f"{what} cannot be read back: {error if isinstance(error, SmaError) else reason(error)}"
        ) from error
    if spec != core.spec:
        raise CheckpointError(
            f"{what} changes when it is read back; its fields must survive JSON, as strings and numbers do"
        )
    if len(text) > SPEC_BYTES:
        raise CheckpointError(
            f"{what} has {len(text):,} bytes; at most {SPEC_BYTES:,} can be read: use 'repeat' for equal layers"
        )
    return spec, text


def _on_first_rank(write: Any) -> None:
    """Write on rank 0 only; the others wait, and raise its error."""
    failed: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            write()
        except CheckpointError as error:
            failed = [str(error)]
    torch.distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise CheckpointError(failed[0])


def load(folder: str | Path, *, device: torch.device | str | None = "cpu") -> SequenceModel:
    """Load a model that `save` wrote, in evaluation mode.

    Names, shapes and dtypes in the file are compared with those of its spec before memory is allocated. The file is
    opened once: while another process saves, this loads the old model or the new one.

    Args:
        folder: a folder that `save` wrote, or the run folder of a recipe, which has it in `model/`.
        device: device of the model; on `meta` it has no values. None: torch's default device.

    Raises:
        CheckpointError: there is no saved model, it is damaged, its weights do not fit its spec, or the device does not
            exist.
    """
    device = usable_device(device, CheckpointError)
    with open_tensors(_weights_file(check_path(folder, "sma.load"))) as file:
        spec = _saved_spec(file)
        reference = _reference(file, spec)
        if device.type == "meta":
            model = reference.to(device)
        else:
            # With a seed and on the CPU, so that initial weights do not advance the caller's random states.
            with parsing(f"the spec saved in {file.path}", CheckpointError), torch.device("cpu"):
                model = build(spec, seed=0).to(device)
        present = renamed(file.entries, reference.state_dict())
        tensors = {present.get(name, name): file.read(name, device) for name in file.entries}
    shared = shared_names(model)
    model.load_state_dict(tensors, assign=True)
    for names in shared:  # each name was given a copy
        owners = [(model.get_submodule(path), leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
        for owner, leaf in owners[1:]:
            setattr(owner, leaf, getattr(*owners[0]))
    return model.eval()


def _weights_file(folder: Path) -> Path:
    """The weights file in a folder, or in the folder `model` of a run."""
    found = next((path for path in (folder / WEIGHTS, folder / "model" / WEIGHTS) if _exists(path)), None)
    if found is None and folder.is_file():
        raise CheckpointError(f"{quote(str(folder))} is a file; give the folder in which sma.save wrote {WEIGHTS}")
    if found is None:
        raise CheckpointError(
            f"there is no saved model in {quote(str(folder))}: {WEIGHTS} is missing; give a folder that sma.save wrote"
        )
    return found


def _exists(path: Path) -> bool:
    """Whether a path exists; True on errors, which are reported where the file is read."""
    try:
        return path.exists()
    except OSError:
        return True


def _saved_spec(file: TensorFile) -> ModelSpec:
    check_format(file.metadata, str(file.path))
    text = file.metadata.get("spec")
    if text is None:
        raise CheckpointError(f"{file.path} holds weights without a spec; load the model with the code that wrote it")
    what = f"the spec saved in {file.path} cannot be built here"
    if len(text) > SPEC_BYTES:
        raise CheckpointError(f"{what}: it has {len(text):,} characters; at most {SPEC_BYTES:,} are read")
    try:
        given = json.loads(text)
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{what}: it is {quote(given)}; expected a mapping of fields")
        spec: ModelSpec = load_spec(given)
    except CheckpointError:
        raise
    except Exception as error:  # of JSON, or of validators of third-party kinds
        raise CheckpointError(f"{what}: {error if isinstance(error, SmaError) else reason(error)}") from error
    return spec


def _reference(file: TensorFile, spec: ModelSpec) -> SequenceModel:
    """Build the model of a spec without memory, and check that the weights of the file fit."""
    held = sum(entry.numel for entry in file.entries.values())
    with parsing(f"the spec saved in {file.path}", CheckpointError):
        try:
            predicted = spec.num_parameters()
        except TypeError:  # a third-party kind without a prediction
            predicted = 0
        if predicted > held:  # before a small file can make thousands of layers
            count = f"{predicted:,}" if predicted < 10**18 else "10^18 or more"
            raise CheckpointError(
                f"{file.path} does not fit its spec: it holds {held:,} numbers, "
                f"and the spec has {count} parameters; save the model again"
            )
        try:
            reference = build_without_memory(spec)
        except SmaError as error:
            raise CheckpointError(f"the spec saved in {file.path} cannot be built here: {error}") from error
    entries = dict(file.entries)
    rename(entries, reference.state_dict())
    check_weights(str(file.path), reference, entries, "")
    return reference


def save_state(state: State, path: str | Path) -> None:
    """Write the state of the streams of a model, a layer or a sub-module into one safetensors file, atomically.

    Raises:
        CheckpointError: the file cannot be written, or the state is None, as in an output without a state.
    """
    path = check_path(path, "sma.save_state")
    if state is not None and not isinstance(state, State):
        cure = "give its state" if hasattr(state, "state") else "give model.init_state(…) or the state of an output"
        raise CheckpointError(f"sma.save_state got {what_came(state)}; expected a State: {cure}")
    parts = {name: whole_tensor(name, tensor) for name, tensor in named_tensors(state).items()}
    if not parts:
        raise CheckpointError(
            f"there is no state to save, but {quote(state)}; give model.init_state(…) or the state of an output"
        )
    metadata = {"format": "sparse-modular-activation-state", "format_version": str(FORMAT)}
    try:
        write_atomically(path, lambda temporary: write_tensors(temporary, parts, metadata))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot save the state in {quote(str(path))}: {reason(error)}; the folder must be writable and have space"
        ) from error


def load_state(path: str | Path, like: StateKind) -> StateKind:
    """Read a state that `save_state` wrote.

    Args:
        path: the file.
        like: a state of the same model for any number of streams, such as `model.init_state(1)`, which determines
            structure and device.

    Raises:
        CheckpointError: the file does not exist, is damaged, or holds the state of another model.
    """
    path = check_path(path, "sma.load_state")
    if like is not None and not isinstance(like, State):
        raise CheckpointError(f"sma.load_state got {what_came(like)} as `like`; expected a State: model.init_state(1)")
    wanted = named_tensors(like)
    if not wanted:
        raise CheckpointError(
            f"the template state is {quote(like)}; give one of the same model, such as model.init_state(1)"
        )
    if not _exists(path):
        raise CheckpointError(f"there is no saved state in {quote(str(path))}; give a file that sma.save_state wrote")
    with open_tensors(path) as file:
        check_format(file.metadata, str(path))
        _check_state(file, like)
        state: StateKind = with_tensors(like, {name: file.read(name, tensor.device) for name, tensor in wanted.items()})
    _check_counts(path, state)
    return state


def _check_state(file: TensorFile, like: State) -> None:
    """Check names, dtypes and sizes. All tensors have the same batch size, and those that grow with a stream the same
    length, which are otherwise free.
    """
    wanted, growing = named_tensors(like), _growing(like)
    other = f"{quote(str(file.path))} is the state of another model"
    if set(file.entries) != set(wanted):
        odd = sorted(set(file.entries) ^ set(wanted))[0]
        raise CheckpointError(f"{other}: it {'lacks' if odd in wanted else 'has'} {quote(odd)}")
    rows: int | None = None
    lengths: dict[str, int] = {}
    for name, tensor in wanted.items():
        found = file.entries[name]
        shape = [rows, *tensor.shape[1:]]
        if rows is None:
            shape[0] = rows = found.shape[0] if found.shape else None
        if name in growing and len(shape) > 1 and len(found.shape) > 1:
            shape[1] = lengths.setdefault(growing[name], found.shape[1])
        if tensor.dtype != found.dtype or list(found.shape) != shape:
            raise CheckpointError(
                f"{other}: {quote(name)} is {found}; expected {str(tensor.dtype).removeprefix('torch.')} of shape "
                f"{tuple(shape)}"
            )


def _check_counts(path: Path, state: State) -> None:
    """Check the number of tokens that streams have seen, which determines memory and time."""

    def check(part: Any) -> None:
        for field in fields(part):
            inner = getattr(part, field.name)
            if field.name == "seen" and isinstance(inner, Tensor) and inner.numel() and not inner.is_meta:
                least, most = (int(bound) for bound in inner.aminmax())
                held = (
                    min((t.shape[1] for t in tensors(part) if t.ndim > 1), default=0)
                    if getattr(part, "grows", False)
                    else _LONGEST
                )
                if least < 0 or most > held:
                    raise CheckpointError(
                        f"{path} is damaged: {type(part).__name__} has seen {least if least < 0 else most} tokens"
                    )
            _pytree.tree_map(
                lambda leaf: check(leaf) if isinstance(leaf, State) else None,
                inner,
                is_leaf=lambda leaf: isinstance(leaf, State),
            )

    check(state)


def _growing(like: State) -> dict[str, str]:
    """Names of the tensors whose axis 1 grows with the stream, each with the path of its state."""
    parts, _ = _pytree.tree_flatten_with_path(
        like, is_leaf=lambda part: isinstance(part, State) and getattr(part, "grows", False)
    )
    owners = [(_pytree.keystr(path), part) for path, part in parts if isinstance(part, State)]
    return {f"{path}{name}": path for path, part in owners for name in named_tensors(part)}
