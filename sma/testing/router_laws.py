"""The laws of a router, each checked on one random example at a time."""

import torch
from torch import Tensor

from sma.decision import Decision
from sma.padding import move
from sma.routers import Router, RouterSpec, SteerableRouter
from sma.testing.examples import Example
from sma.testing.requirements import (
    Law,
    copied,
    refuses_a_state_unless_causal,
    require,
    require_gradients,
    require_near,
    require_prediction,
    require_slope,
    require_unchanged,
)
from sma.testing.router_case import FIELDS, RouterCase, decide, ranks, require_same, rows_of
from sma.testing.router_stream_laws import (
    chunks_equal_the_whole,
    gradients_cross_chunks,
    never_looks_ahead,
    states_are_values,
    states_can_be_moved,
)


def returns_a_decision(case: RouterCase, example: Example) -> None:
    """Every field has its shape, dtype and range and is finite at valid positions; the names are those given."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        valid = example.active()
        decision = decide(case.make(dtype), case.control(example, dtype), valid)
        shape, wide = (*valid.shape, case.modules), torch.promote_types(dtype, torch.float32)
        require(decision.names == case.names, f"names are {decision.names} for the sub-modules {case.names}")
        for name, wanted in {"active": shape, "confidence": shape, "p_on": shape, "logits": (*shape, 2)}.items():
            tensor = getattr(decision, name)
            require(tensor.shape == wanted, f"{name} has shape {tuple(tensor.shape)}; expected {wanted}")
            kind = torch.bool if name == "active" else wide
            require(tensor.dtype is kind, f"{name} has dtype {tensor.dtype} for a router in {dtype}; expected {kind}")
            require(bool(tensor[valid].isfinite().all()), f"{name} is not finite at a valid position")
        sure, p_on = decision.confidence[valid], decision.p_on[valid]
        require(bool(((sure > 0) & (sure <= 1)).all()), "confidence is not in (0, 1]")
        require(bool(((p_on >= 0) & (p_on <= 1)).all()), "p_on is not in [0, 1]")


def changes_nothing_and_repeats(case: RouterCase, example: Example) -> None:
    """Forward changes no parameter, buffer, control or random state, and repeats its decision, in training too."""
    control, valid = case.control(example), example.active()
    for router in (case.make(), case.make().train()):
        before, given, drawn = copied(router.state_dict()), control.clone(), torch.get_rng_state()
        first, again = decide(router, control, valid), decide(router, control, valid)
        require(
            torch.equal(torch.get_rng_state(), drawn),
            "forward drew from torch's generator; key draws by seed, row and position",
        )
        require(torch.equal(control, given), "forward changed the control state it was given")
        require_unchanged(router.state_dict(), before, "forward changed")
        require_same(again, first, valid, "two decisions about the same tokens")


def replay_is_the_identity(case: RouterCase, example: Example) -> None:
    """The router's own choice, replayed, has the same confidence; another choice keeps the scores."""
    control, valid = case.control(example), example.active()
    for router in (case.make(), case.make().train()):
        decision = decide(router, control, valid)
        own = router.replay(decision, decision.active)
        require(
            torch.equal(own.confidence[decision.active], decision.confidence[decision.active]),
            "the confidence of the router's own choice changed",
        )
        other = router.replay(decision, ~decision.active)
        require(torch.equal(other.active, ~decision.active), "the choice that was given was not followed")
        require(torch.equal(other.logits, decision.logits), "the scores changed with the choice")
        sure = other.confidence[valid]
        require(bool(((sure > 0) & (sure <= 1)).all()), "a confidence of another choice is not in (0, 1]")


def active_is_where_on_beats_off(case: RouterCase, example: Example) -> None:
    """A router that can be steered activates valid tokens where on scores higher than off, none where it scores lower.

    It activates no token whose control state is NaN.
    """
    control, valid = case.control(example), example.active()
    broken = control.masked_fill(torch.arange(example.length)[:, None] % 3 == 1, torch.nan)
    for router in (case.make(), case.make().train()):
        if isinstance(router, SteerableRouter):
            decision = decide(router, control, valid)
            off, on = decision.logits.unbind(-1)
            require(
                bool(decision.active[(on > off) & valid[..., None]].all()),
                "a token whose score for on is the higher one is inactive",
            )
            require(not bool(decision.active[on < off].any()), "a token whose score for on is the lower one is active")
            active = decide(router, broken, valid).active[:, 1::3]
            require(not bool(active.any()), "a token whose control state is NaN is active")


def ties_are_inactive(case: RouterCase, example: Example) -> None:
    """Where all parameters are 0 and on and off score equally, a router that can be steered activates nothing."""
    router = case.make()
    if not isinstance(router, SteerableRouter):
        return
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    decision = decide(router, case.control(example), example.active())
    off, on = decision.logits.unbind(-1)
    require(not bool(decision.active[on == off].any()), "a token whose scores for on and off are equal is active")


