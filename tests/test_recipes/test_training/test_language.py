"""Language modelling: bytes of a segment, scored positions, and resumed runs that equal uninterrupted ones."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import sma
from sma.errors import DataError, SpecError
from sma.pytree import named_tensors
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.run_folder import LAST
from sma.recipes.reports.language import read_along
from sma.recipes.tasks.language.corpus import load_text
from sma.recipes.tasks.language.task import LanguageTask
from sma.recipes.training.distributed import DistributedContext, unshard
from sma.recipes.training.language import EvaluationSegments, LanguageModule, TrainingSegments
from sma.recipes.training.run import Finished, run_experiment
from tests.tape import TapeRecorder
from tests.test_recipes.tiny import checkpoint, power_failure, same

pytestmark = pytest.mark.slow  # real trainings

MODEL = {
    "kind": "language_model",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 256, "scaled": True},
    "layers": {
        "repeat": 2,
        "layer": {
            "backbone": {"kind": "ema", "state_size": 4, "bidirectional": False},
            "modules": {
                "attention": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 8, "bidirectional": False}
            },
            "norm": {"kind": "layer_norm"},
            "dropout": 0.1,
        },
    },
}
TRAINING = {"updates": 30, "batch_size": 3, "learning_rate": 0.01, "warmup": 5, "evaluate_every": 10}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    return path


def experiment(text: Path, *settings: str) -> ExperimentSpec:
    task = {"kind": "language", "data": {"file": str(text)}, "segment": 16, "window": 50, "carry_state": True}
    return load_experiment({"task": task, "model": MODEL, "training": TRAINING}, settings)


def train(spec: ExperimentSpec, out: Path, resume: bool = False) -> Finished:
    return run_experiment(spec, out, spec.task.prepare(out), accelerator="cpu", progress=False, resume=resume)


@given(length=st.integers(2, 60), window=st.integers(1, 30), context=st.none() | st.integers(0, 29))
def test_every_byte_but_the_first_is_scored_once_given_its_predecessor(
    length: int, window: int, context: int | None
) -> None:
    if context is not None and context >= window:
        context = window - 1
    text = torch.randperm(250, generator=torch.Generator().manual_seed(length))[:length].to(torch.uint8)
    segments = EvaluationSegments(text, LanguageTask(window=window, context=context))
    scored = []
    for number in range(len(segments)):
        part = segments[number]
        assert part.inputs.shape[1] <= window
        assert part.fresh is (number == 0 or context is not None)
        if context is not None and number:
            assert int((~part.scored).sum()) == context
        scored += part.targets[part.scored].tolist()
        for before, after in zip(part.inputs[0].tolist(), part.targets[0].tolist(), strict=True):
            place = text.tolist().index(before)
            assert int(text[place + 1]) == after
    assert scored == text[1:].tolist()


@given(length=st.integers(30, 90), rows=st.integers(1, 4), size=st.integers(1, 9))
def test_carried_segments_continue_the_previous_ones(length: int, rows: int, size: int) -> None:
    text = torch.arange(length, dtype=torch.uint8)
    task = LanguageTask(segment=size, carry_state=True)
    segments = TrainingSegments(text, task, experiment_training(rows), seed=3)
    fresh = 0
    for update in range(2 * segments.per_pass + 1):
        part = segments[update]
        assert part.inputs.shape == (rows, size)
        assert torch.equal(part.targets, (part.inputs + 1) % length)
        if update and not part.fresh:
            assert torch.equal(part.inputs[:, 0], segments[update - 1].targets[:, -1])
        fresh += part.fresh
    assert fresh == 3


def experiment_training(rows: int) -> Any:
    return load_experiment(
        {"task": {"kind": "language"}, "model": MODEL, "training": {**TRAINING, "batch_size": rows}}
    ).training


def test_one_pass_of_carried_segments_reads_no_byte_twice() -> None:
    segments = TrainingSegments(
        torch.arange(96, dtype=torch.uint8), LanguageTask(segment=8, carry_state=True), experiment_training(4), seed=0
    )
    seen = torch.cat([segments[update].inputs.flatten() for update in range(segments.per_pass)])
    assert sorted(seen.tolist()) == list(range(96))


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_the_workers_read_the_rows_of_one_process(size: int, carry: bool) -> None:
    text, task, training = (
        torch.arange(90, dtype=torch.uint8),
        LanguageTask(segment=4, carry_state=carry),
        experiment_training(6),
    )
    alone = TrainingSegments(text, task, training, seed=3)
    ranks = [TrainingSegments(text, task, training, 3, DistributedContext(rank, size)) for rank in range(size)]
    for update in range(alone.per_pass + 2):
        wanted, parts = alone[update], [part[update] for part in ranks]
        assert {part.fresh for part in parts} == {wanted.fresh}
        assert all(part.scored.shape == part.inputs.shape for part in parts)
        for row in range(6):
            assert torch.equal(parts[row % size].inputs[row // size], wanted.inputs[row])
            assert torch.equal(parts[row % size].targets[row // size], wanted.targets[row])


def test_rows_that_workers_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(SpecError, match=r"a batch of 4 samples cannot be shared evenly by 3 workers; .* such as 6"):
        TrainingSegments(
            torch.arange(90, dtype=torch.uint8), LanguageTask(), experiment_training(4), 0, DistributedContext(0, 3)
        )


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("modules.attention.window=8", id="window"),
        pytest.param("modules.attention.window=null", id="growing"),  # the lengths of the states differ between ranks
        pytest.param("router={kind: random, rate: 0.5}", id="drawing"),  # draws depend on the index of the row
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_carried_states_of_all_ranks_are_saved_like_those_of_one_process(
    text: Path, size: int, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = experiment(text, "training.batch_size=6", f"model.layers.layer.{setting}")
    corpus, model = load_text(spec.task.data), sma.build(spec.model, seed=0).double().eval()  # type: ignore[attr-defined]
    alone = LanguageModule(model, spec.training, carry_state=True)  # type: ignore[arg-type]
    ranks = [LanguageModule(model, spec.training, True, DistributedContext(rank, size)) for rank in range(size)]  # type: ignore[arg-type]

    def read(module: LanguageModule, update: int) -> torch.Tensor:
        segment = TrainingSegments(corpus.train, spec.task, spec.training, 0, module.distributed)[update]  # type: ignore[arg-type]
        output, losses, _ = module._run(segment, module.carried)
        module.carried = output.state
        return losses.detach()

    for module in (alone, *ranks):
        module.carried = module._own(model.init_state(6))
        read(module, 0)
    saved: dict[str, Any] = {}
    alone.on_save_checkpoint(saved)
    monkeypatch.setattr(
        "sma.recipes.training.language.all_gather_object",
        lambda own: [named_tensors(module.carried) for module in ranks],
    )
    for module in ranks:
        found: dict[str, Any] = {}
        module.on_save_checkpoint(found)
        torch.testing.assert_close(found, saved, rtol=0, atol=1e-12)
    for module in (alone, *ranks):
        module.carried = None
        module.on_load_checkpoint(saved)
    wanted = read(alone, 1)
    torch.testing.assert_close(unshard([read(module, 1) for module in ranks]), wanted, rtol=0, atol=1e-12)


def test_streamed_evaluation_equals_the_loss_of_the_whole_text(text: Path, tmp_path: Path) -> None:
    spec = experiment(text, "training.updates=6")
    finished = train(spec, tmp_path)
    model = sma.load(tmp_path / "model")
    test = load_text(spec.task.data).test.long()[None]  # type: ignore[attr-defined]
    logits = model(test[:, :-1]).logits
    assert logits is not None
    bits = float(torch.nn.functional.cross_entropy(logits[0].detach(), test[0, 1:])) / math.log(2)
    assert finished.summary["bits_per_character"] == pytest.approx(bits, abs=1e-4)
    assert finished.summary == json.loads((tmp_path / "summary.json").read_text())
    assert {"marks", "activation_rate", "seconds", "seed", "commit", "sha256"} <= set(finished.summary)


def test_training_learns(text: Path, tmp_path: Path) -> None:
    bits = train(experiment(text, "training.updates=150"), tmp_path).summary["bits_per_character"]
    assert bits < 3  # frequencies of letters alone give about 4.4


def test_carried_state_gives_the_losses_of_the_joined_segments(text: Path) -> None:
    spec = experiment(text)
    corpus = load_text(spec.task.data)  # type: ignore[attr-defined]
    model = sma.build(spec.model, seed=0).eval()
    module = LanguageModule(model, spec.training, carry_state=True)  # type: ignore[arg-type]
    segments = TrainingSegments(corpus.train, spec.task, spec.training, 0)  # type: ignore[arg-type]
    first, second = segments[0], segments[1]
    _, losses, _ = module._run(first, model.init_state(3))
    output = model(first.inputs, state=model.init_state(3))
    assert output.state is not None
    _, carried, _ = module._run(second, output.state.detach())
    whole = model(torch.cat([first.inputs, second.inputs], 1)).logits
    assert whole is not None
    wanted = torch.nn.functional.cross_entropy(whole[:, 16:].flatten(0, 1), second.targets.flatten(), reduction="none")
    torch.testing.assert_close(carried.flatten(), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(losses.mean(), carried.mean())


def test_gradient_of_a_segment_stops_at_its_beginning(text: Path) -> None:
    spec = experiment(text)
    corpus = load_text(spec.task.data)  # type: ignore[attr-defined]
    segments = TrainingSegments(corpus.train, spec.task, spec.training, 0)  # type: ignore[arg-type]
    module = LanguageModule(sma.build(spec.model, seed=0), spec.training, carry_state=True)  # type: ignore[arg-type]
    output, _, _ = module._run(segments[0], module.model.init_state(3))
    assert any(value.requires_grad for value in tree_leaves(output.state))
    module.compute(segments[0], None)
    assert not any(value.requires_grad for value in tree_leaves(module.carried))
    loss, _ = module.compute(segments[1], None)
    loss.backward()  # fails where the graph of the first segment is needed


def test_a_run_resumes_only_with_its_own_text(text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "book.txt"
    mine.write_bytes(text.read_bytes())
    with power_failure(14, LanguageModule):
        train(experiment(mine), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    mine.write_bytes(text.read_bytes().replace(b"fox", b"cat"))
    with pytest.raises(
        DataError,
        match=r"the data differs from that with which the run in '.*run' began: .* another hash; restore the original",
    ):
        train(experiment(mine), tmp_path / "run", resume=True)
    mine.write_bytes(text.read_bytes())
    assert train(experiment(mine), tmp_path / "run", resume=True).summary["data"] == recorded


@pytest.mark.parametrize("update", [7, 14, 25])
def test_a_resumed_run_equals_the_uninterrupted_one(text: Path, tmp_path: Path, update: int) -> None:
    spec = experiment(text, "training.evaluate_every=5")
    whole = train(spec, tmp_path / "whole")
    with power_failure(update, LanguageModule):
        train(spec, tmp_path / "parts")
    assert (tmp_path / "parts" / LAST).is_file()
    parts = train(spec, tmp_path / "parts", resume=True)
    ours, theirs = parts.module.model.state_dict(), whole.module.model.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert parts.summary["bits_per_character"] == whole.summary["bits_per_character"]


def test_read_along_records_activity_and_bits_of_every_byte(text: Path, tmp_path: Path) -> None:
    finished = train(experiment(text, "training.updates=6"), tmp_path)
    sample = load_text(experiment(text).task.data).test[:40]  # type: ignore[attr-defined]
    reading = read_along(finished.module.model, sample)  # type: ignore[arg-type]
    assert reading.text == bytes(sample.tolist())
    assert reading.active.shape == (2, 40)
    assert reading.bits[0] == 0
    assert (reading.bits[1:] > 0).all()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["task.context=50"], r"context=50 must be below window=50; else no byte is scored"),
        (["model.encoder.vocabulary=99"], r"model.encoder.vocabulary=99 must be at least 256: one for every byte"),
        (
            ["model.layers.layer.backbone.bidirectional=true"],
            r"layer 0 'backbone' sees the token that is to be predicted",
        ),
        (["task.segment=0"], r"segment"),
    ],
)
def test_invalid_experiments_are_refused(text: Path, settings: list[str], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        experiment(text, *settings)


def test_another_kind_of_model_is_refused() -> None:
    model = {key: value for key, value in MODEL.items() if key != "kind"} | {"kind": "sequence_encoder"}
    with pytest.raises(
        SpecError, match="the model kind 'sequence_encoder' does not score the next token; use kind 'language_model'"
    ):
        load_experiment({"task": {"kind": "language"}, "model": model, "training": TRAINING})


def test_recorded_updates_equal_eager_ones(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tapes: list[TapeRecorder]
) -> None:
    spec = experiment(text, "task.carry_state=false", "training.graph=true", "training.optimizer=radam")
    for name, graphs in (("eager", 0), ("recorded", 16)):
        monkeypatch.setattr("sma.recipes.training.graph.MAX_GRAPHS", graphs)
        train(spec, tmp_path / name)
    assert [tape.replays for tape in tapes] == [0, 27]
    eager, recorded = (checkpoint(tmp_path / name) for name in ("eager", "recorded"))
    assert all(same(eager[part], recorded[part]) for part in ("state_dict", "optimizer_states", "fit_scores"))


@pytest.mark.parametrize("setting", ["graph=true", "capacity=1.5"])
def test_a_carried_state_excludes_limits_on_active_tokens(text: Path, setting: str) -> None:
    message = f"training.{setting} limits the active tokens of a batch, and the task 'language' carries a state from"
    with pytest.raises(SpecError, match=re.escape(message)):
        experiment(text, f"training.{setting}")
