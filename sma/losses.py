"""Losses of routing, as functions of decisions: nothing is stored on a module, so recomputation cannot count one twice.

Each takes the decisions of one forward pass, one per routed layer as `ModelOutput.decisions`, and gives one number that
is added to the loss of the task with a weight.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sma.checks import check_decisions, check_known, check_rate, check_tensor
from sma.decision import Decision
from sma.errors import InputError


def budget_loss(
    decisions: Sequence[Decision], target: float | Mapping[str, float], valid: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, ""]:
    r"""How far the activation rates are from their target: the mean of $(r - r^*)^2$ over layers and sub-modules.

    The value is that of the real rate r; the gradient is that of the mean probability `p_on`, at inactive tokens too.
    It is 0, and its gradient 0, exactly at the target, and for a batch without a valid token, which has no rate. A
    gentle alternative to `sma.budget.BudgetController`, which does not change the loss.

    Args:
        decisions: one per routed layer.
        target: the rate, in [0, 1]: one for all, or one per sub-module; sub-modules that are not named are left alone.
        valid: False at padding; None where there is none.

    Raises:
        InputError: a target is not in [0, 1] or names no sub-module, or the mask does not fit.
    """
    check_decisions(decisions, "budget_loss", valid)
    gaps = []
    targets = _targets(decisions, target)
    for decision in decisions:
        chosen = [place for place, name in enumerate(decision.names) if name in targets]
        if chosen:
            soft = _mean(decision.p_on, valid)[chosen]
            real = decision.rate(valid).to(soft.dtype)[chosen]
            wanted = soft.new_tensor([targets[decision.names[place]] for place in chosen])
            gaps.append((real + (soft - soft.detach()) - wanted) * _has_tokens(decision, valid))
    return torch.cat(gaps).square().mean() if gaps else _zero(decisions)


def load_balance_loss(decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, ""]:
    r"""How unevenly the sub-modules of a layer are used: $M \sum_m f_m P_m$, meant over the layers; 1 where they are
    used alike.

    f is each sub-module's share of the layer's activations and P its share of the mean probability `p_on`; the gradient
    goes through P. For routers under which sub-modules compete (`top_k`, `exclusive`); a layer of one sub-module
    gives 1.

    Args:
        decisions: one per routed layer.
        valid: False at padding; None where there is none.

    Reference:
        Fedus et al., "Switch Transformers", arXiv 2101.03961, equation 4.
    """
    check_decisions(decisions, "load_balance_loss", valid)
    losses = []
    for decision in decisions:
        soft, real = _mean(decision.p_on, valid), decision.rate(valid)
        shares = (real / real.sum().clamp(min=1e-30)).to(soft.dtype)
        # A layer in which nothing ran is not unbalanced.
        shares = shares.where(real.sum() > 0, 1 / len(decision.names))
        losses.append(len(decision.names) * (shares * soft / soft.sum().clamp(min=torch.finfo(soft.dtype).tiny)).sum())
    return torch.stack(losses).mean() if losses else _zero(decisions)


def z_loss(decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, ""]:
    r"""How large the scores are: the mean of $(\log(e^{u_0} + e^{u_1}))^2$ over valid tokens, sub-modules and layers.

    u are the two scores of the decision, score bias included, before the temperature. Keeps scores small, where half
    precision and the softmax still tell them apart.

    The paper's sum runs over the scores of all experts of a token, once per token. Here it runs over the pair of each
    sub-module: for `sma`, `gumbel` and `bernoulli`, which have a softmax for each, that is the same equation; under
    `threshold` and `expert_choice` $u_0$ is the threshold; where sub-modules compete (`exclusive`, `top_k`) $u_0$ is
    the best score against which the sub-module stands, so that of n scores that are all 0 it gives $(\log 2)^2$ and not
    $(\log n)^2$.

    Args:
        decisions: one per routed layer.
        valid: False at padding; None where there is none.

    Reference:
        Zoph et al., "ST-MoE", arXiv 2202.08906, equation 5.
    """
    check_decisions(decisions, "z_loss", valid)
    losses = [_mean(decision.logits.logsumexp(-1).square(), valid).mean() for decision in decisions if decision.names]
    return torch.stack(losses).mean() if losses else _zero(decisions)


def policy_gradient_loss(
    decisions: Sequence[Decision],
    losses: Float[Tensor, "B"] | Float[Tensor, "B L"],
    valid: Bool[Tensor, "B L"] | None = None,
    *,
    rates_are_held: bool = False,
) -> Float[Tensor, ""]:
    r"""The score function of sampled decisions: minus the mean of $A_{bt} (a_{bt} - p_{bt}) (u_1 - u_0)_{bt}$.

    a is the draw, p its probability and u are the scores, so that the gradient is that of $A \log P(a)$: an unbiased
    estimate of that of the expected loss over the draws, up to the positive factors by which the advantages A are
    standardised. Its value means nothing. The advantage says how much less a row lost than the other rows of the batch,
    in standard deviations. Where losses are given at positions, it counts those from the token's own position on: a
    causal model owes a token nothing that came before it, and the variance is less. The mean is over valid tokens,
    sub-modules and layers.

    Args:
        decisions: those of routers that sample, whose `p_on` is the probability of having been active.
        losses: of every row; or, of a causal model, of every position, 0 where nothing is asked. Their gradient is not
            used.
        valid: False at padding; None where there is none.
        rates_are_held: a budget holds the rates, so that only the differences between tokens count: the gradient then
            has a mean of 0 over the tokens. Without this, what all tokens have in common and the budget work against
            each other without end.

    Raises:
        InputError: the losses or the mask do not fit.

    Reference:
        Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992.
    """
    check_decisions(decisions, "policy_gradient_loss", valid)
    check_tensor(losses, "the losses are", torch.float32)
    if not decisions:
        return _zero(decisions)
    rows, length = decisions[0].active.shape[:2]
    if losses.shape not in ((rows,), (rows, length)):
        raise InputError(
            f"the losses have shape {tuple(losses.shape)}; required is (B,) = ({rows},), or (B, L) = ({rows}, {length})"
        )
    valid = torch.ones(rows, length, dtype=torch.bool, device=losses.device) if valid is None else valid
    advantage_BL = _advantage(losses.detach(), valid)
    total = []
    for decision in decisions:
        drawn = decision.active.double() - decision.p_on.detach()
        praise_BLM = (advantage_BL[..., None] * drawn).where(valid[..., None], 0)
        if rates_are_held:
            praise_BLM = praise_BLM - _mean(praise_BLM, valid)
        margins = decision.logits[..., 1] - decision.logits[..., 0]
        total.append(_mean(praise_BLM.to(margins.dtype) * margins, valid).mean())
    return -torch.stack(total).mean()


def _advantage(losses: Tensor, valid: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Standard deviations by which each row loses less than the mean of the rows that have a token there."""
    ahead = losses[:, None].expand(valid.shape) if losses.ndim == 1 else losses.flip(1).cumsum(1).flip(1)
    ahead = ahead.double().where(valid, 0)
    count = valid.sum(0).clamp(min=1)
    gap = (ahead.sum(0) / count - ahead).where(valid, 0)
    spread = (gap.square().sum(0) / count).sqrt()
    return torch.where(spread > 0, gap / spread.where(spread > 0, 1), 0)


def _mean(values_BLM: Tensor, valid: Tensor | None) -> Float[Tensor, "M"]:
    """Mean over the valid tokens; 0 where there is none."""
    rows, length = values_BLM.shape[:2]
    if valid is None:
        return values_BLM.sum((0, 1)) / max(rows * length, 1)
    return values_BLM.where(valid[..., None], 0).sum((0, 1)) / valid.sum().clamp(min=1)


def _has_tokens(decision: Decision, valid: Tensor | None) -> Tensor | bool:
    """Whether there is a valid token."""
    return decision.active.shape[:2].numel() > 0 if valid is None else valid.any()


def _zero(decisions: Sequence[Decision]) -> Tensor:
    return decisions[0].p_on.new_zeros(()) if decisions else torch.zeros(())


def _targets(decisions: Sequence[Decision], target: float | Mapping[str, float]) -> dict[str, float]:
    names = list(dict.fromkeys(name for decision in decisions for name in decision.names))
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(names, target)
    check_known(targets, names, "the target rate")
    for name, rate in targets.items():
        check_rate(rate, f"the target rate of {name!r}")
    return targets
