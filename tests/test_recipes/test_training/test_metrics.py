"""Metrics as comma-separated values: any name of a sub-module, in any locale."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = r"""
import sys
from sma.recipes.training.metrics import MetricsLogger
logger = MetricsLogger(sys.argv[1], name="metrics", flush_logs_every_n_steps=1)
logger.log_metrics({"fit_rate/layer0/\u0441\u043b\u043e\u0439": 0.5}, 0)
logger.log_metrics({"fit_rate/layer0/\u0441\u043b\u043e\u0439": 0.25, "val_rate/\u00e9": 1.0}, 1)
logger.save()
"""


@pytest.mark.slow
def test_names_are_written_in_a_locale_that_cannot_encode_them(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "metrics" / "version_0" / "metrics.csv").read_text(encoding="utf-8")
    assert [*csv.DictReader(text.splitlines())] == [
        {"fit_rate/layer0/слой": "0.5", "step": "0", "val_rate/é": ""},
        {"fit_rate/layer0/слой": "0.25", "step": "1", "val_rate/é": "1.0"},
    ]
