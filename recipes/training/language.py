"""The objective of causal language modelling: the next byte of a text."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sma.capacity import Capacity
from sma.model import LanguageModel, SequenceModel
from sma.model_output import ModelOutput, ModelState
from sma.pytree import named_tensors, with_tensors
from sma.recipes.experiment import TrainingSpec
from sma.recipes.reports.language import LanguageReport, read_along
from sma.recipes.reports.reference_scores import reference_scores
from sma.recipes.tasks.batch import UNSCORED, scored_losses
from sma.recipes.tasks.language.corpus import Corpus
from sma.recipes.tasks.language.task import LanguageTask
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext, all_gather_object, unshard
from sma.recipes.training.measures import Average, Measures, Scores, overflow_of
from sma.recipes.training.module import ScoredModule, TrainingModule
from sma.recipes.training.objective import Objective, Split
from sma.stats import count_rates
from sma.summary import summary


class Segment(NamedTuple):
    """Segments of a text, one per row, and the byte after each of their bytes.

    Attributes:
        inputs: the bytes.
        targets: the next byte of every input.
        scored: whether a target counts; the other positions are context.
        fresh: whether the rows start from the initial state; otherwise each continues the row of the last segment.
    """

    inputs: Int64[Tensor, "B L"]
    targets: Int64[Tensor, "B L"]
    scored: Bool[Tensor, "B L"]
    fresh: bool

    def __repr__(self) -> str:
        return summary(self)


class TrainingSegments(Dataset[Segment]):
    """The segments of a whole training, as a function of the seed and the number of the update.

    Without `carry_state` every segment starts at a random position. With it the text is cut into as many stretches as
    the batch has rows, which are read in parallel; at their end the cuts are moved by a random offset and the states
    are reset. The end of the text continues at its beginning.

    Args:
        text: the training split.
        task: length of the segments, and whether the state is carried.
        training: number of segments in a batch.
        seed: seed of the positions.
        distributed: the processes that share every batch; each reads its own rows.

    Raises:
        SpecError: the processes cannot share the batches evenly.
    """

    def __init__(
        self,
        text: Tensor,
        task: LanguageTask,
        training: TrainingSpec,
        seed: int,
        distributed: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.text, self.task, self.rows, self.seed, self.distributed = (
            text,
            task,
            training.batch_size,
            seed,
            distributed,
        )
        distributed.check_batch_size(self.rows)
        self.per_pass = max(1, len(text) // (self.rows * task.segment))

    def __getitem__(self, update: int) -> Segment:
        """The segments of update number `update`."""
        length, size = len(self.text), self.task.segment
        number, position = divmod(update, self.per_pass) if self.task.carry_state else (update, 0)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if self.task.carry_state:
            start = (
                torch.randint(length, (1,), generator=generator)
                + torch.arange(self.rows) * (length // self.rows)
                + position * size
            )
        else:
            start = torch.randint(length, (self.rows,), generator=generator)
        found = self.text[(self.distributed.shard(start)[:, None] + torch.arange(size + 1)) % length].long()
        return Segment(found[:, :-1], found[:, 1:], torch.ones(len(found), size, dtype=torch.bool), position == 0)


class Updates(Sampler[int]):
    """The numbers of the updates from `start` on. The length includes those before, as Lightning's counts do."""

    def __init__(self, updates: int, start: int) -> None:
        self.updates, self.start = updates, start

    def __len__(self) -> int:
        """Number of updates of the whole training."""
        return self.updates

    def __iter__(self) -> Iterator[int]:
        """The remaining updates."""
        return iter(range(self.start, self.updates))


class EvaluationSegments(Dataset[Segment]):
    """Windows over a text in which every byte but the first is scored once.

    Without `context` the windows are consecutive and the state is carried from one to the next, so every byte is
    predicted from all bytes before it. With `context` windows overlap by that many bytes, every window starts from the
    initial state, and its first `context` bytes are not scored, except in the first window.
    """

    def __init__(self, text: Tensor, task: LanguageTask) -> None:
        self.text, self.window, self.context = text, task.window, task.context
        self.stride = task.window - (task.context or 0)

    def __len__(self) -> int:
        """Number of windows."""
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


