"""Presets and specs that come with the recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sma.errors import SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io.presets import read_shipped, shipped
from sma.spec import dump_spec, dump_yaml, load_spec

ROOT = Path(__file__).resolve().parents[3]

every_spec = pytest.mark.parametrize("name", shipped("specs"))
every_preset = pytest.mark.parametrize("name", shipped("presets"))


def test_shipped_files_are_listed_by_name():
    assert {"listops_paper", "listops_tiny", "language_paper", "language_tiny", "digits_routed_mlp_tiny"} <= set(
        shipped("presets")
    )
    assert {"seqboat_listops", "seqboat_listops_tiny", "seqboat_language", "routed_conv_digits_tiny"} <= set(
        shipped("specs")
    )
    assert shipped("presets") == sorted(path.stem for path in (ROOT / "recipes" / "presets").iterdir())
    assert shipped("specs") == sorted(path.stem for path in (ROOT / "recipes" / "specs").iterdir())


@every_spec
def test_shipped_spec_builds_and_round_trips(name, tmp_path):
    spec = load_spec(read_shipped(name, "specs"))
    assert sum(parameter.numel() for parameter in spec.build().parameters()) == spec.num_parameters()
    assert load_spec(dump_spec(spec)) == spec
    (tmp_path / "copy.yaml").write_text(dump_yaml(spec), encoding="utf-8")
    assert load_spec(tmp_path / "copy.yaml") == spec


@every_preset
def test_shipped_preset_round_trips(name, tmp_path):
    experiment = load_experiment(name)
    # The command line builds the name from --task and --preset.
    assert name.startswith(f"{experiment.task.kind}_")
    assert load_experiment(dump_spec(experiment)) == experiment
    (tmp_path / "copy.yaml").write_text(dump_yaml(experiment), encoding="utf-8")
    assert load_experiment(tmp_path / "copy.yaml") == experiment


@every_preset
def test_shipped_preset_has_only_necessary_fields(name):
    # Every field of a preset must change something: a repeated default would look like a decision.
    assert (
        {"task", "model", "training"} <= set(read_shipped(name, "presets")) <= {"task", "model", "training", "threads"}
    )


@pytest.mark.parametrize("name", ["listops_paper", "listops_tiny"])
def test_positions_of_a_preset_cover_its_longest_expression(name):
    experiment = load_experiment(name)
    longest = experiment.task.data.max_length - 1
    assert {layer.modules["attention"].position.max_positions >= longest for layer in experiment.model.layer_specs} == {
        True
    }


def test_changes_to_a_read_preset_do_not_reach_the_next_read():
    read_shipped("listops_tiny", "presets")["training"]["updates"] = 1
    assert read_shipped("listops_tiny", "presets")["training"]["updates"] == 4000


def test_file_is_read_by_its_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: mine\nwidth: 3\n", encoding="utf-8")
    assert (
        read_shipped(tmp_path / "mine.yaml", "specs")
        == read_shipped(str(tmp_path / "mine.yaml"), "specs")
        == {"kind": "mine", "width": 3}
    )


@pytest.mark.parametrize(
    ("source", "folder", "complaint"),
    [
        pytest.param(
            "listops_tin",
            "presets",
            "no file and no shipped preset 'listops_tin'; "
            "did you mean 'listops_tiny'[?] shipped presets: .*listops_paper, .*listops_tiny",
            id="near-preset",
        ),
        pytest.param(
            "nothing.yaml",
            "presets",
            "no shipped preset 'nothing.yaml'; shipped presets: .*listops_paper",
            id="far-preset",
        ),
        pytest.param(
            "seqboat_listop",
            "specs",
            "no file and no shipped spec 'seqboat_listop'; did you mean 'seqboat_listops'",
            id="spec",
        ),
        pytest.param(".", "presets", "there is no file and no shipped preset '.'", id="folder"),
        pytest.param("", "presets", "there is no file and no shipped preset ''", id="empty"),
    ],
)
def test_error_for_an_unknown_name_lists_the_known_ones(source, folder, complaint):
    with pytest.raises(SpecError, match=complaint):
        read_shipped(source, folder)


def test_file_without_a_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"list\.yaml must hold a mapping of fields, not list"):
        read_shipped(tmp_path / "list.yaml", "presets")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tiny_preset_beats_chance_after_400_updates(tmp_path):
    settings = ["training.updates=400", "training.warmup=50", "training.evaluate_every=200", "task.data.train=20000"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "sma.recipes.seqboat_lra", "--no-progress", *words]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SMA_")}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # 2000 samples: a standard deviation of 0.9 points at 20 %.
    assert summary["test_accuracy"] > summary["majority"] + 0.1
    assert summary["test_accuracy"] > 0.3
    assert max(summary["activation_rate"]) >= 0.02
