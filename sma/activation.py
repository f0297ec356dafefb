"""Sparse modular activation: a router and the sub-modules it chooses from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sma.decision import Decision
from sma.errors import InputError, StateError
from sma.pytree import register_output
from sma.ragged import Ragged, compress_each, extract_add_
from sma.routers import Router


@register_output
@dataclass(frozen=True)
class RoutedOutput:
    """What `SparseModularActivation` returns.

    Attributes:
        values: sum over the sub-modules of activity times confidence times result; zeros where nothing was active.
        decision: who ran where.
        state: where the stream stands; None unless one was given.
    """

    values: Float[Tensor, "B L D"]
    decision: Decision
    state: Any = None


class SparseModularActivation(nn.Module):
    r"""$y_t = \sum_m a_t^m c_t^m f_m(\mathrm{compress}(x))_t$: every token runs the sub-modules its router chose, and only those.

    Args:
        router: decides; its `names` are the keys of `modules`.
        modules: the sub-modules by name; each works on ragged tokens.
        dropout: probability of dropping a channel of a sub-module's result.

    Shape:
        x `(B, L, D)` in, values `(B, L, D)` out.

    Raises:
        InputError: the router decides about other names than there are sub-modules, or a name is one that torch uses.

    Reference:
        Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197.
    """

    def __init__(self, router: Router, modules: Mapping[str, nn.Module], dropout: float = 0.0) -> None:
        super().__init__()
        if set(router.names) != set(modules):
            raise InputError(f"the router decides about {list(router.names)}, but the sub-modules are {list(modules)}; use the same names")
        taken = [name for name in router.names if name_is_taken(name)]
        if taken:
            raise InputError(
                f"the sub-module name {taken[0]!r} is taken by torch.nn.ModuleDict; choose another, such as {taken[0] + '_'!r}"
            )
        self.router = router
        self.submodules = nn.ModuleDict({name: modules[name] for name in router.names})
        self.dropout = dropout

    @property
    def causal(self) -> bool:
        """Whether neither the router nor a sub-module looks ahead."""
        return self.router.causal and all(bool(module.causal) for module in self.submodules.values())

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        *,
        control_BLD: Float[Tensor, "B L E"] | None = None,
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: Any = None,
    ) -> RoutedOutput:
        """Route every token.

        Args:
            x_BLD: tokens.
            control_BLD: what the router reads; default the tokens themselves.
            valid: False at padding, on whichever side; None where there is none.
            positions: position of each token in its row's stream; default its rank among the valid tokens of its row.
            state: not supported yet; must be None.

        Raises:
            InputError: the shapes or dtypes do not fit.
            StateError: a state was given.
        """
        if state is not None:
            raise StateError("SparseModularActivation does not support streaming yet; run whole sequences with state=None")
        check_batch(x_BLD, valid)
        if positions is None and valid is not None:
            positions = valid.cumsum(1) - 1
        control_BLD = x_BLD if control_BLD is None else control_BLD
        if valid is not None:  # the gradient of the router's weights multiplies what stands at padding by 0, and 0 x NaN is NaN
            control_BLD = control_BLD.where(valid[..., None], 0)
        out_TD = x_BLD.new_zeros(x_BLD.shape[0] * x_BLD.shape[1], x_BLD.shape[2])
        out_TD, decision = self.add_to(out_TD, x_BLD, control_BLD, valid, positions)
        return RoutedOutput(out_TD.unflatten(0, x_BLD.shape[:2]), decision)

    def add_to(
        self,
        out_TD: Float[Tensor, "T D"],
        x_BLD: Float[Tensor, "B L D"],
        control_BLD: Float[Tensor, "B L E"],
        valid: Bool[Tensor, "B L"] | None,
        positions: Int[Tensor, "B L"] | None,
    ) -> tuple[Float[Tensor, "T D"], Decision]:
        """Route every token and add the results, in place, to a flattened batch; the inputs are not checked."""
        decision, _ = self.router(control_BLD, valid, positions)
        for place, tokens in enumerate(compress_each(x_BLD, decision.active, positions_BL=positions)):
            out_TD = extract_add_(self._results(place, tokens, decision), tokens, out_TD)
        return out_TD, decision

    def _results(self, place: int, tokens: Ragged, decision: Decision) -> Tensor:
        name = decision.names[place]
        values, _ = self.submodules[name](tokens)
        confidence = decision.confidence[..., place].reshape(-1).index_select(0, tokens.index)
        values = nn.functional.dropout(values, self.dropout, self.training)
        return values * confidence.to(values.dtype)[:, None]


def name_is_taken(name: str) -> bool:
    """Whether a sub-module cannot have this name, because `torch.nn.ModuleDict` has an attribute that is called so."""
    return hasattr(nn.ModuleDict(), name)


def check_batch(x_BLD: Tensor, valid: Tensor | None, width: int | None = None) -> None:
    """Check the shapes and dtypes of a batch of tokens.

    Raises:
        InputError: what was given and what is required.
    """
    if x_BLD.ndim != 3 or (width is not None and x_BLD.shape[2] != width):
        raise InputError(f"the tokens have shape {tuple(x_BLD.shape)}; required is (B, L, D{'' if width is None else f' = {width}'})")
    if not x_BLD.is_floating_point():
        raise InputError(f"the tokens have dtype {x_BLD.dtype}; required is a floating-point dtype, such as torch.float32")
    check_valid(x_BLD, valid)


def check_valid(inputs: Tensor, valid: Tensor | None) -> None:
    """Check the mask of the valid positions of a batch.

    Raises:
        InputError: what was given and what is required.
    """
    if valid is None:
        return
    if valid.dtype is not torch.bool:
        raise InputError(f"valid has dtype {valid.dtype}; required is torch.bool, True at real tokens: write valid.bool()")
    if valid.shape != inputs.shape[:2]:
        raise InputError(f"valid has shape {tuple(valid.shape)}; required is (B, L) = {tuple(inputs.shape[:2])}, as the input has")