def a_score_bias_steers_the_rate(case: RouterCase, example: Example) -> None:
    """A higher `score_bias` switches tokens of its sub-module on, never off; one of 1e6 switches on all of them."""
    control, valid = case.control(example), example.active()
    for index in range(case.modules):
        router = case.make()
        if not isinstance(router, SteerableRouter):
            return
        before = decide(router, control, valid).active[..., index]
        for more in (0.3, 1e6):
            router.score_bias[index] += more
            after = decide(router, control, valid).active[..., index]
            require(not bool((before & ~after).any()), f"{more:g} more score bias switched a token off")
            before = after
        require(torch.equal(before, valid), "a score bias of 1e6 did not switch every valid token on")


def padding_changes_nothing(case: RouterCase, example: Example) -> None:
    """Padding on any side is never active, and its content changes no valid decision."""
    router, control, valid = case.make(), case.control(example), example.active()
    order = torch.argsort(~valid, dim=1, stable=True)
    packed = move(valid, order)
    wanted = decide(router, move(control, order), packed)
    for garbage in (1.0, 1e4, torch.nan):
        decision = decide(router, control.where(valid[..., None], torch.randn_like(control) * garbage), valid)
        require(not bool(decision.active[~valid].any()), "padding is active")
        require_same(
            decision,
            wanted,
            valid,
            f"padding of random numbers times {garbage} anywhere against padding on the right",
            packed,
        )


def without_padding_nothing_need_be_given(case: RouterCase, example: Example) -> None:
    """`valid=None` means that all tokens are valid, and `positions=None` counts from 0."""
    router, control = case.make(), case.control(example)
    everywhere = torch.ones(control.shape[:2], dtype=torch.bool)
    require_same(
        router(control)[0],
        decide(router, control, everywhere),
        everywhere,
        "without valid and positions against all valid",
    )


def rows_are_independent(case: RouterCase, example: Example) -> None:
    """The first row gives the same decisions alone and in a batch, whatever the other rows contain, NaN included.

    So does every other row with the state of its own stream, from which a stochastic router gets the number of the row.
    """
    router, control, valid = case.make(), case.control(example), example.active()
    wanted = decide(router, control[:1], valid[:1])
    for stranger in (1.0, 1e4, torch.nan):
        batch = torch.cat([control[:1], control[1:] * stranger])
        found = rows_of(decide(router, batch, valid), torch.arange(1))
        require_same(found, wanted, valid[:1], f"the first row beside rows times {stranger} against the row alone")
    for router in (case.make(), case.make().train()):
        whole = decide(router, control, valid)
        for row in torch.arange(control.shape[0])[:, None]:
            state = router.init_state(control.shape[0], dtype=control.dtype).select(row) if router.causal else None
            alone, _ = router(control[row], valid[row], ranks(valid[row]), state)
            require_same(rows_of(whole, row), alone, valid[row], f"row {int(row)} of the batch against the row alone")


def names_are_labels(case: RouterCase, example: Example) -> None:
    """Other names of the sub-modules change no decision."""
    control, valid = case.control(example), example.active()
    wanted = decide(case.make(), control, valid)
    other = tuple(reversed(case.names))
    found = decide(case.make(names=other), control, valid)
    require(found.names == other, f"names are {found.names} for the sub-modules {other}")
    require_same(found, wanted, valid, "the same sub-modules under other names")


def takes_no_tokens(case: RouterCase, example: Example) -> None:
    """A batch without positions or with padding only has no active token, and gradients of zeros, never None."""
    for length in (0, 3):
        router = case.make()
        control = torch.randn(len(example.lengths), length, case.width, dtype=torch.float64)
        decision = decide(router, control, torch.zeros(control.shape[:2], dtype=torch.bool))
        require(not bool(decision.active.any()), "a token is active, and none is valid")
        _require_gradients(router, decision, zero=True)


def every_parameter_gets_a_gradient(case: RouterCase, example: Example) -> None:
    """Confidence carries a finite gradient to every parameter and, if there are parameters, to the control state."""
    for router in (case.make(), case.make().train()):
        control = case.control(example).requires_grad_()
        _require_gradients(router, decide(router, control, example.active()), zero=False)
        if any(True for _ in router.parameters()):
            require(control.grad is not None, "confidence has no gradient to the control state: was it detached?")
            require(
                control.grad is None or bool(control.grad.isfinite().all()),
                "the gradient of the control state is not finite",
            )


def _require_gradients(router: Router, decision: Decision, zero: bool) -> None:
    """Backward as in a layer, which multiplies the results of the active tokens by their confidence."""
    if not list(router.parameters()):
        return
    used = decision.confidence[decision.active]
    require(used.requires_grad, "confidence carries no gradient, so the router cannot learn")
    (used * torch.randn_like(used)).sum().backward()
    require_gradients(router, zero)


