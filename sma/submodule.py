"""The contract of a sub-module."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed, nn
from torch.nn.modules import module as every_module
from torch.utils import _pytree

from sma.checks import check_booleans, check_causal, check_count, check_floating, check_rows, check_state, check_tensor
from sma.devices import usable_device
from sma.errors import StateError
from sma.memory import zeros
from sma.moved import former_names
from sma.pytree import map_tensors, register_output, tensors
from sma.ragged import Ragged, check_ragged
from sma.spec import Spec
from sma.summary import settings

__getattr__ = former_names(
    __name__,
    Operations="sma.submodule.MACs(matmul, fft, elementwise), and the method operations of a spec is macs",
    placement="sma.submodule.device_and_dtype",
    check_sizes="sma.checks.check_sizes",
)


StateKind = TypeVar("StateKind", bound="State")


class MACs(NamedTuple):
    """Multiply-accumulates (MACs) of a forward pass.

    Attributes:
        matmul: number in matrix products, exact.
        fft: number in Fourier transforms, estimated as 1.25 n log2 n each.
        elementwise: number in products channel by channel, such as the taps of a depthwise convolution.
    """

    matmul: int = 0
    fft: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)

    @classmethod
    def sum(cls, parts: Iterable["MACs"]) -> "MACs":
        """The MACs of several parts together."""
        return cls(*map(sum, zip(*parts, strict=True)))


@dataclass(frozen=True)
class State:
    """State of a causal part between two chunks of a stream: a frozen dataclass of tensors, batch first.

    Subclasses are decorated with `register_output` and `@dataclass(frozen=True)`. The initial state is all zeros. A
    state that keeps every token has an attribute `grows` that is True; axis 1 of its tensors is as long as the stream.
    `forward` returns a new state and does not change the old one, so a stream can be continued from it twice.
    """

    @property
    def batch_size(self) -> int:
        """Number of streams, B."""
        # Read at every step; a walk through the whole tree would take a tenth of its time.
        own = (getattr(self, name) for name in self.__dataclass_fields__)
        return next((part.shape[0] for part in own if isinstance(part, Tensor)), None) or int(tensors(self)[0].shape[0])

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors(self))

    def select(self, rows: Int[Tensor, "R"]) -> Self:
        """The state of some rows, in the given order; a row may occur twice."""
        rows = check_rows(rows, self.batch_size)
        return map_tensors(lambda tensor: tensor.index_select(0, rows), self)

    def reorder(self, rows: Int[Tensor, "B"]) -> Self:
        """The state after a step of beam search: row b continues the stream of the old row `rows[b]`.

        Raises:
            StateError: the number of rows differs from that of the state; use `select` for that.
        """
        if check_tensor(rows, "rows are", torch.int64).shape != (self.batch_size,):
            raise StateError(
                f"reorder got rows of shape {tuple(rows.shape)} for {self.batch_size} streams; "
                "select(rows) takes any number"
            )
        return self.select(rows)

    def reset(self, rows: Bool[Tensor, "B"] | Int[Tensor, "R"]) -> Self:
        """The state with some rows at the beginning of a stream, given by a mask `(B,)` or by their indices."""
        if check_tensor(rows, "rows are", torch.bool).dtype is torch.bool:
            check_booleans(rows, "rows are", {"B": self.batch_size})
        else:
            rows = check_rows(rows, self.batch_size)
            rows = torch.zeros(self.batch_size, dtype=torch.bool, device=rows.device).index_fill(0, rows, True)

        def begin(part: Any) -> Any:
            if isinstance(part, State):
                return part.reset(rows)
            return part.masked_fill(rows.reshape(-1, *[1] * (part.ndim - 1)), 0) if isinstance(part, Tensor) else part

        parts = {field.name: getattr(self, field.name) for field in fields(self) if not field.metadata.get("static")}
        return replace(self, **{name: _pytree.tree_map(begin, part, is_leaf=_is_state) for name, part in parts.items()})

    def detach(self) -> Self:
        """The same state, detached from the graph."""
        return map_tensors(lambda tensor: tensor.detach(), self)

    def to(self, target: torch.device | str | torch.dtype) -> Self:
        """The same state on another device, or with its floating-point tensors in another dtype."""
        if not isinstance(target, torch.dtype):
            device = usable_device(target)
            return map_tensors(lambda tensor: tensor.to(device), self)
        check_floating(target)
        return map_tensors(lambda tensor: tensor.to(target) if tensor.is_floating_point() else tensor, self)


def _is_state(part: object) -> bool:
    return isinstance(part, State)


@register_output
@dataclass(frozen=True)
class NoState(State):
    """Empty state of a part that reads single tokens.

    Attributes:
        rows: an empty tensor with B rows.
    """

    rows: Bool[Tensor, "B 0"]


class SubModuleSpec(Spec):
    """Root of the sub-module kinds."""

    family: ClassVar[str] = "sub-module"
    kind: str

    def build(self, width: int) -> "SubModule":
        """Make the module for tokens of `width` channels."""
        raise SubModuleSpec._incomplete(self, "build(self, width)")

    def num_parameters(self, width: int) -> int:
        """Predict the number of parameters of the module that `build(width)` makes."""
        raise SubModuleSpec._incomplete(self, "num_parameters(self, width)")

    def macs(self, width: int, tokens: int) -> MACs:
        """Predict the MACs of one forward pass over one row of `tokens` tokens."""
        raise SubModuleSpec._incomplete(self, "macs(self, width, tokens)")

    def _incomplete(self, method: str) -> TypeError:
        return TypeError(f"{type(self).__name__} must define {method}; see CONTRIBUTING.md, 'A sub-module in one file'")


class SubModule(nn.Module):
    """A module that a token can activate. It works on ragged tokens, independently of the routing.

    Attributes:
        causal: whether the result at a token depends on no later token of its row.
        keeps_state: False in a causal part that cannot continue from a state.
        to_stream: advice for a part that cannot continue from a state, in the message about it.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., tuple[Tensor, State | None]]  # which nn.Module types as Any

    causal: bool = False
    keeps_state: ClassVar[bool] = True
    to_stream: ClassVar[str] = "build the model with bidirectional=false to stream it"

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Compute the result of every token.

        Args:
            tokens: the tokens, packed or rectangular; a row may have none, and T may be 0.
            state: state of the streams; None at their beginning.

        Returns:
            the results in the order of the tokens, and a new state if and only if one was given.

        Raises:
            StateError: a state was given to a part that cannot continue from one.
        """
        raise TypeError(f"{type(self).__name__} must define forward(self, tokens, state=None)")

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Make the initial state of `batch_size` streams; recurrent states are never below float32.

        A causal sub-module that reads single tokens inherits this; any other must override it.

        Args:
            batch_size: streams, B.
            device: default the device of the parameters.
            dtype: dtype of the tokens in the state; default the dtype of the parameters.
        """
        check_causal(self)
        return no_state(batch_size, *device_and_dtype(self, device, dtype))

    def extra_repr(self) -> str:
        return settings(self)

    def _continue(self, state: State | None, kind: type[StateKind], tokens: Ragged) -> StateKind | None:
        """Check a state that `forward` was given.

        Raises:
            InputError: the tokens are not a Ragged.
            StateError: this part is not causal, or the state has another class or another number of rows.
        """
        check_ragged(tokens, type(self).__name__)
        if state is None:
            return None
        check_causal(self)
        return check_state(self, state, kind, tokens.num_rows)


