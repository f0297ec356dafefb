"""The report of a classifier: text and figures."""

import csv
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.decision import Decision
from sma.model import ModelSpec, SequenceModel
from sma.recipes.io.names import plain
from sma.recipes.reports.activation_maps import Example, Modality, beside, draw_map, height_of
from sma.recipes.reports.confusion import Confusion
from sma.recipes.reports.figures import drawing, label, save_figure
from sma.recipes.reports.hints import Routing, hints
from sma.recipes.tasks.batch import UNSCORED, Batch
from sma.recipes.tasks.contract import Samples, TaskData
from sma.repeat import RepeatSpec
from sma.stats import module_names

FIGURE = "activation.png"

_POSITIONS = 2_000_000
"""Maximum number of positions that are measured, which limits the number of long samples."""

_BATCH = 2**17
"""Maximum number of positions of a batch."""


class ClassificationReport(NamedTuple):
    """The behaviour of a model on a split.

    Attributes:
        majority: accuracy of always predicting the majority class.
        samples: number of measured samples.
        by_text: activation rates per layer and number of occurrences of every text of a position; empty for sounds.
        examples: samples for the figure.
        modules: names of the routed sub-modules of all layers.
        modality: kind of the inputs.
        class_names: names of the classes; empty if they have only numbers.
        confusion: confusion matrix of the whole split; None if it was not counted.
        roles: role of a position by the first character of its text; empty if positions have no roles.
        by_group: accuracy on the measured samples of every group; empty if samples have no groups.
        without_layer: accuracy on the measured samples with the sub-modules of one routed layer switched off, by layer.
        routing: settings of the routers, for suggestions.
        per_position: whether a sample has several targets; the examples then count targets and right answers.
    """

    majority: float
    samples: int
    by_text: dict[str, tuple[list[float], int]]
    examples: list[Example]
    modules: tuple[str, ...] = ()
    modality: Modality = Modality()
    class_names: tuple[str, ...] = ()
    confusion: Confusion | None = None
    roles: Mapping[str, str] = MappingProxyType({})
    by_group: Mapping[str, float] = MappingProxyType({})
    without_layer: tuple[float, ...] = ()
    routing: Routing = Routing()
    per_position: bool = False

    @property
    def rates_by_role(self) -> dict[str, list[float]]:
        """The activation rate per layer of the positions of every role, in the order of the roles."""
        found = defaultdict(list)
        for text, counted in self.by_text.items():
            if role := self.roles.get(text[:1]):
                found[role].append(counted)
        return {
            role: [statistics.fmean(layer, numbers) for layer in zip(*rates, strict=True)]
            for role in self.roles.values()
            if role in found
            for rates, numbers in [zip(*found[role], strict=True)]
        }

    def describe_roles(self) -> str:
        """The activation rates of every role, layer by layer, in aligned lines."""
        rows = self.rates_by_role
        width = max(map(len, rows), default=0)
        return "\n".join(
            f"  {role:<{width}}  " + "  ".join(f"layer {layer}: {rate:6.1%}" for layer, rate in enumerate(rates))
            for role, rates in rows.items()
        )

    def describe(self, summary: Mapping[str, Any], out: Path) -> str:
        """The results of a run as text: accuracy, activation rates, files, and suggestions."""
        accuracy, rates = summary["test_accuracy"], summary["activation_rate"]
        speed = f", {summary['tokens_per_second']:,} tokens/s in training" if summary["tokens_per_second"] else ""
        lines = [
            "",
            (
                f"test accuracy     {accuracy:.1%}   (chance {summary['chance']:.1%}, "
                f"majority class {self.majority:.1%})"
            ),
            (
                "activation rate   "
                f"{'   '.join(f'layer {layer}: {rate:.1%}' for layer, rate in enumerate(rates)) or 'nothing is routed'}"
            ),
            (
                f"time              {summary['seconds']:.0f} s{speed}, "
                f"{summary['parameters']:,} parameters, seed {summary['seed']}"
            ),
        ]
        if self.by_group:
            shares = "   ".join(f"{plain(group)}: {share:.1%}" for group, share in self.by_group.items())
            lines.insert(2, f"by group          {shares}   ({self.samples:,} samples)")
        if self.without_layer and any(rates):
            off = "   ".join(f"layer {layer}: {accuracy:.1%}" for layer, accuracy in enumerate(self.without_layer))
            lines.insert(-1, f"switched off      {off}   (test accuracy without one layer, {self.samples:,} samples)")
        if self.roles and any(rates):
            lines += ["by role", self.describe_roles()]
        elif self.by_text and any(rates):
            busiest = max(range(len(rates)), key=lambda layer: (0.02 <= rates[layer] <= 0.98, -abs(rates[layer] - 0.5)))
            common = sorted(self.by_text, key=lambda text: -self.by_text[text][1])[:16]
            ranked = sorted(common, key=lambda text: -self.by_text[text][0][busiest])
            shares = ", ".join(f"{plain(text, 40)} {self.by_text[text][0][busiest]:.0%}" for text in ranked)
            what = "by grey value: " if self.modality.image_shape else ""
            lines.append(f"active in layer {busiest} {what}{shares}")
        if self.confusion is not None:
            lines += ["", self.confusion.table()]
        lines += [
            "",
            f"figure            {where_figure(out)}",
            f"model             {plain(out / 'model')}   (sma.load reads it)",
            f"metrics           {plain(out / 'metrics')}, {plain(out / 'tensorboard')}",
            f"summary           {plain(out / 'summary.json')}",
            "",
        ]
        return "\n".join(
            [*lines, *(f"next: {hint}" for hint in hints(summary, self.majority, self.modules, self.routing))]
        )

    def draw(self, out: Path, title: str) -> Path:
        """Draw the active positions per layer, and the rates over training, into `activation.png`.

        Pixels are drawn as images, sounds as waves, everything else as text; see `activation_maps`. The confusion
        matrix, if there is one, is drawn into `confusion.png`.
        """
        count = beside(self.examples[0], self.modality) if self.examples else 1
        rows = [self.examples[start : start + count] for start in range(0, len(self.examples), count)]
        heights = [*(max(height_of(example, self.modality) for example in row) for row in rows), 2.9]
        width = 10 if count > 1 else 14  # images side by side are square; the narrower figure has the larger words
        with drawing(width, sum(heights) + 0.6) as figure:
            figure.suptitle(title, fontsize=13)
            parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
            for part, row in zip(parts, rows, strict=False):
                for own, example in zip(part.subfigures(1, count, squeeze=False)[0], row, strict=False):
                    draw_map(own, example, self.modality, _caption(self, example))
            draw_rates(parts[-1].subplots(), out)
            path = save_figure(figure, out / FIGURE)
        if self.confusion is not None:
            self.confusion.draw(out / self.confusion.file, title)
        return path


