"""Plain modules as sub-modules: `TokenWise` and `RowWise`."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sma.checks import check_instance, what_came
from sma.errors import InputError, did_you_mean, quote
from sma.ragged import Ragged, check_ragged, fill_holes
from sma.submodule import NoState, State, SubModule

MASK_ARGUMENTS = ("src_key_padding_mask", "key_padding_mask", "padding_mask", "attention_mask", "attn_mask", "mask")
"""Arguments by which modules take the mask of a padded row."""

_ROW_MODULES = (nn.RNNBase, nn.MultiheadAttention, nn.modules.conv._ConvNd, nn.TransformerEncoder)
_WIDTHS = ("width", "in_features", "embed_dim", "d_model", "input_size", "normalized_shape", "in_channels")


class _Wrapped(SubModule):
    """What both kinds of wrapped modules have in common.

    Attributes:
        module: the plain module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        name = type(self).__name__
        check_instance(module, nn.Module, f"{name} got", "put a function into a module whose forward calls it")
        if _keeps_contract(module):
            raise InputError(
                f"{name} got {type(module).__name__}, which is a sub-module already; use it without {name}"
            )
        self.module = module
        for path, part in _batch_norms(module):
            if part.running_mean is None:
                self._refuse_statistics(path, "keeps no running statistics; set track_running_stats=True")

    def extra_repr(self) -> str:
        return ""

    def _check_statistics(self) -> None:
        """Check that no part of the module takes statistics over the batch.

        Raises:
            InputError: a batch norm is in training mode; names it.
        """
        if self.training:
            for path, part in _batch_norms(self.module):
                if part.training:
                    self._refuse_statistics(path, "is in training mode; freeze it with .eval(), or use a layer norm")

    def _refuse_statistics(self, path: str, problem: str) -> None:
        raise InputError(
            f"{self._label} contains a batch norm, {quote(path or 'the module itself')}, whose statistics would depend "
            f"on the routing: it {problem}"
        )

    @property
    def _label(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__})"

    def _checked(self, result: object, like: Tensor, axes: str) -> Tensor:
        if isinstance(result, Tensor) and result.shape == like.shape:
            return result
        raise InputError(
            f"{self._label} returned {what_came(result)}; required is a tensor {axes} of shape {tuple(like.shape)}: "
            "wrap the module in one that returns it"
        )


