"""The sub-module that returns its tokens."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs, NoState, State, SubModule, SubModuleSpec


@register
class IdentitySpec(SubModuleSpec):
    """Spec of `Identity`."""

    kind: Literal["identity"] = "identity"

    def build(self, width: int) -> "Identity":
        return Identity()

    def num_parameters(self, width: int) -> int:
        return 0

    def macs(self, width: int, tokens: int) -> MACs:
        return MACs()


class Identity(SubModule):
    """$y = x$: passes tokens through, for example to give a router the choice of a skip connection.

    Shape:
        tokens `(T, D)` in, `(T, D)` out.
    """

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Return the tokens' values; see `SubModule.forward`."""
        self._continue(state, NoState, tokens)
        return tokens.values, state