@torch.no_grad()
def measure_activation(
    model: SequenceModel, samples: Samples, data: TaskData, *, limit: int = 1000, shown: int = 4
) -> ClassificationReport:
    """Measure the positions that activate sub-modules, on up to `limit` samples of a split.

    The samples are a random choice, the same in every report, because many data sets are sorted by class.
    """
    model.eval()
    modality = Modality(data.image_shape, data.sample_rate)
    longest = max(1, int(samples.lengths.max()))
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    drawn = drawn[: min(limit, max(shown, _POSITIONS // longest))]
    indices: dict[str, int] = {}
    text_ids: list[int] = []
    activity: list[Tensor] = []
    examples: dict[int, Example] = {}
    modules: tuple[str, ...] = ()
    device = next(model.parameters()).device
    right, scored = [0] * len(model.routed_layers), 0
    groups: dict[str, list[bool]] = defaultdict(list)
    rows = model.spec.rows_per_sample
    # Samples of about 40 positions fill one line of the figure; ties are resolved by the order of the draws.
    wanted = drawn[torch.argsort((samples.lengths[drawn] - 40).abs(), stable=True)[: 4 * shown]].tolist()
    for part in drawn.sort().values.split(min(100, max(1, _BATCH // longest))):
        batch = data.collate([samples[int(number)] for number in part]).to(device)
        output = model(batch.inputs, batch.valid)
        guesses, answers = _answers(output.logits, batch.targets)
        if data.group is not None and guesses:
            for row, (guess, answer) in enumerate(zip(guesses, answers, strict=True)):
                own = slice(row * rows, (row + 1) * rows)  # the documents of a pair are concatenated
                groups[data.group(data.show(batch.inputs[own][batch.valid[own]].cpu()))].append(guess == answer)
        if not output.decisions:
            continue
        modules = module_names(output.decisions)
        scored += int((batch.targets != UNSCORED).sum())
        for layer in range(len(output.decisions)):
            right[layer] += _right_without(layer, model, batch, output.decisions)
        active = torch.stack([decision.active.any(-1) for decision in output.decisions]).cpu()
        for row, number in enumerate(part.tolist()):
            own = slice(row * rows, (row + 1) * rows)  # the documents of a pair are concatenated
            valid = batch.valid[own].cpu()
            values = batch.inputs[own].cpu()[valid]
            mine = active[:, own][:, valid]
            texts: list[str] = []
            if modality.sample_rate is None:  # the values of a sound are all different, so rates by value mean nothing
                texts = data.show(values)
                text_ids += [indices.setdefault(text, len(indices)) for text in texts]
                activity.append(mine)
            if number in wanted:
                kept = values if modality != Modality() else None
                examples[number] = Example(texts, answers[row], guesses[row], mine, kept)
    targets = torch.cat([torch.as_tensor(samples[number][1]).reshape(-1) for number in range(len(samples))])
    majority = float(targets[targets != UNSCORED].bincount().max() / (targets != UNSCORED).sum())
    by_text = _by_text(indices, torch.tensor(text_ids), torch.cat(activity, 1)) if text_ids else {}
    chosen = _right_and_wrong([examples[number] for number in wanted if number in examples], shown)
    without = tuple(count / scored for count in right[: len(output.decisions)]) if scored else ()
    report = ClassificationReport(majority, len(drawn), by_text, chosen, modules, modality, data.class_names)
    routers = [layer.router for layer in model.spec.layer_specs if layer.modules]
    return report._replace(
        roles=data.roles,
        by_group={group: statistics.fmean(hits) for group, hits in sorted(groups.items())},
        without_layer=without,
        routing=Routing(_router_paths(model.spec), all(router.fixed_rate for router in routers)),
        per_position=batch.targets.ndim == 2,
    )


def _router_paths(spec: ModelSpec) -> tuple[str, ...]:
    """Field paths of the routers: that of all layers, or one for each routed layer of a list."""
    layers = spec.layers.layer if isinstance(spec.layers, RepeatSpec) else spec.layers
    path = "layers.layer" if isinstance(spec.layers, RepeatSpec) else "layers"
    if not isinstance(layers, tuple):
        return (f"{path}.router",)
    return tuple(f"{path}.{number}.router" for number, layer in enumerate(layers) if layer.modules)


def _right_without(layer: int, model: SequenceModel, batch: Batch, decisions: Sequence[Decision]) -> int:
    """Number of right answers with one routed layer off and the decisions of the others as given."""
    kept = [
        replace(decision, active=torch.zeros_like(decision.active)) if number == layer else decision
        for number, decision in enumerate(decisions)
    ]
    logits = model(batch.inputs, batch.valid, decisions=kept).logits
    return 0 if logits is None else int(((logits.argmax(-1) == batch.targets) & (batch.targets != UNSCORED)).sum())


def _by_text(indices: dict[str, int], text_ids: Tensor, active: Tensor) -> dict[str, tuple[list[float], int]]:
    """The activation rates of all layers and the number of occurrences of every text.

    Args:
        indices: number of every text.
        text_ids: number of the text at every position.
        active: whether a layer was active at a position, `(layers, positions)`.
    """
    counts = text_ids.bincount()
    rates = torch.stack([text_ids.bincount(layer.double()) for layer in active], 1) / counts[:, None]
    return {text: (rates[index].tolist(), int(counts[index])) for text, index in indices.items()}


def _answers(logits: Tensor | None, targets: Tensor) -> tuple[list[int], list[int]]:
    """The predicted and the true classes; with a target per position, the numbers of right and of scored positions."""
    if logits is None:
        return [], targets.tolist()
    guesses = logits.argmax(-1)
    if targets.ndim == 1:
        return guesses.tolist(), targets.tolist()
    return ((guesses == targets) & (targets != UNSCORED)).sum(1).tolist(), (targets != UNSCORED).sum(1).tolist()


def _right_and_wrong(examples: list[Example], shown: int) -> list[Example]:
    """At most `shown` examples: right predictions, the classes in turns, and one wrong prediction of every four."""
    right = [example for example in examples if example.guess == example.target]
    wrong = [example for example in examples if example.guess != example.target]
    seen: Counter[int] = Counter()
    turns = []
    for example in right:
        turns.append((seen[example.target], example.target))
        seen[example.target] += 1
    order = sorted(range(len(right)), key=turns.__getitem__)
    some = [right[number] for number in order][: max(shown - max(1, shown // 4), shown - len(wrong))]
    return some + wrong[: shown - len(some)]


def where_figure(out: Path) -> str:
    """The path of a run's figure, or a note that it was not drawn."""
    return plain(out / FIGURE) if (out / FIGURE).is_file() else "none: it could not be drawn, see the warning above"


def rates_over_training(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the logged activation rates of a run, over all its interruptions: (update, rate) pairs by curve name.

    Incomplete lines of a killed process are skipped.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(
        (out / "metrics").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])
    ):
        for row in csv.DictReader(_whole_lines(path), restkey=""):
            wanted = {
                name: value
                for name, value in row.items()
                if value and (name.startswith("fit_rate/") or name == "val_accuracy")
            }
            try:
                update, points = int(row["step"]) + 1, {name: float(value) for name, value in wanted.items()}
            except (KeyError, TypeError, ValueError):
                continue
            for name, point in points.items():
                curves[name][update] = point
    return {name: sorted(points.items()) for name, points in sorted(curves.items())}


def _whole_lines(path: Path) -> list[str]:
    """The complete lines of a file. After a crash of the machine some file systems pad it with zeros."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n") and "\0" not in line]


def _caption(report: ClassificationReport, example: Example) -> str:
    names = report.class_names
    mark = "orange" if report.modality.image_shape is not None else "dark"
    shown = f"{mark}: {' or '.join(report.modules)} active"
    if report.per_position:
        return f"{example.guess} of {example.target} answers correct; {shown}"
    answer, guess = (label(names[index], 40) if names else str(index) for index in (example.target, example.guess))
    predicted = "predicted correctly" if example.guess == example.target else f"predicted {guess}"
    return f"class {answer}, {predicted}; {shown}"


def draw_rates(axis: Any, out: Path) -> None:
    """Draw the activation rates of a run over its training, and the validation accuracy if there is one."""
    for name, points in rates_over_training(out).items():
        updates, values = zip(*points, strict=True)
        if name == "val_accuracy":
            axis.plot(updates, values, "k--o", markersize=3, label="validation accuracy")
        else:
            axis.plot(
                updates, values, label=name.removeprefix("fit_rate/").replace("layer", "layer ").replace("/", ": ")
            )
    axis.set(xlabel="update", ylabel="activation rate", ylim=(-0.02, 1.02))
    if axis.lines:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.grid(alpha=0.3)
