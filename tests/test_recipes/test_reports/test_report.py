"""The report of a run: text and figure."""

import shlex

import matplotlib.image
import pytest
import torch

import sma
from sma.budget_spec import BudgetSpec
from sma.model import build
from sma.recipes.experiment import load_experiment
from sma.recipes.reports.activation_maps import Example, Modality
from sma.recipes.reports.classification import (
    ClassificationReport,
    _caption,
    _right_and_wrong,
    _router_paths,
    measure_activation,
    rates_over_training,
)
from sma.recipes.reports.hints import Routing, hints
from tests.test_recipes.tiny import tiny, train

SUMMARY = {
    "test_accuracy": 0.4567,
    "activation_rate": [0.03, 0.5],
    "chance": 0.1,
    "seconds": 12.3,
    "tokens_per_second": 12345,
    "parameters": 67890,
    "updates": 400,
    "seed": 3,
}
BARE = {"backbone": {"kind": "ema", "state_size": 4}}
LAYER = {**BARE, "modules": {"attention": {"kind": "gau", "query_size": 4, "hidden_size": 8}}}
REPORT = ClassificationReport(0.187, 60, {"9": ([0.0, 0.25], 40), "[MAX": ([0.1, 1.0], 10), "]": ([0.0, 0.5], 30)}, [])


def test_rates_by_symbol_equal_a_loop_over_samples(finished, data):
    _, done = finished
    model = done.module.model.eval()
    report = measure_activation(model, data.test, data, limit=25)
    ran = {}
    for number in torch.randperm(60, generator=torch.Generator().manual_seed(0))[:25].tolist():
        ids, _ = data.test[number]
        with torch.no_grad():
            decisions = model(ids[None]).decisions
        for position, text in enumerate(data.show(ids)):
            ran.setdefault(text, []).append([float(decision.active[0, position].any()) for decision in decisions])
    assert report.samples == 25
    assert set(report.by_text) == set(ran)
    for text, rows in ran.items():
        rates, count = report.by_text[text]
        assert count == len(rows)
        assert rates == pytest.approx(torch.tensor(rows).mean(0).tolist(), abs=2 / count)


def test_accuracy_without_a_layer_equals_a_loop_over_samples(finished, data):
    _, done = finished
    model = done.module.model.eval()
    report = measure_activation(model, data.test, data, limit=25)
    assert len(report.without_layer) == 2
    for off, accuracy in enumerate(report.without_layer):
        right = 0
        for number in torch.randperm(60, generator=torch.Generator().manual_seed(0))[:25].tolist():
            ids, target = data.test[number]
            with torch.no_grad():
                masks = [decision.active & (layer != off) for layer, decision in enumerate(model(ids[None]).decisions)]
                right += int(model(ids[None], decisions=masks).logits.argmax()) == target
        assert accuracy == right / 25
    assert tuple(done.summary["without_layer"]) == done.report.without_layer


def test_accuracy_by_group_equals_a_loop_over_samples(finished, data, tmp_path):
    _, done = finished
    hits = {}
    for number in range(len(data.test)):
        ids, target = data.test[number]
        with torch.no_grad():
            right = int(done.module.model.eval()(ids[None]).logits.argmax()) == target
        hits.setdefault(f"outermost {data.show(ids)[0].removeprefix('[')}", []).append(right)
    assert list(done.report.by_group) == sorted(hits)
    assert len(hits) == 4
    assert done.report.by_group == {group: pytest.approx(sum(own) / len(own)) for group, own in hits.items()}
    assert done.summary["by_group"] == done.report.by_group
    groups = "   ".join(f"{group}: {share:.1%}" for group, share in done.report.by_group.items())
    assert f"by group          {groups}   (60 samples)" in done.report.describe(done.summary, tmp_path).splitlines()


def test_majority_is_the_share_of_the_majority_class(finished, data):
    answers = [data.test[number][1] for number in range(len(data.test))]
    assert finished[1].report.majority == pytest.approx(max(map(answers.count, answers)) / len(answers))
    assert finished[1].summary["majority"] == finished[1].report.majority


def test_examples_show_whole_samples_with_answer_and_guess(finished, data):
    _, done = finished
    assert len(done.report.examples) == 4
    samples = {" ".join(data.show(data.test[number][0])): data.test[number] for number in range(len(data.test))}
    for example in done.report.examples:
        ids, target = samples[" ".join(example.texts)]
        assert example.target == target
        assert example.active.shape == (2, len(ids))
        with torch.no_grad():
            assert example.guess == int(done.module.model.eval()(ids[None]).logits.argmax())


