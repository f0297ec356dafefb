"""Plain modules as sub-modules: `TokenWise` and `RowWise`."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sma.checks import check_instance, what_came
from sma.errors import InputError, did_you_mean, quote
from sma.plain_modules import ATTENDING, PADDING_MASKS, PAIR_MASKS, arguments_of, bare, keeps_contract, own_parts
from sma.ragged import Ragged, check_ragged, fill_holes
from sma.submodule import NoState, State, SubModule


class _Wrapped(SubModule):
    """Common parts of `TokenWise` and `RowWise`.

    Attributes:
        module: the plain module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        name = type(self).__name__
        check_instance(module, nn.Module, f"{name} got", "put a function into a module whose forward calls it")
        if keeps_contract(module):
            raise InputError(
                f"{name} got {type(module).__name__}, which is a sub-module already; use it without {name}"
            )
        # The forward of a compiled script is an attribute of the instance.
        if getattr(type(module), "forward", None) is nn.Module.forward:
            raise InputError(
                f"{name} got {type(module).__name__}, which has no forward; give a module that can be called"
            )
        self.module = module
        norms = [(path, part) for path, part in module.named_modules() if isinstance(part, _BatchNorm | _InstanceNorm)]
        for path, part in norms:
            if isinstance(part, _InstanceNorm):
                self._refuse_norm(path, part, "takes statistics over the padding of a row; use a layer norm")
            if part.running_mean is None:
                self._refuse_norm(path, part, "keeps no running statistics; set track_running_stats=True")
        # A tuple of pairs, so that torch does not register these modules again.
        self._batch_norms = tuple(norms)
        self._in_place = any(getattr(part, "inplace", False) for part in module.modules())

    def extra_repr(self) -> str:
        return ""

    def _check_statistics(self) -> None:
        """Check that no part of the module takes statistics over the batch.

        Raises:
            InputError: a batch norm is in training mode; the message names it.
        """
        for path, part in self._batch_norms:
            if part.training:
                self._refuse_norm(
                    path,
                    part,
                    "is in training mode; call its eval() after each train() of the model, or use a layer norm",
                )

    def _refuse_norm(self, path: str, part: nn.Module, problem: str) -> None:
        raise InputError(
            f"{self._label} contains {type(part).__name__} {quote(path or 'as the module itself')}, whose statistics "
            f"would depend on the routing: it {problem}"
        )

    @property
    def _label(self) -> str:
        return f"{type(self).__name__}({type(bare(self.module)).__name__})"

    def _run(self, values: Tensor, axes: str, **options: Any) -> Tensor:
        """Call the module. It must not change its input, because other parts of the model read it.

        Raises:
            InputError: it changes its input, or does not return a tensor of the same shape.
        """
        counted = not (self._in_place or torch.compiler.is_compiling() or values.is_inference())
        values = values.clone() if self._in_place else values
        version = values._version if counted else 0
        if isinstance(bare(self.module), nn.MultiheadAttention):
            result = self.module(values, values, values, need_weights=False, **options)[0]
        else:
            result = self.module(values, **options)
        if counted and values._version != version:
            raise InputError(
                f"{self._label} changes its input in place, which other parts of the model read; let its forward begin "
                "with x = x.clone()"
            )
        dense = isinstance(result, Tensor) and not result.is_nested and result.layout is torch.strided
        if dense and result.is_floating_point() and result.shape == values.shape:
            return result
        raise InputError(
            f"{self._label} returned {what_came(result)}; expected a floating-point tensor {axes} of shape "
            f"{tuple(values.shape)}: wrap the module in one that returns it"
        )

    def _nothing(self, tokens: Ragged) -> Tensor:
        """Return zeros that give the tokens and all parameters gradients of zero."""
        zeros = fill_holes(tokens.values, tokens)
        if distributed.is_available() and distributed.is_initialized():
            # Other ranks would wait for a sharded module. Ones, because gradients may be infinite at zeros.
            taking_part = [self._run_on_one(zeros.new_ones(1, 1, zeros.shape[-1]))]
        else:
            taking_part = [each for each in self.module.parameters() if each.requires_grad]
        return zeros + sum((each.flatten()[:0].sum() for each in taking_part), zeros.new_zeros(())).to(zeros.dtype)

    def _run_on_one(self, one_BSD: Tensor) -> Tensor:
        """Call the module on one token, `(1, 1, D)`."""
        raise TypeError(f"{type(self).__name__} must define _run_on_one(self, one_BSD)")