class TokenWise(_Wrapped):
    r"""A plain module that transforms each token by itself, as a sub-module: $y_t = f(x_t)$.

    Holes never reach the module. It takes part in streams, because no token depends on another. Where shapes
    may not depend on the data, in a compiled model or a CUDA graph, it gets zeros in place of holes.

    Args:
        module: maps `(…, D)` to `(…, D)`, each token by itself: a feed-forward block, an adapter, a norm.

    Shape:
        the module gets the active tokens `(T, D)`, in which T may be 0, and returns `(T, D)`.

    Raises:
        InputError: the module is a sub-module already, has a batch norm without running statistics, or, at a call, has
            one in training mode or returns anything but `(T, D)`.
    """

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Transform every token on its own; see `SubModule.forward`."""
        self._continue(state, NoState, tokens)
        self._check_statistics()
        if not tokens.holes:
            return self._apply_module(tokens.values), state
        if _is_static(tokens):
            return self._apply_module(fill_holes(tokens.values, tokens)), state
        index = tokens.mask.nonzero().squeeze(1)
        result = self._apply_module(tokens.values.index_select(0, index))
        return result.new_zeros(tokens.values.shape).index_copy(0, index, result), state

    def _apply_module(self, values_TD: Tensor) -> Tensor:
        return self._checked(self.module(values_TD), values_TD, "(T, D)")


class RowWise(_Wrapped):
    r"""A plain module that transforms a row of tokens, as a sub-module: attention, a convolution, a recurrence.

    Rows without an active token are dropped before the call. If no row has one, the module is not called and its
    parameters get gradients of zero; with a process group it is called on one token of zeros, because its parameters
    may be sharded. Where shapes may not depend on the data, in a compiled model or a CUDA graph, such rows are kept
    with one token of zeros.

    It keeps nothing between the chunks of a stream, so a state is refused; write a `SubModule` to stream it.

    Args:
        module: maps `(B, S, D)` to `(B, S, D)`: S active tokens of a row, padded with zeros on the right. An
            `nn.MultiheadAttention` gets them as query, key and value.
        mask_argument: name of the argument by which it takes the mask `(B, S)` of the padded rows; None: it takes none,
            because padding on the right changes no token.
        mask_true_is: whether the mask is True at `padding` or at `valid` tokens.
        causal: whether the result at a token depends on no later token of its row.

    Shape:
        the module gets `(B', S, D)` of the B' rows that have active tokens, and returns the same shape.

    Raises:
        InputError: the module takes no such argument, has its batch on the second axis or its channels on the second,
            is a sub-module already, has a batch norm without running statistics, or, at a call, has one in training
            mode or returns another shape.
        StateError: a state was given.
    """

    streams = False
    to_stream = "it keeps nothing between chunks; write a SubModule with init_state to stream it"

    def __init__(
        self,
        module: nn.Module,
        mask_argument: str | None = "src_key_padding_mask",
        mask_true_is: Literal["padding", "valid"] = "padding",
        causal: bool = False,
    ) -> None:
        super().__init__(module)
        if mask_true_is not in ("padding", "valid"):
            raise InputError(f"mask_true_is={quote(mask_true_is)}; required is 'padding' or 'valid'")
        self._check_axes()
        if mask_argument is not None:
            self._check_argument(mask_argument)
        self.mask_argument = mask_argument
        self.mask_true_is = mask_true_is
        self.causal = causal

    def extra_repr(self) -> str:
        mask = f", mask_true_is={self.mask_true_is!r}" if self.mask_argument is not None else ""
        return f"mask_argument={self.mask_argument!r}{mask}, causal={self.causal}"

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Transform every row; see `SubModule.forward`."""
        check_ragged(tokens, type(self).__name__)
        if state is not None:
            self._continue(state, NoState, tokens)
        self._check_statistics()
        padded, mask = tokens.to_padded()
        if _is_static(tokens):
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            return tokens.from_padded(self._apply_module(padded, mask | (first & ~mask[:, :1]))), None
        rows = tokens.lengths.nonzero().squeeze(1)
        if rows.shape[0] == 0:
            return self._nothing(tokens), None
        if rows.shape[0] == tokens.num_rows:
            return tokens.from_padded(self._apply_module(padded, mask)), None
        result = self._apply_module(padded.index_select(0, rows), mask.index_select(0, rows))
        return tokens.from_padded(result.new_zeros(padded.shape).index_copy(0, rows, result)), None

    def _apply_module(self, padded_BSD: Tensor, mask_BS: Bool[Tensor, "B S"]) -> Tensor:
        options: dict[str, Any] = {}
        if self.mask_argument is not None:
            options[self.mask_argument] = ~mask_BS if self.mask_true_is == "padding" else mask_BS
        if isinstance(self.module, nn.MultiheadAttention):
            result = self.module(padded_BSD, padded_BSD, padded_BSD, need_weights=False, **options)[0]
        else:
            result = self.module(padded_BSD, **options)
        return self._checked(result, padded_BSD, "(B, S, D)")

    def _nothing(self, tokens: Ragged) -> Tensor:
        """Zeros, by which the tokens and all parameters get gradients of zero."""
        zeros = fill_holes(tokens.values, tokens)
        if distributed.is_available() and distributed.is_initialized():
            one = zeros.new_zeros(1, 1, zeros.shape[-1])
            taking_part = [self._apply_module(one, torch.ones(1, 1, dtype=torch.bool, device=one.device))]
        else:
            taking_part = [each for each in self.module.parameters() if each.requires_grad]
        return zeros + sum((each.flatten()[:0].sum() for each in taking_part), zeros.new_zeros(())).to(zeros.dtype)

    def _check_axes(self) -> None:
        for path, part in self.module.named_modules():
            if getattr(part, "batch_first", True) is False:
                where = f" in {quote(path)}" if path else ""
                raise InputError(
                    f"{self._label} takes its batch on the second axis{where}; build {type(part).__name__} with "
                    "batch_first=True"
                )
        first = next((part for part in self.module.modules() if not isinstance(part, nn.Sequential)), None)
        if isinstance(first, nn.Conv1d | nn.ConvTranspose1d):
            raise InputError(
                f"{self._label} takes its channels on the second axis; wrap {type(first).__name__} in a module that "
                "calls it on x.transpose(1, 2) and transposes its result"
            )

    def _check_argument(self, name: str) -> None:
        known = _arguments(self.module)
        if known is not None and name not in known:
            cure = did_you_mean(name, list(known), "arguments")
            raise InputError(
                f"{self._label} has mask_argument={quote(name)}, which {type(self.module).__name__}.forward does not "
                f"take{cure}; give mask_argument=None if padding on the right changes no token"
            )


