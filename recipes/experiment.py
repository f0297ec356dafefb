"""Experiments: a task, a model and how to train it, as one spec; and the presets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

import sma.recipes.tasks.kinds  # noqa: F401 (registers the tasks)
from sma.budget import BudgetSpec
from sma.model import ModelSpec
from sma.paths import override, parse_path
from sma.recipes.io.presets import read_shipped
from sma.recipes.tasks.contract import TaskSpec
from sma.spec import Spec, parse_setting


class RoutingLosses(Spec):
    """Losses of the decisions that are added to that of the task; see `sma.losses`."""

    budget: float = Field(
        default=0.0, ge=0.0, description="weight of the squared distance of the activation rates from `target`"
    )
    target: float | None = Field(default=None, ge=0.0, le=1.0, description="the rate that the budget loss pulls to")
    load_balance: float = Field(
        default=0.0, ge=0.0, description="weight of the load balance, for routers under which sub-modules compete"
    )
    z: float = Field(default=0.0, ge=0.0, description="weight of the z-loss, which keeps scores small")
    policy: float = Field(
        default=0.0,
        ge=0.0,
        description="weight of the policy gradient of routers that sample; "
        "with a budget it begins when the first rate is no longer held",
    )

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.budget and self.target is None:
            raise ValueError("a budget loss needs a target; set training.losses.target to a rate between 0 and 1")
        return self


class TrainingSpec(Spec):
    """How to train: Adam with decoupled weight decay on every parameter, linear warm-up, polynomial decay to 0."""

    optimizer: Literal["adam", "radam"] = Field(default="adam", description="Adam, or rectified Adam")
    updates: int = Field(ge=1, description="optimiser steps of the whole training")
    batch_size: int = Field(ge=1, description="samples per update")
    learning_rate: float = Field(gt=0.0, description="at the end of the warm-up")
    router_learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        description="learning rate of the routers' own parameters, on the same schedule; null: that of all others",
    )
    weight_decay: float = Field(default=0.0, ge=0.0, description="decoupled, times the learning rate")
    warmup: int = Field(default=0, ge=0, description="updates until the full learning rate")
    warmup_from: float = Field(default=1e-7, ge=0.0, description="learning rate of the first update of the warm-up")
    decay_power: float = Field(
        default=1.0, gt=0.0, description="the learning rate falls as (updates left)^power; 1 is linear"
    )
    clip_norm: float | None = Field(default=1.0, gt=0.0, description="largest norm of the gradient; null does not clip")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="decay of Adam's two averages")
    epsilon: float = Field(default=1e-8, gt=0.0, description="added to Adam's denominator")
    evaluate_every: int = Field(default=500, ge=1, description="updates from one validation and checkpoint to the next")
    budget: BudgetSpec | None = Field(
        default=None, description="keeps the activation rates at a target; null lets the routers choose"
    )
    losses: RoutingLosses = Field(
        default=RoutingLosses(), description="of the routers' decisions, beside that of the task"
    )
    recompute: bool = Field(
        default=False, description="activation checkpointing: layers are computed again in backward, for less memory"
    )
    bucket: int = Field(
        default=50, ge=1, description="batches that are sorted by length together, so that there is less padding"
    )

    @property
    def log_every(self) -> int:
        """Updates from one line of the metrics to the next."""
        return min(50, self.evaluate_every, self.updates)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup >= self.updates:
            raise ValueError(
                f"warmup={self.warmup} must be below updates={self.updates}; there is nothing left to train with"
            )
        if self.budget is not None and self.budget.settled >= self.updates:
            raise ValueError(
                f"the budget comes to its target after {self.budget.settled} updates; that must be below "
                f"updates={self.updates}: lower budget.hold and budget.anneal, or set budget=null"
            )
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
    """Everything that decides a run, besides the versions of the software and the machine."""

    task: TaskSpec = Field(description="what to learn")
    model: ModelSpec = Field(description="what learns it")
    training: TrainingSpec = Field(description="how")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = Field(
        default="32-true", description="of the training arithmetic"
    )
    threads: int | None = Field(
        default=None, ge=1, description="of the CPU; null: one per core. A small model is as fast on one"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the weights, the order of the samples and the dropout")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.task.check_model(self.model)
        self._check_policy()
        return self

    def _check_policy(self) -> None:
        """A policy gradient needs routers that sample, and some routers learn from nothing else."""
        routers = [layer.router for layer in self.model.layer_specs if layer.modules]
        weight = self.training.losses.policy
        if weight and not any(router.stochastic for router in routers):
            kinds = ", ".join(dict.fromkeys(repr(router.kind) for router in routers)) or "none"
            raise ValueError(
                f"training.losses.policy={weight} needs a router that samples, and the model's are: {kinds}; "
                "use one, such as the router kind 'bernoulli', or set training.losses.policy=0"
            )
        for router in routers:
            if router.needs_policy_gradient and not weight:
                raise ValueError(
                    f"training.losses.policy=0 leaves the router kind {router.kind!r} nothing to learn from; "
                    "set training.losses.policy=1.0, or use another kind, such as 'gumbel'"
                )


def load_experiment(source: str | Path | Mapping[str, Any], settings: Sequence[str] = ()) -> ExperimentSpec:
    """Validate an experiment.

    Args:
        source: a mapping, a YAML file, or the name of a preset, such as `listops_tiny`. Its `model` may be the name of
            a shipped spec or a file.
        settings: `path=value`, applied before validation; a path may leave out a leading `model.`.

    Raises:
        SpecError: one sentence per mistake.
    """
    data = dict(source) if isinstance(source, Mapping) else read_shipped(source, "presets")
    if isinstance(data.get("model"), str):
        data["model"] = read_shipped(data["model"], "specs")
    return ExperimentSpec.model_validate(override(ExperimentSpec, data, dict(map(_setting, settings))))


def full_path(path: str) -> str:
    """A field path of an experiment, which may have left out a leading `model.`."""
    return f"model.{path}" if parse_path(path)[0] in {*ModelSpec.model_fields, "head"} else path


def _setting(setting: str) -> tuple[str, Any]:
    path, value = parse_setting(setting)
    return full_path(path), value
