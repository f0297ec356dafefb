"""Arms: experiments that differ in one thing only, such as the router, trained one after another and laid side by
side.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sma.describe import align
from sma.errors import SpecError, did_you_mean
from sma.model import ModelSpec
from sma.recipes.experiment import ExperimentSpec, RoutingLosses, load_experiment
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY, read_summary, refuse_another, write_text
from sma.recipes.reports.figures import attempt, drawing, label, save_figure
from sma.recipes.tasks.contract import TaskData, TaskSpec
from sma.routers import RandomRouterSpec, RouterSpec
from sma.stats import operation_count

Result = Mapping[str, Any]
"""What one arm came to: `accuracy`, `activation_rate` and so on, as `run_arms` lists them."""

Arm = ExperimentSpec | Callable[[Mapping[str, Result]], ExperimentSpec]
"""An experiment, or what makes it from the results of the arms before it."""

FIGURE = "comparison.png"

_NEEDED = ("test_accuracy", "activation_rate", "activation_rates", "tokens_per_second", "seconds", "parameters")
_SHARED = ("task", "chance", "majority", "seed", "updates", "data", "commit", "hardware", "date")


def run_arms(
    arms: Mapping[str, Arm],
    out: Path,
    data: TaskData,
    *,
    only: Sequence[str] | None = None,
    title: str = "",
    accelerator: str = "auto",
    progress: bool = True,
    subject: str | None = None,
) -> dict[str, Any]:
    """Train and test every arm in its folder below `out`, print their table, and write `summary.json` and
    `comparison.png`.

    An arm whose run is finished is not run again, and one that was interrupted goes on, so a second call with the same
    folder completes the first. Everything is written after every arm.

    Args:
        arms: by name, in the order of training.
        out: the folder of the comparison.
        data: the data of their task; the same for all.
        only: the arms to train; others are listed where `out` holds their finished runs. None: all.
        title: of the figure and the table.
        accelerator: Lightning's name for the device: `auto`, `cpu`, `cuda`.
        progress: show a bar.
        subject: start of the titles of the figures of every run, before the name of the arm; None: runs draw none.

    Returns:
        the summary: `models` maps the name of an arm to

        | key | |
        |---|---|
        | `accuracy` | on the test split |
        | `activation_rate` | on the test split, of the layer whose sub-modules run most |
        | `rates` | the rate of every sub-module of every routed layer |
        | `operations_per_token` | multiply-adds of layers at these rates, in a row of the test split's mean length |
        | `tokens_per_second` | in training, without evaluation |
        | `seconds` | of the whole run |

    Raises:
        SpecError: `only` names an arm that is not there, an arm needs results of one that was not trained, or the arms
            have different tasks.
        CheckpointError: a folder below `out` holds a run of another experiment.
    """
    # Lightning takes seconds to import, and most of this file does without.
    from sma.recipes.training.run import run_experiment

    wanted = _wanted(arms, only)
    length = max(1, round(float(data.test.lengths.double().mean())))
    models: dict[str, Result] = {}
    summary: dict[str, Any] = {}
    task: TaskSpec | None = None
    for name, arm in arms.items():
        folder = out / name
        done = (folder / SUMMARY).is_file()
        if not done and name not in wanted:
            continue
        spec = arm if isinstance(arm, ExperimentSpec) else load_experiment(folder / EXPERIMENT) if done else arm(models)
        if (folder / EXPERIMENT).exists():
            refuse_another(
                load_experiment(folder / EXPERIMENT),
                spec,
                folder / EXPERIMENT,
                "give another folder, or delete it to run this arm again",
            )
        task = task or spec.task
        if spec.task != task:
            raise SpecError(
                f"the arm {name!r} has the task {spec.task} and the arms before it {task}; arms must have one task"
            )
        if not done:
            print(
                f"{name}: {spec.model.num_parameters():,} parameters, "
                f"{spec.training.updates:,} updates -> {plain(folder)}",
                flush=True,
            )
            own = None if subject is None else f"{subject}, {name}"
            run_experiment(spec, folder, data, resume=True, accelerator=accelerator, progress=progress, title=own)
        run = read_summary(folder, *_SHARED, *_NEEDED)
        models[name] = _result(spec.model, run, length)
        summary = {key: run[key] for key in _SHARED} | {
            "test_samples": len(data.test),
            "length": length,
            "models": models,
        }
        write_text(out / SUMMARY, json.dumps(summary, indent=1))
    print(f"\n{title}\n\n{table(summary)}\n")
    attempt(f"the figure of the comparison in {out}", lambda: draw_arms(summary, out, title))
    return summary


def with_routers(spec: ExperimentSpec, routers: RouterSpec | Sequence[RouterSpec]) -> ExperimentSpec:
    """Return the same experiment with other routers, and with the budget and the losses of decisions that they can
    learn from.

    Where none of them learns a rate there is no budget and no such loss; where none samples, no policy gradient; and
    routers that learn from it alone get one of the weight 1 if there is none.

    Args:
        spec: the experiment.
        routers: one for all layers that route, or one for each of them.

    Raises:
        SpecError: the number of routers is not that of the layers that route.
    """
    places = [place for place, layer in enumerate(spec.model.layer_specs) if layer.modules]
    each = [routers] * len(places) if isinstance(routers, RouterSpec) else list(routers)
    if len(each) != len(places):
        raise SpecError(
            f"there are {len(each)} routers for {len(places)} layers that route; "
            "give one for each of them, or one for all"
        )
    layers = list(spec.model.layer_specs)
    for place, router in zip(places, each, strict=True):
        layers[place] = layers[place].replace(router=router)
    training = spec.training
    if all(router.fixed_rate for router in each):
        training = training.replace(budget=None, losses=RoutingLosses())
    elif not any(router.stochastic for router in each):
        training = training.replace(losses=training.losses.replace(policy=0.0))
    elif not training.losses.policy and any(router.needs_policy_gradient for router in each):
        training = training.replace(losses=training.losses.replace(policy=1.0))
    return spec.replace(model=spec.model.replace(layers=tuple(layers)), training=training)


def layer_rates(results: Mapping[str, Result], name: str) -> list[float]:
    """The activation rate of every routed layer of an arm, for arms that shall run as often; of several sub-modules the
    mean.

    Raises:
        SpecError: the arm was not trained.
    """
    if name not in results:
        raise SpecError(
            f"an arm is to run at the rates of {name!r}, which was not trained; train {name!r} too, before it"
        )
    return [sum(rates.values()) / len(rates) for rates in results[name]["rates"]]


def at_random(spec: ExperimentSpec, results: Mapping[str, Result], name: str) -> ExperimentSpec:
    """Return the same experiment with every layer run on tokens drawn at random, as often as in the arm `name`.

    Raises:
        SpecError: that arm was not trained.
    """
    return with_routers(spec, [RandomRouterSpec(rate=rate, seed=spec.seed) for rate in layer_rates(results, name)])


def table(summary: Mapping[str, Any]) -> str:
    """The results of the arms in aligned columns."""
    rows = [["arm", "accuracy", "rate per layer, %", "operations per token", "tokens/s", "seconds"]]
    for name, result in summary["models"].items():
        rates = " / ".join(f"{100 * rate:.0f}" for rate in layer_rates(summary["models"], name)) or "-"
        speed = f"{result['tokens_per_second']:,}" if result["tokens_per_second"] else "-"
        cells = [
            f"{result['accuracy']:.1%}",
            rates,
            f"{result['operations_per_token']:,.0f}",
            speed,
            f"{result['seconds']:.0f}",
        ]
        rows.append([name, *cells])
    samples = summary["test_samples"]
    marks = f"chance {summary['chance']:.1%}, always the commonest answer {summary['majority']:.1%}"
    error = f"{samples:,} test samples, so one standard error is at most {50 / samples**0.5:.1f} points"
    return "\n".join([*align(rows, right=(1, 2, 3, 4, 5)), "", marks, error])


def draw_arms(summary: Mapping[str, Any], out: Path, title: str = "") -> Path:
    """Draw the accuracy of the arms against their operations into `comparison.png`."""
    with drawing(7, 4.5) as figure:
        axis = figure.subplots()
        for name, result in summary["models"].items():
            point = result["operations_per_token"] / 1000, 100 * result["accuracy"]
            axis.plot(*point, "o", markersize=8)
            axis.annotate(
                f"{label(name, 40)} ({result['activation_rate']:.0%})",
                point,
                xytext=(7, 5),
                textcoords="offset points",
                fontsize=9,
            )
        axis.margins(x=0.25, y=0.15)
        axis.set(xlabel="thousand multiply-adds per token, layers only", ylabel="test accuracy, %", title=title)
        axis.grid(alpha=0.3)
        return save_figure(figure, out / FIGURE)


def check_arms(names: Iterable[str], known: Iterable[str]) -> None:
    """Check names of arms.

    Raises:
        SpecError: names the first that is not known, and one near it.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise SpecError(f"unknown arm {name!r}{did_you_mean(name, known, 'arms')}")


def _wanted(arms: Mapping[str, Arm], only: Sequence[str] | None) -> set[str]:
    check_arms(only or (), arms)
    wanted = set(arms if only is None else only)
    if not wanted:
        raise SpecError(f"there is no arm to train; choose some of {', '.join(arms)}")
    return wanted


def _result(model: ModelSpec, run: Mapping[str, Any], length: int) -> Result:
    rates = run["activation_rates"]
    return {
        "accuracy": run["test_accuracy"],
        "activation_rate": max(run["activation_rate"], default=0.0),
        "rates": rates,
        "operations_per_token": operation_count(model, length, rates).per_token,
        "tokens_per_second": run["tokens_per_second"],
        "seconds": run["seconds"],
        "parameters": run["parameters"],
    }