def test_report_of_data_sorted_by_class_covers_all_classes(finished, data):
    test = data.test
    by_class = sorted(range(len(test)), key=lambda number: test[number][1])
    half = len(by_class) // 2

    class Sorted:
        lengths = torch.full((len(by_class),), 12)

        def __len__(self):
            return len(by_class)

        def __getitem__(self, place):
            ids, target = test[by_class[place]]
            return ids.repeat(12)[:12], target

    report = measure_activation(finished[1].module.model, Sorted(), data, limit=half, shown=8)
    assert report.samples == half
    assert len({example.target for example in report.examples}) >= 3
    assert max(example.target for example in report.examples) > test[by_class[half]][1]
    assert (
        report.examples[0].texts
        == measure_activation(finished[1].module.model, Sorted(), data, limit=half, shown=8).examples[0].texts
    )


def test_fewer_samples_than_shown_are_accepted(finished, data):
    report = measure_activation(finished[1].module.model, data.test, data, limit=2)
    assert (report.samples, len(report.examples)) == (2, 2)


def test_text_has_the_results_and_the_paths(tmp_path):
    (tmp_path / "activation.png").touch()
    printed = REPORT.describe(SUMMARY, tmp_path)
    assert "test accuracy     45.7%   (chance 10.0%, majority class 18.7%)" in printed
    assert "activation rate   layer 0: 3.0%   layer 1: 50.0%" in printed
    assert "time              12 s, 12,345 tokens/s in training, 67,890 parameters, seed 3" in printed
    assert "active in layer 1 [MAX 100%, ] 50%, 9 25%" in printed
    for name in ("activation.png", "model", "metrics", "tensorboard", "summary.json"):
        assert str(tmp_path / name) in printed


def test_text_has_the_accuracy_without_each_layer_if_layers_run(tmp_path):
    report = REPORT._replace(without_layer=(0.25, 0.4))
    wanted = "switched off      layer 0: 25.0%   layer 1: 40.0%   (test accuracy without one layer, 60 samples)"
    assert wanted in report.describe(SUMMARY, tmp_path).splitlines()
    assert "switched off" not in report.describe({**SUMMARY, "activation_rate": [0.0, 0.0]}, tmp_path)
    assert "switched off" not in REPORT.describe(SUMMARY, tmp_path)


@pytest.mark.parametrize(("layers", "rows"), [(1, 2), (3, 2), (4, 4)])
def test_images_of_few_layers_are_drawn_two_in_a_row(tmp_path, monkeypatch, layers, rows):
    values = torch.rand(4)
    examples = [Example([], 0, 0, torch.rand(layers, 4) < 0.5, values) for _ in range(4)]
    report = ClassificationReport(0.5, 4, {}, examples, ("attention",), Modality(image_shape=(2, 2)))
    sizes = []
    monkeypatch.setattr(
        "sma.recipes.reports.classification.save_figure",
        lambda figure, path: sizes.append((len(figure.subfigs), sum(len(part.subfigs) for part in figure.subfigs))),
    )
    report.draw(tmp_path, "title")
    assert sizes == [(rows + 1, 4)]


def test_examples_are_correct_ones_of_every_class_and_one_wrong_in_four():
    def example(target, right):
        return Example([], target, target if right else 1 - target, torch.zeros(1, 1, dtype=torch.bool))

    right = [example(0, True)] * 6 + [example(1, True)] * 2
    shown = _right_and_wrong([example(0, False), *right, example(1, False)], 4)
    assert [(each.target, each.guess) for each in shown] == [(0, 0), (1, 1), (0, 0), (0, 1)]
    assert [each.target for each in _right_and_wrong(right, 4)] == [0, 1, 0, 1]
    assert len(_right_and_wrong([example(0, False)] * 5 + right[:1], 4)) == 4
    assert _right_and_wrong([], 4) == []


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        ({"repeat": 2, "layer": LAYER}, ["layers.layer.router"]),
        ([BARE, LAYER, LAYER], ["layers.1.router", "layers.2.router"]),
        ({"repeat": 1, "layer": [BARE, BARE, LAYER]}, ["layers.layer.2.router"]),
    ],
)
def test_suggestions_name_the_routers_of_the_model(layers, paths, tmp_path):
    model = {"kind": "sequence_encoder", "width": 8, "encoder": {"kind": "real_number"}, "layers": layers}
    assert list(_router_paths(sma.load_spec(model, "model"))) == paths
    printed = REPORT._replace(routing=Routing(tuple(paths))).describe(SUMMARY, tmp_path)
    settings = " ".join(f"--set {path}='{{kind: never}}'" for path in paths)
    assert f"next: {settings} trains the same model without routed sub-modules" in printed


