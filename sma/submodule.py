"""The contract of a sub-module: what a token may activate."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sma.errors import StateError
from sma.pytree import map_tensors
from sma.ragged import Ragged
from sma.spec import Spec


class Operations(NamedTuple):
    """Multiply-adds that a part executes: exact for matrix products, estimated for Fourier transforms (1.25 n log2 n each)."""

    products: int = 0
    transforms: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.products + self.transforms

    def plus(self, other: "Operations", times: int = 1) -> "Operations":
        """Add `times` another count."""
        return Operations(self.products + times * other.products, self.transforms + times * other.transforms)


@dataclass(frozen=True)
class State:
    """What a causal part carries from one chunk of a stream to the next: a frozen dataclass of tensors, batch first.

    Subclasses are decorated with `register_output` and `@dataclass(frozen=True)`.
    """

    def select(self, rows: Int[Tensor, "R"]) -> Self:
        """The state of some rows, in the order given; a row may be taken twice."""
        return map_tensors(lambda tensor: tensor.index_select(0, rows), self)

    def detach(self) -> Self:
        """The same state cut off from the graph."""
        return map_tensors(lambda tensor: tensor.detach(), self)

    def to(self, device: torch.device | str) -> Self:
        """The same state on another device."""
        return map_tensors(lambda tensor: tensor.to(device), self)


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

    def operations(self, width: int, tokens: int) -> Operations:
        """Predict the multiply-adds of one forward pass over one row of `tokens` tokens."""
        raise SubModuleSpec._incomplete(self, "operations(self, width, tokens)")

    def _incomplete(self, method: str) -> TypeError:
        return TypeError(f"{type(self).__name__} must define {method}; see CONTRIBUTING.md, 'A sub-module in one file'")


class SubModule(nn.Module):
    """What a token may activate. It works on ragged tokens and does not know that it is routed.

    Attributes:
        causal: whether the result at a token depends on no later token of its row.
    """

    causal: bool = False

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Compute the result of every token.

        Args:
            tokens: the tokens, packed or rectangular; a row may have none, and T may be 0.
            state: where the stream of every row stands; None at its beginning.

        Returns:
            the results in the order of the tokens, and a new state if and only if one was given.

        Raises:
            StateError: a state was given to a part that cannot continue from one.
        """
        raise TypeError(f"{type(self).__name__} must define forward(self, tokens, state=None)")

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """Make the state of `batch_size` streams that have seen nothing; recurrent states are never below float32."""
        raise self._no_stream()

    def _no_stream(self) -> StateError:
        if not self.causal:
            reason = "is not causal (causal=False) and cannot continue from a state; build it with bidirectional=false or causal=true"
        else:
            reason = "does not support streaming yet; run whole sequences with state=None"
        return StateError(f"{type(self).__name__} {reason}")

    def _refuse(self, state: State | None) -> None:
        if state is not None:
            raise self._no_stream()
