"""Linear state-space models: one forward for every recurrence that runs along rows."""

from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sma.checks import check_causal, check_count, check_sizes
from sma.devices import without_autocast
from sma.memory import zeros
from sma.modules.cache import Cache
from sma.modules.long_convolution import long_convolution
from sma.modules.scan import LinearRecurrence, Scanned, advance, causal_scan
from sma.ragged import Ragged
from sma.submodule import State, SubModule, device_and_dtype

Kind = TypeVar("Kind", bound=LinearRecurrence)


class StateSpace(SubModule, Generic[Kind]):
    """A linear recurrence per channel along every row, and a multiple of the token itself.

    A causal one is a scan. A bidirectional one is the convolution with the kernels of two recurrences, one of which
    runs from the right; both include the token itself. Computed in float32 or wider, returned in the dtype of the
    tokens.

    A kind has a state whose field `hidden` is `(B, *hidden_shape)`, and defines `recurrences`, `gain` and `_state`.

    Args:
        spec: has `bidirectional`.
        width: channels of every token, D.
        state_kind: class of the states.
        hidden_shape: shape of the states of one row; flattened `(D, N)`.
        taps: largest length of the kernels; None for the length of the rows.
    """

    def __init__(
        self, spec: Any, width: int, state_kind: type[State], hidden_shape: Sequence[int], taps: int | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        self.causal = not spec.bidirectional
        self.state_kind = state_kind
        self.hidden_shape = tuple(hidden_shape)
        self.taps = taps

    def recurrences(self, dtype: torch.dtype) -> Sequence[Kind]:
        """The recurrence of each direction, forward first."""
        raise TypeError(f"{type(self).__name__} must define recurrences(self, dtype)")

    @property
    def gain(self) -> Float[Tensor, "D"]:
        """Factor of the token itself."""
        raise TypeError(f"{type(self).__name__} must define gain")

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
        wide = torch.promote_types(values.dtype, torch.float32)
        with without_autocast(values.device):
            x_BSD = tokens.with_values(values.to(wide)).to_padded()[0]
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

    def _run(self, x_BSD: Tensor) -> Tensor:
        ahead, *reverse = self.recurrences(x_BSD.dtype)
        gain, length = self.gain.to(x_BSD.dtype), x_BSD.shape[1]
        if reverse:
            return long_convolution(x_BSD, *ahead.kernels(reverse[0], min(length, self.taps or length)), gain)
        return self._scan(x_BSD, ahead) + gain * x_BSD

    def _scan(self, x_BSD: Tensor, ahead: Kind) -> Tensor:
        """Run along rows from their beginning, causally."""
        return causal_scan(x_BSD, ahead)

    def _run_stream(self, x_BSD: Tensor, tokens: Ragged, before: Any) -> tuple[Tensor, State]:
        (ahead,) = self.recurrences(x_BSD.dtype)
        scanned, recent = self._advance(x_BSD, tokens, ahead, before)
        after = scanned.final.to(before.hidden.dtype)
        if len(self.hidden_shape) > 2:
            after = after.unflatten(2, self.hidden_shape[1:])
        if tokens.holes or tokens.stride is None:  # a row without a token keeps its state to the last bit
            real = (tokens.lengths > 0).reshape(-1, *[1] * len(self.hidden_shape))
            after = after.where(real, before.hidden)
        return scanned.out + self.gain.to(x_BSD.dtype) * x_BSD, self._state(after, recent)

    def _advance(self, x_BSD: Tensor, tokens: Ragged, ahead: Kind, before: Any) -> tuple[Scanned, Cache | None]:
        """Run along a chunk of streams; return the inputs to keep, too."""
        return advance(x_BSD, tokens.lengths, ahead, before.hidden.to(x_BSD.dtype).flatten(2)), None