class LanguageModule(ScoredModule):
    """Cross-entropy of the next byte, bits per character and activation rates of a `LanguageModel`.

    With `carry_state` a segment continues from the detached state at the end of the last one (truncated backpropagation
    through time). A checkpoint holds the states of all rows in an order that does not depend on the number of
    processes.

    A text is one stream, so every rank evaluates all of it. The measures are means over the ranks, hence the same.

    Args:
        model: the model.
        training: optimiser and schedule.
        carry_state: whether a segment continues from the state of the last one.
        distributed: the processes that share every batch.
    """

    def __init__(
        self,
        model: LanguageModel,
        training: TrainingSpec,
        carry_state: bool,
        distributed: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        super().__init__(model, training, "bits_per_character", Average, short="bits")
        self.carry_state, self.distributed = carry_state, distributed
        self.carried: ModelState | None = None
        self.streamed: ModelState | None = None

    def compute(self, batch: Segment, capacity: Capacity | None) -> tuple[Tensor, Measures]:
        """Compute the loss and the measures of an update, and update the budget controller."""
        state = None
        if self.carry_state:
            state = self.carried
            if state is None or batch.fresh:
                state = self._own(self.model.init_state(len(batch.inputs) * self.distributed.world_size))
            state = state.to(self.device)  # a checkpoint is read on the CPU
        output, losses, measures = self._run(batch, state, capacity)
        self.carried = None if output.state is None else output.state.detach()
        self.steer(output.decisions, None)
        return measures.loss + self.routing_loss(output.decisions, None, losses), measures

    def validation_step(self, batch: Segment, batch_idx: int) -> None:
        """Score one window of the validation split."""
        self._score(batch, self.val_scores)

    def test_step(self, batch: Segment, batch_idx: int) -> None:
        """Score one window of the test split."""
        self._score(batch, self.test_scores)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the states of the streams of all ranks; all ranks must call it."""
        super().on_save_checkpoint(checkpoint)
        shards = all_gather_object(None if self.carried is None else named_tensors(self.carried.to("cpu")))
        checkpoint["carried"] = (
            None if shards[0] is None else {name: unshard([shard[name] for shard in shards]) for name in shards[0]}
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the states of the streams of this rank."""
        super().on_load_checkpoint(checkpoint)
        found = checkpoint.get("carried")
        self.carried = None if found is None else self._own(with_tensors(self.model.init_state(1), found))

    def _own(self, state: ModelState) -> ModelState:
        """The rows of this rank in the state of a whole batch."""
        return state.select(self.distributed.shard(torch.arange(state.batch_size, device=state.seen.device)))

    def _score(self, batch: Segment, scores: Scores) -> None:
        state = self.model.init_state(len(batch.inputs)) if batch.fresh or self.streamed is None else self.streamed
        output, _, measures = self._run(batch, state)
        self.streamed = output.state
        self.check_loss(measures.loss)
        scores.add(measures)

    def _run(
        self, batch: Segment, state: ModelState | None, capacity: Capacity | None = None
    ) -> tuple[ModelOutput, Tensor, Measures]:
        output: ModelOutput = self.model(batch.inputs, state=state, capacity=capacity)
        targets = batch.targets.where(batch.scored, UNSCORED)
        losses, _ = scored_losses(cast(Tensor, output.logits).float(), targets)
        count, bits = batch.scored.sum(), losses.detach().sum(dtype=torch.float64) / math.log(2)
        rates, overflow = count_rates(output.decisions, batch.scored), overflow_of(output.decisions)
        return output, losses, Measures(losses.sum() / count, rates, (bits, count), batch.inputs.numel(), overflow)


class LanguageModelling(Objective[LanguageTask, Corpus]):
    """Trains causal language models by cross-entropy and tests their bits per character."""

    def module(
        self, model: SequenceModel, training: TrainingSpec, distributed: DistributedContext = SINGLE_PROCESS
    ) -> LanguageModule:
        return LanguageModule(cast(LanguageModel, model), training, self.task.carry_state, distributed)

    def training_batches(
        self, training: TrainingSpec, seed: int, done: int = 0, distributed: DistributedContext = SINGLE_PROCESS
    ) -> DataLoader[Any]:
        """See `TrainingSegments`."""
        segments = TrainingSegments(self.data.train, self.task, training, seed, distributed)
        return DataLoader(segments, batch_size=None, sampler=Updates(training.updates, done))

    def evaluation_batches(self, split: Split, distributed: DistributedContext = SINGLE_PROCESS) -> DataLoader[Any]:
        """All windows of a split on every rank, because a text is one stream."""
        return DataLoader(EvaluationSegments(getattr(self.data, split), self.task), batch_size=None)

    @property
    def subject(self) -> str:
        return self.data.name

    @property
    def size(self) -> str:
        return f"{len(self.data.train):,} bytes"

    def report(self, module: TrainingModule) -> LanguageReport:
        return read_along(cast(LanguageModel, module.model), self.data.test[:1600])

    def results(self, report: LanguageReport, measures: Mapping[str, float]) -> dict[str, Any]:
        corpus = self.data
        return {
            "marks": reference_scores(corpus.before_test, corpus.test),
            "text": corpus.name,
            "sha256": corpus.sha256,
            **super().results(report, measures),
            "bytes": {"train": len(corpus.train), "validation": len(corpus.validation), "test": len(corpus.test)},
            "context": self.task.context,
        }

    def tested(self, module: TrainingModule) -> str:
        return f"{len(self.data.test):,} held-out bytes"
