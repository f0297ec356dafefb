"""Multi-query associative recall: distribution of samples, scored positions, and rejected settings."""

import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.__main__ import main
from sma.errors import DataError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.tasks.batch import UNSCORED
from sma.recipes.tasks.mqar import ROLES, MQARDataset, MQARSettings, MQARTask, draw, make_mqar, show
from sma.recipes.training.run import run_experiment
from tests.streams import exactly

TINY = {
    "task": {
        "kind": "mqar",
        "data": {"length": 16, "pairs": 2, "vocabulary": 12, "train": 40, "validation": 8, "test": 12},
    },
    "model": {
        "kind": "language_model",
        "width": 8,
        "encoder": {"kind": "token_embedding", "vocabulary": 12, "scaled": True},
        "layers": [
            {
                "backbone": {"kind": "ema", "state_size": 4, "bidirectional": False},
                "modules": {
                    "attention": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 8, "bidirectional": False}
                },
            }
        ],
    },
    "training": {"updates": 3, "batch_size": 4, "learning_rate": 0.01, "evaluate_every": 3},
}


@st.composite
def settings(draw):
    pairs = draw(st.integers(1, 6))
    return MQARSettings(
        length=draw(st.integers(max(4, 4 * pairs), 4 * pairs + 21)),
        pairs=pairs,
        vocabulary=draw(st.integers(2 * pairs + 2, 40)),
        filler=draw(st.sampled_from(["zero", "random"])),
        power=draw(st.sampled_from([0.0, 0.01, 1.0, 3.0])),
        train=5,
        validation=2,
        test=3,
        seed=draw(st.integers(0, 9)),
    )


def check_sample(chosen, ids, targets):
    """Check a sample token by token."""
    half = chosen.vocabulary // 2
    assert len(ids) == len(targets) == chosen.length
    told = {}
    for pair in range(chosen.pairs):
        key, value = ids[2 * pair], ids[2 * pair + 1]
        assert 1 <= key < half
        assert half <= value < chosen.vocabulary
        assert key not in told
        told[key] = value
    assert len(set(told.values())) == chosen.pairs
    asked = []
    for place, (token, target) in enumerate(zip(ids, targets, strict=True)):
        if target == UNSCORED:
            assert place < 2 * chosen.pairs or chosen.filler == "random" or token == 0
            assert 0 <= token < chosen.vocabulary
            continue
        assert place >= 2 * chosen.pairs
        assert (place - 2 * chosen.pairs) % 2 == 0
        assert target == told[token]
        asked.append(token)
    assert sorted(asked) == sorted(told)


@given(chosen=settings())
def test_every_row_queries_every_key_once_and_the_target_is_its_value(chosen):
    made = make_mqar(chosen)
    assert [len(made.train), len(made.validation), len(made.test)] == [5, 2, 3]
    for split in (made.train, made.validation, made.test):
        for number in range(len(split)):
            ids, targets = split[number]
            check_sample(chosen, ids.tolist(), targets.tolist())


@given(chosen=settings())
def test_a_sample_does_not_depend_on_the_others_of_its_batch(chosen):
    split = MQARDataset(chosen, 1, 9)
    together = split.__getitems__([7, 2, 2, 0])
    for (ids, targets), number in zip(together, [7, 2, 2, 0], strict=True):
        alone_ids, alone_targets = split[number]
        assert torch.equal(ids, alone_ids)
        assert torch.equal(targets, alone_targets)
    assert torch.equal(split[-1][0], split[8][0])
    with pytest.raises(IndexError, match="out of range"):
        split[9]


@given(chosen=settings(), seed=st.integers(0, 99))
def test_an_answer_occurs_only_in_its_pair(chosen, seed):
    drawn = draw(chosen.replace(filler="zero", seed=seed), 0, torch.arange(4))
    hidden = drawn.ids.clone()
    hidden[:, 1 : 2 * chosen.pairs : 2] = 0
    for row, answers in zip(hidden.tolist(), drawn.answers.tolist(), strict=True):
        assert not {*row} & {*answers}


def law_of_gaps(gaps, pairs, power):
    """Probability of every ordered choice of distinct gaps, each drawn in proportion to the remaining weights."""
    weights = [(gap + 1) ** (power - 1) for gap in range(gaps)]
    found = {}

    def choose(chosen, probability):
        if len(chosen) == pairs:
            found[chosen] = probability
            return
        left = sum(weight for gap, weight in enumerate(weights) if gap not in chosen)
        for gap, weight in enumerate(weights):
            if gap not in chosen:
                choose((*chosen, gap), probability * weight / left)

    choose((), 1.0)
    return found


