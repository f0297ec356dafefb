"""Multi-query associative recall on streams that are much longer than the training samples."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from sma.checkpoint import load
from sma.errors import SpecError
from sma.model import SequenceModel
from sma.model_output import ModelState
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.option_parser import Names
from sma.recipes.io.run_folder import read_checked, write_text
from sma.recipes.reports.figures import attempt
from sma.recipes.reports.reach import FIGURE, draw_reach, reach_table
from sma.recipes.reports.results import Summary, layer_rates
from sma.recipes.reports.table import Table
from sma.recipes.studies.baselines import baseline, with_parameters
from sma.recipes.studies.contract import Begun, Chosen, Study, StudyOptions, variants_field
from sma.recipes.studies.grid import Results, Run
from sma.recipes.tasks.contract import SPLITS, TaskData
from sma.recipes.tasks.mqar import MQARSettings, MQARTask, draw
from sma.stats import RateCount, count_rates

VARIANTS = ("seqboat", "always", "local_attention", "s4d")
REACH = "reach.json"
CHUNK = 2048
"""Number of tokens of a row per chunk."""


class ReachOptions(StudyOptions):
    """The options of the recipe."""

    preset: Literal["tiny"] = Field(default="tiny", description="tiny: minutes on one core for each model")
    variants: Names | None = variants_field(VARIANTS)
    lengths: Names = Field(default="4096,16384,65536", description="numbers of tokens of the tested streams")
    samples: int = Field(default=16, ge=1, description="number of streams of every length")

    @property
    def name(self) -> str:
        return f"mqar_reach_{self.preset}"


class ReachChosen(Chosen):
    """The settings of a study of reach.

    Attributes:
        lengths: numbers of tokens of the tested streams.
        samples: number of streams of every length.
    """

    lengths: list[int] = Field(min_length=1)
    samples: int = Field(ge=1)


class Reach(Study[ReachOptions, ReachChosen]):
    """Comparison of SeqBoat, whose window counts active tokens, with models whose window counts all tokens or whose
    state has a fixed size. They are trained on short rows and tested on long streams with uniform distances, in chunks.
    """

    name = "reach"
    chosen = ReachChosen
    older = "reached.json"
    figures: ClassVar[Sequence[str]] = (FIGURE,)

    def settings(self, options: ReachOptions) -> dict[str, Any]:
        return {**super().settings(options), "lengths": _lengths(options.lengths), "samples": options.samples}

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": VARIANTS}

    def check(self, spec: ExperimentSpec, chosen: ReachChosen) -> None:
        settings = _data(spec)
        for length in chosen.lengths:
            _far(settings, length)
        for name in chosen.variants:
            baseline(name, spec)

    def runs(
        self, spec: ExperimentSpec, chosen: ReachChosen, data: TaskData, out: Path, accelerator: str = "auto"
    ) -> list[Run]:
        made = {name: with_parameters(name, spec) for name in VARIANTS}
        seeds = range(spec.seed, spec.seed + (chosen.seeds or 1))
        return [Run(f"{name}-{seed}", name, seed, made[name].replace(seed=seed)) for name in VARIANTS for seed in seeds]

    def summarise(self, results: Results, chosen: ReachChosen, out: Path) -> dict[str, Any]:
        rows = [dict(row) | _measured(out / row["name"] / REACH) for row in results.rows]
        return {"rows": rows, "lengths": chosen.lengths, "samples": chosen.samples}

    def conclude(self, summary: Summary, begun: Begun[ReachChosen], data: TaskData) -> dict[str, Any]:
        settings = _data(begun.spec)
        for row in summary["rows"]:
            folder = begun.out / row["name"]
            if (folder / REACH).is_file():
                continue
            print(f"streaming {', '.join(map(str, begun.chosen.lengths))} tokens through {row['name']}", flush=True)
            found = measure_reach(load(folder / "model"), settings, begun.chosen.lengths, begun.chosen.samples)
            write_text(folder / REACH, json.dumps(found))
            row |= found
        attempt(f"the figure of {begun.out}", lambda: draw_reach(summary, begun.out, settings.length))
        return {"rows": summary["rows"]}

    def table(self, summary: Summary) -> Table:
        return reach_table(summary)


def _lengths(given: str) -> list[int]:
    words = [word.strip() for word in given.split(",")]
    if not all(word.isdecimal() for word in words):
        raise SpecError(f"--lengths {given!r} must be numbers of tokens separated by commas, such as 4096,16384")
    return [int(word) for word in words]


def _data(spec: ExperimentSpec) -> MQARSettings:
    if not isinstance(spec.task, MQARTask):
        raise SpecError(f"the study of reach tests models of the task 'mqar', not of {spec.task.kind!r}; use that task")
    return spec.task.data


def _far(settings: MQARSettings, length: int) -> MQARSettings:
    """The settings of streams whose distances are uniform."""
    return settings.replace(length=length, power=1.0)


@torch.no_grad()
def measure_reach(
    model: SequenceModel, settings: MQARSettings, lengths: Sequence[int], samples: int, chunk: int = CHUNK
) -> dict[str, dict[str, float]]:
    """Stream long rows through a model, and measure its accuracy.

    Args:
        model: a causal model of the task.
        settings: settings of its training samples; the streams have other lengths, and uniform distances.
        lengths: numbers of tokens of the streams.
        samples: number of streams of each length.
        chunk: number of tokens per chunk.

    Returns:
        `recall`: accuracy by length; `distance`: accuracy over all lengths by the distance of a query from its value,
        rounded down to a power of two; `rate`: mean activation rate by length, for models with routers.
    """
    model.eval()
    found: dict[str, dict[str, float]] = {"recall": {}, "distance": {}, "rate": {}}
    by_distance: dict[int, list[bool]] = defaultdict(list)
    for length in lengths:
        drawn = draw(_far(settings, length), SPLITS.index("test"), torch.arange(samples))
        state: ModelState | None = model.init_state(samples)
        guesses, counts = [], list[RateCount]()
        for ids in drawn.ids.split(chunk, dim=1):
            output = model(ids, state=state)
            state = output.state
            guesses.append(cast(Tensor, output.logits).argmax(-1))
            if output.decisions:
                counts.append(count_rates(output.decisions, torch.ones_like(ids, dtype=torch.bool)))
        right = torch.cat(guesses, 1).gather(1, drawn.queries) == drawn.answers
        distances = drawn.queries - torch.arange(1, 2 * settings.pairs, 2)
        for distance, hit in zip(distances.flatten().tolist(), right.flatten().tolist(), strict=True):
            by_distance[2 ** int(math.log2(distance))].append(hit)
        found["recall"][str(length)] = float(right.double().mean())
        if counts:
            found["rate"][str(length)] = statistics.fmean(layer_rates(reduce(add, counts).by_layer()))
    found["distance"] = {str(reach): sum(hits) / len(hits) for reach, hits in sorted(by_distance.items())}
    return found


def _measured(path: Path) -> dict[str, Any]:
    """Read the result of `measure_reach`; empty if there is none yet."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = read_checked(path, _is_measured, "a measurement", "delete it to measure again")
    return found


def _is_measured(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), dict) for key in ("recall", "distance", "rate"))
