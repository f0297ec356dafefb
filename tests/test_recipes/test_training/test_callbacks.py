"""Callbacks of a training: warnings, random states, checkpoints."""

import errno
import logging
import os
from types import SimpleNamespace

import pytest
import torch

from sma.errors import CheckpointError
from sma.recipes.training.callbacks import AtomicCheckpointIO, RandomStates, RouterHealth
from sma.routers import (
    AlwaysRouterSpec,
    ExpertChoiceRouterSpec,
    NeverRouterSpec,
    RandomRouterSpec,
    RouterSpec,
    SMARouterSpec,
)
from tests.test_recipes.tiny import checkpoint, same, tiny, train


def _watch(health, rates, step=10, module="attention"):
    metrics = {
        f"val_rate/layer{layer}/{module}": torch.tensor(rate, dtype=torch.float64) for layer, rate in enumerate(rates)
    }
    trainer = SimpleNamespace(
        callback_metrics={"val_rate": torch.tensor(0.5), "loss": torch.tensor(0.0), **metrics}, global_step=step
    )
    health.on_validation_end(trainer, None)


def test_routers_are_not_checked_before_the_budget_has_settled(new_warnings):
    health, metrics = RouterHealth([SMARouterSpec()]), {"val_rate/layer0/attention": torch.tensor(1.0)}
    trainer = SimpleNamespace(callback_metrics=metrics, global_step=3)
    health.on_validation_end(trainer, SimpleNamespace(settled=False))
    assert new_warnings() == []
    health.on_validation_end(trainer, SimpleNamespace(settled=True))
    assert len(new_warnings()) == 1


@pytest.fixture
def new_warnings(caplog):
    """The warnings since the last call."""
    caplog.set_level(logging.WARNING, logger="sma.recipes")

    def read():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return read


def test_every_change_of_a_router_is_reported_once(new_warnings):
    health = RouterHealth([SMARouterSpec()] * 2)
    _watch(health, [0.5, 0.5])
    assert new_warnings() == []
    _watch(health, [0.0004, 0.5], step=500)
    dead = (
        "the router of 'attention' in layer 0 is dead at update 500: rate 0.0004, so it gets no gradient; "
        "set training.budget.target"
    )
    assert new_warnings() == [f"warning: {dead}"]
    _watch(health, [0.0, 1.0], step=1000)
    saturated = (
        "the router of 'attention' in layer 1 is saturated at update 1000: rate 1.0000, so nothing is skipped; "
        "set training.budget.target"
    )
    assert new_warnings() == [f"warning: {saturated}"]
    _watch(health, [0.0, 1.0], step=1500)
    assert new_warnings() == []
    _watch(health, [0.02, 1.0], step=2000)
    assert new_warnings() == ["the router of 'attention' in layer 0 is alive again at update 2000: rate 0.0200"]
    _watch(health, [0.0, 0.0], step=2500)
    assert [message.split(" at ")[0] for message in new_warnings()] == [
        "warning: the router of 'attention' in layer 0 is dead",
        "warning: the router of 'attention' in layer 1 is dead",
    ]


@pytest.mark.parametrize(
    "router",
    [
        pytest.param(router, id=router.kind)
        for router in (
            AlwaysRouterSpec(),
            NeverRouterSpec(),
            RandomRouterSpec(rate=0.5),
            ExpertChoiceRouterSpec(share=0.5),
        )
    ],
)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_routers_with_a_fixed_rate_are_not_watched(new_warnings, router: RouterSpec, rate: float):
    _watch(RouterHealth([router]), [rate])
    assert new_warnings() == []


def test_warnings_name_the_layer_and_the_module(new_warnings):
    health = RouterHealth([AlwaysRouterSpec(), SMARouterSpec()])
    _watch(health, [1.0, 1.0], module="mlp")
    assert [message.split(" is ")[0] for message in new_warnings()] == ["warning: the router of 'mlp' in layer 1"]


def test_run_without_a_learning_router_is_silent(data, tmp_path, new_warnings):
    spec = tiny(layers__layer__router="{kind: never}", training__updates=6)
    summary = train(spec, tmp_path, data).summary
    assert new_warnings() == []
    assert summary["activation_rate"] == [0.0, 0.0]


def test_run_warns_of_a_dead_router(data, tmp_path, new_warnings, monkeypatch):
    monkeypatch.setattr("sma.recipes.training.callbacks.router_health", lambda rate: "dead")
    train(tiny(training__updates=6, training__evaluate_every=2), tmp_path, data)
    assert [message.split(":")[1] for message in new_warnings()] == [
        " the router of 'attention' in layer 0 is dead at update 2",
        " the router of 'attention' in layer 1 is dead at update 2",
    ]