def gradients_are_right(case: RouterCase, example: Example) -> None:
    """The gradient of confidence agrees with differences of it, in random directions."""
    router, control, valid = case.make(), case.control(example)[:2, :9], example.active()[:2, :9]
    leaves = [control.clone().requires_grad_(), *router.parameters()]
    if len(leaves) == 1:
        return
    weight = torch.randn(*valid.shape, case.modules, dtype=torch.float64) * valid[..., None]
    toward, *directions = (torch.randn_like(leaf) for leaf in leaves)

    def value(step: float) -> Tensor:
        moved = case.make()
        with torch.no_grad():
            for parameter, direction in zip(moved.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=step)
            return (decide(moved, control + step * toward, valid).confidence * weight).sum()

    (decide(router, leaves[0], valid).confidence * weight).sum().backward()
    require_slope(value, leaves, [toward, *directions])


def training_decides_as_evaluation(case: RouterCase, example: Example) -> None:
    """A decision is the same in training and in evaluation."""
    control, valid = case.control(example), example.active()
    require_same(
        decide(case.make().train(), control, valid),
        decide(case.make(), control, valid),
        valid,
        "training against evaluation",
    )


def extreme_tokens_are_decided(case: RouterCase, example: Example) -> None:
    """In float32, control states of 0 and of 1e4 give finite scores and gradients, and a confidence in (0, 1]."""
    for size in (0.0, 1e4):
        router, valid = case.make(torch.float32), example.active()
        control = (case.control(example, torch.float32) * size).requires_grad_()
        decision = decide(router, control, valid)
        for name in FIELDS:
            require(
                bool(getattr(decision, name)[valid].isfinite().all()),
                f"{name} is not finite for a control state of {size:g}",
            )
        sure = decision.confidence[valid]
        require(bool(((sure > 0) & (sure <= 1)).all()), f"confidence is not in (0, 1] for a control state of {size:g}")
        _require_gradients(router, decision, zero=False)
        require(
            control.grad is None or bool(control.grad.isfinite().all()),
            f"a gradient is not finite for a control state of {size:g}",
        )


def half_precision_decides_as_float32(case: RouterCase, example: Example) -> None:
    """A float32 router decides about bfloat16 tokens exactly as about their float32 values, under autocast too."""
    router, control, valid = case.make(torch.float32), case.control(example, torch.bfloat16), example.active()
    wanted = decide(router, control.float(), valid)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = decide(router, control, valid)
        for name in ("active", *FIELDS):
            same = torch.equal(getattr(found, name)[valid], getattr(wanted, name)[valid])
            require(
                same,
                f"{name} of bfloat16 tokens differs from that of the same float32 "
                f"tokens{' under autocast' if enabled else ''}",
            )


def works_in_float32(case: RouterCase, example: Example) -> None:
    """Decisions in float32 are those in float64, except where rounding orders two scores that are nearly equal."""
    control, valid = case.control(example, torch.float32), example.active()
    found, wanted = decide(case.make(torch.float32), control, valid), decide(case.make(), control.double(), valid)
    off, on = wanted.logits.unbind(-1)
    clear = valid[..., None] & ((on - off).abs() > 1e-3 * (1 + off.abs() + on.abs()))
    require(torch.equal(found.active[clear], wanted.active[clear]), "float32 decides unlike float64")
    for name in ("confidence", "p_on"):
        require_near(
            getattr(found, name)[clear].double(),
            getattr(wanted, name)[clear],
            f"{name} in float32 against float64",
            1e-3,
        )


def weights_are_all_there_is(case: RouterCase, example: Example) -> None:
    """A router made with another seed makes the same decisions once it has loaded the same `state_dict`."""
    control, valid = case.control(example), example.active()
    router, other = case.make(), case.make(seed=1)
    other.load_state_dict(router.state_dict())
    require_same(
        decide(other, control, valid), decide(router, control, valid), valid, "a router with the weights of another"
    )


def spec_predicts_and_survives(case: RouterCase, example: Example) -> None:
    """The spec predicts parameters, MACs and whether decisions are drawn, and survives dump and load."""
    if not isinstance(case.spec, RouterSpec):
        return
    router = case.make()
    require_prediction(case.spec, case.spec.num_parameters(case.width, case.modules), router, "router")
    given, drawn = case.spec.stochastic, router.stochastic
    require(given == drawn, f"stochastic is {given} in the spec, and {drawn} in the router")
    require(case.spec.macs_per_token(case.width, case.modules) >= 0, "MACs are negative")


ROUTER_LAWS: tuple[Law, ...] = (
    returns_a_decision,
    replay_is_the_identity,
    active_is_where_on_beats_off,
    ties_are_inactive,
    a_score_bias_steers_the_rate,
    changes_nothing_and_repeats,
    training_decides_as_evaluation,
    padding_changes_nothing,
    without_padding_nothing_need_be_given,
    rows_are_independent,
    names_are_labels,
    takes_no_tokens,
    every_parameter_gets_a_gradient,
    gradients_are_right,
    extreme_tokens_are_decided,
    half_precision_decides_as_float32,
    works_in_float32,
    never_looks_ahead,
    chunks_equal_the_whole,
    gradients_cross_chunks,
    states_are_values,
    states_can_be_moved,
    refuses_a_state_unless_causal,
    weights_are_all_there_is,
    spec_predicts_and_survives,
)
