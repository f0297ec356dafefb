"""The contract of a router, and what routers with scores have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from sma.checks import check_causal, check_control, check_state
from sma.decision import Decision
from sma.devices import is_sharded, without_autocast
from sma.errors import InputError, quote
from sma.init import truncated_normal_
from sma.spec import Spec
from sma.submodule import NoState, State, StateKind, device_and_dtype, no_state
from sma.summary import listed, settings


class RouterSpec(Spec):
    """Root of the router kinds.

    What the rest of the framework needs to know of a kind stands here; a kind that differs overrides it, by a property
    or by `fixed_rate: ClassVar[bool] = True`.
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
        """Whether the policy gradient is all that the router learns from."""
        return False

    def build(self, width: int, names: Sequence[str]) -> "Router":
        """Make the router of the named sub-modules for control states of `width` channels."""
        raise TypeError(f"{type(self).__name__} must define build(self, width, names)")

    def num_parameters(self, width: int, modules: int) -> int:
        """Predict the number of parameters of the router of `modules` sub-modules."""
        raise TypeError(f"{type(self).__name__} must define num_parameters(self, width, modules)")

    def operations(self, width: int, modules: int) -> int:
        """Predict the multiply-adds per token."""
        return 0


class Router(nn.Module):
    """Reads the control state of each token and decides which sub-modules run on it.

    A router whose rates can be steered (`sma.budget`) has a buffer `offset` `(M,)`, which it adds to the scores for on,
    and decides by its logits: a valid token is active iff `logits[..., 1] > logits[..., 0]`, ties that it breaks itself
    and draws excepted. The offset stays in float32 or wider whatever the model is converted to: in half precision the
    steps of a budget would round to nothing.

    Attributes:
        causal: whether a decision depends on no later token of its row.
        state_kind: class of the state that it carries along a stream.
        names: the sub-modules, in the order of the decision's last axis.
        offset: what is added to the scores for on; None where the rates cannot be steered.
        least: the smallest sum of the activation rates.
        most: the largest sum of the activation rates.
        place: number of its layer among those of its model, which sets it.
        samples: whether decisions are drawn in training, with the probability `p_on`.
        competing: whether the sub-modules take tokens from each other alone, and from the choice to run nothing where
            there is one.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., tuple[Decision, State | None]]  # of what torch calls, which editors see as Any

    causal: bool = True
    to_stream: ClassVar[str] = "choose a causal router, such as 'sma', to stream the model"
    state_kind: type[State] = NoState
    least: float = 0.0
    most: float = math.inf
    competing: bool = False
    place: int = 0
    samples: bool = False
    names: tuple[str, ...]
    offset: Tensor | None

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) != len(names):
            raise InputError(f"the sub-modules of one router need different names, not {list(names)}")
        self.names = tuple(names)
        self.register_buffer("offset", None)

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token.

        Args:
            control_BLD: what the router reads.
            valid: False at padding, which is never active; None where there is no padding.
            positions: position of each token in its row's stream, for routers that draw; default `0 … L - 1`.
            state: where the stream stands; None at its beginning.

        Returns:
            the decision, and a new state if and only if one was given.
        """
        raise TypeError(f"{type(self).__name__} must define forward(self, control_BLD, valid, positions, state=None)")

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Make the state of `batch_size` streams that have seen nothing; a router that looks at one token at a time
        inherits this.

        Raises:
            StateError: the router is not causal.
        """
        check_causal(self)
        return no_state(batch_size, *device_and_dtype(self, device, dtype))

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"names=[{listed(map(quote, self.names))}]", settings(self))))

    @property
    def unit(self) -> float | Tensor:
        """What one unit of log-odds is in the scores: the temperature, 1 where there is none."""
        return 1.0

    def idle_margins(self, decision: Decision) -> Float[Tensor, "B L"] | None:
        """Log-odds by which the best sub-module of a competing router beats running nothing; None where that is no
        choice of its own.
        """
        return None

    def advance(self, updates: int) -> None:
        """Tell the router how many updates its training has made; one that anneals or draws anew takes note."""

    def check_steerable(self) -> None:
        """Check that a budget can move the activation rates at all.

        Raises:
            InputError: there is no offset; says what to use.
        """
        if self.offset is None:
            raise InputError(
                f"the router kind {self._kind!r} cannot be steered to a rate; "
                "use one that learns its rate, such as 'sma'"
            )

    def check_targets(self, targets: Mapping[str, float]) -> None:
        """Check that activation rates, by sub-module, can be reached together; sub-modules that are not named may have
        any.

        Raises:
            InputError: they cannot; says why.
        """
        self.check_steerable()
        total, free = sum(targets.values()), len(self.names) - len(targets)
        if self.least - free - 1e-6 <= total <= self.most + 1e-6:
            return
        sums = f"to {self.least:g}" if self.least == self.most else f"between {self.least:g} and {self.most:g}"
        others = f", to which the {free} without a target add {free} at most" if free and total < self.least else ""
        raise InputError(
            f"the rates of this {self._kind} router sum {sums}, but the targets {dict(targets)} to {total:g}{others}"
        )

    @property
    def _kind(self) -> str:
        return getattr(getattr(self, "spec", None), "kind", type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert or move the tensors, which `to`, `half` and their like do by this method, and keep the offset
        wide.
        """
        before = self.offset
        super()._apply(fn, recurse)
        if before is not None and self.offset is not None and self.offset.dtype in (torch.bfloat16, torch.float16):
            self.offset = before.to(self.offset.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load, and widen an offset of half precision that took the place of this one (`assign=True`)."""
        super()._load_from_state_dict(*args)
        if self.offset is not None:
            self.offset = self.offset.to(torch.promote_types(self.offset.dtype, torch.float32))

    def _continue(self, state: State | None, kind: type[StateKind], control_BLD: Tensor) -> StateKind | None:
        if state is None:
            return None
        check_causal(self)
        return check_state(self, state, kind, control_BLD.shape[0])


def keep_valid(active: Bool[Tensor, "B L M"], valid: Bool[Tensor, "B L"] | None) -> Bool[Tensor, "B L M"]:
    """Switch padding off."""
    return active if valid is None else active & valid[..., None]


class ScoredRouter(Router):
    """A router that makes its choices by linear scores: $u = W h + b$, one row per choice, plus the offset of a budget.

    Args:
        spec: of the router.
        width: channels of the control state, D.
        names: the sub-modules, M of them.
        choices: rows of W.
        steerable: whether it has an offset.

    Attributes:
        weight: `(choices, D)`, truncated normal of standard deviation 0.02 at first.
        bias: `(choices,)`, 0 at first.
        offset: `(M,)`, added to the scores for on; only `sma.budget` changes it.
    """

    def __init__(self, spec: Any, width: int, names: Sequence[str], choices: int, *, steerable: bool = True) -> None:
        super().__init__(names)
        self.spec = spec
        self.width = width
        self.weight = nn.Parameter(torch.empty(choices, width))
        self.bias = nn.Parameter(torch.zeros(choices))
        if steerable:
            self.register_buffer("offset", torch.zeros(len(self.names)))
        truncated_normal_(self.weight)

    def forward(
        self,
        control_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token; see `Router.forward`."""
        check_control(control_BLD, valid, self.width)
        streams = self._continue(state, self.state_kind, control_BLD)
        with without_autocast(control_BLD.device):
            return self._decide(self._scores(control_BLD), valid, positions, streams), state

    def _scores(self, control_BLD: Tensor) -> Tensor:
        """One score per choice, offset included."""
        # Near a tie half precision decides by rounding, so the scores are never computed below float32.
        wide = torch.promote_types(control_BLD.dtype, torch.float32)
        bias = self.bias.to(wide)
        if self.offset is not None:
            bias = bias + self._spread(self.offset.to(wide))
        return nn.functional.linear(control_BLD.to(wide), self.weight.to(wide), bias)

    def _spread(self, offset: Tensor) -> Tensor:
        """Give every choice its offset: `(M,)` to `(choices,)`; by default the choices are the sub-modules."""
        return offset

    def _decide(
        self, scores: Tensor, valid: Tensor | None, positions: Tensor | None, streams: State | None
    ) -> Decision:
        """Decide by the scores `(B, L, choices)`, in float32 or wider; positions and state are those of `forward`."""
        raise TypeError(f"{type(self).__name__} must define _decide(self, scores, valid, positions, streams)")


def gathered(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over the ranks (`fully_shard`), whole; every rank has to ask for it. Any other as it
    is.
    """
    whole: Tensor = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
    return whole


class TemperedSpec(RouterSpec):
    """What the specs of routers with a learned temperature have in common."""

    temperature_scale: float = Field(
        default=1.0,
        ge=1e-4,
        le=1e4,
        description="initial temperature, in units of sqrt(width); smaller decides more sharply",
    )


class TemperedRouter(ScoredRouter):
    r"""A router with scores and a learned temperature $\tau = e^s$, one for all sub-modules,
    $s_0 = \ln(\text{scale} \sqrt{D})$.
    """

    def __init__(self, spec: TemperedSpec, width: int, names: Sequence[str], choices: int) -> None:
        super().__init__(spec, width, names, choices)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(spec.temperature_scale * math.sqrt(width))]))

    @property
    def unit(self) -> Tensor:
        exponent = gathered(self.log_temperature.detach())[0]
        return exponent.to(torch.promote_types(exponent.dtype, torch.float32)).exp()

    def _softmax(self, scores: Tensor) -> Tensor:
        """The softmax over the last axis: from differences, which the temperature makes infinite sooner than wrong."""
        shifted = scores - scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores
        return torch.softmax(shifted / self.log_temperature.to(scores.dtype).exp(), dim=-1)