def test_random_states_are_restored_at_the_start_of_the_training(tmp_path):
    torch.manual_seed(5)
    torch.save(RandomStates().state_dict(), tmp_path / "states")
    expected = torch.rand(3)
    restored = RandomStates()
    restored.load_state_dict(torch.load(tmp_path / "states", weights_only=True))
    torch.manual_seed(9)  # building and evaluating the model draw random numbers in between
    restored.on_train_start(None, None)
    assert torch.equal(torch.rand(3), expected)


def test_fresh_training_keeps_its_random_states():
    before = torch.get_rng_state()
    RandomStates().on_train_start(None, None)
    assert torch.equal(torch.get_rng_state(), before)


CONTENT = {
    "weights": torch.arange(1000.0),
    "global_step": 3,
    "nested": [{"a": torch.ones(2, dtype=torch.bool)}, None, 1.5, "text"],
}


def test_checkpoint_is_read_without_running_code_in_it(tmp_path):
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "new" / "last.ckpt")
    assert same(AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt"), CONTENT)
    assert same(torch.load(tmp_path / "new" / "last.ckpt", weights_only=True), CONTENT)
    torch.save({"evil": SimpleNamespace(a=1)}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)


@pytest.mark.parametrize("first", [True, False], ids=["first", "replacing"])
@pytest.mark.parametrize(
    ("raised", "expected", "complaint"),
    [
        pytest.param(KeyboardInterrupt("stop"), KeyboardInterrupt, "stop", id="interrupt"),
        pytest.param(
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            CheckpointError,
            r"cannot write '.*last\.ckpt': .*No space left on device; the run folder must be writable and have space",
            id="full-disk",
        ),
        pytest.param(
            RuntimeError("writing file failed"),
            CheckpointError,
            r"cannot write '.*last\.ckpt': writing file failed",
            id="torch",
        ),
    ],
)
def test_interrupted_write_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, first, raised, expected, complaint
):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    if not first:
        io.save_checkpoint(CONTENT, path)

    def half(content, target):
        target.write_bytes(b"half of a checkpoint")
        raise raised

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(expected, match=complaint):
        io.save_checkpoint({}, path)
    assert [found.name for found in tmp_path.iterdir()] == ([] if first else ["last.ckpt"])
    if not first:
        assert same(io.load_checkpoint(path), CONTENT)


def test_checkpoints_of_a_run_hold_weights_optimiser_schedule_and_random_states(finished):
    out, _ = finished
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    last = checkpoint(out)
    assert last["global_step"] == 30
    assert last["optimizer_states"][0]["state"]
    assert last["lr_schedulers"][0]["last_epoch"] == 30
    assert last["callbacks"]["RandomStates"]["cpu"].dtype == torch.uint8


def test_last_checkpoint_is_the_last_evaluation_even_when_it_was_not_the_best(data, tmp_path, monkeypatch):
    # A score that only falls: the first evaluation stays the best.
    falling = iter([0.9, 0.5, 0.4])
    compute = "sma.recipes.training.module.Scores.compute"
    monkeypatch.setattr(
        compute, lambda self, split: {f"{split}_accuracy": next(falling, 0.1) if split == "val" else 0.1}
    )
    spec = tiny(layers__layer__modules="{}", training__updates=6, training__evaluate_every=2)
    summary = train(spec, tmp_path, data).summary
    assert checkpoint(tmp_path, "checkpoints/best.ckpt")["global_step"] == summary["best_update"] == 2
    assert checkpoint(tmp_path)["global_step"] == 6


@pytest.mark.parametrize(
    ("updates", "evaluations"),
    [(7, [3, 6, 7]), (6, [3, 6]), (2, [2])],
    ids=["something-left", "nothing-left", "fewer-than-one"],
)
def test_last_update_is_always_evaluated(data, tmp_path, updates, evaluations, monkeypatch):
    seen = []
    monkeypatch.setattr(
        RouterHealth, "on_validation_end", lambda self, trainer, module: seen.append(trainer.global_step)
    )
    spec = tiny(training__updates=updates, training__evaluate_every=3, training__warmup=1)
    train(spec, tmp_path, data)
    assert seen == evaluations
    assert checkpoint(tmp_path)["global_step"] == updates
