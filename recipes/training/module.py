"""The base class of training modules: optimiser, schedule, routing losses, activation rates, check of the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning
import torch
from torch import Tensor
from torchmetrics import Metric

from sma.budget import BudgetController, routers_of
from sma.capacity import Capacity
from sma.decision import Decision
from sma.errors import DataError, SpecError
from sma.formats import FORMAT
from sma.losses import budget_loss, load_balance_loss, policy_gradient_loss, z_loss
from sma.model import SequenceModel
from sma.recipes.experiment import TrainingSpec
from sma.recipes.training.distributed import all_gather_object, is_rank_zero
from sma.recipes.training.graph import Graphed, Update, check_capturable
from sma.recipes.training.measures import Measures, Overflow, RateMetric, Scores, UnseenLosses


class TrainingModule(lightning.LightningModule):
    """A model, its optimiser and its routing losses; subclasses define the loss of the task and the measures.

    A subclass logs the metric of its task on both splits, as `val_NAME` and `test_NAME`, and the measures of its
    `RateMetric`.

    Args:
        model: the model.
        training: optimiser and schedule.

    Attributes:
        module_names: names of the sub-modules of every routed layer.
        tokens_seen: number of tokens in the updates so far, a number or a tensor; subclasses count them.
        fit_scores: the measures since the last line of the metrics; subclasses replace it. Checkpoints hold the sums of
            its torchmetrics.
        between_updates: called before every update but the first, after everything of the previous update is complete.
    """

    fit_scores: Any

    def __init__(self, model: SequenceModel, training: TrainingSpec) -> None:
        super().__init__()
        self.model = model.recompute_activations(training.recompute)
        self.training_spec = training
        self.module_names = [tuple(layer.spec.modules) for layer in model.routed_layers if layer.routed is not None]
        self.controller = None if training.budget is None else BudgetController.of(model, training.budget)
        self.tokens_seen: int | Tensor = 0
        self.unseen_losses = UnseenLosses()
        self.fit_scores = torch.nn.Module()
        self.between_updates: Callable[[], None] = lambda: None

    @property
    def settled(self) -> bool:
        """Whether the activation rates have reached the target of the budget; no earlier checkpoint is the best."""
        return self.controller is None or int(self.controller.updates) >= self.controller.spec.settled

    def steer(self, decisions: Sequence[Decision], valid: Tensor | None) -> None:
        """Update the budget controller with the decisions of one update."""
        if self.controller is not None:
            self.controller.update(decisions, valid)

    def routing_loss(self, decisions: Sequence[Decision], valid: Tensor | None, losses: Tensor) -> Tensor | float:
        """The weighted sum of the routing losses.

        Args:
            decisions: the decisions of this update.
            valid: False at padding.
            losses: losses of the task, per row, or per position with 0 at positions that are not scored.
        """
        weights = self.training_spec.losses
        total: Tensor | float = 0.0
        if weights.budget and weights.target is not None:
            total = total + weights.budget * budget_loss(decisions, weights.target, valid)
        if weights.load_balance:
            total = total + weights.load_balance * load_balance_loss(decisions, valid)
        if weights.z:
            total = total + weights.z * z_loss(decisions, valid)
        if weights.policy:
            routers = routers_of(self.model)
            drawn = [decision for decision, router in zip(decisions, routers, strict=True) if router.stochastic]
            rows = decisions[0].active.shape[0] if decisions else 0
            # A sample may have several rows, such as a pair of documents: each row gets the loss of its sample.
            if losses.ndim == 1 and losses.shape[0] < rows:
                losses = losses.repeat_interleave(rows // losses.shape[0])
            over = self.controller.spec.over if self.controller is not None else None
            policy = policy_gradient_loss(drawn, losses, valid, budget_over=over)
            if self.controller is not None:
                # While the budget holds its first rate the losses do not yet depend on which tokens need a sub-module.
                policy = policy.where(self.controller.updates > self.controller.spec.hold, 0)
            total = total + weights.policy * policy
        return total

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch unchanged. It is the only hook that Lightning calls between two updates."""
        if self.trainer.training and self.global_step:
            self.between_updates()
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of the next line of the metrics over all ranks; all ranks must call it.

        Raises:
            DataError: a loss since the last check is not finite, so the weights are not saved.
        """
        self.check_unseen()
        parts = all_gather_object({name: value.cpu() for name, value in self._counts().items()})
        checkpoint["format_version"] = FORMAT
        checkpoint["fit_scores"] = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums, on rank 0."""
        found = _renamed(checkpoint.get("fit_scores", {}))  # older versions have none
        for name, value in self._counts().items():
            if name in found and is_rank_zero():
                value.copy_(found[name])

    def _counts(self) -> dict[str, Tensor]:
        """The states of the metrics of the training split, which are sums."""
        return {
            f"{name}.{state}": value
            for name, metric in self.fit_scores.named_modules()
            if isinstance(metric, Metric)
            for state, value in metric.metric_state.items()
            if isinstance(value, Tensor)
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Set the step of the routers, on which annealing and random draws depend."""
        for router in routers_of(self.model):
            router.set_step(self.global_step)

    def configure_optimizers(self) -> Any:
        """Adam or rectified Adam with decoupled weight decay, and the schedule per update."""
        spec = self.training_spec
        settings: dict[str, Any] = {
            "lr": spec.learning_rate,
            "betas": spec.betas,
            "eps": spec.epsilon,
            "weight_decay": spec.weight_decay,
        }
        optimizer: torch.optim.Optimizer
        if spec.optimizer == "radam":
            optimizer = torch.optim.RAdam(self._groups(), **settings, decoupled_weight_decay=True)
        else:  # a fused optimiser unscales gradients itself, which Lightning does not combine with clipping
            fused = spec.graph or self.trainer.precision.endswith("true")
            optimizer = torch.optim.AdamW(self._groups(), **settings, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: spec.learning_rate_at(step) / spec.learning_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups; routers have their own group if they have their own learning rate."""
        spec = self.training_spec
        if spec.router_learning_rate is None:
            return [{"params": list(self.parameters())}]
        # Layers may share one router.
        routers = list(dict.fromkeys(part for router in routers_of(self.model) for part in router.parameters()))
        known = {id(part) for part in routers}
        others = [part for part in self.parameters() if id(part) not in known]
        return [{"params": others}, {"params": routers, "lr": spec.router_learning_rate}]

    @property
    def overflow(self) -> Overflow | None:
        """The active tokens that found no slot in this training so far; None without a capacity."""
        return None

    def check_capacity(self) -> None:
        """Check that the module can train with the capacity of the experiment, and as a graph if the spec requires it.

        Raises:
            SpecError: it cannot.
        """
        spec = self.training_spec
        capacity = spec.capacity_at(0, self.module_names)
        if capacity is not None:
            raise SpecError(
                f"{type(self).__name__} gives its model no capacity: derive it from ScoredModule, "
                "or leave training.capacity and training.graph out"
            )

    def check_loss(self, loss: Tensor) -> None:
        """Check that the loss is finite, so that diverged weights do not replace the last good checkpoint.

        On an accelerator the host reads the losses later, before it writes a line of the metrics, an evaluation or a
        checkpoint.

        Raises:
            DataError: the loss is not finite.
        """
        self.unseen_losses.add(self.global_step, loss)
        if loss.device.type == "cpu":
            self.check_unseen()

    def check_unseen(self) -> None:
        """Check that the losses that the host has not read yet are finite.

        Raises:
            DataError: one is not.
        """
        bad = self.unseen_losses.first_bad()
        if bad is not None:
            update, value = bad
            raise DataError(
                f"the loss of update {update} is {value}; the last checkpoint is still good: "
                "start a new run with a lower training.learning_rate or another seed"
            )

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Drop the gradients of the last update. A graph includes this and the steps of the next two methods."""
        if not self.training_spec.graph:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """Compute the gradients."""
        if not self.training_spec.graph:
            super().backward(loss, *arguments, **options)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Make an update, and check the losses before anything of it is written.

        Raises:
            DataError: a loss is not finite.
        """
        if self.training_spec.graph:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.is_written(self.global_step):
            self.check_unseen()

    def is_written(self, update: int) -> bool:
        """Whether a line of the metrics, an evaluation or a checkpoint follows an update, counted from 0."""
        spec = self.training_spec
        return any((update + 1) % every == 0 for every in (spec.log_every, spec.evaluate_every, spec.updates))

    def on_validation_end(self) -> None:
        """Check the losses of the split."""
        self.check_unseen()

    def on_test_end(self) -> None:
        """Check the losses of the split."""
        self.check_unseen()


def _renamed(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of a checkpoint by their present names; older versions have those of metrics of torchmetrics."""
    found = dict(sums)
    for metric in ("accuracy", "bits"):
        if f"{metric}.tp" in found:
            found[f"{metric}.sum"] = found[f"{metric}.tp"]
            found[f"{metric}.count"] = found[f"{metric}.tp"] + found[f"{metric}.fn"]
        if f"{metric}.mean_value" in found:
            found[f"{metric}.sum"], found[f"{metric}.count"] = found[f"{metric}.mean_value"], found[f"{metric}.weight"]
    return found


class ScoredModule(TrainingModule):
    """A training module that logs the `Scores` of the training, the validation and the test split.

    Args:
        model: the model.
        training: optimiser and schedule.
        name: name of the metric of the task.
        metric: function that makes the metric.
        short: name of the metric in the progress bar; None: `name`.
    """

    def __init__(
        self,
        model: SequenceModel,
        training: TrainingSpec,
        name: str,
        metric: Callable[[], Metric],
        short: str | None = None,
    ) -> None:
        super().__init__(model, training)
        self.fit_scores, self.val_scores, self.test_scores = (
            Scores(name, metric(), self.module_names, short) for _ in range(3)
        )
        self._graphed: Graphed | None = None
        self._overflow = Overflow()  # up to the last line of the metrics

    @property
    def overflow(self) -> Overflow | None:
        """The active tokens that found no slot in this training so far, over all ranks; all ranks must read it. None
        without a capacity.
        """
        if self.training_spec.effective_capacity is None:
            return None
        return self._overflow.plus(cast(RateMetric, self.fit_scores["rates"]).overflowed())

    def check_capacity(self) -> None:
        """Check that no part of the model prevents graphs, if the training requires them.

        Raises:
            SpecError: one does.
        """
        if self.training_spec.graph:
            check_capturable(self.model.spec, self.training_spec.capacity_at(0, self.module_names))

    def compute(self, batch: Any, capacity: Capacity | None) -> tuple[Tensor, Measures]:
        """Compute the loss of an update, with the routing losses, and its measures; update the budget controller.

        It logs nothing and reads no value from a device.

        Args:
            batch: the batch.
            capacity: the capacity of the sub-modules.
        """
        raise TypeError(f"{type(self).__name__} must define compute(self, batch, capacity)")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of one update; with `training.graph` make the update. A non-finite loss ends the training
        with an error message.
        """
        spec = self.training_spec
        capacity = spec.capacity_at(self.global_step, self.module_names)
        if spec.graph:
            if self._graphed is None:  # not earlier, because a resumed run first restores the states of the optimiser
                optimizer: Any = self.optimizers(use_pl_optimizer=False)
                self._graphed = Graphed(Update(self.compute, optimizer, spec.clip_norm))
            loss, measures = self._graphed(batch, capacity)
        else:
            loss, measures = self.compute(batch, capacity)
        self.record(measures)
        return loss

    def record(self, measures: Measures) -> None:
        """Add the measures of an update to those of the line of the metrics, and log them.

        Raises:
            DataError: the loss is not finite.
        """
        self.check_loss(measures.loss)
        scores: Scores = self.fit_scores
        scores.add(measures)
        self.tokens_seen = self.tokens_seen + measures.tokens
        self.log("loss", measures.loss.detach(), prog_bar=True, batch_size=1, sync_dist=True)
        if (self.global_step + 1) % self.training_spec.log_every == 0:
            limited = {}
            if measures.overflow is not None:
                overflow = cast(RateMetric, scores["rates"]).overflowed()
                self._overflow = self._overflow.plus(overflow)
                limited = {"fit_overflow": overflow.share}
            logged = scores.compute("fit") | limited
            self.log_dict(logged, batch_size=1)
            shown = {scores.short: f"fit_{scores.name}", **({"rate": "fit_rate"} if self.module_names else {})}
            for short, name in shown.items():
                self.log(short, logged[name], prog_bar=True, logger=False, batch_size=1)

    def on_fit_end(self) -> None:
        """Free the memory of the graphs."""
        self._graphed = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the overflow up to the last line of the metrics; all ranks must call it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["overflow"] = list(self._overflow)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the overflow."""
        super().on_load_checkpoint(checkpoint)
        self._overflow = Overflow(*checkpoint.get("overflow", ()))

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.val_scores.compute("val"))

    def on_test_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.test_scores.compute("test"))
