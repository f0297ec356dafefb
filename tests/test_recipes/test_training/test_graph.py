"""Updates as graphs, recorded on a tape instead of a device: the same losses and weights as eager ones."""

import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from sma.capacity import PerBatch
from sma.errors import DataError, SpecError
from sma.modules.gau import GatedAttentionUnit as GAU
from sma.ragged import Ragged
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.tasks import batch as batches
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training import graph
from sma.recipes.training.classification import Classification, Classifier
from sma.recipes.training.graph import Graphed, Update, check_capturable, check_graph
from sma.recipes.training.run import Finished
from tests.tape import TapeRecorder
from tests.test_recipes.tiny import assert_same_run, checkpoint, metrics_of, power_failure, same, tiny, train

pytestmark = pytest.mark.slow  # real trainings

BUDGET = "{target: 0.4, hold: 4, anneal: 10}"
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "fit_scores", "overflow")


def _trained(
    spec: ExperimentSpec, out: Path, data: TaskData, monkeypatch: pytest.MonkeyPatch, graphs: int = 16
) -> Finished:
    monkeypatch.setattr(graph, "MAX_GRAPHS", graphs)
    return train(spec, out, data)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"training__budget": BUDGET}, id="annealed"),
        pytest.param({"training__optimizer": "radam", "training__clip_norm": "null"}, id="radam"),
        pytest.param(
            {
                "layers__layer__router": "{kind: bernoulli}",
                "training__losses": "{policy: 0.5, z: 0.1}",
                "training__budget": BUDGET,
                "training__router_learning_rate": 0.0003,
            },
            id="drawn",
        ),
        pytest.param(
            {"layers__layer__router": "{kind: gumbel, anneal: 20}", "precision": "64-true"},
            id="cooled",
        ),
        pytest.param({"precision": "bf16-mixed"}, id="bf16"),
        pytest.param({"layers__layer__modules": "{}"}, id="dense"),
        pytest.param({"layers__layer__norm": "{kind: batch_norm, place: pre}"}, id="batch-norm"),
    ],
)
def test_recorded_updates_equal_eager_ones(
    data: TaskData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tapes: list[TapeRecorder],
    settings: dict[str, Any],
) -> None:
    spec = tiny(training__graph="true", **settings)
    eager = _trained(spec, tmp_path / "eager", data, monkeypatch, graphs=0)
    recorded = _trained(spec, tmp_path / "recorded", data, monkeypatch)
    assert [tape.recordings > 0 for tape in tapes] == [False, True]
    assert tapes[1].replays >= 9
    assert tapes[1].asked <= {"_local_scalar_dense"}  # on a CPU, the check for NaN reads the loss
    mine, theirs = (checkpoint(tmp_path / name) for name in ("recorded", "eager"))
    assert all(same(mine[part], theirs[part]) for part in PARTS)
    assert metrics_of(tmp_path / "recorded") == metrics_of(tmp_path / "eager")
    assert recorded.summary["test_loss"] == eager.summary["test_loss"]
    assert mine["global_step"] == 30


