"""Losses of routing, as functions of decisions. Nothing is stored on modules, so recomputation cannot count one twice.

Each takes the decisions of one forward pass, one per routed layer as in `ModelOutput.decisions`, and returns a scalar
to be added to the loss of the task with a weight.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sma.checks import check_decisions, check_known, check_rate, check_tensor
from sma.decision import Decision
from sma.devices import running_sum
from sma.errors import InputError, quote


def budget_loss(
    decisions: Sequence[Decision], target: float | Mapping[str, float], valid: Bool[Tensor, "B L"] | None = None
) -> Float[Tensor, ""]:
    r"""Distance of the activation rates from their target: the mean of $(r - r^*)^2$ over layers and sub-modules.

    The value uses the actual rate r; the gradient is that of the mean probability `p_on`, at inactive tokens too. Value
    and gradient are 0 exactly at the target, and for a batch without a valid token, which has no rate. It is an
    alternative to `sma.budget.BudgetController`, which does not change the loss.

    Args:
        decisions: one per routed layer.
        target: the rate, in [0, 1]: one for all sub-modules, or one per name; others are not affected.
        valid: False at padding; None where there is none.

    Raises:
        InputError: a target is not in [0, 1] or names no sub-module, or the mask does not fit.
    """
    check_decisions(decisions, "budget_loss", valid)
    gaps = []
    targets = _targets(decisions, target)
    for decision in decisions:
        soft = _mean(decision.p_on, valid)
        rates = decision.rate(valid).to(soft.dtype) + (soft - soft.detach())
        any_token = decision.active.shape[:2].numel() > 0 if valid is None else valid.any()
        for name, rate in zip(decision.names, rates.unbind(), strict=True):
            if name in targets:
                gaps.append((rate - targets[name]) * any_token)
    return torch.stack(gaps).square().mean() if gaps else _zero(decisions)


def load_balance_loss(decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, ""]:
    r"""Imbalance of the use of a layer's sub-modules: the mean of $M \sum_m f_m P_m$ over the layers; 1 for uniform
    use.

    f is the share of a sub-module in the activations of the layer, P its share in the mean probability `p_on`. The
    gradient flows through P. It is for routers under which sub-modules compete (`top_k`, `exclusive`); a layer with one
    sub-module gives 1.

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
    r"""Size of the scores: the mean of $(\log(e^{u_0} + e^{u_1}))^2$ over valid tokens, sub-modules and layers.

    u are the two scores of the decision, with the score bias, before the temperature. The loss keeps scores small,
    where half precision and the softmax still distinguish them.

    In the paper the sum runs over the scores of all experts of a token, once per token; here over the pair of each
    sub-module. For `sma`, `gumbel` and `bernoulli`, which have a softmax per sub-module, that is the same equation.
    Under `threshold` and `expert_choice` $u_0$ is the threshold. Where sub-modules compete (`exclusive`, `top_k`)
    $u_0$ is the best competing score, so n scores that are all 0 give $(\log 2)^2$, not $(\log n)^2$.

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
    budget_over: Literal["each", "total"] | None = None,
) -> Float[Tensor, ""]:
    r"""The score function of sampled decisions: minus the mean of $A_{bt} (a_{bt} - p_{bt}) (u_1 - u_0)_{bt}$.

    a is the draw, p its probability and u are the scores, so the gradient is that of $A \log P(a)$: an unbiased
    estimate of the gradient of the expected loss over the draws, up to the positive factors that standardise the
    advantages A. Only the gradient is meaningful, not the value. The advantage is the number of standard deviations by
    which the loss of a row is below that of the other rows of the batch. With losses by position it sums those from the
    token's own position on: in a causal model a token does not affect earlier losses, and the variance is smaller. The
    mean is over valid tokens, sub-modules and layers.

    Args:
        decisions: decisions of routers that sample, whose `p_on` is the probability of being active.
        losses: loss of every row; or, of a causal model, of every position, 0 where there is no target. Their gradient
            is not used.
        valid: False at padding; None where there is none.
        budget_over: what a budget holds, as in `BudgetSpec.over`; None without a budget. Only differences between
            tokens count then, and for a total also those between layers and sub-modules: the gradient has mean 0 over
            the tokens of each sub-module, or over everything. Its common part and the budget would counteract each
            other.

    Raises:
        InputError: the losses or the mask do not fit, or `budget_over` is unknown.

    Reference:
        Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992.
    """
    if budget_over not in (None, "each", "total"):
        raise InputError(f"budget_over={quote(budget_over)}; expected 'each', 'total', or None without a budget")
    check_decisions(decisions, "policy_gradient_loss", valid)
    check_tensor(losses, "the losses are", torch.float32)
    if not decisions:
        return _zero(decisions)
    rows, length = decisions[0].active.shape[:2]
    if losses.shape not in ((rows,), (rows, length)):
        raise InputError(
            f"the losses have shape {tuple(losses.shape)}; expected (B,) = ({rows},), or (B, L) = ({rows}, {length})"
        )
    valid = torch.ones(rows, length, dtype=torch.bool, device=losses.device) if valid is None else valid
    advantage_BL = _advantage(losses.detach(), valid)
    rewards = [
        (advantage_BL[..., None] * (decision.active.double() - decision.p_on.detach())).where(valid[..., None], 0)
        for decision in decisions
    ]
    means = [_mean(reward_BLM, valid) for reward_BLM in rewards]
    if budget_over is None:
        means = [torch.zeros_like(mean) for mean in means]
    elif budget_over == "total":
        means = [torch.cat(means).mean()] * len(means)
    total = []
    for decision, reward_BLM, mean in zip(decisions, rewards, means, strict=True):
        margins = decision.logits[..., 1] - decision.logits[..., 0]
        total.append(_mean((reward_BLM - mean).to(margins.dtype) * margins, valid).mean())
    return -torch.stack(total).mean()


def _advantage(losses: Tensor, valid: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Standard deviations by which the loss of each row is below the mean of the rows that have a token there."""
    if losses.ndim == 1:
        ahead = repeat(losses, "B -> B L", L=valid.shape[1])
    else:
        ahead = running_sum(losses.flip(1)).flip(1)
    ahead = ahead.double().where(valid, 0)
    count = valid.sum(0).clamp(min=1)
    gap = (ahead.sum(0) / count - ahead).where(valid, 0)
    spread = (gap.square().sum(0) / count).sqrt()
    return torch.where(spread == 0, 0, gap / spread.where(spread != 0, 1))  # NaN stays NaN


def _mean(values_BLM: Tensor, valid: Tensor | None) -> Float[Tensor, "M"]:
    """Mean over the valid tokens; 0 where there is none."""
    rows, length = values_BLM.shape[:2]
    if valid is None:
        return values_BLM.sum((0, 1)) / max(rows * length, 1)
    return values_BLM.where(valid[..., None], 0).sum((0, 1)) / valid.sum().clamp(min=1)


def _zero(decisions: Sequence[Decision]) -> Tensor:
    return decisions[0].p_on.new_zeros(()) if decisions else torch.zeros(())


def _targets(decisions: Sequence[Decision], target: float | Mapping[str, float]) -> dict[str, float]:
    names = list(dict.fromkeys(name for decision in decisions for name in decision.names))
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(names, target)
    check_known(targets, names, "the target rate")
    for name, rate in targets.items():
        check_rate(rate, f"the target rate of {name!r}")
    return targets
