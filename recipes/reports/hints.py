"""Suggestions at the end of a run, which depend on its results."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sma.budget_spec import BudgetSpec
from sma.recipes.io.names import plain


class Routing(NamedTuple):
    """The settings of a run that concern its routers.

    Attributes:
        routers: field paths of the routers: that of all layers, or one for each routed layer of a list.
        fixed: whether the rates of all routers are fixed, so that no suggestion can change them.
        budget: the budget of the training; None without one.
        policy: whether the training has a policy gradient.
    """

    routers: tuple[str, ...] = ("layers.layer.router",)
    fixed: bool = False
    budget: BudgetSpec | None = None
    policy: bool = False


def hints(summary: Mapping[str, Any], majority: float, modules: Sequence[str], routing: Routing) -> list[str]:
    """Suggestions that fit the results of a run.

    Args:
        summary: the summary of the run.
        majority: accuracy of always predicting the majority class.
        modules: names of the routed sub-modules.
        routing: settings of the run.
    """
    accuracy, rates, updates = summary["test_accuracy"], summary["activation_rate"], summary["updates"]
    best = summary.get("best_update", updates)
    found = []
    if accuracy <= majority + 0.01:
        found.append("the accuracy is that of the majority class, so the model has not learned the task yet")
    if rates and not routing.fixed:
        found += _rate_hints(rates, routing.budget)
        names = " and ".join(map(plain, modules)) or "routed sub-modules"
        found.append(f"{_without_routers(routing)} trains the same model without {names}")
    if best <= 0.7 * updates:
        found.append(f"the best checkpoint is that of update {best:,} of {updates:,}: more updates may not help")
    elif accuracy < 0.99:
        found.append(f"--set training.updates={2 * updates} trains twice as long")
    return found


def _without_routers(routing: Routing) -> str:
    """The options that switch all routers off, and the parts of the training that need them."""
    settings = [f"{path}='{{kind: never}}'" for path in routing.routers]
    settings += ["training.budget=null"] if routing.budget is not None else []
    settings += ["training.losses.policy=0"] if routing.policy else []
    return " ".join(f"--set {setting}" for setting in settings)


def _rate_hints(rates: Sequence[float], budget: BudgetSpec | None) -> list[str]:
    """Suggestions for layers that run on no token, or on nearly every token."""
    found = []
    dead = min(rates) < 0.001
    if budget is None:
        if dead:
            found.append(
                "a router is dead: its layer has only the backbone; --set training.budget.target=0.3 keeps routers "
                "alive"
            )
        if max(rates) > 0.9:
            found.append("a layer runs on nearly every token; --set training.budget.target=0.3 lowers the rate")
    elif dead and budget.over == "total":
        found.append(
            "a layer is off, because the budget covers all layers together; --set training.budget.over=each keeps "
            "each of them active"
        )
    return found
