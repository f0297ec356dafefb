"""The router that laws are checked on, its decisions about whole rows and chunks, and their comparison."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sma.decision import Decision
from sma.routers import Router, RouterSpec
from sma.submodule import State
from sma.testing.examples import Example, reproducible
from sma.testing.requirements import require, require_near

FIELDS = ("confidence", "logits", "p_on")


@dataclass(frozen=True)
class RouterCase:
    """The router that is checked: a spec, or a function from the width and the sub-modules' names to a router."""

    spec: RouterSpec | Callable[[int, Sequence[str]], Router]
    width: int
    modules: int

    @property
    def names(self) -> tuple[str, ...]:
        """The sub-modules that the router decides about."""
        return tuple(f"module_{index}" for index in range(self.modules))

    @cached_property
    def streams(self) -> bool:
        """Whether the router is causal, and so continues from a state."""
        return self.make().causal

    def make(self, dtype: torch.dtype = torch.float64, names: Sequence[str] | None = None, seed: int = 0) -> Router:
        """A new router with spread parameters, the same ones for a seed, in evaluation mode."""
        build = self.spec.build if isinstance(self.spec, RouterSpec) else self.spec
        return reproducible(lambda: build(self.width, self.names if names is None else names), dtype, seed)

    def control(self, example: Example, dtype: torch.dtype = torch.float64) -> Tensor:
        """A random control state `(B, L, D)`."""
        return torch.randn(len(example.lengths), example.length, self.width, dtype=torch.float64).to(dtype)


def ranks(valid: Tensor, seen: int | Tensor = 0) -> Tensor:
    """Position `(B, L)` of each valid token in its row's stream, after `seen` tokens of earlier chunks."""
    return valid.cumsum(1) - 1 + seen


def decide(router: Router, control: Tensor, valid: Tensor) -> Decision:
    """The decision about whole rows, from the beginning of their streams."""
    decision, after = router(control, valid, ranks(valid))
    require(after is None, f"no state was given, and {type(after).__name__} was returned")
    return decision


def stream(
    router: Router,
    control: Tensor,
    valid: Tensor,
    chunks: Iterable[slice],
    state: State | None = None,
    seen: int | Tensor = 0,
) -> tuple[Decision, State]:
    """The decision about whole rows, made chunk by chunk, and the last state."""
    state = router.init_state(control.shape[0], dtype=control.dtype) if state is None else state
    positions, parts = ranks(valid, seen), []
    for chunk in chunks:
        decision, after = router(control[:, chunk], valid[:, chunk], positions[:, chunk], state)
        if not isinstance(after, State):
            raise AssertionError(f"forward was given a state and returned {type(after).__name__} instead of a new one")
        parts.append(decision)
        state = after
    joined = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in ("active", *FIELDS)}
    return Decision(**joined, names=parts[0].names), state


def require_same(
    found: Decision, wanted: Decision, valid: Tensor, what: str, wanted_valid: Tensor | None = None
) -> None:
    """Compare two decisions at the valid positions."""
    other = valid if wanted_valid is None else wanted_valid
    require(torch.equal(found.active[valid], wanted.active[other]), f"{what}: other tokens are active")
    for name in FIELDS:
        require_near(getattr(found, name)[valid], getattr(wanted, name)[other], f"{what}: {name}")


def rows_of(decision: Decision, rows: Tensor) -> Decision:
    """The decision about some rows, in the order given."""
    return Decision(**{name: getattr(decision, name)[rows] for name in ("active", *FIELDS)}, names=decision.names)
