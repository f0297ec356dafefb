"""Specs of experiments: a task, a model, and the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sma.budget import BudgetSpec
from sma.capacity import PerBatch
from sma.model import ModelSpec
from sma.paths import Settings, override, parse_path, parse_settings
from sma.recipes.io.presets import read_shipped
from sma.recipes.tasks.contract import TaskSpec
from sma.spec import Spec


class RoutingLosses(Spec):
    """Weights of the losses on decisions that are added to the loss of the task; see `sma.losses`."""

    budget: float = Field(
        default=0.0, ge=0.0, description="weight of the squared distance of the activation rates from `target`"
    )
    target: float | None = Field(default=None, ge=0.0, le=1.0, description="target activation rate of the budget loss")
    load_balance: float = Field(
        default=0.0, ge=0.0, description="weight of the load-balance loss, for routers under which sub-modules compete"
    )
    z: float = Field(default=0.0, ge=0.0, description="weight of the z-loss, which keeps scores small")
    policy: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of the policy gradient of stochastic routers; "
        "with a budget it starts after the updates of budget.hold",
    )

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.budget and self.target is None:
            raise ValueError("a budget loss needs a target; set training.losses.target to a rate between 0 and 1")
        return self


GRAPH_CAPACITY = 1.25
"""The capacity of a training with CUDA graphs unless the experiment gives another one."""


class TrainingSpec(Spec):
    """Training: Adam with decoupled weight decay on every parameter, linear warm-up, polynomial decay to 0."""

    optimizer: Literal["adam", "radam"] = Field(default="adam", description="Adam, or rectified Adam")
    updates: int = Field(ge=1, description="number of optimiser steps")
    batch_size: int = Field(ge=1, description="samples per update")
    learning_rate: float = Field(gt=0.0, description="learning rate at the end of the warm-up")
    router_learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        description="learning rate of the routers' parameters, on the same schedule; null: that of the others",
    )
    weight_decay: float = Field(default=0.0, ge=0.0, description="decoupled weight decay, times the learning rate")
    warmup: int = Field(default=0, ge=0, description="number of updates until the full learning rate")
    warmup_from: float = Field(default=1e-7, ge=0.0, description="learning rate of the first update of the warm-up")
    decay_power: float = Field(
        default=1.0, gt=0.0, description="the learning rate falls as (updates left)^power; 1 is linear"
    )
    clip_norm: float | None = Field(default=1.0, gt=0.0, description="maximum norm of the gradient; null does not clip")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="decay rates of Adam's two averages")
    epsilon: float = Field(default=1e-8, gt=0.0, description="added to Adam's denominator")
    evaluate_every: int = Field(
        default=500, ge=1, description="number of updates between validations, with their checkpoints"
    )
    budget: BudgetSpec | None = Field(
        default=None, description="controller that holds the activation rates at a target; null leaves them free"
    )
    losses: RoutingLosses = Field(
        default=RoutingLosses(), description="losses on the routers' decisions, besides that of the task"
    )
    recompute: bool = Field(
        default=False, description="activation checkpointing: layers are recomputed in the backward pass to save memory"
    )
    bucket: int = Field(
        default=50, ge=1, description="number of batches whose samples are sorted together by length, to reduce padding"
    )

    tf32: bool = Field(
        default=True,
        description="round the operands of float32 products to 10 bits (TF32) on a CUDA device; no effect elsewhere",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="processes that prepare batches; null: 2 for an accelerator, 0 on a CPU. No effect on the batches",
    )
    pinned: bool = Field(
        default=True, description="copy batches to a CUDA device while it computes, from pinned memory"
    )
    capacity: float | None = Field(
        default=None,
        gt=0.0,
        description="slots per batch for each sub-module in training, as a multiple of its rate under the budget, or "
        "of all tokens without one; active tokens without a slot are skipped and counted. null: 1.25 with graph, "
        "else no limit",
    )
    graph: bool = Field(
        default=False, description="run updates as CUDA graphs, with batches padded to a few lengths; needs CUDA"
    )

    @property
    def effective_capacity(self) -> float | None:
        """The capacity, with the default of null applied; None without one."""
        return GRAPH_CAPACITY if self.capacity is None and self.graph else self.capacity

    def capacity_at(self, update: int, layers: Sequence[Sequence[str]]) -> dict[str, PerBatch] | None:
        """The capacity of every sub-module in an update, counted from 0; None without one.

        Args:
            update: the update.
            layers: names of the sub-modules of every routed layer.
        """
        multiple = self.effective_capacity
        if multiple is None:
            return None
        rates: dict[str, float] = {}
        for index, names in enumerate(layers):
            for name in names:
                rates[name] = max(rates.get(name, 0.0), self._highest_rate(update, index, name))
        return {name: PerBatch(min(1.0, multiple * rate)) for name, rate in rates.items()}

    def _highest_rate(self, update: int, layer: int, name: str) -> float:
        """Upper bound of the rate of a sub-module under the budget; 1 without a budget or with a total budget."""
        if self.budget is None or self.budget.over == "total":
            return 1.0
        targets = self.budget.target
        target = targets[layer] if isinstance(targets, tuple) else targets
        own = target.get(name) if isinstance(target, Mapping) else target
        return 1.0 if own is None else self.budget.ceiling(own, update)

    @property
    def log_every(self) -> int:
        """Number of updates per line of the metrics."""
        return min(50, self.evaluate_every, self.updates)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup >= self.updates:
            raise ValueError(
                f"warmup={self.warmup} must be below updates={self.updates}; lower warmup or raise updates"
            )
        if self.budget is not None and self.budget.settled >= self.updates:
            raise ValueError(
                f"the budget reaches its target after {self.budget.settled} updates, which must be below "
                f"updates={self.updates}; lower budget.hold and budget.anneal, or set budget=null"
            )
        if self.graph and self.recompute:
            raise ValueError("graph=true cannot capture activation checkpointing; set recompute=false or graph=false")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both be at least 0 and below 1")
        return self

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        floor = self.warmup_from
        if step < self.warmup:
            return floor + (self.learning_rate - floor) * step / self.warmup
        left = max(0.0, (self.updates - step) / (self.updates - self.warmup))
        return self.learning_rate * float(left**self.decay_power)


class ExperimentSpec(Spec):
    """Everything that determines a run, besides the versions of the software and the machine."""

    task: TaskSpec = Field(description="the task and its data")
    model: ModelSpec = Field(description="the model")
    training: TrainingSpec = Field(description="optimiser, schedule and losses")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = Field(
        default="32-true", description="floating-point precision of the training"
    )
    threads: int | None = Field(
        default=None, ge=1, description="number of CPU threads; null: one per core. One is enough for a small model"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seed of the weights, the order of the samples and the dropout"
    )

    @model_validator(mode="before")
    @classmethod
    def _know_the_tasks(cls, data: Any) -> Any:
        _register_tasks()
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.task.check_model(self.model)
        self._check_policy()
        self._check_graph()
        return self

    def _check_graph(self) -> None:
        """Check that the task and the precision allow a capacity and CUDA graphs."""
        training = self.training
        if self.task.carries_state and training.effective_capacity is not None:
            given = "graph=true" if training.graph else f"capacity={training.capacity}"
            raise ValueError(
                f"training.{given} limits the active tokens of a batch, and the task {self.task.kind!r} carries a "
                f"state from batch to batch, which needs all of them; set task.carry_state=false, or leave {given} out"
            )
        if training.graph and self.precision == "16-mixed":
            raise ValueError(
                "training.graph=true cannot capture the loss scaling of precision=16-mixed; set precision=bf16-mixed"
            )

    def _check_policy(self) -> None:
        """Check that a policy gradient is used with stochastic routers, and that routers that require it have it."""
        routers = [layer.router for layer in self.model.layer_specs if layer.modules]
        weight = self.training.losses.policy
        if weight and not any(router.stochastic for router in routers):
            kinds = ", ".join(dict.fromkeys(repr(router.kind) for router in routers)) or "none"
            raise ValueError(
                f"training.losses.policy={weight} needs a stochastic router, and the model's are: {kinds}; "
                "use one, such as the router kind 'bernoulli', or set training.losses.policy=0"
            )
        for router in routers:
            if router.needs_policy_gradient and not weight:
                raise ValueError(
                    f"training.losses.policy=0 leaves the router kind {router.kind!r} without a gradient; "
                    "set training.losses.policy=1.0, or use another kind, such as 'gumbel'"
                )


def load_experiment(source: str | Path | Mapping[str, Any], overrides: Settings = ()) -> ExperimentSpec:
    """Validate an experiment.

    Args:
        source: a mapping, a YAML file, or the name of a preset, such as `listops_tiny`. Its `model` may be the name of
            a shipped spec or a file.
        overrides: values by field path, or a list of `path=value`, set before validation; a path may omit a leading
            `model.`.

    Raises:
        SpecError: the experiment is not valid; the message has one line per mistake.
    """
    _register_tasks()
    data = dict(source) if isinstance(source, Mapping) else read_shipped(source, "presets")
    if isinstance(data.get("model"), str):
        data["model"] = read_shipped(data["model"], "specs")
    values = {full_path(path): value for path, value in parse_settings(overrides).items()}
    return ExperimentSpec.model_validate(override(ExperimentSpec, data, values))


def _register_tasks() -> None:
    """Register the tasks of the recipes; a command imports them when it has an experiment, and not for its help."""
    import sma.recipes.tasks.kinds  # noqa: F401


def full_path(path: str) -> str:
    """The field path of an experiment, with the leading `model.` that may be omitted."""
    return f"model.{path}" if parse_path(path)[0] in {*ModelSpec.model_fields, "head"} else path
