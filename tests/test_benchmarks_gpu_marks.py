"""Limits and the report of a run on a GPU, for made-up figures."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import marks, report
from benchmarks.gpu.results import Points, Results

FIGURES: dict[tuple[str, str], dict[str, Any]] = {
    ("ceilings", "copy"): {"gigabytes_per_second": 3000.0},
    ("ceilings", "product tf32"): {"teraflops": 400.0},
    ("ceilings", "product bf16"): {"teraflops": 800.0},
    ("correctness", "ema causal whole"): {"error": 2e-6},
    ("correctness", "ema both ways whole"): {"error": 9e-6},
    ("correctness", "attention softmax causal fp32"): {"error": 2e-5},
    ("correctness", "attention softmax causal tf32"): {"error": float("nan")},
    ("correctness", "nan"): {"same_pattern": True},
    ("correctness", "two runs"): {"differ": ["routed.submodules.attention.bias_table"]},
    ("kernels", "ema text"): {"forward": 0.3, "step": 0.9, "gigabytes": 0.1},
    ("plain", "ema text"): {"step": 1.7},
    ("kernels", "ema enwik8"): {"step": 2.0},
    ("plain", "ema enwik8"): {"step": 17.0},
    ("kernels", "attention text tf32"): {"forward_teraflops": 150.0, "backward_teraflops": 90.0},
    ("kernels", "glue a"): {"gigabytes_per_second": 2400.0},
    ("kernels", "glue b"): {"gigabytes_per_second": 1800.0},
    ("kernels", "text 0.3 tf32"): {"milliseconds": 4.8, "peak_gigabytes": 2.0},
    ("kernels", "text 0.3 tf32, on the device"): {"device_milliseconds": 2.4, "roofline": 1.5},
    ("plain", "text 0.3 tf32"): {"milliseconds": 8.0, "peak_gigabytes": 4.0},
    ("kernels", "text 1.0 tf32 dense, on the device"): {"device_milliseconds": 6.4},
    ("kernels", "text 0.0 tf32 without, on the device"): {"device_milliseconds": 1.4},
    ("kernels", "text 0.3 bf16"): {"milliseconds": 4.0},
    ("kernels", "text 0.3 bf16, on the device"): {"device_milliseconds": 2.0},
    ("peers", "transformer text"): {"milliseconds": 6.0},
    ("peers", "transformer text, on the device"): {"device_milliseconds": 5.0},
    ("peers", "authors text"): {"milliseconds": 24.0},
    ("peers", "authors text, on the device"): {"device_milliseconds": 9.6},
    ("profile", "ragged"): {"synchronisations": 5.0, "layers": 4},
    ("profile", "static"): {"synchronisations": 0.0, "layers": 4},
    ("steps", "graph"): {"idle": 0.03},
    ("steps", "losses"): {"largest_difference": 0.0},
}
JUDGED = {
    "error of the moving average, float32": (9e-6, "met"),
    "error of the attention, fp32": (2e-5, "missed"),
    "error of the attention, tf32": (float("nan"), "missed"),
    "error of the attention, bf16": (None, "not measured"),
    "NaN propagates as in plain PyTorch": (1.0, "met"),
    "tensors that differ between two runs, without the bias table": (0.0, "met"),
    "moving average of Text, forward, relative to three passes": (3.0, "met"),  # 0.3 GB at 3 TB/s: 0.1 ms
    "speed of the moving average of text relative to the FFT, forward + backward": (1.7 / 0.9, "missed"),
    "speed of the moving average of enwik8 causal, relative to the scan of torch, forward + backward": (8.5, "met"),
    "attention of Text, forward, tf32, relative to a product": (37.5, "met"),
    "attention of Text, backward, tf32, relative to a product": (22.5, "missed"),
    "slowest fused function, relative to a copy": (60.0, "missed"),
    "layer of text at 0.3, tf32, relative to its roofline": (1.6, "met"),
    "speed relative to flash attention, text at 0.3, bf16, on the device": (2.5, "met"),
    "speed relative to flash attention, text at 0.3, bf16, including the host": (1.5, "missed"),
    "speed relative to flash attention, text at 0.1, bf16, on the device": (None, "not measured"),
    "speed relative to the authors' algorithm, text at 0.3, on the device": (4.0, "missed"),
    "speed relative to the authors' algorithm, text at 0.3, including the host": (5.0, "met"),
    "skip efficiency, text at 0.3": (4.0 / (0.7 * 5.0), "met"),
    "peak memory relative to plain PyTorch, text at 0.3": (0.5, "met"),
    "synchronisations with the host in a training step, per layer": (1.25, "missed"),
    "synchronisations with the host in a training step, with a capacity": (0.0, "met"),
    "idle share of a training step as a graph": (3.0, "met"),
    "losses of 30 updates, graph and eager, relative difference": (0.0, "met"),
}


def _made_up() -> list[dict[str, Any]]:
    return [{"kind": "point", "phase": phase, "name": name, **each} for (phase, name), each in FIGURES.items()]


@pytest.mark.parametrize("name", JUDGED)
def test_marks_follow_from_the_figures_of_the_same_run(name: str) -> None:
    figure, state = JUDGED[name]
    found = {mark.name: mark for mark in marks.marks(Points(_made_up()))}[name]
    assert found.state == state
    assert found.figure == (None if figure is None else pytest.approx(figure, nan_ok=True))


def test_a_mark_without_ceilings_is_not_measured() -> None:
    records = [each for each in _made_up() if each["phase"] != "ceilings"]
    found = {mark.name: mark.state for mark in marks.marks(Points(records))}
    assert found["moving average of Text, forward, relative to three passes"] == "not measured"
    assert found["attention of Text, forward, tf32, relative to a product"] == "not measured"
    assert {mark.state for mark in marks.marks(Points([]))} == {"not measured"}


def test_a_report_has_the_name_of_the_gpu_the_limits_and_the_points(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add("device", device="cuda", card="Card X", torch="2.11.0", triton="3.6.0", python="3.12.3")
    results.add("run", command="python -m benchmarks.gpu --out x", commit="0123abc", date="2026-11-27 12:00 UTC")
    for each in _made_up():
        results.add(**each)
    results.add("failed", phase="peers", name="flex attention peer", reason="RuntimeError: no", trace="...")
    lines = report.report(tmp_path).splitlines()
    assert lines[0] == "### Card X"
    assert lines[2] == (
        "`python -m benchmarks.gpu --out x`, commit 0123abc, 2026-11-27 12:00 UTC, torch 2.11.0, triton 3.6.0, "
        "python 3.12.3."
    )
    assert "| speed relative to flash attention, text at 0.3, bf16, on the device | >= 2x | 2.5 | met |" in lines
    assert "| error of the attention, tf32 | <= 0.001 | nan | missed |" in lines
    assert "| ema text | 1.7 |  |  |" in lines[lines.index("**plain**") :]
    assert lines[-1] == "- peers flex attention peer: RuntimeError: no"
