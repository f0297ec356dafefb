"""The weights of a model without wrappers, and their comparison with the weights that its spec builds."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from sma.errors import CheckpointError, SmaError, quote, reason
from sma.model import ModelSpec, SequenceModel, build
from sma.plain_modules import WRAPPERS
from sma.spec import Spec

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model that has a spec: with wrappers that `plain_weights` removes (torch.compile, data parallelism,
    averaged weights), and without any.

    Unknown wrappers are unwrapped through their attribute `module`. Both are the given module if it contains no model.
    """
    outer: Any = model
    while isinstance(outer, nn.Module):
        inner = _bare(outer)
        if isinstance(getattr(inner, "spec", None), ModelSpec):
            return outer, inner
        outer = getattr(inner, "module", None)
    return model, model


def plain_weights(model: nn.Module) -> dict[str, Any]:
    """Return the entries of a model's `state_dict` under the names of its spec.

    Wrappers of the model or its parts are removed, and parametrised weights have their values in evaluation. Neither
    the model nor its parametrisations change.

    Raises:
        CheckpointError: the model cannot be read.
    """
    try:
        found = dict(model.state_dict())
        for path, part in list(model.named_modules(remove_duplicate=False)):
            prefix = f"{path}." if path else ""
            if isinstance(part, AveragedModel):
                found.pop(f"{prefix}n_averaged", None)
            for name, value, owned in _computed(part):
                for key in [key for key in found if key.startswith(f"{prefix}parametrizations.{name}.")]:
                    del found[key]
                for own in owned:
                    found.pop(f"{prefix}{own}", None)
                found[f"{prefix}{name}"] = value
        # From the inside out, so that the remaining names are still those of the module tree.
        for path, part in reversed(list(model.named_modules(remove_duplicate=False))):
            kept, prefix = _wrapped(part), f"{path}." if path else ""
            if kept is not None:
                inside = f"{prefix}{kept}."
                found = {
                    f"{prefix}{key[len(inside) :]}" if key.startswith(inside) else key: value
                    for key, value in found.items()
                }
    except CheckpointError:
        raise
    except Exception as error:  # of methods of third-party modules
        raise CheckpointError(
            f"cannot save this {type(model).__name__}: its weights cannot be read: {reason(error)}"
        ) from error
    return found


def _wrapped(part: nn.Module) -> str | None:
    """Name under which a wrapper keeps its module; None for other modules."""
    if isinstance(part, DistributedDataParallel | DataParallel | AveragedModel):
        return "module"
    return next((name for name in WRAPPERS if name in part._modules), None)


