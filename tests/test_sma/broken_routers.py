"""Routers that each break one law of the conformance kit, and one that breaks none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sma.decision import Decision
from sma.pytree import register_output
from sma.routers import SteerableRouter
from sma.submodule import State, device_and_dtype


@register_output
@dataclass(frozen=True)
class Before(State):
    token: Tensor


class Rising(SteerableRouter):
    """A correct router that scores the difference to the previous valid token; the base of the broken ones."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.weight = nn.Parameter(torch.randn(len(names), width))
        self.bias = nn.Parameter(torch.zeros(len(names)))

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        device, dtype = device_and_dtype(self, device, dtype)
        return Before(torch.zeros(batch_size, self.weight.shape[1], device=device, dtype=dtype))

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        before = self._continue(state, Before, control)
        first = (
            control.new_zeros(control.shape[0], control.shape[2]) if before is None else before.token.to(control.dtype)
        )
        line = torch.cat([first[:, None], control], 1)
        places = torch.arange(line.shape[1]).expand(line.shape[:2])
        if valid is not None:
            places = places.where(nn.functional.pad(valid, (1, 0), value=True), 0).cummax(1).values
        change = self.wide(control) - self.wide(line).take_along_dim(places[:, :-1, None], 1)
        scores = self.scores(change, control)
        sure = self.sure(scores)
        active = self.active(scores)
        if valid is not None:
            active = active & valid[..., None]
        logits, p_on = torch.stack([torch.zeros_like(scores), scores], -1), torch.sigmoid(scores)
        after = (
            None
            if before is None
            else Before(line.take_along_dim(places[:, -1:, None], 1).squeeze(1).to(before.token.dtype))
        )
        return Decision(active, sure, logits, p_on, self.names), after

    def wide(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return change @ self.weight.to(change.dtype).T + (self.bias + self.score_bias).to(change.dtype)

    def sure(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores.abs())

    def active(self, scores: Tensor) -> Tensor:
        return scores > 0


class Leak(Rising):
    """Depends on the whole row."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) + 1e-3 * self.wide(control).sum((1, 2), keepdim=True)


class Padded(Rising):
    """Activates padding."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        decision, after = super().forward(control, valid, positions, state)
        return Decision(
            decision.logits[..., 1] > 0, decision.confidence, decision.logits, decision.p_on, self.names
        ), after


class Neighbour(Rising):
    """Treats padding as the previous token."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        decision, after = super().forward(control, None, positions, state)
        valid = torch.ones(control.shape[:2], dtype=torch.bool) if valid is None else valid
        active = decision.active & valid[..., None]
        return Decision(active, decision.confidence, decision.logits, decision.p_on, self.names), after


class Tied(Rising):
    """Activates tokens with tied scores."""

    def active(self, scores: Tensor) -> Tensor:
        return scores >= 0


class Mixing(Rising):
    """Normalises over the batch."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) - 1e-3 * change.sum((0, 2))[:, None]


class Placed(Rising):
    """Adds to the scores of later rows of a batch."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) + 1e-3 * torch.arange(len(change), dtype=change.dtype)[:, None, None]


class Greedy(Rising):
    """Activates every token whose score is not below the threshold, including NaN."""

    def active(self, scores: Tensor) -> Tensor:
        return ~(scores <= 0)


class Detached(Rising):
    """Returns a confidence without a gradient."""

    def sure(self, scores: Tensor) -> Tensor:
        return super().sure(scores.detach())


class Unused(Rising):
    """Does not use its parameters if there is no token."""

    def sure(self, scores: Tensor) -> Tensor:
        return super().sure(scores) if scores.numel() else torch.ones_like(scores)


class Sure(Rising):
    """Returns a confidence above 1."""

    def sure(self, scores: Tensor) -> Tensor:
        return 1 + super().sure(scores)


class Half(Rising):
    """Computes scores in the precision of autocast."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        scores = (change @ self.weight.to(change.dtype).T).to(change.dtype)
        return scores + (self.bias + self.score_bias).to(change.dtype)


class Cancelling(Rising):
    """Adds and subtracts a number so large that float32 loses the score."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) + 1e7 - 1e7


class Exploding(Rising):
    """Computes scores that overflow."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) * change.square().sum(-1, keepdim=True) ** 6


class Forgetful(Rising):
    """Accepts a state and returns none."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        return super().forward(control, valid, positions, state)[0], None


class Stale(Rising):
    """Returns the given state unchanged."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        return super().forward(control, valid, positions, state)[0], state


class Overwriting(Rising):
    """Changes the old state in place."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        decision, after = super().forward(control, valid, positions, state)
        if isinstance(state, Before) and isinstance(after, Before):
            state.token.copy_(after.token.detach())
        return decision, after


class Cut(Rising):
    """Cuts the graph at the state."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        return super().forward(control, valid, positions, None if state is None else state.detach())


@register_output
@dataclass(frozen=True)
class Stubborn(Before):
    def reset(self, rows: Tensor) -> "Stubborn":
        return self


class Unresettable(Rising):
    """Makes a state that cannot be reset."""

    def init_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> State:
        return Stubborn(torch.zeros(batch_size, self.weight.shape[1], dtype=dtype))

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        decision, after = super().forward(control, valid, positions, state)
        return decision, Stubborn(after.token) if isinstance(after, Before) else None


class Jittering(Rising):
    """Samples from torch's global generator."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) + 1e-3 * torch.rand(change.shape[:2], dtype=change.dtype)[..., None]


class Counting(Rising):
    """Counts its calls in a buffer."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        super().__init__(width, names)
        self.register_buffer("calls", torch.zeros(()))

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        self.calls += 1
        return super().scores(change, control)


class Moody(Rising):
    """Makes other decisions in training."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) + 0.1 * self.training


class Contrary(Rising):
    """Activates tokens whose score for off is higher."""

    def active(self, scores: Tensor) -> Tensor:
        return scores < 0


class Opposite(Rising):
    """Subtracts the score bias."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) - 2 * self.score_bias.to(change.dtype)


class Lexical(Rising):
    """Makes decisions that depend on the alphabetical order of names."""

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        order = sorted(range(len(self.names)), key=lambda place: self.names[place])
        return super().scores(change, control)[..., order]


class Hidden(Rising):
    """Keeps a random number that no checkpoint contains."""

    def __init__(self, width: int, names: Sequence[str]) -> None:
        super().__init__(width, names)
        self.shift = torch.randn(())

    def scores(self, change: Tensor, control: Tensor) -> Tensor:
        return super().scores(change, control) + self.shift.to(change.dtype)


class Demanding(Rising):
    """Requires a mask."""

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        return super().forward(control, valid & True, positions, state)


class Wrong(Rising):
    """Returns a gradient that is not that of the confidence."""

    def sure(self, scores: Tensor) -> Tensor:
        return super().sure(scores.detach() + 2 * (scores - scores.detach()))


class Pretending(Rising):
    """Declares causal=False, but creates a state."""

    causal = False


class Unmoved(Rising):
    """Ignores the decision to replay."""

    def replay(self, decision, active):
        return decision


BROKEN = [
    (Sure, "returns_a_decision"),
    (Contrary, "active_is_where_on_beats_off"),
    (Greedy, "active_is_where_on_beats_off"),
    (Tied, "ties_are_inactive"),
    (Opposite, "a_score_bias_steers_the_rate"),
    (Unmoved, "replay_is_the_identity"),
    (Jittering, "changes_nothing_and_repeats"),
    (Counting, "changes_nothing_and_repeats"),
    (Moody, "training_decides_as_evaluation"),
    (Padded, "padding_changes_nothing"),
    (Neighbour, "padding_changes_nothing"),
    (Demanding, "without_padding_nothing_need_be_given"),
    (Mixing, "rows_are_independent"),
    (Placed, "rows_are_independent"),
    (Lexical, "names_are_labels"),
    (Unused, "takes_no_tokens"),
    (Detached, "every_parameter_gets_a_gradient"),
    (Wrong, "gradients_are_right"),
    (Exploding, "extreme_tokens_are_decided"),
    (Half, "half_precision_decides_as_float32"),
    (Cancelling, "works_in_float32"),
    (Leak, "never_looks_ahead"),
    (Leak, "chunks_equal_the_whole"),
    (Stale, "chunks_equal_the_whole"),
    (Forgetful, "chunks_equal_the_whole"),
    (Cut, "gradients_cross_chunks"),
    (Overwriting, "states_are_values"),
    (Neighbour, "states_are_values"),
    (Unresettable, "states_can_be_moved"),
    (Pretending, "refuses_a_state_unless_causal"),
    (Hidden, "weights_are_all_there_is"),
]
