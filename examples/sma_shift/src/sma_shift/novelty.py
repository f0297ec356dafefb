"""A router that activates tokens that differ from the previous one."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from sma import Decision, State, register
from sma.checks import check_sizes
from sma.routers import RouterSpec, SteerableRouter
from sma.submodule import device_and_dtype
from torch import Tensor, nn

from sma_shift.last_token import LastToken, line_up, newest


@register
class NoveltyRouterSpec(RouterSpec):
    """Spec of `NoveltyRouter`."""

    kind: Literal["novelty"] = "novelty"
    threshold: float = Field(
        default=0.5, ge=0.0, le=1.0, description="initial threshold of novelty, above which a token is active"
    )
    sharpness: float = Field(default=10.0, gt=0.0, le=1e4, description="initial log-odds per unit of novelty")

    def build(self, width: int, names: Sequence[str]) -> "NoveltyRouter":
        return NoveltyRouter(self, width, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return 2 * modules

    def macs_per_token(self, width: int, modules: int) -> int:
        return width + modules


class NoveltyRouter(SteerableRouter):
    r"""Independent decisions by the novelty of a token: $n_t = |h_t - h_{t-1}| / (|h_t| + |h_{t-1}|)$ in [0, 1].

    $|h|$ is the sum of absolute values and $h_{t-1}$ the previous valid token, zeros before the first one. The first
    token of a stream has novelty 1, a repeated token 0. The score for on is $g_m (n_t - \theta_m)$ plus the score bias
    of a budget, for off 0; $p = \mathrm{softmax}$ of the two. Active iff $p_1 > p_0$, confidence $c = \max(p)$. A
    negative gain, which training may reach, selects repeated tokens.

    Causal; its state is one token per row. The gradient goes through the softmax, and only from active tokens.

    Args:
        spec: the first threshold and gain of every sub-module.
        width: channels of the control state, D.
        names: the sub-modules, M of them.

    Shape:
        control `(B, L, D)`. `gain` and `threshold` are `(M,)`.
    """

    def __init__(self, spec: NoveltyRouterSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec
        self.width = width
        self.gain = nn.Parameter(torch.full((len(self.names),), spec.sharpness))
        self.threshold = nn.Parameter(torch.full((len(self.names),), spec.threshold))

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LastToken:
        """Make the state of streams that have seen nothing; see `Router.init_state`."""
        device, dtype = device_and_dtype(self, device, dtype)
        return LastToken(torch.zeros(batch_size, self.width, device=device, dtype=dtype))

    def forward(
        self,
        control_BLD: Tensor,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Decision, State | None]:
        """Decide for every token; see `Router.forward`."""
        before = self._continue(state, LastToken, control_BLD)
        if before is not None:
            check_sizes(self, tuple(before.values.shape[1:]), (self.width,))
        line = line_up(control_BLD, before)
        places = last_valid(control_BLD, valid)
        novelty = self._novelty(control_BLD, line.take_along_dim(places[:, :-1, None], dim=1))
        # There is no matrix product, so autocast changes nothing: float32 or wider throughout.
        gain, threshold, bias = (part.to(novelty.dtype) for part in (self.gain, self.threshold, self.score_bias))
        on = gain * (novelty[..., None] - threshold) + bias
        scores = torch.stack([torch.zeros_like(on), on], dim=-1)
        p_off, p_on = torch.softmax(scores, dim=-1).unbind(-1)
        active = on > 0 if valid is None else (on > 0) & valid[..., None]
        decision = Decision(active, torch.maximum(p_off, p_on), scores, p_on, self.names)
        return decision, None if before is None else newest(line, places[:, -1], before)

    def _novelty(self, token: Tensor, before: Tensor) -> Tensor:
        wide = torch.promote_types(token.dtype, torch.float32)
        token, before = token.to(wide), before.to(wide)
        # Absolute values and not squares: those of 1e20 would be infinite in float32.
        return (token - before).abs().mean(-1) / (token.abs() + before.abs()).mean(-1).add(1e-6)


def last_valid(control_BLD: Tensor, valid: Tensor | None) -> Tensor:
    """`(B, L + 1)`: index in the line of the newest valid token before each token, and after the last one; 0 is the
    state.
    """
    rows, length = control_BLD.shape[:2]
    places = torch.arange(length + 1, device=control_BLD.device).expand(rows, length + 1)
    if valid is None:
        return places
    return places.where(nn.functional.pad(valid, (1, 0), value=True), 0).cummax(dim=1).values
