"""Causal language modelling of bytes: training, evaluation, and the whole run."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int64
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import MeanMetric

from sma.model import LanguageModel, build
from sma.model_output import ModelOutput, ModelState
from sma.pytree import named_tensors, with_tensors
from sma.recipes.experiment import ExperimentSpec, TrainingSpec
from sma.recipes.reports.language import Reading, read_along
from sma.recipes.reports.reference_scores import marks
from sma.recipes.tasks.language.corpus import Corpus
from sma.recipes.tasks.language.task import LanguageTask
from sma.recipes.training.devices import check_device
from sma.recipes.training.distributed import ALONE, Team, of_all, whole
from sma.recipes.training.estimates import check_update_fits
from sma.recipes.training.loop import finish, fit, prepare, rates_by_layer, writing
from sma.recipes.training.module import Learner, RateMetric
from sma.recipes.training.trainer import run_test


class Segment(NamedTuple):
    """Stretches of text, one per row, and what follows each of their bytes.

    Attributes:
        inputs: the bytes.
        targets: the byte after each.
        scored: which targets count; the others are context.
        fresh: whether the rows begin anew; otherwise they go on where those of the last segment ended.
    """

    inputs: Int64[Tensor, "B L"]
    targets: Int64[Tensor, "B L"]
    scored: Bool[Tensor, "B L"]
    fresh: bool


class TrainingSegments(Dataset[Segment]):
    """The segments of a whole training, a function of the seed and the number of the update.

    Fresh ones stand anywhere. Carried ones walk through the text: it is cut into as many stretches as the batch has
    rows, which are read side by side; at the end of the stretches the cuts are moved and everything starts afresh. The
    text is taken as a ring.

    Args:
        text: the training split.
        task: how long the segments are, and whether they are carried.
        training: how many make a batch.
        seed: of the places.
        team: the processes that share every batch; this one gives its own rows of it.

    Raises:
        SpecError: they cannot share the batches evenly.
    """

    def __init__(self, text: Tensor, task: LanguageTask, training: TrainingSpec, seed: int, team: Team = ALONE) -> None:
        self.text, self.task, self.rows, self.seed, self.team = text, task, training.batch_size, seed, team
        team.check_batch(self.rows)
        self.per_pass = max(1, len(text) // (self.rows * task.segment))

    def __getitem__(self, update: int) -> Segment:
        """The segments of update number `update`."""
        length, size = len(self.text), self.task.segment
        number, place = divmod(update, self.per_pass) if self.task.carry_state else (update, 0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if self.task.carry_state:
            start = (
                torch.randint(length, (1,), generator=generator)
                + torch.arange(self.rows) * (length // self.rows)
                + place * size
            )
        else:
            start = torch.randint(length, (self.rows,), generator=generator)
        found = self.text[(self.team.part(start)[:, None] + torch.arange(size + 1)) % length].long()
        return Segment(found[:, :-1], found[:, 1:], torch.ones(len(found), size, dtype=torch.bool), place == 0)


class Updates(Sampler[int]):
    """The numbers of the updates from `start` on; its length counts the done ones too, as Lightning does."""

    def __init__(self, updates: int, start: int) -> None:
        self.updates, self.start = updates, start

    def __len__(self) -> int:
        """All updates."""
        return self.updates

    def __iter__(self) -> Iterator[int]:
        """Those that are left."""
        return iter(range(self.start, self.updates))


class EvaluationSegments(Dataset[Segment]):
    """A text from its second byte to its last, each scored once.

    Without a context the windows follow one another and the state goes from one to the next, so every byte is predicted
    from all before it. With one, every window starts afresh and its first `context` bytes are only read (those of the
    first are scored too).
    """

    def __init__(self, text: Tensor, task: LanguageTask) -> None:
        self.text, self.window, self.context = text, task.window, task.context
        self.stride = task.window - (task.context or 0)

    def __len__(self) -> int:
        """Windows."""
        return max(1, math.ceil((len(self.text) - 1 - (self.window - self.stride)) / self.stride))

    def __getitem__(self, number: int) -> Segment:
        """Window number `number`."""
        start = number * self.stride
        if number >= len(self):
            raise IndexError(number)
        found = self.text[None, start : start + self.window + 1].long()
        scored = torch.ones(1, found.shape[1] - 1, dtype=torch.bool)
        if number and self.context:
            scored[:, : self.context] = False
        return Segment(found[:, :-1], found[:, 1:], scored, number == 0 or self.context is not None)


class LanguageScores(nn.Module):
    """What is measured on one split: bits per character, and the activation rates of the routed layers."""

    def __init__(self, layers: list[tuple[str, ...]]) -> None:
        super().__init__()
        self.bits = MeanMetric()
        self.rates = RateMetric(layers)

    def update(self, output: ModelOutput, losses: Tensor, scored: Tensor) -> None:
        """Count one segment; `losses` are those of the scored targets, in nats."""
        self.bits.update(losses.double() / math.log(2))
        self.rates.update(output.decisions, scored)

    def compute(self, split: str) -> dict[str, float]:
        """The measures by their logged names; starts afresh."""
        measures = {f"{split}_bits_per_character": float(self.bits.compute())}
        self.bits.reset()
        return measures | self.rates.measures(split)


class LanguageLearner(Learner):
    """Cross-entropy of the next byte, bits per character and activation rates of a `LanguageModel`.

    With `carry_state` a segment goes on from the state in which the last one ended, cut off from its gradient
    (truncated backpropagation through time); the state of all rows is part of a checkpoint, in the same order however
    many processes share them.

    Every process of a team evaluates the whole of a text, which is one stream; the measures are means, and stay the
    same.

    Args:
        model: what is trained.
        training: optimiser and schedule.
        carry_state: go on from segment to segment.
        team: the processes that share every batch.
    """

    monitor, monitor_mode = "val_bits_per_character", "min"

    def __init__(self, model: LanguageModel, training: TrainingSpec, carry_state: bool, team: Team = ALONE) -> None:
        super().__init__(model, training)
        self.carry_state, self.team = carry_state, team
        self.carried: ModelState | None = None
        self.streamed: ModelState | None = None
        self.fit_scores, self.val_scores, self.test_scores = (LanguageScores(self.module_names) for _ in range(3))

    def training_step(self, batch: Segment, batch_idx: int) -> Tensor:
        """One update."""
        state = None
        if self.carry_state:
            state = self.carried
            if state is None or batch.fresh:
                state = self._own(self.model.init_state(len(batch.inputs) * self.team.size))
            state = state.to(self.device)  # a checkpoint is read on the CPU
        output, losses = self._run(batch, state)
        self.carried = None if output.state is None else output.state.detach()
        loss = losses.mean()
        self.tokens_seen += batch.inputs.numel()
        self.fit_scores.update(output, losses.detach(), batch.scored)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        if (self.global_step + 1) % self.training_spec.log_every == 0:
            measures = self.fit_scores.compute("fit")
            self.log_dict(measures, batch_size=1)
            self.log("bits", measures["fit_bits_per_character"], prog_bar=True, logger=False, batch_size=1)
            if self.module_names:
                self.log("rate", measures["fit_rate"], prog_bar=True, logger=False, batch_size=1)
        self.steer(output.decisions, None)
        return loss + self.routing_loss(
            output.decisions, None, losses.new_zeros(batch.scored.shape).masked_scatter(batch.scored, losses.detach())
        )

    def validation_step(self, batch: Segment, batch_idx: int) -> None:
        """Score one window of the validation split."""
        self._score(batch, self.val_scores)

    def test_step(self, batch: Segment, batch_idx: int) -> None:
        """Score one window of the test split."""
        self._score(batch, self.test_scores)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.val_scores.compute("val"))

    def on_test_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.test_scores.compute("test"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep where the streams of the training stand, those of all processes: all of them must call it."""
        super().on_save_checkpoint(checkpoint)
        parts = of_all(None if self.carried is None else named_tensors(self.carried.to("cpu")))
        checkpoint["carried"] = (
            None if parts[0] is None else {name: whole([part[name] for part in parts]) for name in parts[0]}
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("carried")
        self.carried = None if found is None else self._own(with_tensors(self.model.init_state(1), found))

    def _own(self, state: ModelState) -> ModelState:
        """The rows of this process, out of the state of a whole batch."""
        return state.select(self.team.part(torch.arange(state.batch_size, device=state.seen.device)))

    def _score(self, batch: Segment, scores: LanguageScores) -> None:
        state = self.model.init_state(len(batch.inputs)) if batch.fresh or self.streamed is None else self.streamed
        output, losses = self._run(batch, state)
        self.streamed = output.state
        scores.update(output, losses, batch.scored)

    def _run(self, batch: Segment, state: ModelState | None) -> tuple[ModelOutput, Tensor]:
        output: ModelOutput = self.model(batch.inputs, state=state)
        logits = cast(Tensor, output.logits)
        losses = nn.functional.cross_entropy(
            logits[batch.scored].float(), batch.targets[batch.scored], reduction="none"
        )
        self.check_loss(losses.sum())
        return output, losses


def evaluation_loader(text: Tensor, task: LanguageTask) -> DataLoader[Any]:
    """The windows of a split."""
    return DataLoader(EvaluationSegments(text, task), batch_size=None)


class Finished(NamedTuple):
    """What a run leaves: the summary that stands in its folder, a reading for the figure, and the learner."""

    summary: dict[str, Any]
    reading: Reading
    learner: LanguageLearner


def run_language(
    spec: ExperimentSpec,
    out: Path,
    corpus: Corpus,
    *,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    team: Team = ALONE,
    figures: Callable[[Finished], object] | None = None,
) -> Finished:
    """Train a language model, evaluate its best checkpoint and write the run folder; see `training.loop.fit`.

    `figures` is called at the end, before the summary is written, with which a run counts as finished.
    """
    check_update_fits(spec, check_device(accelerator, spec.precision), processes=team.size)
    with writing(out, team):
        return _run(
            spec,
            out,
            corpus,
            figures,
            team,
            resume=resume,
            accelerator=accelerator,
            progress=progress,
            callbacks=callbacks,
        )


def _run(
    spec: ExperimentSpec,
    out: Path,
    corpus: Corpus,
    figures: Callable[[Finished], object] | None,
    team: Team,
    **options: Any,
) -> Finished:
    prepare(spec, team)
    task = cast(LanguageTask, spec.task)
    learner = LanguageLearner(
        cast(LanguageModel, build(spec.model, seed=spec.seed)), spec.training, task.carry_state, team
    )
    segments = TrainingSegments(corpus.train, task, spec.training, spec.seed, team)

    def batches(done: int) -> DataLoader[Any]:
        return DataLoader(segments, batch_size=None, sampler=Updates(spec.training.updates, done))

    validation, hashes = evaluation_loader(corpus.validation, task), corpus.hashes
    fitted = fit(learner, spec, out, batches, validation, hashes, team=team, **options)
    measured = run_test(fitted.trainer, learner, evaluation_loader(corpus.test, task), team)
    results = {
        "bits_per_character": measured["test_bits_per_character"],
        "marks": marks(corpus.before_test, corpus.test),
        "activation_rate": rates_by_layer(measured, learner),
        "text": corpus.name,
        "sha256": corpus.sha256,
        "data": dict(hashes),
        "bytes": {"train": len(corpus.train), "validation": len(corpus.validation), "test": len(corpus.test)},
        "context": task.context,
    }
    reading = read_along(cast(LanguageModel, learner.model), corpus.test[:1600])
    draw = None if figures is None else lambda summary: figures(Finished(summary, reading, learner))
    return Finished(finish(spec, out, learner, fitted, results, team, draw), reading, learner)
