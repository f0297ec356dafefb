"""The GPU benchmark on a CPU: all its phases at toy sizes, failures, and interrupted runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.count import Shape, count, layer_spec
from benchmarks.gpu import layers, marks, measure, operators, padded, profiled, report, runner, steps
from benchmarks.gpu.correctness import poisoned
from benchmarks.gpu.profiled import Event
from benchmarks.gpu.results import Points, Results
from sma.layer import RoutedLayer
from sma.recipes.training.graph import RECORDERS
from tests.tape import TapeRecorder

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PHASES = ["ceilings", "correctness", "profile", "plain", "kernels", "peers", "steps", "counters"]


def _python(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return Results(folder).read()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_phase_runs_on_a_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # It takes 25 s of processor time, and far longer on a busy machine.
    arguments = ["--out", str(folder), "--device", "cpu", "--deadline", "5000"]
    subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=800, check=True)
    lines = _lines(folder)
    assert [line for line in lines if line["kind"] in ("failed", "stopped")] == []
    assert [line["phase"] for line in lines if line["kind"] == "phase"] == PHASES
    assert {line["phase"] for line in lines if line["kind"] == "point"} == set(PHASES[:-1])
    for line in lines:
        if line["kind"] == "missing":
            assert line["reason"].startswith("not measured on this device")
    head = next(line for line in lines if line["kind"] == "run")
    device = next(line for line in lines if line["kind"] == "device")
    assert "--device cpu" in head["command"]
    assert device["torch"] == torch.__version__
    states = {mark.name: mark.state for mark in marks.marks(Points(lines), timed=False)}
    assert states.pop("error of the moving average, float32") == "met"
    assert states.pop("error of the attention, fp32") == "met"
    assert states.pop("NaN propagates as in plain PyTorch") == "met"
    assert states.pop("tensors that differ between two runs, without the bias table") == "met"
    assert set(states.values()) == {"not measured"}
    printed = report.report(folder)
    assert device["card"] in printed
    assert "| error of the attention, fp32 | <= 1e-05 |" in printed
    assert "steps graph: not measured on this device: CUDA graphs" in printed


@pytest.mark.slow
def test_a_terminated_run_keeps_its_points(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path), "--device", "cpu"]
    run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 200
    while not any(line["kind"] == "point" for line in _lines(tmp_path)) and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    lines = _lines(tmp_path)
    assert run.returncode == 143
    assert lines[-1]["kind"] == "stopped"
    assert lines[-1]["reason"].startswith("the run was ended by SIGTERM after ")
    assert any(line["kind"] == "point" for line in lines)
    assert "the run was ended by SIGTERM" in report.report(tmp_path)


FAILING = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from benchmarks.gpu import runner
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.processes import fork, in_parallel, wait
from benchmarks.gpu.results import Points, Results
from benchmarks.gpu.runner import Phase

def raises(bench):
    bench.attempt("good", lambda: {"number": 1})
    bench.attempt("bad", lambda: 1 / 0)
    bench.attempt("better", lambda: {"number": 2})
    raise ValueError("outside of a point")

def crashes(bench):
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs(bench):
    bench.attempt("before", lambda: {"number": 3})
    time.sleep(60)

def late(bench):
    bench.until = 0.0
    bench.attempt("late", lambda: {"number": 4})

def parallel(bench):
    functions = [partial(bench.attempt, str(number), partial(dict, number=number)) for number in range(5)]
    in_parallel(bench.results, bench.phase, bench.until, functions)

phases = (raises, crashes, late, parallel)
runner.PHASES = tuple(Phase(each.__name__, 560.0, each) for each in phases)
status = runner.measure(Path(sys.argv[1]), "cpu", 500.0, "a command")

# The deadline passes after the first point, independently of the speed of the machine.
results = Results(Path(sys.argv[1]))
bench = Bench(results, "hangs", "cpu", time.monotonic() + 100)
children = [fork(results, "hangs", time.monotonic() + 100, partial(hangs, bench))]
while "before" not in Points(results.read()).of("hangs"):
    time.sleep(0.02)
assert not wait(results, children, time.monotonic())
sys.exit(status)
"""