@pytest.mark.parametrize("power", [0.01, 1.0, 2.5])
def test_gaps_are_drawn_without_replacement_in_proportion_to_the_power_law(power):
    chosen = MQARSettings(length=16, pairs=3, vocabulary=20, power=power)
    rows = 20_000
    gaps = (draw(chosen, 0, torch.arange(rows)).queries - 6) // 2
    drawn, counts = gaps.unique(dim=0, return_counts=True)
    counted = {tuple(row): count for row, count in zip(drawn.tolist(), counts.tolist(), strict=True)}
    expected = law_of_gaps(5, 3, power)
    assert {*counted} <= {*expected}
    for choice, probability in expected.items():
        deviation = math.sqrt(rows * probability * (1 - probability))
        assert abs(counted.get(choice, 0) - rows * probability) < 5 * deviation + 1


def test_keys_and_values_are_uniform_ordered_choices():
    rows = 12_000
    chosen = MQARSettings(length=8, pairs=2, vocabulary=8)  # keys 1 to 3, values 4 to 7
    drawn = draw(chosen, 0, torch.arange(rows))
    for tokens, ways in ((drawn.ids[:, [0, 2]], 6), (drawn.answers, 12)):
        found, counts = tokens.unique(dim=0, return_counts=True)
        assert len(found) == ways
        assert (counts - rows / ways).abs().max() < 5 * math.sqrt(rows / ways)
    apart = torch.cat([drawn.ids[:, :1], drawn.answers[:, :1]], 1).unique(dim=0, return_counts=True)[1]
    assert len(apart) == 12  # every key occurs with every value
    assert (apart - rows / 12).abs().max() < 5 * math.sqrt(rows / 12)


def test_random_filler_is_uniform_over_the_vocabulary():
    chosen = MQARSettings(length=24, pairs=1, vocabulary=6)
    drawn = draw(chosen, 0, torch.arange(2000))
    filler = drawn.ids[:, 2:][drawn.targets[:, 2:] == UNSCORED]
    assert len(filler) == 2000 * 21
    assert (filler.bincount(minlength=6) - len(filler) / 6).abs().max() < 5 * math.sqrt(len(filler) / 6)


def test_splits_are_fixed_by_the_seed_and_disjoint():
    small = MQARSettings(length=32, pairs=4, vocabulary=64, train=50, validation=50, test=50)
    made, larger, other = make_mqar(small), make_mqar(small.replace(train=60)), make_mqar(small.replace(seed=1))
    assert make_mqar(small).hashes == made.hashes
    assert larger.hashes["test"] == made.hashes["test"]
    assert larger.hashes["train"] != made.hashes["train"]
    assert not {*other.hashes.values()} & {*made.hashes.values()}
    rows = {tuple(split[n][0].tolist()) for split in (made.train, made.validation, made.test) for n in range(50)}
    assert len(rows) == 150


def test_hash_does_not_depend_on_the_block_size(monkeypatch):
    split = MQARDataset(MQARSettings(length=16, pairs=2, vocabulary=12), 2, 7)
    whole = MQARDataset(split.settings, 2, 7).sha256
    monkeypatch.setattr("sma.recipes.tasks.mqar._BLOCK", 16)
    assert split.sha256 == whole


def test_long_samples_are_drawn_one_at_a_time():
    chosen = MQARSettings(length=2**18, pairs=16, train=10**9, validation=1, test=1)
    split = MQARDataset(chosen, 0, chosen.train)
    ids, targets = split[10**9 - 1]
    check_sample(chosen, ids.tolist(), targets.tolist())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param(
            {"pairs": 17},
            "MQARSettings: pairs=17 need a length of at least 68, two tokens for each pair and a distance of two for "
            "each query; raise length=64, or lower pairs",
            id="length",
        ),
        pytest.param(
            {"pairs": 8, "vocabulary": 16},
            "MQARSettings: pairs=8 must be at most 7, the keys of vocabulary=16, because the keys of a sample differ; "
            "raise vocabulary, or lower pairs",
            id="keys",
        ),
        pytest.param({"vocabulary": 3}, "MQARSettings: vocabulary=3 must be at least 4", id="vocabulary"),
        pytest.param({"power": -0.5}, "MQARSettings: power=-0.5 must be at least 0", id="power"),
    ],
)
def test_settings_that_no_sample_can_satisfy_are_refused(changes, sentence):
    with pytest.raises(SpecError, match=re.escape(sentence)):
        MQARSettings(**changes)


