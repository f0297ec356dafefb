"""A signal of a job scheduler ends a training cleanly at any time, and the run resumes bit for bit."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from lightning import Trainer

from sma.errors import SmaError
from sma.recipes.experiment import load_experiment
from sma.recipes.io.command import exit_code
from sma.recipes.io.run_folder import LAST
from sma.recipes.io.signals import PREEMPTED, Preempted, on_preemption
from sma.recipes.training.classification import Classifier
from sma.recipes.training.language import LanguageModule
from sma.recipes.training.run import run_experiment
from sma.recipes.training.trainer import interruptible
from tests.test_recipes.test_training.test_steering import BUDGET
from tests.test_recipes.tiny import (
    MODEL,
    assert_same_run,
    before_update,
    checkpoint,
    metrics_of,
    power_failure,
    same,
    tiny,
    train,
)

pytestmark = pytest.mark.slow  # real trainings

SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "t",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def _send(number=signal.SIGUSR1):
    return lambda *_: os.kill(os.getpid(), number)


def _preempted(out, data, update, monkeypatch, spec=None, number=signal.SIGUSR1):
    """Send a signal in an update, counted from 0; return the error message."""
    with monkeypatch.context() as patch:
        before_update(patch, update, _send(number))
        with pytest.raises(Preempted, match=rf"preempted by {signal.Signals(number).name}: update .* is saved$") as end:
            train(spec or tiny(), out, data, resume=True)
    assert not (out / "summary.json").exists()
    return str(end.value)


@pytest.mark.parametrize(
    ("update", "saved", "number"),
    [
        pytest.param(0, 1, signal.SIGUSR1, id="first-update"),
        pytest.param(6, 7, signal.SIGUSR1, id="before-the-first-evaluation"),
        pytest.param(9, 10, signal.SIGTERM, id="evaluation-follows"),
        pytest.param(10, 11, signal.SIGUSR1, id="evaluation-precedes"),
        pytest.param(17, 18, signal.SIGTERM, id="between-evaluations"),
        pytest.param(29, 30, signal.SIGUSR1, id="last-update"),
    ],
)
def test_run_resumes_after_the_update_of_the_signal(finished, data, tmp_path, monkeypatch, update, saved, number):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert f"update {saved} of 30 is saved" in _preempted(tmp_path, data, update, monkeypatch, number=number)
    assert checkpoint(tmp_path)["global_step"] == saved
    assert list(tmp_path.rglob("hpc_ckpt*")) == []
    train(tiny(), tmp_path, data, resume=True)
    assert_same_run(tmp_path, finished[0])


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_interrupted_evaluation_is_repeated(finished, data, tmp_path, monkeypatch, evaluation):
    original, count = Classifier.validation_step, [0]

    def step(self, batch, batch_idx):
        count[0] += 1
        if count[0] == evaluation:
            _send()()
        original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "validation_step", step)
        with pytest.raises(Preempted, match=f"update {10 * evaluation} of 30 is saved"):
            train(tiny(), tmp_path, data)
    train(tiny(), tmp_path, data, resume=True)
    assert_same_run(tmp_path, finished[0])


def test_run_resumes_after_many_signals_and_a_crash(finished, data, tmp_path, monkeypatch):
    for update in (2, 3, 9, 10, 28):
        _preempted(tmp_path, data, update, monkeypatch)
    with power_failure(29):
        train(tiny(), tmp_path, data, resume=True)
    _preempted(tmp_path, data, 29, monkeypatch)
    train(tiny(), tmp_path, data, resume=True)
    assert_same_run(tmp_path, finished[0])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_during_the_setup_of_lightning_ends_the_training(data, tmp_path, monkeypatch, number):
    original = Trainer._run_stage

    def run_stage(self):
        _send(number)()
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_stage", run_stage)
        with pytest.raises(Preempted, match="update 1 of 6 is saved"):
            train(tiny(training__updates=6), tmp_path, data)
    assert checkpoint(tmp_path)["global_step"] == 1


@pytest.mark.parametrize("router", ["{kind: sma}", "{kind: gumbel, anneal: 20}", "{kind: bernoulli}"])
def test_stochastic_routers_and_budgets_resume(data, tmp_path, monkeypatch, router):
    more = {"training__losses__policy": 1.0} if "bernoulli" in router else {}
    spec = tiny(training__budget=BUDGET, model__layers__layer__router=router, **more)
    train(spec, tmp_path / "whole", data)
    _preempted(tmp_path / "parts", data, 13, monkeypatch, spec)
    train(spec, tmp_path / "parts", data, resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    weights = checkpoint(tmp_path / "whole")["state_dict"]
    assert int(weights["controller.updates"]) == 30
    assert any(value.any() for name, value in weights.items() if name.endswith("router.score_bias"))


def test_metrics_between_two_evaluations_count_every_update(data, tmp_path, monkeypatch):
    # Lines of metrics and evaluations do not coincide: a line covers updates before and after a checkpoint.
    spec = tiny(training__updates=120, training__evaluate_every=70)
    train(spec, tmp_path / "whole", data)
    for update in (33, 72):
        _preempted(tmp_path / "parts", data, update, monkeypatch, spec)
    train(spec, tmp_path / "parts", data, resume=True)
    whole, parts = (
        {step: line for (step, kind), line in metrics_of(tmp_path / name).items() if kind == "fit"}
        for name in ("whole", "parts")
    )
    assert {50, 100} <= {*whole}
    assert parts == whole


def test_language_model_with_carried_state_resumes(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 80)
    task = {
        "kind": "language",
        "data": {"file": str(tmp_path / "text.txt")},
        "segment": 16,
        "window": 50,
        "carry_state": True,
    }
    parts = {name: part for name, part in MODEL.items() if name not in ("head", "kind", "encoder")}
    model = {**parts, "kind": "language_model", "encoder": {"kind": "token_embedding", "vocabulary": 256}}
    causal = [f"model.layers.layer.{part}.bidirectional=false" for part in ("backbone", "modules.attention")]
    training = {"updates": 20, "batch_size": 4, "learning_rate": 0.003, "evaluate_every": 10}
    spec = load_experiment({"task": task, "model": model, "training": training}, causal)
    corpus = spec.task.prepare(tmp_path)

    def run(out, resume=False):
        run_experiment(spec, out, corpus, accelerator="cpu", progress=False, resume=resume)

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_update(patch, 13, _send(), LanguageModule)
        with pytest.raises(Preempted, match="update 14 of 20 is saved"):
            run(tmp_path / "parts")
    run(tmp_path / "parts", resume=True)
    for part in ("state_dict", "optimizer_states", "carried"):
        assert same(checkpoint(tmp_path / "parts")[part], checkpoint(tmp_path / "whole")[part]), part


def test_handlers_are_restored(data, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    _preempted(tmp_path, data, 3, monkeypatch)
    train(tiny(), tmp_path, data, resume=True)
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before


def test_existing_handler_is_kept(data, tmp_path, monkeypatch):
    got = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    try:
        with monkeypatch.context() as patch:
            before_update(patch, 3, _send())
            train(tiny(training__updates=6), tmp_path, data)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert got == [signal.SIGUSR1]


def test_thread_trains_without_handlers(data, tmp_path):
    failed = []

    def run():
        try:
            train(tiny(training__updates=6), tmp_path, data)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failed == []


def test_sys_exit_is_not_converted_to_keyboard_interrupt(data, tmp_path, monkeypatch):
    before_update(monkeypatch, 3, lambda _: sys.exit(3))
    with pytest.raises(SystemExit, match="3"):
        train(tiny(training__updates=6), tmp_path, data)


def test_exit_of_lightning_after_ctrl_c_becomes_a_keyboard_interrupt_in_a_thread():
    ended = []

    def run():
        try:
            with interruptible():
                try:
                    raise KeyboardInterrupt
                except KeyboardInterrupt:
                    sys.exit(1)
        except BaseException as error:
            ended.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == [KeyboardInterrupt]


def test_handlers_nest_and_are_released():
    got = []
    before = signal.getsignal(signal.SIGUSR1)
    with on_preemption(lambda _: got.append("outer")):
        with on_preemption(lambda _: got.append("inner")) as install:
            _send()()
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            install()
            _send()()
        _send()()
    assert got == ["inner", "inner", "outer"]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_preempted_command_has_its_own_exit_status(capsys, number):
    def work():
        _send(number)()
        time.sleep(5)
        pytest.fail("the signal was ignored")

    assert exit_code(work) == PREEMPTED == 75
    name = signal.Signals(number).name
    expected = f"preempted by {name}: completed work is kept; repeat the command\n"
    assert capsys.readouterr().err == expected


def test_preemption_is_not_caught_as_an_error():
    assert not issubclass(Preempted, Exception)
    assert not issubclass(Preempted, SmaError)


def test_no_partial_file_is_left(data, tmp_path, monkeypatch):
    _preempted(tmp_path, data, 6, monkeypatch)
    assert {path.name for path in (tmp_path / Path(LAST).parent).iterdir()} == {"last.ckpt"}
    assert not list(tmp_path.rglob(".*"))
