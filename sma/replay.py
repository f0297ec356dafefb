"""Replayed decisions: their checks, and their files of one bit per token and sub-module."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sma.checks import check_booleans, check_decisions, check_device, check_names, what_came
from sma.decision import Decision
from sma.errors import CheckpointError, InputError, quote, reason
from sma.files import check_path, write_atomically
from sma.formats import FORMAT, check_format
from sma.memory import ADDRESSABLE, check_memory
from sma.tensor_file import open_tensors, write_tensors

_FORMAT = "sparse-modular-activation-decisions"


def check_selection(selection: object, names: Sequence[str], like: Tensor, what: str) -> Tensor:
    """Check a decision that is to be replayed, and return its mask `(B, L, M)`.

    Args:
        selection: a decision or a mask.
        names: the sub-modules of the layer.
        like: the batch `(B, L, …)`.
        what: its name.

    Raises:
        InputError: it is neither, about other sub-modules or other tokens, or on another device.
    """
    if isinstance(selection, Decision):
        check_names(selection, names, what)
        selection = selection.active
    elif not isinstance(selection, Tensor):
        raise InputError(
            f"{what} is {what_came(selection)}; expected a Decision or a boolean mask (B, L, M) of which tokens run "
            "which sub-modules"
        )
    axes = {"B": like.shape[0], "L": like.shape[1], "M": len(names)}
    check_booleans(selection, f"{what} is", axes)
    check_device(selection.device, like.device, what)
    return selection


def check_selections(decisions: object, layers: Sequence[Sequence[str]], like: Tensor) -> list[Tensor]:
    """Check decisions that a model is to replay, and return their masks.

    Args:
        decisions: one decision or mask for each routed layer.
        layers: the sub-modules of each routed layer.
        like: the inputs `(B, L, …)`.

    Raises:
        InputError: there are more or fewer, or one does not fit; names it.
    """
    if not isinstance(decisions, Sequence):
        cure = ": give output.decisions" if hasattr(decisions, "decisions") else ""
        raise InputError(
            f"decisions is {what_came(decisions)}; expected a sequence of a Decision or a mask for each of the "
            f"{len(layers)} routed layers{cure}"
        )
    if len(decisions) != len(layers):
        raise InputError(
            f"decisions has {len(decisions)} elements; expected one for each of the {len(layers)} routed layers"
        )
    return [
        check_selection(given, names, like, f"decisions[{index}]")
        for index, (given, names) in enumerate(zip(decisions, layers, strict=True))
    ]


def save_decisions(decisions: Sequence[Decision], path: str | Path) -> None:
    """Write the masks of decisions into one safetensors file, in one step: B L M / 8 bytes for each.

    Args:
        decisions: of the routed layers, such as `output.decisions`.
        path: the file.

    Raises:
        InputError: they are not decisions.
        CheckpointError: the file cannot be written.
    """
    path = check_path(path, "sma.save_decisions")
    check_decisions(decisions, "save_decisions")
    for index, decision in enumerate(decisions):
        axes = {"B": None, "L": None, "M": len(decision.names)}
        check_booleans(decision.active, f"active of decision {index} is", axes)
        if decision.active.is_meta:
            raise InputError(
                f"decision {index} is on the meta device, which holds no values; save decisions of a real run"
            )
    masks = [decision.active.detach().cpu() for decision in decisions]
    bits = {str(index): torch.from_numpy(np.packbits(mask.numpy().reshape(-1))) for index, mask in enumerate(masks)}
    layers = [
        {"names": list(decision.names), "shape": list(mask.shape)}
        for decision, mask in zip(decisions, masks, strict=True)
    ]
    metadata = {"format": _FORMAT, "format_version": str(FORMAT), "layers": json.dumps(layers)}
    try:
        write_atomically(path, lambda temporary: write_tensors(temporary, bits, metadata))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot save the decisions in {quote(str(path))}: {reason(error)}; the folder must be writable and have "
            "space"
        ) from error


def load_decisions(path: str | Path, names: Sequence[Sequence[str]]) -> tuple[Tensor, ...]:
    """Read what `save_decisions` wrote: masks `(B, L, M)` for `model(inputs, decisions=…)`, one for each routed layer.

    Args:
        path: the file.
        names: the sub-modules of each routed layer of the model that replays them, such as
            `[layer.routed_names for layer in model.routed_layers]`.

    Raises:
        CheckpointError: the file does not exist, is damaged, or contains something else.
        InputError: the decisions are about other sub-modules.
    """
    path = check_path(path, "sma.load_decisions")
    lists = not isinstance(names, str) and isinstance(names, Sequence)
    if not lists or any(isinstance(each, str) or not isinstance(each, Sequence) for each in names):
        raise InputError(
            f"sma.load_decisions got names={quote(names)}; expected a list of names for each routed layer: "
            "[layer.routed_names for layer in model.routed_layers]"
        )
    with open_tensors(path) as file:
        if file.metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{quote(str(path))} holds no decisions; give a file that sma.save_decisions wrote")
        check_format(file.metadata, str(path))
        layers = _layers(path, file.metadata.get("layers", ""))
        sizes = {str(index): -(-int(np.prod(shape, dtype=object)) // 8) for index, (_, shape) in enumerate(layers)}
        found = {name: entry.numel if entry.dtype is torch.uint8 else -1 for name, entry in file.entries.items()}
        if found != sizes:
            raise CheckpointError(f"{quote(str(path))} is damaged: its bits are not those of the layers it names")
        wanted = [list(each) for each in names if each]
        if wanted != [each for each, _ in layers]:
            raise InputError(
                f"{quote(str(path))} holds decisions about {quote([each for each, _ in layers])}; expected "
                f"{quote(wanted)}, one list for each routed layer"
            )
        masks = []
        for index, (_, shape) in enumerate(layers):
            count = int(np.prod(shape))
            check_memory(count, f"mask {index} of {path}", device="cpu", error=CheckpointError, hint="free some memory")
            bits = np.unpackbits(file.read(str(index)).numpy(), count=count)
            masks.append(torch.from_numpy(bits).bool().reshape(shape))
    return tuple(masks)


def _layers(path: Path, text: str) -> list[tuple[list[str], list[int]]]:
    """Names and shape of each mask, as the metadata has them."""
    damaged = CheckpointError(f"{quote(str(path))} is damaged: its layers are {quote(text)}")
    try:
        layers = [(layer["names"], layer["shape"]) for layer in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged from None
    for names, shape in layers:
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        sized = isinstance(shape, list) and all(type(size) is int and 0 <= size <= ADDRESSABLE for size in shape)
        if not (named and sized and len(shape) == 3 and shape[2] == len(names) > 0):
            raise damaged
        if math.prod(max(size, 1) for size in shape) > ADDRESSABLE:
            raise damaged
    return layers
