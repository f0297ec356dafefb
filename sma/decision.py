"""Decision: which tokens run which sub-modules, and the confidence of the router."""

from dataclasses import dataclass, field, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.checks import check_valid
from sma.errors import quote
from sma.padding import move
from sma.pytree import register_output
from sma.summary import brief, is_known, listed, summary


@register_output
@dataclass(frozen=True)
class Decision:
    """Decision of a router about a batch of B rows, L positions and M sub-modules.

    Attributes:
        active: which tokens run which sub-modules; False at padding.
        confidence: factor of a sub-module's output where it is active, in (0, 1]; carries the router's gradient.
        logits: scores for off and on.
        p_on: probability of being active, in [0, 1], for losses and reports.
        names: the sub-modules, in the order of the last axis.
        overflow: number of tokens of each row that the router activated beyond a static capacity; they are False in
            `active`. None without a capacity.
        skip_score: score of the empty choice, if it competes with the sub-modules; else None.
    """

    active: Bool[Tensor, "B L M"]
    confidence: Float[Tensor, "B L M"]
    logits: Float[Tensor, "B L M 2"]
    p_on: Float[Tensor, "B L M"]
    names: tuple[str, ...] = field(metadata={"static": True})
    overflow: Int[Tensor, "B M"] | None = None
    skip_score: Float[Tensor, "B L"] | None = None

    def rate(self, valid: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "M"]:
        """Activation rate of each sub-module: active valid tokens / valid tokens, in [0, 1]; 0 where no token is valid.

        Raises:
            InputError: the mask does not fit, and would be broadcast to rates above 1.
        """
        rows, length = self.active.shape[:2]
        if valid is None:
            return self.active.sum((0, 1)).double() / max(rows * length, 1)
        check_valid(self.active, valid)
        return (self.active & valid[..., None]).sum((0, 1)).double() / valid.sum().clamp(min=1)

    def __repr__(self) -> str:
        """One line: rows, positions, and the share of all positions that are active, padding included."""
        if not isinstance(self.active, Tensor) or self.active.ndim != 3:
            return summary(self)
        rates = self.rate().tolist() if is_known(self.active) else None
        if rates is None:
            what = f"names=[{listed(map(quote, self.names))}]"
        else:
            known = (f"{quote(name)}: {rate:.3g}" for name, rate in zip(self.names, rates, strict=False))
            what = f"rates={{{listed(known)}}}"
        rows, length = self.active.shape[:2]
        dtype = brief(self.confidence).partition("[")[0]
        return f"Decision(B={rows}, L={length}, {what}, dtype={dtype}, device={str(self.active.device)!r})"

    def move(self, order: Int[Tensor, "B L"]) -> "Decision":
        """Reorder the positions of every row, as `sma.padding.move` does."""
        return replace(
            self,
            active=move(self.active, order),
            confidence=move(self.confidence, order),
            logits=move(self.logits, order),
            p_on=move(self.p_on, order),
            skip_score=None if self.skip_score is None else move(self.skip_score, order),
        )
