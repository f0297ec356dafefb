"""The contract of a router."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sma.checks import check_causal, check_state
from sma.decision import Decision
from sma.errors import InputError, quote
from sma.spec import Spec
from sma.submodule import NoState, State, StateKind, device_and_dtype, no_state
from sma.summary import listed, settings


class RouterSpec(Spec):
    """Root of the router kinds.

    Its properties are the facts about a kind that the rest of the framework uses. A kind overrides them by a property
    or by a class variable, such as `fixed_rate: ClassVar[bool] = True`.
    """

    family: ClassVar[str] = "router"
    kind: str

    @property
    def fixed_rate(self) -> bool:
        """Whether training leaves the activation rates as they are: no budget steers them, and rates of 0 and 1 are
        intended.
        """
        return False

    @property
    def expected_rate(self) -> float | None:
        """Activation rate of every sub-module where the spec determines it; None where it depends on the tokens."""
        return None

    @property
    def stochastic(self) -> bool:
        """Whether decisions are drawn in training, with the probability `p_on`, so that a policy gradient applies."""
        return False

    @property
    def needs_policy_gradient(self) -> bool:
        """Whether the router learns from the policy gradient only."""
        return False

    def build(self, width: int, names: Sequence[str]) -> "Router":
        """Make the router of the named sub-modules for control states of `width` channels."""
        raise TypeError(f"{type(self).__name__} must define build(self, width, names)")

    def num_parameters(self, width: int, modules: int) -> int:
        """Predict the number of parameters of the router of `modules` sub-modules."""
        raise TypeError(f"{type(self).__name__} must define num_parameters(self, width, modules)")

    def macs_per_token(self, width: int, modules: int) -> int:
        """Predict the multiply-accumulates (MACs) per token."""
        if hasattr(self, "operations"):
            raise TypeError(f"{type(self).__name__}.operations(self, width, modules) is now macs_per_token; rename it")
        return 0

    def elementwise_macs_per_token(self, width: int, modules: int) -> int:
        """Predict how many of the MACs per token multiply channel by channel, outside of matrix products."""
        return 0


class Router(nn.Module):
    """Reads the control state of each token and decides which sub-modules run on it.

    Attributes:
        causal: whether a decision depends on no later token of its row.
        to_stream: advice for a router that is not causal, in the message about a state that it cannot continue from.
        state_kind: class of its state.
        names: the sub-modules, in the order of the decision's last axis.
        layer_index: index of its layer in the model, set by the model.
        stochastic: whether decisions are drawn in training, with the probability `p_on`.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., tuple[Decision, State | None]]  # which nn.Module types as Any

    causal: bool = True
    to_stream: ClassVar[str] = "choose a causal router, such as 'sma', to stream the model"
    state_kind: type[State] = NoState
    layer_index: int = 0
    stochastic: bool = False
    names: tuple[str, ...]

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        words = isinstance(names, Collection) and all(isinstance(name, str) for name in names)
        if not words or isinstance(names, str):
            raise InputError(f"a router takes the names of its sub-modules, such as ['attention'], not {quote(names)}")
        if len(set(names)) != len(names):
            raise InputError(f"the sub-modules of one router need different names, not {list(names)}")
        self.names = tuple(names)

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token.

        Args:
            control_BLD: control states.
            valid: False at padding, which is never active; None where there is no padding.
            positions: position of each token in its row's stream, for routers that draw; default `0 … L - 1`.
            state: state of the streams; None at their beginning.

        Returns:
            the decision, and a new state if and only if one was given.
        """
        raise TypeError(f"{type(self).__name__} must define forward(self, control_BLD, valid, positions, state=None)")

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Make the initial state of `batch_size` streams; a router that reads single tokens inherits this.

        Raises:
            StateError: the router is not causal.
        """
        check_causal(self)
        return no_state(batch_size, *device_and_dtype(self, device, dtype))

    def replay(self, decision: Decision, active: Bool[Tensor, "B L M"]) -> Decision:
        """The decision that this router would have made, had it chosen `active`.

        The scores are those of `decision`; so is the confidence. A router whose confidence depends on its choice
        overrides this.

        Args:
            decision: what `forward` returned for the same tokens.
            active: which tokens run which sub-modules, such as a recorded decision. A state that `forward` returned is
                that of its own choice.
        """
        return replace(decision, active=active)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"names=[{listed(map(quote, self.names))}]", settings(self))))

    def set_step(self, updates: int) -> None:
        """Set the number of updates that training has made; routers that anneal or draw anew depend on it."""

    def _continue(self, state: State | None, kind: type[StateKind], control_BLD: Tensor) -> StateKind | None:
        if state is None:
            return None
        check_causal(self)
        return check_state(self, state, kind, control_BLD.shape[0])


def kind_of(router: Router) -> str:
    """The registered kind of a router, or the name of its class where it has no spec."""
    return getattr(getattr(router, "spec", None), "kind", type(router).__name__)


def keep_valid(active: Bool[Tensor, "B L M"], valid: Bool[Tensor, "B L"] | None) -> Bool[Tensor, "B L M"]:
    """Make padding inactive."""
    return active if valid is None else active & valid[..., None]
