"""What the recipes of routed modules share: one model with five routers, side by side."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sma.errors import SpecError
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY, is_list_of, read_checked, refuse_another, write_text
from sma.recipes.studies.variants import FIGURE, Arm, Result, at_random, check_arms, layer_rates, run_arms, with_routers
from sma.recipes.training.options import RunOptions, asked_experiment, check_fits, folder_of
from sma.routers import AlwaysRouterSpec, ExpertChoiceRouterSpec, NeverRouterSpec, RouterSpec
from sma.spec import dump_yaml, load_spec
from sma.yaml_text import read_yaml

ARMS = ("routed", "expert_choice", "always", "never", "random")
_CHOSEN = "arms.json"


class ArmsOptions(RunOptions):
    """The options of every recipe that compares arms."""

    preset: Literal["tiny"] = Field(default="tiny", description="all arms in some minutes on one core")
    arms: str | None = Field(default=None, description="which to train, with commas between; default all")


class RoutedOptions(ArmsOptions):
    """The options of the recipes that compare routers."""

    task: Literal["listops", "digits"] = Field(default="listops", description="what to learn")
    router: str | None = Field(
        default=None,
        description="of the routed arm: a kind, or YAML such as '{kind: sma, temperature_scale: 0.5}'; "
        "default the preset's",
    )
    arms: str | None = Field(default=None, description=f"which to train, with commas between; default {','.join(ARMS)}")


@contextmanager
def comparison(
    options: ArmsOptions, known: Sequence[str], router: str | None = None
) -> Iterator[tuple[ExperimentSpec, list[str], Path]]:
    """Yield the experiment that the arms are made of, the arms to train, and the folder of the comparison; the folder
    is locked as long.

    The first two are kept in the folder, so that `--resume FOLDER` goes on with the same; with `--arms` it trains
    others.

    Args:
        options: the command line.
        known: the arms that there are.
        router: replaces the experiment's own: a kind, or YAML.

    Raises:
        SmaError: a sentence for the user.
    """
    chosen = None if options.arms is None else [name.strip() for name in options.arms.split(",")]
    check_arms(chosen or (), known)
    asked = None
    if options.resume is None:
        asked = asked_experiment(options)
        if router is not None:
            asked = with_routers(asked, _router(router))
    elif options.set or options.seed is not None or options.spec is not None or router is not None:
        raise SpecError(
            "--resume goes on with the comparison as it was; "
            "leave --set, --seed, --spec and --router out, or start a new one"
        )
    with folder_of(options, _CHOSEN, "comparison") as (out, began):
        if not began and asked is not None:
            write_text(out / EXPERIMENT, dump_yaml(asked))
            write_text(out / _CHOSEN, json.dumps(chosen or list(known)))
        spec = load_experiment(out / EXPERIMENT)
        refuse_another(spec, asked or spec, out / EXPERIMENT)
        check_fits(spec, options)
        kept = read_checked(
            out / _CHOSEN, lambda found: is_list_of(found, known), "a list of arms", "start a new comparison"
        )
        yield spec, chosen or kept, out


def routed_arms(spec: ExperimentSpec) -> dict[str, Arm]:
    """One model under five routers; width, depth, updates, learning rate, seed and data are the same.

    | arm | router |
    |---|---|
    | `routed` | the experiment's own |
    | `expert_choice` | each layer runs its best-scoring tokens, as many as ran there in `routed`: Mixture of Depths |
    | `always` | every token: the dense twin |
    | `never` | no token: what the rest of the model does alone |
    | `random` | tokens drawn at random, as many as in `routed`: the control for claims that routing learned something |

    Reference:
        Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models", arXiv
        2404.02258.
    """

    def expert_choice(results: Mapping[str, Result]) -> ExperimentSpec:
        # A share of nothing is no share: where no token ran, none does.
        rates = layer_rates(results, "routed")
        return with_routers(spec, [ExpertChoiceRouterSpec(share=rate) if rate else NeverRouterSpec() for rate in rates])

    return {
        "routed": spec,
        "expert_choice": expert_choice,
        "always": with_routers(spec, AlwaysRouterSpec()),
        "never": with_routers(spec, NeverRouterSpec()),
        "random": lambda results: at_random(spec, results, "routed"),
    }


def run_routed(options: RoutedOptions, what: str) -> dict[str, Any]:
    """Train, test and compare the arms as the options say; returns the summary.

    Args:
        options: the command line.
        what: what is routed, for titles.

    Raises:
        SmaError: a sentence for the user.
    """
    with comparison(options, ARMS, options.router) as (spec, chosen, out):
        data = spec.task.prepare(options.data, progress=options.progress)
        subject = f"{what} on {spec.task.kind}"
        summary = run_arms(
            routed_arms(spec),
            out,
            data,
            only=chosen,
            title=f"{subject}, seed {spec.seed}",
            accelerator=options.accelerator,
            progress=options.progress,
            subject=subject,
        )
        print(f"summary  {plain(out / SUMMARY)}")
        if (out / FIGURE).is_file():
            print(f"figure   {plain(out / FIGURE)}")
        return summary


def _router(given: str) -> RouterSpec:
    value = read_yaml(given, "the value of --router")
    router: RouterSpec = load_spec(value if isinstance(value, Mapping) else {"kind": str(value)}, family="router")
    return router