def check_submodules(modules: Mapping[str, nn.Module]) -> None:
    """Check that modules keep the contract of a sub-module.

    Raises:
        InputError: one is a plain module; says which wrapper fits its signature.
    """
    for name, module in modules.items():
        check_instance(module, nn.Module, f"the sub-module {quote(name)} is", "see sma.SubModule")
        if not _keeps_contract(module):
            raise InputError(
                f"the sub-module {quote(name)} is a plain {type(module).__name__}, which does not take ragged tokens; "
                f"wrap it: sma.TokenWise(module) if it maps each token by itself, sma.RowWise(module) if it maps rows "
                f"of tokens. {_fitting(module)}"
            )


def width_of(modules: Mapping[str, nn.Module]) -> int:
    """The number of channels D of the tokens that modules take, from the sizes that they and their parts keep.

    Raises:
        InputError: it is not to be found, or two modules differ.
    """
    found = {name: width for name, module in modules.items() if (width := _width(module)) is not None}
    if not found:
        raise InputError(
            f"the width of the tokens does not follow from the sub-modules {list(modules)}; give width=, or a router"
        )
    if len(set(found.values())) > 1:
        raise InputError(f"the sub-modules take tokens of different widths, {found}; give width=, or a router")
    return next(iter(found.values()))


def _width(module: nn.Module) -> int | None:
    for part in module.modules():
        for attribute in _WIDTHS:
            value = getattr(part, attribute, None)
            value = value[-1] if isinstance(value, tuple) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _keeps_contract(module: nn.Module) -> bool:
    """Whether a module is a sub-module, or a compiled or otherwise wrapped one, which passes its attributes on."""
    if isinstance(module, SubModule):
        return True
    arguments = _arguments(module)
    return hasattr(module, "causal") and (arguments is None or "state" in arguments)


def _arguments(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the arguments of a module's `forward`; None if it takes any or they are not known."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters)


def _fitting(module: nn.Module) -> str:
    """Which wrapper fits a module, in a sentence."""
    name, arguments = type(module).__name__, _arguments(module) or ()
    mask = next((each for each in MASK_ARGUMENTS if each in arguments), None)
    if mask is not None:
        given = "" if mask == MASK_ARGUMENTS[0] else f", mask_argument={mask!r}"
        return f"{name}.forward takes {mask!r}: sma.RowWise(module{given}) fits"
    if any(isinstance(part, _ROW_MODULES) for part in module.modules()):
        return f"{name} mixes the tokens of a row: sma.RowWise(module, mask_argument=None) fits"
    return f"{name}.forward takes no mask: sma.TokenWise(module) fits if it mixes no tokens"


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((path, part) for path, part in module.named_modules() if isinstance(part, _BatchNorm))


def _is_static(tokens: Ragged) -> bool:
    """Whether no shape may depend on which tokens are real."""
    values = tokens.values
    return (
        torch.compiler.is_compiling() or values.is_meta or (values.is_cuda and torch.cuda.is_current_stream_capturing())
    )