@pytest.mark.parametrize(
    "preset", ["listops_tiny", "listops_binary", "pathfinder_tiny", "pathx_tiny", "mqar_tiny", "recall_tiny"]
)
def test_the_suggested_model_without_attention_is_a_valid_experiment(preset):
    spec = load_experiment(preset)
    routing = Routing(_router_paths(spec.model), False, spec.training.budget, spec.training.losses.policy > 0)
    summary = {"test_accuracy": 1.0, "activation_rate": [0.5], "updates": 1}
    (hint,) = hints(summary, 0.1, ["attention"], routing)
    settings = [word for word in shlex.split(hint.partition(" trains ")[0]) if word != "--set"]
    changed = load_experiment(preset, settings)
    assert all(layer.router.kind == "never" for layer in changed.model.layer_specs if layer.modules)
    assert changed.training.budget is None


def test_examples_with_several_targets_count_right_answers(tmp_path):
    example = Example(["a"], 4, 3, torch.zeros(1, 1, dtype=torch.bool))
    report = REPORT._replace(modules=("attention",))
    assert _caption(report, example) == "class 4, predicted 3; dark: attention active"
    assert _caption(report._replace(per_position=True), example) == "3 of 4 answers correct; dark: attention active"


def test_rates_of_images_are_by_grey_value(tmp_path):
    report = REPORT._replace(modality=Modality(image_shape=(2, 2)))
    assert "active in layer 1 by grey value: [MAX 100%" in report.describe(SUMMARY, tmp_path)


def suggestions(tmp_path, report=REPORT, **changes):
    printed = report.describe({**SUMMARY, **changes}, tmp_path)
    return [line.removeprefix("next: ") for line in printed.splitlines() if line.startswith("next: ")]


def test_text_has_suggestions(tmp_path):
    assert suggestions(tmp_path, REPORT._replace(modules=("attention", "mlp"))) == [
        "--set layers.layer.router='{kind: never}' trains the same model without attention and mlp",
        "--set training.updates=800 trains twice as long",
    ]


TOTAL = BudgetSpec(target=0.5, over="total", hold=100, anneal=200)


@pytest.mark.parametrize(
    ("report", "changes", "hints"),
    [
        pytest.param({"routing": Routing(fixed=True)}, {"test_accuracy": 0.995}, [], id="nothing-to-improve"),
        pytest.param({"routing": Routing(fixed=True)}, {"activation_rate": [1.0, 0.0]}, ["twice"], id="fixed-rates"),
        pytest.param({}, {"activation_rate": []}, ["twice"], id="nothing-is-routed"),
        pytest.param(
            {"routing": Routing(fixed=True)},
            {"best_update": 280},
            ["update 280 of 400: more updates may not"],
            id="best-early",
        ),
        pytest.param({"routing": Routing(fixed=True)}, {"best_update": 281}, ["twice"], id="best-late"),
        pytest.param(
            {"routing": Routing(fixed=True)},
            {"test_accuracy": 0.19},
            ["majority class", "twice"],
            id="nothing-is-learned",
        ),
        pytest.param({}, {"activation_rate": [0.0, 0.95]}, ["dead", "nearly every", "never", "twice"], id="rates"),
        pytest.param(
            {"routing": Routing(budget=TOTAL)},
            {"activation_rate": [0.0, 0.95]},
            ["over=each", "never", "twice"],
            id="total",
        ),
        pytest.param(
            {"routing": Routing(budget=BudgetSpec(target=0.5))},
            {"activation_rate": [0.0, 0.5]},
            ["never", "twice"],
            id="each",
        ),
    ],
)
def test_suggestions_fit_the_results(tmp_path, report, changes, hints):
    found = suggestions(tmp_path, REPORT._replace(**report), **changes)
    assert len(found) == len(hints), found
    assert all(hint in line for hint, line in zip(hints, found, strict=True)), found


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        pytest.param(
            {"activation_rate": [0.95, 0.5]},
            "next: a layer runs on nearly every token; --set training.budget.target=0.3 lowers the rate",
            id="saturated",
        ),
        pytest.param(
            {"activation_rate": [0.0, 0.5]}, "next: a router is dead: its layer has only the backbone", id="dead"
        ),
        pytest.param(
            {"tokens_per_second": None}, "time              12 s, 67,890 parameters, seed 3", id="only-tested"
        ),
        pytest.param({}, "figure            none: it could not be drawn, see the warning above", id="no-figure"),
    ],
)
def test_text_fits_the_summary(tmp_path, changes, line):
    assert line in REPORT.describe({**SUMMARY, **changes}, tmp_path)


