"""Associative recall: samples, scored positions, and five variants that differ only in router and budget."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import SpecError
from sma.model import build
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.recall import main
from sma.recipes.reports.classification import ClassificationReport, measure_activation
from sma.recipes.studies.recall import RATES, VARIANTS, Recall
from sma.recipes.studies.variants import with_routers
from sma.recipes.tasks.batch import UNSCORED, Batch, select_scored
from sma.recipes.tasks.recall import RecallSettings, collate, make_recall, show
from sma.recipes.training.run import run_experiment
from sma.routers import AlwaysRouterSpec
from sma.spec import dump_spec
from tests.streams import exactly

TINY = {
    "task": {
        "kind": "recall",
        "data": {
            "length": 16,
            "queries_from": 10,
            "pairs": 2,
            "keys": 3,
            "values": 3,
            "distractors": 2,
            "train": 40,
            "validation": 8,
            "test": 12,
        },
    },
    "model": {
        "kind": "language_model",
        "width": 8,
        "encoder": {"kind": "token_embedding", "vocabulary": 8, "scaled": True},
        "layers": [
            {
                "backbone": {"kind": "ema", "state_size": 4, "bidirectional": False},
                "modules": {
                    "attention": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 8, "bidirectional": False}
                },
            }
        ],
    },
    "training": {
        "updates": 6,
        "batch_size": 4,
        "learning_rate": 0.01,
        "evaluate_every": 3,
        "budget": {"target": 0.4, "anneal": 2, "speed": 0.5},
    },
}


@st.composite
def settings(draw):
    pairs = draw(st.integers(1, 5))
    start = draw(st.integers(2 * pairs, 2 * pairs + 12))
    return RecallSettings(
        length=draw(st.integers(max(4, start + pairs), start + pairs + 9)),
        queries_from=start,
        pairs=pairs,
        keys=draw(st.integers(pairs, 9)),
        values=draw(st.integers(2, 6)),
        distractors=draw(st.integers(1, 4)),
        train=3,
        validation=2,
        test=2,
        seed=draw(st.integers(0, 9)),
    )


@given(chosen=settings())
def test_target_of_every_query_is_the_value_that_followed_its_key(chosen):
    made = make_recall(chosen)
    for split in (made.train, made.validation, made.test):
        for number in range(len(split)):
            ids, targets = split[number]
            texts = show(chosen, ids)
            told = {texts[place]: texts[place + 1] for place in range(chosen.queries_from) if texts[place][0] == "k"}
            assert len(told) == chosen.pairs  # the keys of a sample differ
            assert all(value[0] == "v" for value in told.values())
            assert sum(text[0] == "v" for text in texts) == chosen.pairs
            asked_for = {text for text in texts if text[0] == "?"}
            assert {f"k{text[1:]}" for text in asked_for} == set(told)
            for place, text in enumerate(texts):
                if text[0] == "?":
                    assert place >= chosen.queries_from
                    assert f"v{int(targets[place])}" == told[f"k{text[1:]}"]
                else:
                    assert targets[place] == UNSCORED


def test_positions_of_the_pairs_are_uniform():
    chosen = RecallSettings(
        length=12, queries_from=8, pairs=2, keys=2, values=2, distractors=1, train=6000, validation=1, test=1
    )
    ids = make_recall(chosen).train.ids[:, :8].long()
    starts = (ids >= 2) & (ids < 4)
    ways, counts = starts.int().unique(dim=0, return_counts=True)
    assert len(ways) == 15  # two pairs at eight positions: 6 choose 2
    assert counts.min() > 400 - 5 * 20


def test_splits_of_one_seed_are_fixed_and_those_of_another_differ():
    small = RecallSettings(train=50, validation=20, test=20)
    again, larger, other = make_recall(small), make_recall(small.replace(train=60)), make_recall(small.replace(seed=1))
    assert make_recall(small).hashes == again.hashes
    assert larger.hashes["test"] == again.hashes["test"]
    assert all(other.hashes[name] != again.hashes[name] for name in again.hashes)
    assert len(set(again.hashes.values())) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({"pairs": 40}, "pairs=40 must be at most keys=32; the keys of a sample differ", id="keys"),
        pytest.param(
            {"queries_from": 14},
            "pairs=8 do not fit: they require 16 of the first queries_from=14 tokens, "
            "and their queries 8 of the other 114",
            id="pairs",
        ),
        pytest.param({"queries_from": 121}, "and their queries 8 of the other 7", id="queries"),
    ],
)
def test_settings_that_no_sample_can_satisfy_are_refused(changes, sentence):
    with pytest.raises(SpecError, match=re.escape(sentence)):
        RecallSettings(**changes)


def test_select_scored_keeps_only_scored_positions():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[UNSCORED, 4, UNSCORED], [0, UNSCORED, 2]])
    found, wanted = select_scored(logits, targets)
    assert wanted.tolist() == [4, 0, 2]
    assert torch.equal(found, torch.stack([logits[0, 1], logits[1, 0], logits[1, 2]]))


def test_select_scored_keeps_one_answer_per_row_unchanged():
    logits, targets = torch.randn(3, 5), torch.tensor([4, 0, 2])
    found, wanted = select_scored(logits, targets)
    assert torch.equal(found, logits)
    assert torch.equal(wanted, targets)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        pytest.param(
            "encoder.vocabulary=9",
            "model.encoder.vocabulary=9 must be 8: values, keys and distractors of the task",
            id="vocabulary",
        ),
        pytest.param(
            "model={kind: sequence_encoder, width: 8, encoder: {kind: token_embedding, vocabulary: 8}, layers: []}",
            "the model kind 'sequence_encoder' does not score every position; use kind 'language_model'",
            id="kind",
        ),
    ],
)
def test_unsuitable_model_is_refused(setting, sentence):
    with pytest.raises(SpecError, match=exactly(f"ExperimentSpec: {sentence}")):
        load_experiment(TINY, [setting])


def test_variants_differ_only_in_router_and_budget():
    spec = load_experiment(TINY)
    variants = Recall().variants(spec)
    assert tuple(variants) == VARIANTS
    for name, variant in variants.items():
        made = variant if isinstance(variant, ExperimentSpec) else variant.make([0.25])
        kind = "sma" if name == "seqboat" else name
        assert [layer.router.kind for layer in made.model.layer_specs] == [kind]
        assert (made.training.budget is None) == (name != "seqboat")
        same = with_routers(made, AlwaysRouterSpec()).replace(training=spec.training)
        assert dump_spec(same) == dump_spec(with_routers(spec, AlwaysRouterSpec()).replace(training=spec.training))


def test_rates_by_role_equal_a_loop_over_tokens():
    spec = load_experiment(TINY)
    data = spec.task.prepare(None, progress=False)
    model = build(spec.model, seed=0).eval()
    report = measure_activation(model, data.test, data)
    ran = {"key": [], "value": [], "query": [], "distractor": []}
    roles = {"k": "key", "v": "value", "?": "query", "·": "distractor"}
    for number in range(len(data.test)):
        ids, _ = data.test[number]
        with torch.no_grad():
            active = model(ids[None]).decisions[0].active[0, :, 0].tolist()
        for text, mine in zip(data.show(ids), active, strict=True):
            ran[roles[text[0]]].append(mine)
    for role, rates in report.rates_by_role.items():
        assert rates == pytest.approx([sum(ran[role]) / len(ran[role])])


def test_examples_count_the_correctly_answered_queries():
    spec = load_experiment(TINY)
    data = spec.task.prepare(None, progress=False)
    model = build(spec.model, seed=0).eval()
    examples = measure_activation(model, data.test, data, shown=2).examples
    samples = {" ".join(data.show(data.test[number][0])): data.test[number] for number in range(len(data.test))}
    assert examples
    for example in examples:
        ids, targets = samples[" ".join(example.texts)]
        with torch.no_grad():
            guesses = model(ids[None]).logits[0].argmax(-1)
        scored = targets != UNSCORED
        assert example.target == int(scored.sum())
        assert example.guess == int((guesses == targets)[scored].sum())


def test_accuracy_of_a_run_is_the_share_of_correctly_answered_queries(tmp_path):
    spec = load_experiment(TINY, ["training.updates=3"])
    data = spec.task.prepare(tmp_path, progress=False)
    finished = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False)
    batch = collate([data.test[number] for number in range(len(data.test))])
    with torch.no_grad():
        guesses = finished.module.model.eval()(batch.inputs).logits.argmax(-1)
    scored = batch.targets != UNSCORED
    assert finished.summary["test_accuracy"] == pytest.approx(float((guesses == batch.targets)[scored].float().mean()))
    assert finished.summary["chance"] == pytest.approx(1 / 3)


def test_command_trains_the_requested_variants(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["--spec", str(path), "--arms", "seqboat,never,random", "--out", str(out), "--no-progress"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    rows = {row["variant"]: row for row in summary["rows"]}
    assert list(rows) == ["seqboat", "never", "random"]
    assert rows["never"]["activation_rate"] == 0
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert (out / "comparison.png").stat().st_size > 10_000
    assert (out / "recall.png").stat().st_size > 10_000
    assert [point["asked"] for point in summary["calibrated"]] == list(RATES)
    assert "seqboat: tokens that run attention\n  key" in capsys.readouterr().out


def test_error_for_an_unknown_variant_suggests_a_near_one(capsys):
    assert main(["--arms", "seqbot"]) == 2
    assert "unknown variant 'seqbot'; did you mean 'seqboat'?" in capsys.readouterr().err


def test_a_batch_is_not_padded():
    data = make_recall(RecallSettings(train=4, validation=1, test=1))
    batch = collate([data.train[number] for number in range(4)])
    assert isinstance(batch, Batch)
    assert batch.valid.all()
    assert torch.equal(batch.inputs, data.train.ids.long())


def test_report_without_routed_layers_has_no_roles():
    assert ClassificationReport(0.1, 3, {}, [], roles={"k": "key"}).rates_by_role == {}