class TokenWise(_Wrapped):
    r"""A plain module that transforms each token independently, as a sub-module: $y_t = f(x_t)$.

    The module gets no holes. If no token is active, it is not called, and its parameters get gradients of zero. With a
    process group it is then called on one token of ones, because its parameters may be sharded. It streams, because no
    token depends on another. In a compiled model or a CUDA graph, where shapes must not depend on the data, it gets
    zeros in place of holes.

    Args:
        module: maps `(…, D)` to `(…, D)`, each token independently: a feed-forward block, an adapter, a norm.

    Shape:
        the module gets the active tokens `(T, D)` and returns `(T, D)`.

    Raises:
        InputError: the module is a sub-module already, attends, recurs, or takes statistics over a batch or a row. At a
            call: it has a batch norm in training mode, changes its input, or returns another shape than `(T, D)`.
    """

    causal = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        mixing: nn.Module | None = next(
            (part for part in module.modules() if isinstance(part, (*ATTENDING, nn.RNNBase))), None
        )
        mixing = mixing or next(
            (part for part in own_parts(bare(self.module)) if isinstance(part, nn.modules.conv._ConvNd)), None
        )
        if mixing is not None:
            raise InputError(
                f"{self._label}: {type(mixing).__name__} mixes tokens, and would mix those of different rows; use "
                "sma.RowWise(module)"
            )

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Transform every token independently; see `SubModule.forward`."""
        self._continue(state, NoState, tokens)
        self._check_statistics()
        if _is_static(tokens):
            return self._run(fill_holes(tokens.values, tokens), "(T, D)"), state
        index = tokens.mask.nonzero().squeeze(1) if tokens.holes else None
        if (tokens.values if index is None else index).shape[0] == 0:
            return self._nothing(tokens), state
        if index is None:
            return self._run(tokens.values, "(T, D)"), state
        result = self._run(tokens.values.index_select(0, index), "(T, D)")
        return result.new_zeros(tokens.values.shape).index_copy_(0, index, result), state

    def _run_on_one(self, one_BSD: Tensor) -> Tensor:
        return self._run(one_BSD.flatten(0, 1), "(T, D)")


class RowWise(_Wrapped):
    r"""A plain module that transforms a row of tokens, as a sub-module: attention, a convolution, a recurrence.

    Rows without an active token are dropped before the call. If no token is active, the module is not called, and its
    parameters get gradients of zero. With a process group it is then called on one token of ones, because its
    parameters may be sharded. In a compiled model or a CUDA graph, where shapes must not depend on the data, rows
    without an active token are kept with one token of zeros.

    It refuses a state, because it keeps nothing between the chunks of a stream; write a `SubModule` to stream it.

    Args:
        module: maps `(B, S, D)` to `(B, S, D)`: S active tokens of a row, padded on the right. An
            `nn.MultiheadAttention` gets them as query, key and value.
        mask_argument: name of the argument for the mask `(B, S)` of the padded rows; None if the module takes no mask,
            because padding with zeros on the right changes no token.
        mask_true_is: whether the mask is True at `padding` or at `valid` tokens.
        causal: whether the result at a token depends on no later token of its row.

    Shape:
        the module gets the B' rows that have active tokens, `(B', S, D)`, and returns the same shape. Padding holds
        zeros or, if the module takes a mask, the first token of its row, so that no gradient is infinite there.

    Raises:
        InputError: the module takes no such argument, attends without a mask, has its batch or its channels on the
            wrong axis, is a sub-module already, or takes statistics over a batch or a row. At a call: it has a batch
            norm in training mode, changes its input, or returns another shape.
        StateError: a state was given.
    """

    keeps_state = False
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
            raise InputError(f"mask_true_is={quote(mask_true_is)}; expected 'padding' or 'valid'")
        if not isinstance(causal, bool):
            raise InputError(f"causal={quote(causal)}; expected True or False")
        self._check_axes()
        if mask_argument is not None:
            self._check_argument(mask_argument)
        else:
            self._check_needs_no_mask()
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
        if padded.shape[0] * padded.shape[1] == 0:
            return self._nothing(tokens), None
        if _is_static(tokens):
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            return tokens.from_padded(self._run_rows(padded, mask | (first & ~mask[:, :1]))), None
        rows = tokens.lengths.nonzero().squeeze(1)
        if rows.shape[0] == 0:
            return self._nothing(tokens), None
        if rows.shape[0] == tokens.num_rows:
            return tokens.from_padded(self._run_rows(padded, mask)), None
        result = self._run_rows(padded.index_select(0, rows), mask.index_select(0, rows))
        return tokens.from_padded(result.new_zeros(padded.shape).index_copy_(0, rows, result)), None

    def _run_rows(self, padded_BSD: Tensor, mask_BS: Bool[Tensor, "B S"]) -> Tensor:
        if self.mask_argument is None:
            return self._run(padded_BSD, "(B, S, D)")
        padded_BSD = padded_BSD.where(mask_BS[..., None], padded_BSD[:, :1].detach())
        mask = ~mask_BS if self.mask_true_is == "padding" else mask_BS
        return self._run(padded_BSD, "(B, S, D)", **{self.mask_argument: mask})

    def _run_on_one(self, one_BSD: Tensor) -> Tensor:
        return self._run_rows(one_BSD, torch.ones(1, 1, dtype=torch.bool, device=one_BSD.device))

    def _check_axes(self) -> None:
        for part in own_parts(bare(self.module)):
            inside = part.modules() if isinstance(part, ATTENDING) else [part]
            if any(getattr(each, "batch_first", True) is False for each in inside):
                name = type(part).__name__
                raise InputError(
                    f"{self._label} takes its batch on the second axis; build {name} with batch_first=True"
                )
            if isinstance(part, nn.modules.conv._ConvNd):
                raise InputError(
                    f"{self._label} takes its channels on the second axis; wrap {type(part).__name__} in a module that "
                    "calls it on x.transpose(1, 2) and transposes its result"
                )

    def _check_argument(self, name: str) -> None:
        if not isinstance(name, str):
            raise InputError(f"mask_argument is {what_came(name)}; expected the name of an argument, or None")
        kind, known = type(bare(self.module)).__name__, arguments_of(bare(self.module))
        if known is not None and name not in known:
            raise InputError(
                f"{self._label} has mask_argument={quote(name)}, which {kind}.forward does not "
                f"take{did_you_mean(name, list(known), 'arguments')}; give mask_argument=None if padding on the right "
                "changes no token"
            )
        of_pairs = isinstance(bare(self.module), ATTENDING) and name in PAIR_MASKS
        if of_pairs or (known and name == known[0]):
            what = "a mask of pairs of tokens" if of_pairs else "the tokens"
            fitting = next((each for each in PADDING_MASKS if known and each in known), None)
            hint = f"; give mask_argument={fitting!r}" if fitting else "; name the argument of the mask (B, S)"
            raise InputError(
                f"{self._label} has mask_argument={quote(name)}, by which {kind}.forward takes {what}{hint}"
            )

    def _check_needs_no_mask(self) -> None:
        for part in own_parts(bare(self.module)):
            name = type(part).__name__
            if isinstance(part, ATTENDING):
                hint = _mask_hint(bare(self.module), part)
                raise InputError(f"{self._label}: {name} would attend to padding without a mask; {hint}")
            if isinstance(part, nn.RNNBase) and part.bidirectional:
                raise InputError(
                    f"{self._label}: a bidirectional {name} would read padding first; wrap it in a module that takes "
                    "the mask (B, S) and packs its rows"
                )


def _mask_hint(module: nn.Module, part: nn.Module) -> str:
    fitting = next((each for each in PADDING_MASKS if each in (arguments_of(part) or ())), None)
    if module is part and fitting is not None:
        return f"give mask_argument={fitting!r}"
    return f"wrap {type(module).__name__} in a module that takes the mask (B, S) and passes it on"


def _is_static(tokens: Ragged) -> bool:
    """Whether shapes must not depend on the data."""
    values = tokens.values
    return (
        torch.compiler.is_compiling() or values.is_meta or (values.is_cuda and torch.cuda.is_current_stream_capturing())
    )