def _pixels(path):
    image = matplotlib.image.imread(path)
    assert image.ndim == 3
    assert min(image.shape[:2]) > 200
    assert 0.5 < image[..., :3].mean() < 1.0  # a white background that is not blank
    return image


def test_figure_is_not_blank(finished, tmp_path):
    out, done = finished
    (tmp_path / "metrics").symlink_to(out / "metrics")
    path = done.report.draw(tmp_path, "the title")
    assert path == tmp_path / "activation.png"
    image = _pixels(path)
    assert image[..., :3].std() > 0.1
    # Another title gives another image, and so do other activations.
    assert (_pixels(done.report.draw(tmp_path, "another title")) != image).any()
    silent = [example._replace(active=torch.zeros_like(example.active)) for example in done.report.examples]
    assert (_pixels(done.report._replace(examples=silent).draw(tmp_path, "the title")) != image).any()


def test_curves_of_a_resumed_run_are_joined(tmp_path):
    header = "step,loss,fit_rate/layer0/attention,val_accuracy\n"
    for version, lines in {
        0: "9,1.0,0.5,\n9,,,0.1\n19,1.0,0.6,\n",
        2: "19,1.0,0.7,\n",
        10: "29,1.0,0.8,\n29,,,0.3\n",
    }.items():
        (tmp_path / "metrics" / f"version_{version}").mkdir(parents=True)
        (tmp_path / "metrics" / f"version_{version}" / "metrics.csv").write_text(header + lines)
    assert rates_over_training(tmp_path) == {
        "fit_rate/layer0/attention": [(10, 0.5), (20, 0.7), (30, 0.8)],
        "val_accuracy": [(10, 0.1), (30, 0.3)],
    }


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"0.4", id="in a value"),
        pytest.param(b"0.45,,0,9", id="in the step"),
        pytest.param(b"0.45,,0,9" + b"\0" * 20, id="zeros"),
        pytest.param(b"0.45,,0,9" + b"\0" * 20 + b"\n", id="zeros and a line"),
        pytest.param(b"0.45,,0,\n", id="no step"),
        pytest.param(b"0.45,x,0,9\n", id="no number"),
        pytest.param(b"0.45,,0,9,9,9\xff", id="too much"),
    ],
)
def test_half_written_line_of_a_killed_run_is_skipped(tmp_path, tail):
    (tmp_path / "metrics" / "version_0").mkdir(parents=True)
    lines = b"fit_rate/layer0/attention,val_accuracy,epoch,step\r\n0.5,,0,49\r\n"
    (tmp_path / "metrics" / "version_0" / "metrics.csv").write_bytes(lines + tail)
    assert rates_over_training(tmp_path) == {"fit_rate/layer0/attention": [(50, 0.5)]}


def test_curves_of_a_run_equal_its_metrics(finished):
    curves = rates_over_training(finished[0])
    assert set(curves) == {"fit_rate/layer0/attention", "fit_rate/layer1/attention", "val_accuracy"}
    assert all([update for update, _ in points] == [10, 20, 30] for points in curves.values())


def test_folder_without_metrics_has_no_curves(tmp_path):
    assert rates_over_training(tmp_path) == {}


def test_model_without_routing_is_described(data, tmp_path):
    spec = tiny(layers__layer__modules="{}", training__updates=6)
    done = train(spec, tmp_path, data)
    assert done.summary["activation_rate"] == []
    assert "activation rate   nothing is routed" in done.report.describe(done.summary, tmp_path)
    assert len(done.report.by_group) == 4
    _pixels(done.report.draw(tmp_path, "no router"))


def test_measuring_leaves_the_model_unchanged(data):
    model = build(tiny().model, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_activation(model, data.test, data, limit=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