@pytest.mark.slow
def test_a_failed_phase_loses_only_its_remaining_points(tmp_path: Path) -> None:
    done = _python(FAILING, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = _lines(tmp_path)
    points = Points(lines)
    assert points.get("raises", "good", "number") == 1
    assert points.get("raises", "better", "number") == 2
    assert points.get("hangs", "before", "number") == 3
    assert sorted(points.of("parallel")) == ["0", "1", "2", "3", "4"]
    reasons = [(line["phase"], line.get("name"), line["reason"]) for line in lines if "reason" in line]
    assert reasons == [
        ("raises", "bad", "ZeroDivisionError: division by zero"),
        ("raises", None, "ValueError: outside of a point"),
        ("crashes", None, "the process was ended by SIGSEGV"),
        ("late", "late", "no time was left"),
        ("hangs", None, "the time of the phase was over"),
    ]
    assert "in attempt" in next(line["trace"] for line in lines if line.get("name") == "bad")


@pytest.mark.slow
def test_wrong_arguments_give_one_error_message(tmp_path: Path) -> None:
    def message(*arguments: str) -> str:
        done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr.strip()

    assert message("--report", str(tmp_path)) == (
        f"there are no results in {str(tmp_path)!r}: results.jsonl is missing or has no run; "
        f"write python -m benchmarks.gpu --out {tmp_path}"
    )
    if not torch.cuda.is_available():
        assert message("--out", str(tmp_path)) == (
            "torch finds no CUDA device here; run this on a machine with an NVIDIA GPU, or write --device cpu for a "
            "run at toy sizes"
        )
    Results(tmp_path).add("run", command="earlier")
    taken = str(tmp_path / "results.jsonl")
    assert message("--out", str(tmp_path), "--device", "cpu") == (
        f"{taken!r} has the points of another run; give --out a folder without them"
    )
    assert message("--out", str(tmp_path), "--deadline", "0") == (
        "--deadline 0 must be above 0 seconds; write --deadline 560"
    )


def test_an_unknown_phase_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^'kernls' is no phase; did you mean 'kernels'\?"):
        runner.measure(tmp_path / "run", "cpu", 10.0, "a command", names=["kernls"])
    assert not (tmp_path / "run").exists()


def test_chosen_phases_share_the_whole_time() -> None:
    chosen = [phase for phase in runner.PHASES if phase.name in ("ceilings", "kernels")]
    share = chosen[0].seconds / (chosen[0].seconds + chosen[1].seconds)
    assert runner._ends(chosen, 5.0, 320.0) == pytest.approx([5.0 + 320.0 * share, 325.0])
    assert runner._ends(runner.PHASES, 0.0, 560.0)[-1] == 560.0


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add("point", phase="a", name="one", number=1)
    with results.path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "poi')
    assert [line["name"] for line in results.read()] == ["one"]


def test_idle_share_is_the_time_without_a_running_kernel() -> None:
    events = [
        Event("one", True, 0.0, 10.0),
        Event("inside", True, 2.0, 5.0),
        Event("overlap", True, 8.0, 14.0),
        Event("two", True, 18.0, 20.0),
    ]
    assert profiled.idle_share(events) == pytest.approx(4 / 20)
    assert profiled.idle_share([]) is None


def test_a_profile_counts_synchronisations_launches_and_kernels_per_step() -> None:
    events = [
        Event("cudaLaunchKernel", False, 0.0, 1.0),
        Event("cuLaunchKernelEx", False, 1.0, 2.0),
        Event("cudaStreamSynchronize", False, 2.0, 9.0),
        Event("cudaEventSynchronize", False, 2.0, 9.0),
        Event("cudaDeviceSynchronize", False, 9.0, 10.0),
        Event("Optimizer.step", False, 0.0, 10.0),
        Event("Optimizer.step", True, 0.0, 10.0),  # the span of an annotation
        Event("kernel", True, 2.0, 6.0),
        Event("Memcpy DtoH", True, 6.0, 7.0),
    ]
    found = profiled.figures(events, steps=2, host_only=False)
    assert found["synchronisations"] == 1.0
    assert found["launches"] == 1.0
    assert found["kernels"] == 0.5
    assert found["idle"] == 0.0
    assert found["top"] == [["kernel", 0.002], ["Memcpy DtoH", 0.0005]]


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("model", ["text", "image", "pathx", "language"])
def test_the_authors_algorithm_computes_the_same_layer(model: str, rate: float, tmp_path: Path) -> None:
    bench = measure.Bench(Results(tmp_path), "test", "cpu", time.monotonic() + 60)
    layer, inputs, _ = measure.build_layer(bench, Shape(f"seqboat_{model}_tiny", 2, 150), rate)
    peer = padded.PaddedLayer(layer)
    peer.eval()
    found, wanted = (part(inputs[0]) for part in (peer, lambda x: layer(x).hidden))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    weight = torch.randn_like(wanted)
    parameters = [inputs[0], *layer.parameters()]
    pairs = zip(
        torch.autograd.grad(found, parameters, weight, materialize_grads=True),
        torch.autograd.grad(wanted, parameters, weight, materialize_grads=True),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * (1 + float(other.abs().max())))


@pytest.mark.parametrize(("variant", "modules", "rate"), [("dense", 1, 1.0), ("without", 0, 0.0), ("routed", 1, 0.5)])
def test_variants_of_a_layer_have_the_requested_rate(variant: str, modules: int, rate: float, tmp_path: Path) -> None:
    bench = measure.Bench(Results(tmp_path), "test", "cpu", time.monotonic() + 60)
    built = measure.build_layer(bench, Shape("seqboat_image_tiny", 2, 20), rate, variant)
    assert isinstance(built.layer, RoutedLayer)
    assert len(built.layer.spec.modules) == modules
    assert built.rate == pytest.approx(rate, abs=0.03)


def test_updates_by_a_graph_have_the_losses_of_eager_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", TapeRecorder)
    bench = measure.Bench(Results(tmp_path), "test", "cpu", time.monotonic() + 60)
    runs = [steps.training_of(bench, repeatable=True).step(steps.STATIC, graphed) for graphed in (False, True)]
    losses = [[float(step()) for step in runs] for _ in range(6)]
    assert [eager for eager, _ in losses] == [graphed for _, graphed in losses]
    assert losses[-1] != losses[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_pairs_in_reach_equal_a_count_by_loops(window: int, causal: bool) -> None:
    lengths = [0, 1, 3, 4, 9]
    wanted = sum(-window <= j - i <= (0 if causal else window) for n in lengths for i in range(n) for j in range(n))
    assert operators.pairs_in_reach(lengths, window, causal) == wanted


def test_a_roofline_is_the_sum_over_the_launches() -> None:
    shape = Shape("seqboat_image", 4, 1024)

    def bound(copy: float, product: float) -> float:
        ceilings = [
            {"kind": "point", "phase": "ceilings", "name": "copy", "gigabytes_per_second": copy},
            {"kind": "point", "phase": "ceilings", "name": "product tf32", "teraflops": product},
        ]
        return float(layers.roofline(shape, 0.3, "tf32", Points(ceilings))["roofline"])

    width, spec = layer_spec(shape.model)
    with torch.device("meta"):
        work = count(spec.build(width).train(), shape.batch, shape.length, 0.3).work()
    gigabytes, teraflop = (work.read + work.written) / 1e9, work.flops / 1e12
    assert bound(1.0, 1e12) == pytest.approx(1e3 * gigabytes)
    assert bound(1e12, 1.0) == pytest.approx(1e3 * teraflop)
    assert bound(1.0, 1.0) <= 1e3 * (gigabytes + teraflop)
    assert layers.roofline(shape, 0.3, "tf32", Points([])) == {}


def test_uninitialised_tensors_are_nan_inside_the_block_only() -> None:
    like = torch.ones(3)
    with poisoned():
        made = [torch.empty(3), torch.empty_like(like), like.new_empty(3)]
        assert all(bool(each.isnan().all()) for each in made)
        assert torch.empty(2, dtype=torch.int64).shape == (2,)
    made = [torch.zeros(3), like.new_zeros(3)]
    assert not any(bool(each.isnan().any()) for each in made)
    assert "_full" not in torch.empty.__qualname__


def test_records_are_json_lines(tmp_path: Path) -> None:
    Results(tmp_path).add("point", phase="a", name="b", figure=1.5)
    assert json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8")) == {
        "kind": "point",
        "phase": "a",
        "name": "b",
        "figure": 1.5,
    }
