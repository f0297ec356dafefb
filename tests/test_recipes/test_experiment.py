"""Experiments: the paper's table, the schedule, and how a spec comes from a name, a file and settings."""

import pytest
import yaml

from sma.errors import SpecError
from sma.recipes.experiment import TrainingSpec, load_experiment
from sma.recipes.io.presets import read_shipped
from sma.spec import dump_spec
from tests.test_recipes.tiny import DATA, EXPERIMENT, MODEL, tiny

# DATA.md, section 2, column ListOps, and section 1.
LAYER = "model.layers.layer"
PAPER = {
    "task.kind": "listops",
    "task.data.train": 96_000,
    "task.data.validation": 2_000,
    "task.data.test": 2_000,
    "task.data.min_length": 500,
    "task.data.max_length": 2000,
    "task.data.max_depth": 10,
    "task.data.min_arity": 2,
    "task.data.max_arity": 10,
    "model.kind": "sequence_classifier",
    "model.width": 80,
    "model.sinusoid": False,
    "model.final_norm": None,
    "model.embedding_dropout": 0.1,
    "model.encoder": {"kind": "token_embedding", "vocabulary": 16, "padding": 0, "scaled": False},
    "model.layers.repeat": 6,
    f"{LAYER}.backbone": {"kind": "ema", "state_size": 16, "bidirectional": True, "truncation": 1024},
    f"{LAYER}.router.kind": "sma",
    f"{LAYER}.router.temperature_scale": 0.3,
    f"{LAYER}.modules.attention.kind": "gau",
    f"{LAYER}.modules.attention.query_size": 64,
    f"{LAYER}.modules.attention.hidden_size": 160,
    f"{LAYER}.modules.attention.window": 128,
    f"{LAYER}.modules.attention.bidirectional": True,
    f"{LAYER}.modules.attention.attention": "softmax",
    f"{LAYER}.modules.attention.position": {
        "kind": "relative_bias",
        "distance": "true_distance",
        "max_positions": 2002,
    },
    f"{LAYER}.bypass": "linear",
    f"{LAYER}.norm.kind": "layer_norm",
    f"{LAYER}.norm.place": "post",
    f"{LAYER}.dropout": 0.1,
    "model.head": {"kind": "mean_pool_mlp", "hidden": 160, "classes": 10, "dropout": 0.1},
    "training.updates": 90_000,
    "training.warmup": 27_000,
    "training.batch_size": 64,
    "training.learning_rate": 0.004,
    "training.weight_decay": 0.001,
    "training.decay_power": 1.0,
    "training.clip_norm": 1.0,
    "training.betas": [0.9, 0.98],
    "training.epsilon": 1e-8,
    "precision": "32-true",
}


def _at(data, path):
    for step in path.split("."):
        data = data[step]
    return data


@pytest.mark.parametrize(("path", "value"), [pytest.param(path, value, id=path) for path, value in PAPER.items()])
def test_paper_preset_equals_the_table(path, value):
    assert _at(dump_spec(load_experiment("listops_paper")), path) == value


def test_paper_preset_has_the_parameters_of_the_table():
    model = load_experiment("listops_paper").model
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.build().parameters()) == 408_036
    # The authors' vocabulary has five more symbols.
    assert load_experiment("listops_paper", ["encoder.vocabulary=21"]).model.num_parameters() == 408_436


def test_paper_preset_has_no_feed_forward_and_no_other_dropout():
    layer = load_experiment("listops_paper").model.layer_specs[0]
    assert list(layer.modules) == ["attention"]
    assert layer.modules["attention"].value_dropout == layer.modules["attention"].attention_dropout == 0.0


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        pytest.param(0, 1e-7, id="start"),
        pytest.param(1, 1e-7 + (0.004 - 1e-7) / 27_000, id="first"),
        pytest.param(13_500, (1e-7 + 0.004) / 2, id="mid-warm-up"),
        pytest.param(26_999, 0.004 - (0.004 - 1e-7) / 27_000, id="last-of-warm-up"),
        pytest.param(27_000, 0.004, id="peak"),
        pytest.param(27_001, 0.004 * 62_999 / 63_000, id="after-peak"),
        pytest.param(58_500, 0.002, id="mid-decay"),
        pytest.param(89_999, 0.004 / 63_000, id="last"),
        pytest.param(90_000, 0.0, id="end"),
        pytest.param(100_000, 0.0, id="past-the-end"),
    ],
)
def test_paper_schedule_warms_up_from_1e_7_and_falls_to_zero(step, rate):
    assert load_experiment("listops_paper").training.learning_rate_at(step) == pytest.approx(rate, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_schedule_falls_as_a_power_of_the_updates_left(power):
    spec = TrainingSpec(updates=1000, batch_size=1, learning_rate=0.01, warmup=200, decay_power=power)
    assert [spec.learning_rate_at(step) for step in (200, 400, 800)] == pytest.approx(
        [0.01, 0.01 * 0.75**power, 0.01 * 0.25**power]
    )


def test_schedule_without_warm_up_starts_at_the_full_rate():
    spec = TrainingSpec(updates=4, batch_size=1, learning_rate=0.2)
    assert [spec.learning_rate_at(step) for step in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])