def may_skip(part: nn.Module) -> bool:
    """Whether a call of a part without tokens has no effect, so that it can be skipped.

    Gradients and hooks, of the part or of all modules, need the call. In a compiled graph the number of tokens is
    unknown. In a process group the part may be sharded (`fully_shard`), and ranks with tokens would wait for the rank
    that skips it.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or (distributed.is_available() and distributed.is_initialized())
        or part._forward_hooks
        or part._forward_pre_hooks
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
    )


def no_state(batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> NoState:
    """Make the empty state of a part that reads single tokens."""
    check_count(batch_size, "batch_size")
    return NoState(zeros((batch_size, 0), "a state", dtype=torch.bool, device=device))


def device_and_dtype(
    part: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a state: those given, else those of the part's parameters or buffers, else torch's defaults.

    Raises:
        InputError: the device does not exist, or the dtype is not a floating-point dtype.
    """
    dtype = floating_dtype(part) or torch.get_default_dtype() if dtype is None else check_floating(dtype)
    if device is None:
        return next((tensor.device for tensor in (*part.parameters(), *part.buffers())), torch.empty(0).device), dtype
    return usable_device(device), dtype


def floating_dtype(part: nn.Module) -> torch.dtype | None:
    """Dtype of the first floating-point parameter of a part, else buffer; None without one, as in quantised parts."""
    return next((tensor.dtype for tensor in (*part.parameters(), *part.buffers()) if tensor.is_floating_point()), None)
