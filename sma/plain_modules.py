"""Plain modules: which wrapper fits them, and the width of the tokens that they take."""

import inspect
from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from sma.checks import check_count, check_instance, what_came
from sma.errors import InputError, quote
from sma.ragged import rectangular
from sma.submodule import SubModule

PADDING_MASKS = ("src_key_padding_mask", "key_padding_mask", "padding_mask")
"""Arguments of masks that are True at padding."""

VALID_MASKS = ("attention_mask",)
"""Arguments of masks that are True at valid tokens."""

PAIR_MASKS = ("src_mask", "attn_mask", "mask", "is_causal")
"""Arguments of torch's modules for a mask of pairs of tokens."""

ATTENDING = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoderLayer,
    nn.TransformerDecoder,
    nn.Transformer,
)
_WIDTHS = ("width", "in_features", "embed_dim", "d_model", "input_size", "normalized_shape", "in_channels", "nx")
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which torch.compile, activation checkpointing and FSDP keep the module that they wrap."""


def check_submodules(modules: Mapping[str, nn.Module]) -> None:
    """Check that modules keep the contract of a sub-module.

    Raises:
        InputError: there are none, or one is a plain module; the message contains the wrapper that fits its signature.
    """
    if not isinstance(modules, Mapping):
        raise InputError(f"the sub-modules are {what_came(modules)}; expected a mapping of names to sub-modules")
    if not modules:
        raise InputError("there are no sub-modules to choose from; give at least one")
    for name, module in modules.items():
        if not isinstance(name, str):
            raise InputError(f"the name {quote(name)} of a sub-module is {what_came(name)}; expected a word")
        check_instance(module, nn.Module, f"the sub-module {quote(name)} is", "see sma.SubModule")
        if not keeps_contract(module):
            raise InputError(
                f"the sub-module {quote(name)} is a plain {type(module).__name__}, which does not take ragged tokens; "
                f"wrap it: sma.TokenWise(module) if it maps each token independently, sma.RowWise(module) if it maps "
                f"rows of tokens. {_fitting(bare(module))}"
            )


def width_of(modules: Mapping[str, nn.Module], given: int | None = None) -> int:
    """The number of channels D of the tokens that modules take.

    The candidates are the sizes that the modules and their parts store as attributes. The width is the first candidate
    for which a call on the meta device, which computes nothing, returns as many channels as it gets.

    Args:
        modules: the sub-modules.
        given: the width, if it is known.

    Raises:
        InputError: it cannot be found, two modules differ, or the given one is not a size.
    """
    if given is not None:
        check_count(given, "width", 1, " channel")
        return given
    found = {name: width for name, module in modules.items() if (width := _width(bare(module))) is not None}
    if not found:
        raise InputError(
            f"the width of the tokens does not follow from the sub-modules {list(modules)}; give width=, or a router"
        )
    if len(set(found.values())) > 1:
        raise InputError(f"the sub-modules take tokens of different widths, {found}; give width=, or a router")
    return next(iter(found.values()))


def _width(module: nn.Module) -> int | None:
    sizes: dict[int, None] = {}
    for part in module.modules():
        for attribute in _WIDTHS:
            value = getattr(part, attribute, None)
            value = value[-1] if isinstance(value, tuple) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                sizes[value] = None
    return next((size for size in sizes if _takes(module, size)), None)


@torch.no_grad()
def _takes(module: nn.Module, width: int) -> bool:
    """Whether a sub-module maps tokens of this width to tokens of this width."""
    try:
        weights = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        dtype = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
        tokens = rectangular(torch.empty(1, 2, width, device="meta", dtype=dtype))
        return bool(functional_call(module, weights, (tokens,))[0].shape == (2, width))
    except Exception:  # a module may raise any exception for tokens of another width
        return False


def keeps_contract(module: nn.Module) -> bool:
    """Whether a module is a sub-module, or a compiled or otherwise wrapped one, which passes its attributes on."""
    if isinstance(module, SubModule):
        return True
    return hasattr(module, "causal") and (hasattr(module, "init_state") or "state" in (arguments_of(module) or ()))


def bare(module: nn.Module) -> nn.Module:
    """A module without the wrappers of `torch.compile`, activation checkpointing and FSDP."""
    while (name := next((each for each in WRAPPERS if each in module._modules), None)) is not None:
        module = module.get_submodule(name)
    return module


def own_parts(module: nn.Module) -> list[nn.Module]:
    """A module, or the modules that a sequence of modules calls one after another."""
    if not isinstance(module, nn.Sequential):
        return [module]
    return [part for child in module for part in own_parts(child)]


def arguments_of(module: nn.Module, required: bool = False) -> tuple[str, ...] | None:
    """Names of the arguments of a module's `forward`, or of the required ones; None if it takes any or they are not
    known.
    """
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(
        parameter.name
        for parameter in parameters
        if not required or (parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL)
    )


def _fitting(module: nn.Module) -> str:
    """The advice which wrapper fits the signature of a module."""
    name, arguments = type(module).__name__, arguments_of(module) or ()
    needed = arguments_of(module, required=True) or ()
    mask = next((each for each in (*PADDING_MASKS, *VALID_MASKS) if each in arguments), None)
    others = [each for each in needed[1:] if each != mask]
    if others and not isinstance(module, nn.MultiheadAttention):
        return f"{name}.forward requires {', '.join(needed)}: first wrap it in a module that takes the tokens alone"
    if mask in PADDING_MASKS:
        given = "" if mask == PADDING_MASKS[0] else f", mask_argument={mask!r}"
        return f"{name}.forward takes {mask!r}: sma.RowWise(module{given}) fits if the mask is True at padding"
    if mask is not None:
        return (
            f"{name}.forward takes {mask!r}: sma.RowWise(module, mask_argument={mask!r}, mask_true_is='valid') fits if "
            "the mask is True at valid tokens"
        )
    if any(isinstance(part, (*ATTENDING, nn.RNNBase, nn.modules.conv._ConvNd)) for part in module.modules()):
        return (
            f"{name} mixes tokens and takes no mask: sma.RowWise(module, mask_argument=None) fits if padding on the "
            "right changes no token; otherwise wrap it in a module that takes a mask"
        )
    return f"{name}.forward takes no mask: sma.TokenWise(module) fits if it mixes no tokens"
