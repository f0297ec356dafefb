"""Base class of the linear state-space models: recurrences along rows."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sma.checks import check_causal, check_count, check_sizes
from sma.devices import without_autocast
from sma.memory import zeros
from sma.modules.cache import Cache
from sma.ragged import Ragged
from sma.submodule import State, SubModule, device_and_dtype


class Advanced(NamedTuple):
    """Results of a chunk of streams.

    Attributes:
        out: one per slot.
        hidden: the states after the last token of each row.
        recent: the inputs that the kind keeps, if any.
    """

    out: Float[Tensor, "B S D"]
    hidden: Float[Tensor, "B D N"]
    recent: Cache | None


class StateSpace(SubModule):
    """A linear recurrence per channel along every row, and a multiple of the token itself.

    A bidirectional one adds a second recurrence that runs from the right; both include the token itself. Computed in
    float32 or wider, returned in the dtype of the tokens.

    A kind has a state whose field `hidden` is `(B, *hidden_shape)`, and defines `_run`, `_advance` and `_state`.

    Args:
        spec: has `bidirectional`.
        width: channels of every token, D.
        state_kind: class of the states.
        hidden_shape: shape of the states of one row; flattened `(D, N)`.
    """

    def __init__(self, spec: Any, width: int, state_kind: type[State], hidden_shape: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        self.causal = not spec.bidirectional
        self.state_kind = state_kind
        self.hidden_shape = tuple(hidden_shape)

    def _run(self, x_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """Run along rows, whose holes are 0."""
        raise TypeError(f"{type(self).__name__} must define _run(self, x_BSD)")

    def _advance(self, x_BSD: Float[Tensor, "B S D"], tokens: Ragged, before: Any) -> Advanced:
        """Run along a chunk of streams, in the dtype of the states of a computation."""
        raise TypeError(f"{type(self).__name__} must define _advance(self, x_BSD, tokens, before)")

    def _state(self, hidden: Tensor, recent: Cache | None) -> State:
        """Make a state from the states of the recurrence and the inputs that the kind keeps, if any."""
        raise TypeError(f"{type(self).__name__} must define _state(self, hidden, recent)")

    def _no_inputs(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Cache | None:
        """The cache of the inputs that a kind keeps, before the first one; None for a kind that keeps none."""
        return None

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Make the state of streams that have seen no token; see `SubModule.init_state`."""
        check_causal(self)
        device, dtype = device_and_dtype(self, device, dtype)
        check_count(batch_size, "batch_size")
        wide = torch.promote_types(dtype, torch.float32)
        what = f"the state of {type(self).__name__}"
        hidden = zeros((batch_size, *self.hidden_shape), what, device=device, dtype=wide)
        return self._state(hidden, self._no_inputs(batch_size, device, dtype))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Run along every row; see `SubModule.forward`."""
        before = self._continue(state, self.state_kind, tokens)
        if before is not None:
            self._check_sizes(before)
        values = tokens.values
        if not torch.compiler.is_compiling() and values.shape[0] == 0:
            # Every parameter gets a gradient of zeros, so that no rank waits for another.
            nothing = sum(parameter.sum() for parameter in self._core()) * 0
            return self._mixed(values + torch.as_tensor(nothing).to(values.dtype)), state
        with without_autocast(values.device):
            x_BSD = tokens.to_padded()[0]
            if before is None:
                out, after = self._run(x_BSD), None
            else:
                out, after = self._run_stream(x_BSD, tokens, before)
        return self._mixed(tokens.from_padded(out).to(values.dtype)), after

    def _check_sizes(self, before: Any) -> None:
        check_sizes(self, tuple(before.hidden.shape[1:]), self.hidden_shape)

    def _core(self) -> Iterable[nn.Parameter]:
        """The parameters that `_mixed` does not use."""
        return self.parameters()

    def _mixed(self, y_TD: Tensor) -> Tensor:
        """The token-wise map of the results."""
        return y_TD

    def _run_stream(self, x_BSD: Tensor, tokens: Ragged, before: Any) -> tuple[Tensor, State]:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        out, hidden, recent = self._advance(x_BSD.to(wide), tokens, before)
        after = hidden.to(before.hidden.dtype)
        if len(self.hidden_shape) > 2:
            after = after.unflatten(2, self.hidden_shape[1:])
        if tokens.holes or tokens.stride is None:  # a row without a token keeps its state to the last bit
            real = (tokens.lengths > 0).reshape(-1, *[1] * len(self.hidden_shape))
            after = after.where(real, before.hidden)
        return out, self._state(after, recent)
