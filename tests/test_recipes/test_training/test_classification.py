"""Classification: accuracy against loops, non-finite inputs, and the batches of a training and of a split."""

import pytest
import torch
from torch import Tensor

from sma.errors import DataError
from sma.recipes.experiment import load_experiment
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.classification import Classification, check_finite
from sma.recipes.training.measures import Average, Measures, Scores
from sma.stats import count_rates
from tests.cases import generator
from tests.test_recipes.decisions import LAYERS, batches
from tests.test_recipes.tiny import EXPERIMENT, tiny, train


def _measures(decisions, valid, right, samples):
    rates = count_rates(decisions, valid)
    return Measures(torch.tensor(0.0), rates, (right, torch.tensor(samples)), valid.sum())


def _scored(layers, split):
    scores, right, samples = Scores("accuracy", Average(torch.int64), layers), 0, 0
    for seed, (decisions, valid) in enumerate(batches(layers)):
        logits = torch.randn(valid.shape[0], 10, generator=generator(70 + seed))
        # Every second answer is correct.
        targets = torch.where(torch.arange(valid.shape[0]) % 2 == 0, logits.argmax(-1), (logits.argmax(-1) + 1) % 10)
        scores.add(_measures(decisions, valid, (logits.argmax(-1) == targets).sum(), len(targets)))
        right += sum(int(row.argmax()) == int(target) for row, target in zip(logits, targets, strict=True))
        samples += len(targets)
    return scores, scores.compute(split), right / samples


def test_accuracy_is_the_share_of_correct_answers():
    scores, measures, share = _scored(LAYERS, "val")
    assert measures["val_accuracy"] == pytest.approx(share, abs=1e-7)
    rates = [value for name, value in measures.items() if name.startswith("val_rate/")]
    assert len(rates) == 5
    assert measures["val_rate"] == pytest.approx(sum(rates) / 5)
    decisions, valid = next(batches(LAYERS))
    scores.add(_measures(decisions, valid, torch.tensor(2), 3))
    assert scores.compute("val")["val_accuracy"] == pytest.approx(2 / 3)  # without the first split


def test_model_without_routers_has_no_rates():
    assert set(_scored([], "test")[1]) == {"test_accuracy"}


def _numbers(bad, sample, position):
    items = [(torch.arange(1.0, 4.0 + number), number) for number in range(4)]
    items[sample][0][position] = bad
    return collate(items)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_error_for_a_non_finite_input_names_sample_and_position(bad):
    complaint = f"the batch of update 7 has {bad} in sample 2 at position 3; inputs must be finite numbers"
    with pytest.raises(DataError, match=complaint):
        check_finite(_numbers(bad, 2, 3), 7)


def test_features_are_checked_for_finite_values():
    batch = collate([(torch.ones(4), 0), (torch.ones(3), 1)])
    inputs = batch.inputs[..., None].expand(-1, -1, 3).clone()
    inputs[1, 2, 1] = float("nan")
    with pytest.raises(DataError, match="has nan in sample 1 at position 2"):
        check_finite(batch._replace(inputs=inputs), 0)


def test_finite_numbers_and_ids_pass():
    check_finite(_numbers(1e30, 0, 0), 0)
    check_finite(collate([(torch.tensor([3, 4]), 0)]), 0)


class _Numbers:
    """A split of real numbers; the sample `bad` has a NaN."""

    def __init__(self, samples, bad=None):
        self.items = [
            (torch.randn(6 + number % 3, generator=generator(number)), number % 10) for number in range(samples)
        ]
        self.lengths = torch.tensor([len(item[0]) for item in self.items])
        if bad is not None:
            self.items[bad][0][2] = float("nan")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_non_finite_input_stops_the_run(tmp_path, split):
    bad = {split: 5}
    splits = [_Numbers(16, bad.get(name)) for name in ("train", "validation", "test")]
    data = TaskData(*splits, {}, collate, lambda numbers: [f"{number:.1f}" for number in numbers.tolist()])
    spec = load_experiment(
        {**EXPERIMENT, "model": {**EXPERIMENT["model"], "encoder": {"kind": "real_number"}}}, ["training.updates=6"]
    )
    with pytest.raises(
        DataError, match=r"the batch of update \d has nan in sample \d+ at position 2; inputs must be finite numbers"
    ):
        train(spec, tmp_path, data)
    assert not (tmp_path / "summary.json").exists()


def test_evaluation_uses_every_sample_once(data):
    loader = Classification(tiny().task, data).evaluation_batches("test")
    assert sum(len(batch.targets) for batch in loader) == len(data.test)
    lengths: Tensor = torch.cat([batch.valid.sum(1) for batch in loader])
    assert torch.equal(lengths, data.test.lengths.sort().values)


def test_training_batches_start_after_the_finished_updates(data):
    objective = Classification(tiny().task, data)
    whole = list(objective.training_batches(tiny().training, 0))
    rest = list(objective.training_batches(tiny().training, 0, 18))
    assert len(whole) == 30
    assert all(torch.equal(mine.inputs, theirs.inputs) for mine, theirs in zip(rest, whole[18:], strict=True))