def test_tiny_preset_has_the_sizes_of_the_demo():
    spec = load_experiment("listops_tiny")
    shape = {"max_depth": 5, "min_arity": 2, "max_arity": 5}
    assert spec.task.data.model_dump(include=set(shape)) == shape
    # The bounds themselves are excluded: 10 to 100 tokens.
    assert (spec.task.data.min_length, spec.task.data.max_length) == (9, 101)
    assert (len(spec.model.layer_specs), spec.model.width) == (4, 64)


@pytest.mark.parametrize(
    ("updates", "evaluate_every", "every"),
    [(4000, 500, 50), (4000, 20, 20), (7, 500, 7)],
    ids=["usual", "evaluated-often", "short"],
)
def test_metrics_are_logged_before_every_evaluation(updates, evaluate_every, every):
    assert (
        TrainingSpec(updates=updates, batch_size=1, learning_rate=0.1, evaluate_every=evaluate_every).log_every == every
    )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param({"warmup": 10}, "warmup=10 must be below updates=10; lower warmup or raise updates", id="warm-up"),
        pytest.param({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must both be at least 0 and below 1", id="beta-1"),
        pytest.param(
            {"betas": (-0.1, 0.9)}, r"betas=\(-0.1, 0.9\) must both be at least 0 and below 1", id="beta-negative"
        ),
        pytest.param({"updates": 0}, "updates=0", id="no-updates"),
        pytest.param({"batch_size": 0}, "batch_size=0", id="no-batch"),
        pytest.param({"learning_rate": 0.0}, "learning_rate=0.0", id="no-learning"),
        pytest.param({"learning_rate": float("nan")}, "learning_rate", id="nan"),
        pytest.param({"clip_norm": 0.0}, "clip_norm=0.0", id="clip"),
        pytest.param({"evaluate_every": 0}, "evaluate_every=0", id="never-evaluated"),
        pytest.param({"warm_up": 3}, "unknown field 'warm_up'; did you mean 'warmup'", id="misspelt"),
    ],
)
def test_impossible_training_is_refused(fields, complaint):
    with pytest.raises(SpecError, match=complaint):
        TrainingSpec(**{"updates": 10, "batch_size": 8, "learning_rate": 0.01, **fields})


@pytest.mark.parametrize("prefix", ["", "model."], ids=["short", "with-model"])
def test_setting_reaches_the_model_with_and_without_the_prefix(prefix):
    settings = [f"{prefix}width=16", f"{prefix}layers.layer.modules.attention.window=3", f"{prefix}head.hidden=5"]
    model = load_experiment(EXPERIMENT, settings).model
    assert (model.width, model.layer_specs[1].modules["attention"].window, model.head.hidden) == (16, 3, 5)


def test_settings_reach_all_other_fields():
    settings = [
        "seed=7",
        "precision=bf16-mixed",
        "training.updates=12",
        "training.betas=[0.8, 0.9]",
        "training.clip_norm=null",
        "task.data.seed=5",
    ]
    spec = load_experiment(EXPERIMENT, settings)
    assert (spec.seed, spec.precision, spec.training.updates, spec.training.betas, spec.training.clip_norm) == (
        7,
        "bf16-mixed",
        12,
        (0.8, 0.9),
        None,
    )
    assert spec.task.data.seed == 5


def test_setting_of_a_kind_replaces_the_part():
    spec = load_experiment(
        EXPERIMENT, ["layers.layer.router={kind: never}", "layers.layer.modules.attention.position={kind: rotary}"]
    )
    assert {layer.router.kind for layer in spec.model.layer_specs} == {"never"}
    assert spec.model.layer_specs[0].modules["attention"].position.kind == "rotary"