def test_unknown_filler_is_refused():
    with pytest.raises(SpecError, match="filler"):
        MQARSettings(filler="none")


@pytest.mark.parametrize("changes", [{"train": 10**12}, {"test": 10**18}], ids=str)
def test_more_samples_than_fit_in_memory_are_refused(changes):
    with pytest.raises(DataError, match=r"the task mqar needs .* bytes.*; lower train, validation, test or length"):
        make_mqar(MQARSettings(**changes))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        pytest.param(
            "encoder.vocabulary=9",
            "model.encoder.vocabulary=9 must be 12: the empty token, keys and values of the task",
            id="vocabulary",
        ),
        pytest.param(
            "model={kind: sequence_encoder, width: 8, encoder: {kind: token_embedding, vocabulary: 12}, layers: []}",
            "the model kind 'sequence_encoder' does not score every position; use kind 'language_model'",
            id="kind",
        ),
    ],
)
def test_unsuitable_model_is_refused(setting, sentence):
    with pytest.raises(SpecError, match=exactly(f"ExperimentSpec: {sentence}")):
        load_experiment(TINY, [setting])


@given(chosen=settings())
def test_texts_show_the_role_of_every_token(chosen):
    drawn = draw(chosen, 0, torch.arange(3))
    for ids, targets in zip(drawn.ids, drawn.targets, strict=True):
        texts = show(chosen, ids)
        asked = {place for place, target in enumerate(targets.tolist()) if target != UNSCORED}
        roles = "".join(text[0] for text in texts)
        assert roles[: 2 * chosen.pairs] == "kv" * chosen.pairs
        assert all(roles[place] == "?" for place in asked)
        if chosen.filler == "zero":
            assert roles.count("?") == chosen.pairs
        for text, token in zip(texts, ids.tolist(), strict=True):
            assert text[0] in ROLES
            assert text[0] not in "k?" or text[1:] == str(token)
            assert text != "~" or 0 < token < chosen.vocabulary // 2
            assert text != "·" or token == 0 or token >= chosen.vocabulary // 2


def test_accuracy_of_a_run_is_the_share_of_correctly_answered_queries(tmp_path):
    spec = load_experiment(TINY)
    data = spec.task.prepare(tmp_path, progress=False)
    finished = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False)
    batch = data.collate([data.test[number] for number in range(len(data.test))])
    with torch.no_grad():
        guesses = finished.module.model.eval()(batch.inputs).logits.argmax(-1)
    right = asked = 0
    for row, answers in zip(guesses.tolist(), batch.targets.tolist(), strict=True):
        for guess, answer in zip(row, answers, strict=True):
            asked += answer != UNSCORED
            right += answer != UNSCORED and guess == answer
    assert asked == 2 * len(data.test)
    assert finished.summary["test_accuracy"] == pytest.approx(right / asked)
    assert finished.summary["chance"] == pytest.approx(1 / 6)
    assert not list(tmp_path.glob("mqar*"))


def test_tokens_beyond_a_thousand_have_no_confusion_matrix(tmp_path, capsys):
    spec = load_experiment(TINY, ["task.data.vocabulary=1026", "encoder.vocabulary=1026", "training.updates=1"])
    data = spec.task.prepare(tmp_path, progress=False)
    finished = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False)
    assert finished.report.confusion is None
    assert finished.summary["per_class"] == {}
    assert {*finished.summary["rates_by_role"]} <= {*ROLES.values()}
    assert not (tmp_path / "run" / "confusion.png").exists()
    assert main(["evaluate", str(tmp_path / "run"), "--no-progress", "--accelerator", "cpu"]) == 0
    assert "of the test split, recorded" in capsys.readouterr().out
    assert "confusion" not in json.loads((tmp_path / "run" / "evaluation.json").read_text())


def test_chance_is_one_over_the_number_of_values():
    assert MQARTask(data={"vocabulary": 64}).chance == 1 / 32
    assert MQARTask().classes == 8192
