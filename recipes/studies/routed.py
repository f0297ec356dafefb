"""Comparison of five routers in one model with routed modules."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.option_parser import Names
from sma.recipes.studies.contract import variants_field
from sma.recipes.studies.variants import AtRatesOf, Variant, VariantsOptions, VariantsStudy, at_random, with_routers
from sma.routers import AlwaysRouterSpec, ExpertChoiceRouterSpec, NeverRouterSpec, RouterSpec
from sma.spec import load_spec
from sma.yaml_text import read_yaml

VARIANTS = ("routed", "expert_choice", "always", "never", "random")


class RoutedOptions(VariantsOptions):
    """The options of the recipes that compare routers."""

    task: Literal["listops", "digits"] = Field(default="listops", description="the task")
    router: str | None = Field(
        default=None,
        description="router of the variant routed: a kind, or YAML such as '{kind: sma, temperature_scale: 0.5}'; "
        "default: that of the preset",
    )
    variants: Names | None = variants_field(VARIANTS)


class Routed(VariantsStudy[RoutedOptions]):
    """One model under five routers; width, depth, updates, learning rate, seeds and data are the same.

    | variant | router |
    |---|---|
    | `routed` | that of the experiment |
    | `expert_choice` | each layer runs its tokens with the highest scores, at the rate of `routed`: Mixture of Depths |
    | `always` | every token: the dense baseline |
    | `never` | no token: the model without its routed modules |
    | `random` | random tokens at the rate of `routed`: the control for claims that the router learned something |

    Reference:
        Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models", arXiv
        2404.02258.
    """

    name = "routed"
    known = VARIANTS

    def subject(self, spec: ExperimentSpec) -> str:
        names = dict.fromkeys(name for layer in spec.model.layer_specs for name in layer.modules)
        return f"Routed {', '.join(names)} on {spec.task.kind}"

    def experiment(self, options: RoutedOptions) -> ExperimentSpec:
        spec = super().experiment(options)
        return spec if options.router is None else with_routers(spec, _router(options.router))

    def variants(self, spec: ExperimentSpec) -> dict[str, Variant]:
        return {
            "routed": spec,
            # `expert_choice` and `random` need a positive share; at a rate of 0 no token runs.
            "expert_choice": AtRatesOf(
                "routed",
                lambda rates: with_routers(
                    spec, [ExpertChoiceRouterSpec(share=rate) if rate else NeverRouterSpec() for rate in rates]
                ),
            ),
            "always": with_routers(spec, AlwaysRouterSpec()),
            "never": with_routers(spec, NeverRouterSpec()),
            "random": at_random(spec, "routed"),
        }


def _router(given: str) -> RouterSpec:
    value = read_yaml(given, "the value of --router")
    router: RouterSpec = load_spec(value if isinstance(value, Mapping) else {"kind": str(value)}, family="router")
    return router