def test_settings_apply_before_validation():
    # Each of the two is invalid alone.
    with pytest.raises(SpecError, match="warmup=40 must be below updates=30"):
        load_experiment(EXPERIMENT, ["training.warmup=40"])
    assert load_experiment(EXPERIMENT, ["training.warmup=40", "training.updates=50"]).training.warmup == 40
    without = {name: value for name, value in EXPERIMENT.items() if name != "training"}
    complete = load_experiment(without, ["training.updates=5", "training.batch_size=2", "training.learning_rate=0.1"])
    assert complete.training.updates == 5


def test_last_setting_of_a_path_wins():
    assert load_experiment(EXPERIMENT, ["seed=1", "seed=2"]).seed == 2


def test_loading_changes_neither_mapping_nor_spec():
    before = yaml.safe_dump(EXPERIMENT)
    load_experiment(EXPERIMENT, ["width=16", "task.data.train=7"])
    assert yaml.safe_dump(EXPERIMENT) == before


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        pytest.param(["width"], "the setting 'width' has no '='; write path=value, such as width=32", id="no-equals"),
        pytest.param(["=3"], "'' is not a field path", id="no-path"),
        pytest.param(["layers..x=3"], "'layers..x' is not a field path", id="empty-step"),
        pytest.param(["width=[1"], "the value of the setting width is not valid YAML", id="not-yaml"),
        pytest.param(
            ["widht=3"], "unknown field path 'widht': there is no 'widht' here; fields: task, model, training", id="top"
        ),
        pytest.param(
            ["training.updats=3"], "unknown field path 'training.updats'.*did you mean 'updates'[?]", id="training"
        ),
        pytest.param(
            ["layers.layer.modules.attention.windw=3"],
            "unknown field path 'model.layers.layer.modules.attention.windw'.*did you mean 'window'[?]",
            id="model",
        ),
        pytest.param(
            ["task.data.lenght=3"], "unknown field path 'task.data.lenght': there is no 'lenght' here", id="task"
        ),
        pytest.param(
            ["task.kind=lisops"], "unknown task kind 'lisops' in task; did you mean 'listops'", id="task-kind"
        ),
        pytest.param(
            ["head.classes=7"], "model.head.classes=7 must be 10, the classes of the task 'listops'", id="classes"
        ),
        pytest.param(["seed=-1"], "seed=-1", id="seed"),
        pytest.param(["precision=8"], "precision=8", id="precision"),
        pytest.param(["width=0"], "in model: width=0 must be at least 1", id="value"),
        pytest.param(["width=a"], "in model: width='a': input should be a valid integer", id="type"),
        pytest.param(
            ["model={kind: sequence_encoder, width: 8, encoder: {kind: real_number}, layers: []}"],
            "the model kind 'sequence_encoder' has no head that scores classes; use kind 'sequence_classifier'",
            id="no-head",
        ),
    ],
)
def test_wrong_setting_gives_an_error_message(settings, complaint):
    with pytest.raises(SpecError, match=complaint):
        load_experiment(EXPERIMENT, settings)


def test_model_is_given_by_name_by_file_or_inline(tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(MODEL), encoding="utf-8")
    inline = load_experiment(EXPERIMENT)
    assert load_experiment({**EXPERIMENT, "model": str(tmp_path / "model.yaml")}) == inline
    named = load_experiment({**EXPERIMENT, "model": "seqboat_listops_tiny"})
    assert named.model == load_experiment("listops_tiny").model
    assert load_experiment({**EXPERIMENT, "model": read_shipped("seqboat_listops_tiny", "specs")}) == named
    # Settings apply to a model given by name, too.
    assert load_experiment({**EXPERIMENT, "model": "seqboat_listops_tiny"}, ["width=32"]).model.width == 32


def test_error_for_an_unknown_model_name_suggests_a_near_match():
    with pytest.raises(
        SpecError, match="no file and no shipped spec 'seqboat_listop_tiny'; did you mean 'seqboat_listops_tiny'"
    ):
        load_experiment({**EXPERIMENT, "model": "seqboat_listop_tiny"})


def test_experiment_is_given_as_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    assert load_experiment(tmp_path / "mine.yaml") == tiny()
    assert load_experiment(str(tmp_path / "mine.yaml"), ["seed=3"]) == tiny(seed=3)


def test_error_names_a_missing_part():
    with pytest.raises(SpecError, match="model"):
        load_experiment({"task": {"kind": "listops", "data": DATA}, "training": EXPERIMENT["training"]})
