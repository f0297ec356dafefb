"""Computations of a layer around its routed sub-modules: bypass, residual, activation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sma.bypass import LinearBypass
from sma.fused import fuses
from sma.glue import JoinParts, slots_of
from sma.ragged import Places, Ragged

Gather = Callable[[], Places]
"""Returns the places of the routed tokens; it is called late, because the host may have to wait for it."""


class Around(NamedTuple):
    """Computations of a layer around its routed sub-modules, in the same call to save passes over the batch.

    Attributes:
        before: function of all tokens `(B L, D)` and of a `Gather`. It returns the tensor to which results are added in
            place, and the tokens at the places. With `join` it returns the output of the bypass (None without one)
            instead of that tensor.
        after: maps the sum `(B, L, D)` to the values that are returned.
        recompute: whether activations between the decision and the result are recomputed in backward, not kept.
        join: for a single sub-module: function that computes the returned values `(B L, D)` in one pass. Its arguments
            are the output of the bypass, the result (None if the sub-module did not run), the confidences of the router
            `(B, L)`, the tokens of the result, and the probability of dropping a channel of the result. None: results
            are added in place, and `after` is called.
    """

    before: Callable[[Tensor, Gather], tuple[Tensor | Any, Tensor]]
    after: Callable[[Tensor], Tensor]
    recompute: bool = False
    join: Callable[[Tensor | None, Tensor | None, Tensor, Ragged, float], Tensor] | None = None


def _nothing(x_TD: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x_TD, memory_format=torch.contiguous_format), x_TD.index_select(0, gather().index)


ALONE = Around(_nothing, lambda sum_BLD: sum_BLD)
"""Nothing around the sub-modules."""


class Residual(NamedTuple):
    """The residual of a layer, and its other summands.

    Attributes:
        x_BLD: the residual.
        bypass: the linear bypass; None without one.
        identity: whether the tokens themselves are a summand.
        silu: whether silu follows the sum.
        dropout: probability of dropping a channel of the sum before the residual.
    """

    x_BLD: Tensor
    bypass: LinearBypass | None
    identity: bool
    silu: bool
    dropout: float

    def around(self, modules: int, recompute: bool) -> Around:
        """The computations around a number of routed sub-modules."""
        if fuses(self.x_BLD) and modules <= 1:
            return Around(self._pass, self._after, recompute, self._join)
        return Around(self._before, self._after, recompute)

    def without_modules(self, mixed_BLD: Tensor) -> Tensor:
        """The end of a layer that has no routed sub-modules."""
        nothing = torch.zeros(0, dtype=torch.int64, device=mixed_BLD.device)
        before, _ = self._before(mixed_BLD.flatten(0, 1), lambda: Places(nothing, None))
        return self._after(before.reshape(mixed_BLD.shape))

    def _pass(self, mixed_TD: Tensor, gather: Gather) -> tuple[Tensor | None, Tensor]:
        """The output of the bypass, and the routed tokens."""
        if self.bypass is not None:
            passed, routed = self.bypass(mixed_TD, gather)
            return passed, routed
        return (mixed_TD.contiguous() if self.identity else None), mixed_TD.index_select(0, gather().index)

    def _before(self, mixed_TD: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        """The sum of bypass and residual, to which the routed results are added, and the routed tokens.

        The sum has the dtype of the residual stream and is a contiguous tensor of its own: the output of the bypass,
        which a hook may hold, is not changed in place.
        """
        x_TD = self.x_BLD.flatten(0, 1)
        passed, routed = self._pass(mixed_TD, gather)
        if self.dropout:  # the residual follows the dropout
            passed = torch.zeros_like(mixed_TD) if passed is None else passed
            return passed.to(x_TD.dtype, memory_format=torch.contiguous_format, copy=True), routed
        if passed is None:
            return x_TD.clone(memory_format=torch.contiguous_format), routed
        return passed.to(x_TD.dtype) + x_TD, routed

    def _after(self, sum_BLD: Tensor) -> Tensor:
        if self.dropout:
            sum_BLD = nn.functional.dropout(sum_BLD, self.dropout).add_(self.x_BLD)
        return nn.functional.silu(sum_BLD) if self.silu else sum_BLD

    def _join(
        self, passed: Tensor | None, result: Tensor | None, confidence_BL: Tensor, tokens: Ragged, dropout: float
    ) -> Tensor:
        x_TD, confidence = self.x_BLD.flatten(0, 1), confidence_BL.flatten()
        everywhere = not tokens.holes and tokens.stride is not None
        places: tuple[Tensor | None, ...] = None, None, None
        if result is not None and not everywhere:
            real = tokens.mask if tokens.holes else None
            slots = slots_of(tokens.index, real, x_TD.shape[0]) if tokens.inverse is None else tokens.inverse
            places = tokens.index, slots, real
        p, on_sum = (self.dropout, True) if self.dropout else (dropout, False)
        joined: Tensor = JoinParts.apply(x_TD, passed, result, confidence, places, p, on_sum, self.silu)
        return joined
