"""An MLP of each token mixed with the previous active one."""

from typing import Literal

import torch
from pydantic import Field
from sma import Ragged, State, SubModule, SubModuleSpec, register
from sma.checks import check_sizes
from sma.submodule import MACs, device_and_dtype
from torch import Tensor, nn

from sma_shift.last_token import LastToken, line_up, newest


@register
class TokenShiftSpec(SubModuleSpec):
    """Spec of `TokenShift`."""

    kind: Literal["token_shift"] = "token_shift"
    hidden_size: int = Field(ge=1, description="width of the hidden layer, in channels, H")

    def build(self, width: int) -> "TokenShift":
        return TokenShift(self, width)

    def num_parameters(self, width: int) -> int:
        return width + 2 * width * self.hidden_size

    def macs(self, width: int, tokens: int) -> MACs:
        return MACs(matmul=2 * tokens * width * self.hidden_size, elementwise=2 * tokens * width)


class TokenShift(SubModule):
    r"""An MLP of each token mixed with the active token before it: $y_t = W_2 \mathrm{relu}(W_1 z_t)^2$.

    $z_t = \mu \odot x_t + (1 - \mu) \odot x_{t-1}$, where t - 1 is the previous active token of the row, zeros before
    the first one.

    Args:
        spec: hidden size.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `mix` is `(D,)`, initially one half.

    Reference:
        the channel mixing of RWKV without its gate; Peng et al., arXiv 2305.13048.
    """

    causal = True

    def __init__(self, spec: TokenShiftSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.mix = nn.Parameter(torch.full((width,), 0.5))
        self.up = nn.Linear(width, spec.hidden_size, bias=False)
        self.down = nn.Linear(spec.hidden_size, width, bias=False)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LastToken:
        """Make the state of streams that have seen nothing; see `SubModule.init_state`."""
        device, dtype = device_and_dtype(self, device, dtype)
        return LastToken(torch.zeros(batch_size, self.mix.shape[0], device=device, dtype=dtype))

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        """Compute the result of every token; see `SubModule.forward`."""
        before = self._continue(state, LastToken, tokens)
        if before is not None:
            check_sizes(self, tuple(before.values.shape[1:]), tuple(self.mix.shape))
        x_BSD, _ = tokens.to_padded()  # every row from the left, zeros after its end
        line = line_up(x_BSD, before)
        mixed = torch.lerp(line[:, :-1], x_BSD, self.mix.to(x_BSD.dtype))
        values = self.down(torch.relu(self.up(tokens.from_padded(mixed))).square())
        return values, None if before is None else newest(line, tokens.lengths, before)