def test_own_update_equals_that_of_lightning(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tapes: list[TapeRecorder]
) -> None:
    monkeypatch.setattr(batches, "LENGTHS", 10**6)  # no padding
    own = _trained(tiny(training__graph="true", training__capacity=1.0), tmp_path / "own", data, monkeypatch, graphs=0)
    lightnings = train(tiny(training__capacity=1.0), tmp_path / "lightnings", data)
    for name, weight in own.module.state_dict().items():
        # Learning rates are rounded to float32 for a graph.
        torch.testing.assert_close(weight, lightnings.module.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("update", [3, 14, 27])
def test_a_run_resumes_to_the_same_weights(
    data: TaskData, tmp_path: Path, tapes: list[TapeRecorder], update: int
) -> None:
    spec = tiny(training__graph="true", training__capacity=0.5, training__evaluate_every=7)
    train(spec, tmp_path / "whole", data)
    with power_failure(update):
        train(spec, tmp_path / "parts", data)
    train(spec, tmp_path / "parts", data, resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert same(*(checkpoint(tmp_path / name)["overflow"] for name in ("parts", "whole")))


def test_a_diverged_update_ends_the_run(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tapes: list[TapeRecorder]
) -> None:
    original = Classifier.compute

    def compute(self: Classifier, batch: Any, capacity: Any) -> Any:
        loss, measures = original(self, batch, capacity)
        bad = torch.where(self.controller.updates > 12, torch.nan, 1.0)  # type: ignore[union-attr]
        return loss * bad, measures._replace(loss=measures.loss * bad)

    monkeypatch.setattr(Classifier, "compute", compute)
    with pytest.raises(DataError, match="the loss of update 12 is nan; the last checkpoint is still good"):
        train(tiny(training__graph="true", training__budget="{target: 1.0}"), tmp_path, data)
    assert checkpoint(tmp_path)["global_step"] == 10
    assert tapes[0].replays


class _Point(NamedTuple):
    x: Tensor
    y: Tensor
    name: str = "a"


def _line(seed: int = 0) -> tuple[nn.Linear, Update]:
    torch.manual_seed(seed)
    line = nn.Linear(3, 1)

    def compute(batch: _Point, capacity: Any) -> tuple[Tensor, dict[str, Tensor]]:
        missed = (line(batch.x)[:, 0] - batch.y).abs()
        return missed.square().mean() * (1 if capacity is None else capacity), {"largest": missed.max()}

    return line, Update(compute, torch.optim.Adam(line.parameters(), lr=0.1), clip_norm=1.0)


def _points(count: int) -> list[_Point]:
    """Batches of four points; every fifth batch has three."""
    draws = torch.Generator().manual_seed(1)
    rows = [3 if number % 5 == 4 else 4 for number in range(count)]
    return [_Point(torch.randn(row, 3, generator=draws), torch.randn(row, generator=draws)) for row in rows]


def test_batches_of_another_shape_run_eagerly(tapes: list[TapeRecorder]) -> None:
    (mine, update), (theirs, eager) = _line(), _line()
    graph.make_capturable(eager.optimizer)
    step = Graphed(update, warm_up=3)
    for number, batch in enumerate(_points(19)):
        for optimizer in (update.optimizer, eager.optimizer):  # as a schedule does
            optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + number))
        found, wanted = step(batch), eager(batch)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1]["largest"], wanted[1]["largest"])
        assert not found[0].requires_grad
        assert not found[1]["largest"].requires_grad
        assert torch.equal(mine.weight, theirs.weight)
    assert (tapes[0].recordings, tapes[0].replays) == (1, 13)  # 16 batches of four points, 3 of them warm-up


def test_every_shape_and_constant_has_a_graph_until_the_capacity_changes(tapes: list[TapeRecorder]) -> None:
    step = Graphed(_line()[1], warm_up=1)
    batch, small, *_ = _points(6)[3:]
    for each in (batch, small, batch._replace(name="b")):
        step(each)
        step(each)
    assert tapes[0].recordings == 3
    step(batch)
    assert tapes[0].recordings == 3
    for _ in range(3):
        step(batch, cast(Any, 2.0))
    assert (tapes[0].recordings, tapes[0].replays) == (4, 6)


def test_step_counts_on_the_host_move_to_the_device(tapes: list[TapeRecorder]) -> None:
    (mine, update), (theirs, eager) = _line(), _line()
    first, *rest = _points(4)
    for each in (update, eager):
        each(first)  # the optimiser has run before
    graph.make_capturable(eager.optimizer)
    step = Graphed(update, warm_up=1)
    assert all(isinstance(state["step"], Tensor) for state in update.optimizer.state.values())
    for batch in rest:
        assert torch.equal(step(batch)[0], eager(batch)[0])
    assert torch.equal(mine.weight, theirs.weight)


def test_parameters_on_another_device_are_refused() -> None:
    with pytest.raises(SpecError, match="the parameters of an update as a graph are on cpu; move the model to a CUDA"):
        Graphed(_line()[1])


def test_error_states_why_an_update_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, tapes: list[TapeRecorder]
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    step = Graphed(_line()[1], warm_up=1)
    monkeypatch.setattr(TapeRecorder, "record", refuse)
    batch = _points(1)[0]
    step(batch)
    with pytest.raises(
        SpecError,
        match="the update cannot be captured in a CUDA graph: operation not permitted when stream is capturing; "
        r"set training\.graph=false",
    ):
        step(batch)


