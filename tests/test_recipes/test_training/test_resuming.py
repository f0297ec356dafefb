"""A run resumes on request from an intact checkpoint of the same experiment; anything else is refused."""

import shutil
import threading

import pytest
import torch
import yaml

from sma.errors import CheckpointError
from sma.recipes.io.claims import run_lock
from sma.recipes.io.run_folder import BEST, LAST
from sma.recipes.io.signals import Preempted, end_at_once
from sma.recipes.seqboat_lra import main
from sma.recipes.training.callbacks import BestCheckpoint
from tests.test_recipes.tiny import EXPERIMENT, before_update, checkpoint, power_failure, tiny, train


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run that stopped after update 13, with a checkpoint of update 10."""
    out = tmp_path_factory.mktemp("resuming") / "run"
    with power_failure(13):
        train(tiny(), out, data)
    return out


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_folder_with_a_run_is_not_resumed_without_the_option(run, data):
    with pytest.raises(CheckpointError, match=r"run' already holds a run \(checkpoints/last\.ckpt\); resume it"):
        train(tiny(), run, data)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        pytest.param(
            {"seed": 1},
            r"experiment\.yaml' belongs to another experiment: seed is 0 there, and 1 is requested; give",
            id="seed",
        ),
        pytest.param(
            {"model__width": 16},
            r"belongs to another experiment: model\.width is 8 there, and 16 is requested",
            id="width",
        ),
    ],
)
def test_another_experiment_is_refused_before_it_trains(run, data, setting, complaint):
    before = (run / LAST).read_bytes()
    with pytest.raises(CheckpointError, match=complaint):
        train(tiny(**setting), run, data, resume=True)
    # The file matches the requested experiment, and the checkpoint does not.
    text = yaml.safe_load((run / "experiment.yaml").read_text())
    (run / "experiment.yaml").write_text(yaml.safe_dump({**text, "seed": 1}))
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt' belongs to another experiment: seed is 0 there, and 1 is requested"
    ):
        train(tiny(seed=1), run, data, resume=True)
    assert (run / LAST).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param({}, "is not one of a run: it has no global_step", id="empty"),
        pytest.param(torch.zeros(3), "is not one of a run: it has no global_step", id="tensor"),
        pytest.param([1], "is not one of a run: it has no global_step", id="list"),
        pytest.param(None, "cannot be read: ", id="bytes"),
    ],
)
@pytest.mark.parametrize("name", [LAST, BEST])
def test_file_that_is_not_a_checkpoint_is_refused(run, data, monkeypatch, name, content, complaint):
    # The best checkpoint is read at the end, and must not be replaced before.
    monkeypatch.setattr(BestCheckpoint, "on_validation_end", lambda *_: None)
    (run / name).write_bytes(b"\x00" * 5000) if content is None else torch.save(content, run / name)
    with pytest.raises(
        CheckpointError, match=rf"the checkpoint '.*{name}' {complaint}.*; replace it with an intact checkpoint"
    ):
        train(tiny(), run, data, resume=True)


def _change(path, *keys, value):
    state = torch.load(path, weights_only=True)
    place = state
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    torch.save(state, path)


@pytest.mark.parametrize(
    ("keys", "value", "complaint"),
    [
        pytest.param(("state_dict", "model.more"), torch.zeros(3), "has an unexpected 'model", id="excess"),
        pytest.param(("global_step",), 11, "have different numbers of updates", id="updates"),
        pytest.param(("loops", "fit_loop"), {}, "cannot be read: KeyError", id="loops"),
        pytest.param(("optimizer_states",), [], "cannot be read: ", id="optimizers"),
        pytest.param(("optimizer_states", 0, "state"), {}, "the states of the optimiser are missing", id="optimizer"),
        pytest.param(("lr_schedulers", 0, "last_epoch"), 3, "have different numbers of updates", id="schedule"),
        pytest.param(
            ("callbacks", "RandomStates"), {"cpu": torch.zeros(2), "cuda": []}, "cannot resume from", id="random-states"
        ),
        pytest.param(
            ("optimizer_states", 0, "state", 0, "exp_avg"),
            torch.zeros(1).expand(1 << 40),
            "does not have the shape of its",
            id="huge",
        ),
    ],
)
def test_checkpoint_with_wrong_parts_is_refused(run, data, keys, value, complaint):
    _change(run / LAST, *keys, value=value)
    with pytest.raises(CheckpointError, match=complaint):
        train(tiny(), run, data, resume=True)


DAMAGED = ["{", "[1]", "[" * 5000, "7"]


@pytest.mark.parametrize(
    ("name", "hint", "content"),
    [
        # A mapping is what older versions wrote into versions.json.
        *(("data.json", "without comparing the data", content) for content in [*DAMAGED, '{"a": 1}']),
        *(("versions.json", "without the versions of the", content) for content in DAMAGED),
    ],
)
def test_damaged_json_is_refused(run, data, name, hint, content):
    (run / name).write_text(content)
    with pytest.raises(
        CheckpointError, match=rf"{name}' (cannot be read: .*|does not hold .*); delete it to resume {hint}"
    ):
        train(tiny(), run, data, resume=True)


def test_run_that_is_being_written_is_refused(run, data):
    held, done = threading.Event(), threading.Event()

    def hold():
        with run_lock(run):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(
            CheckpointError, match=r"run' is being written by process \d+ on '.*'; wait for it or end it"
        ):
            train(tiny(), run, data, resume=True)
    finally:
        done.set()
        thread.join()


@pytest.fixture
def command(tmp_path, capsys):
    """Run the command line on a small experiment; return its exit code and its output."""
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")

    def call(*options, spec=True):
        common = ["--data", str(tmp_path / "data"), "--accelerator", "cpu", "--no-progress"]
        code = main([*(["--spec", str(tmp_path / "spec.yaml")] if spec else []), *map(str, options), *common])
        return code, capsys.readouterr()

    return call


def test_one_command_starts_resumes_and_recognises_a_finished_run(command, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_update(patch, 13, lambda _: end_at_once(15))
        assert command("--out", out, "--auto-resume")[0] == 75
    assert checkpoint(out)["global_step"] == 10
    code, printed = command("--out", out, "--auto-resume", "--seed", "1")
    assert code == 2
    assert "belongs to another experiment: seed is 0 there, and 1 is requested" in printed.err
    assert command("--out", out, "--auto-resume")[0] == 0
    assert checkpoint(out)["global_step"] == 30
    code, printed = command("--out", out, "--auto-resume")
    assert (code, printed.err) == (0, "")
    assert f"the run in {out} is finished" in printed.out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param(
            ["--auto-resume"], "--auto-resume needs --out: without it the folder has another name every time", id="out"
        ),
        pytest.param(["--auto-resume", "--resume", "x"], "leave --auto-resume out", id="resume"),
    ],
)
def test_incompatible_options_are_refused(command, options, complaint):
    code, printed = command(*options, spec="--resume" not in options)
    assert code == 2
    assert complaint in printed.err


def test_dangling_link_to_a_checkpoint_does_not_start_a_new_run(command, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_update(patch, 13, lambda _: end_at_once(15))
        command("--out", out)
    (out / LAST).unlink()
    (out / LAST).symlink_to("moved.ckpt")
    code, printed = command("--resume", out, spec=False)
    assert code == 2
    assert "last.ckpt': No such file" in printed.err


def test_folder_with_other_files_is_refused(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    code, printed = command("--out", tmp_path / "run", "--auto-resume")
    assert code == 2
    assert "run' is not empty; give another --out" in printed.err


def test_end_at_once_raises_preempted():
    with pytest.raises(Preempted, match="preempted by SIGTERM: completed work is kept"):
        end_at_once(15)