@torch.no_grad()
def _computed(part: nn.Module) -> Iterator[tuple[str, Tensor, Sequence[str]]]:
    """Yield the weights that a module computes from others: name, value, and names of the others outside of
    parametrisations.
    """
    if parametrize.is_parametrized(part):
        for name, steps in cast(nn.ModuleDict, part.parametrizations).items():
            with evaluating(steps):  # where spectral norms do not iterate
                yield name, getattr(part, name).detach(), []
    for hook in list(part._forward_pre_hooks.values()):
        # Their attribute on the module has the value of the last forward, before the last update.
        if isinstance(hook, WeightNorm):
            yield hook.name, hook.compute_weight(part).detach(), [f"{hook.name}_g", f"{hook.name}_v"]
        elif isinstance(hook, SpectralNorm):
            value = hook.compute_weight(part, do_power_iteration=False)
            yield hook.name, value.detach(), [f"{hook.name}_orig", f"{hook.name}_u", f"{hook.name}_v"]
        elif isinstance(hook, prune.BasePruningMethod):
            name = str(hook._tensor_name)
            yield name, hook.apply_mask(part).detach(), [f"{name}_orig", f"{name}_mask"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode temporarily, and restore the modes of all its parts afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class _WithoutValues(TorchFunctionMode):
    """Skips random initialisation of meta tensors, for which torch would import its compiler, which takes seconds."""

    _draws = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._draws and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_without_memory(spec: ModelSpec) -> SequenceModel:
    """Build a model on the meta device; with memory where a part cannot be built there."""
    try:
        with torch.device("meta"), _WithoutValues():
            return build(spec, seed=0)
    except SmaError:
        raise
    except Exception:  # a third-party part reads values, which do not exist there
        return build(spec, seed=0)


def check_weights(what: str, reference: nn.Module, given: Mapping[str, Any], hint: str) -> None:
    """Check the names, shapes and dtypes of weights against the model that a spec builds. Values may be NaN.

    Floating-point weights may have any precision from 16 to 64 bits, as after `model.to(dtype)`.

    Args:
        what: beginning of the message.
        reference: the model, on any device.
        given: objects with `shape` and `dtype`, by name.
        hint: end of the message.

    Raises:
        CheckpointError: they do not fit; the message names the first few.
    """
    wanted = reference.state_dict()
    missing, unknown = [name for name in wanted if name not in given], [name for name in given if name not in wanted]
    if missing or unknown:
        lacks, has = (quote(names) if names else "nothing" for names in (missing, unknown))
        raise CheckpointError(f"{what} does not fit its spec: missing {lacks}, unknown {has}{hint}")
    for name, tensor in wanted.items():
        found = given[name]
        if not (isinstance(tensor, Tensor) and hasattr(found, "shape") and hasattr(found, "dtype")):
            raise CheckpointError(
                f"{what} does not fit its spec: {quote(name)} is a {type(found).__name__}; expected a tensor{hint}"
            )
        alike = any(found.dtype in group and tensor.dtype in group for group in (_FLOATING, _COMPLEX, (tensor.dtype,)))
        if tuple(found.shape) != tuple(tensor.shape) or not alike:
            raise CheckpointError(
                f"{what} does not fit its spec: {quote(name)} is {_kind(found)}; expected {_kind(tensor)}{hint}"
            )


def _kind(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {quote(tuple(tensor.shape))}"


def check_parts(model: nn.Module, reference: nn.Module) -> None:
    """Check that the parts of a model are those of its spec: another part can have weights of the same names and sizes.

    Raises:
        CheckpointError: a part has another class or another spec.
    """
    what, hint = f"cannot save this {type(model).__name__}", "undo that, or save model.state_dict() with torch.save"
    for path, wanted in reversed(list(reference.named_modules())):  # to name the innermost difference
        part = _part_at(model, path)
        if part is None:  # its weights are missing too, if it has any
            continue
        where = f"its part {path!r}" if path else "it"
        if not isinstance(part, type(wanted)):
            found, built = (f"{type(one).__module__}.{type(one).__name__}" for one in (part, wanted))
            raise CheckpointError(f"{what}: {where} is a {found}, and its spec builds a {built}; {hint}")
        given, spec = getattr(part, "spec", None), getattr(wanted, "spec", None)
        if isinstance(spec, Spec) and given != spec:
            fields = [name for name in type(spec).model_fields if getattr(given, name, None) != getattr(spec, name)]
            found, built = (
                ", ".join(f"{name}={quote(getattr(one, name, None))}" for name in fields[:4]) for one in (given, spec)
            )
            raise CheckpointError(
                f"{what}: {where} was built with {found}, and the spec of the model has {built}; {hint}"
            )


def _part_at(model: nn.Module, path: str) -> nn.Module | None:
    """The part at a path, without wrappers of it or its owners; None if missing."""
    part: nn.Module | None = model
    for name in path.split(".") if path else []:
        part = None if part is None else _bare(part)._modules.get(name)
    return None if part is None else _bare(part)


def _bare(part: nn.Module) -> nn.Module:
    while (name := _wrapped(part)) is not None:
        part = cast(nn.Module, part._modules[name])
    return part


def shared_names(model: nn.Module) -> list[list[str]]:
    """Groups of names of a model that share one parameter or buffer."""
    found: dict[int, list[str]] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        found.setdefault(id(tensor), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def whole_tensor(name: str, tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all ranks, and detach it, so that it can be written.

    Raises:
        CheckpointError: it has no values in dense memory: quantised, sparse, or on the meta device.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if nn.parameter.is_lazy(tensor):
        raise CheckpointError(f"cannot save {name!r}: it is not initialised; run the model on a batch first")
    plain = tensor.detach()
    if plain.is_meta:
        raise CheckpointError(
            f"cannot save {name!r}: it is on the meta device and has no values; load or initialise the model first"
        )
    if type(plain) is not Tensor or plain.layout is not torch.strided or plain.is_quantized:
        kind = type(plain).__name__ if type(plain) is not Tensor else f"{plain.layout} tensor of {plain.dtype}"
        raise CheckpointError(
            f"cannot save {name!r}: it is a {kind}, not a dense tensor; convert it back first, such as by dequantize"
        )
    return plain


def warn_of_copies(tensors: Mapping[str, Tensor], shared: Sequence[Sequence[str]]) -> None:
    """Warn of weights that share a tensor in the model but not in its spec, so that loading copies them."""
    known = {name: names[0] for names in shared for name in names}
    found: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            found.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    several = [names for names in found.values() if len({known.get(name, name) for name in names}) > 1]
    if several:
        warnings.warn(
            f"{quote(several[0])} are one tensor in this model and separate tensors in its spec: "
            "after loading each has its own copy"
            f"{f' ({len(several)} such groups)' if len(several) > 1 else ''}",
            stacklevel=4,
        )