def test_batches_of_a_graph_have_few_lengths(data: TaskData) -> None:
    objective = Classification(tiny().task, data)
    padded = list(objective.training_batches(tiny(training__graph="true").training, 0))
    plain = list(objective.training_batches(tiny().training, 0))
    longest = objective.longest_row
    assert len({batch.inputs.shape[1] for batch in padded}) <= batches.LENGTHS
    for mine, theirs in zip(padded, plain, strict=True):
        length = theirs.inputs.shape[1]
        assert length <= mine.inputs.shape[1] <= min(longest, length + -(-longest // batches.LENGTHS))
        assert torch.equal(mine.inputs[:, :length], theirs.inputs)
        assert torch.equal(mine.valid[:, :length], theirs.valid)
        assert not mine.valid[:, length:].any()
        assert torch.equal(mine.targets, theirs.targets)


def test_scored_positions_and_features_are_padded() -> None:
    def collate(items: Any) -> batches.Batch:
        return batches.Batch(torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5).long())

    inputs, valid, targets = batches.Padded(collate, 60)([])
    assert (inputs.shape, valid.shape, targets.shape) == ((2, 8, 3), (2, 8), (2, 8))
    assert valid.sum() == 10
    assert not inputs[:, 5:].any()
    assert (targets[:, 5:] == batches.UNSCORED).all()


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cpu", 1, "training.graph=true needs a CUDA device, and the training runs on cpu; set training.graph=false"),
        ("mps", 1, "training.graph=true needs a CUDA device, and the training runs on mps; set training.graph=false"),
        ("cuda", 2, "training.graph=true runs in one process, and 2 share the updates; set training.graph=false"),
    ],
)
def test_graphs_need_one_process_with_a_cuda_device(device: str, processes: int, message: str) -> None:
    with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
        check_graph(tiny(training__graph="true").training, device, processes)
    check_graph(tiny().training, device, processes)


def test_a_graph_without_a_cuda_device_is_refused_before_the_run_starts(data: TaskData, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"training\.graph=true needs a CUDA device"):
        train(tiny(training__graph="true"), tmp_path / "run", data)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"training__graph": "true", "training__recompute": "true"},
            "graph=true cannot capture activation checkpointing; set recompute=false or graph=false",
            id="recompute",
        ),
        pytest.param(
            {"training__graph": "true", "precision": "16-mixed"},
            "training.graph=true cannot capture the loss scaling of precision=16-mixed; set precision=bf16-mixed",
            id="scaling",
        ),
        pytest.param({"training__capacity": 0}, "capacity=0 must be greater than 0.0", id="nothing"),
    ],
)
def test_invalid_graph_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        tiny(**settings)


def test_a_module_that_reads_its_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, original = tiny().model, GAU.forward
    check_capturable(spec, {"attention": PerBatch(0.5)})

    def forward(self: GAU, tokens: Ragged, state: Any = None) -> Any:
        return original(self, tokens.with_values(tokens.values / tokens.values.sum().item()), state)

    monkeypatch.setattr(GAU, "forward", forward)
    with pytest.raises(
        SpecError,
        match=r"because a router or a sub-module reads a value or a size from its device: .*; set training\.gr",
    ):
        check_capturable(spec, {"attention": PerBatch(0.5)})


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"training__budget": BUDGET}, {"precision": "bf16-mixed"}])
def test_graphs_equal_eager_updates_on_a_gpu(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(batches, "LENGTHS", 1)
    losses = {}
    for name, graphs in (("eager", 0), ("graph", 16)):
        monkeypatch.setattr(graph, "MAX_GRAPHS", graphs)
        train(tiny(training__graph="true", **settings), tmp_path / name, data, accelerator="cuda")
        losses[name] = [float(line["loss"]) for (_, kind), line in metrics_of(tmp_path / name).items() if kind == "fit"]
    assert losses["graph"] == pytest.approx(losses["eager"], rel=1e-5)
    one, other = (checkpoint(tmp_path / name)["state_dict"] for name in ("eager", "graph"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
def test_replays_equal_eager_updates_on_a_gpu() -> None:
    (mine, update), (theirs, eager) = _line(), _line()
    for line in (mine, theirs):
        line.cuda()
    graph.make_capturable(eager.optimizer)
    step = Graphed(update)
    for batch in _points(30):
        on_device = _Point(batch.x.cuda(), batch.y.cuda())
        torch.testing.assert_close(step(on_device)[0], eager(on_device)[0])
    torch.testing.assert_close(mine.weight, theirs.weight)
